# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Folding a network of columns for inference: what training needs and prediction does not becomes part of other weights."""
from typing import Any, Mapping, Sequence

from torch import Tensor, nn

from ...checkpoint.loading import FOLDED
from ...reversible import ReversibleColumn, keep_invertible, run_levels


class InferenceColumn(nn.Module):
    """A :class:`ReversibleColumn` for inference only: equation 3 with γ as constants that are already kept invertible.

    Args:
        column: whose levels it takes over, and whose γ it copies. The names stay: ``level{l}`` and, as buffers, ``alpha{l}``;
            the first column's γ, which have no effect, are gone.
    """

    def __init__(self, column: ReversibleColumn) -> None:
        super().__init__()
        self.first, self.num_levels, self.above = column.first, column.num_levels, column.above
        for index, level in enumerate(column.levels):
            self.add_module(f'level{index}', level)
            if not self.first:
                self.register_buffer(f'alpha{index}', keep_invertible(column.gammas[index].detach()).clone())
        self.eval()

    @property
    def levels(self) -> list:
        return [self._modules[f'level{index}'] for index in range(self.num_levels)]

    def forward(self, x: Tensor, p: Sequence[Tensor] | None, context: Mapping[str, Any] | None = None
                ) -> tuple[Tensor, ...]:
        """Features of this column, one per level; see :meth:`ReversibleColumn.forward`."""
        gammas = [self._buffers.get(f'alpha{index}') for index in range(self.num_levels)]
        return run_levels(self, gammas, x, p, context)


def check_folding(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
    """Keeps folded and unfolded weights apart, also where a loader is not strict and would only warn.

    A hook for :meth:`torch.nn.Module.register_load_state_dict_pre_hook`.

    Raises:
        RuntimeError: for weights of the other kind.
    """
    folded = FOLDED in module._buffers
    name = type(module).__name__
    if folded and any(key.startswith(f'{prefix}subnet') and key.endswith('.gamma') for key in state_dict):
        raise RuntimeError(f'this {name} is folded (switch_to_deploy), and the weights to load are not: load them into a '
                           'newly built one, and fold it afterwards')
    if not folded and prefix + FOLDED in state_dict:
        raise RuntimeError(f'the weights to load are those of a folded {name}, and this one is not: call '
                           'switch_to_deploy() on it first. They cannot be trained: for that, load the unfolded checkpoint')
