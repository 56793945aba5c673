# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Folding a network of columns for inference: layers that only training needs are multiplied into other weights.

OpenMMLab's name for it is in ``switch_to_deploy`` and ``--deploy``; everywhere else the network is called folded.
"""
from typing import Any, Mapping, Sequence

from torch import Tensor, nn

from ...checkpoint.loading import FOLDED
from ...reversible import ReversibleColumn, keep_invertible, run_levels


class InferenceColumn(nn.Module):
    """A column for inference only: its γ are constants, already kept invertible.

    Args:
        column (nn.Module): a :class:`ReversibleColumn`, or a column whose ``gammas`` are None because it has no shortcuts. Its
            levels are taken over and its γ are copied. The names stay the same: ``level{l}``, and ``alpha{l}`` for buffers with
            γ. The first column's γ, which have no effect, are removed.
    """

    def __init__(self, column: nn.Module) -> None:
        super().__init__()
        self.first, self.num_levels, self.above = column.first, column.num_levels, column.above
        for index, level in enumerate(column.levels):
            self.add_module(f'level{index}', level)
            gamma = None if self.first else column.gammas[index]
            if gamma is not None:
                self.register_buffer(f'alpha{index}', keep_invertible(gamma.detach()).clone())
        self.eval()

    levels = ReversibleColumn.levels

    def forward(self, x: Tensor, p: Sequence[Tensor] | None, context: Mapping[str, Any] | None = None
                ) -> tuple[Tensor, ...]:
        """Returns the features of this column, one per level; see :meth:`ReversibleColumn.forward`."""
        gammas = [self._buffers.get(f'alpha{index}') for index in range(self.num_levels)]
        return run_levels(self, gammas, x, p, context)


def check_folding(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
    """Stops the loading of folded weights into an unfolded network, or the reverse, also by loaders that are not strict.

    It is a hook for :meth:`torch.nn.Module.register_load_state_dict_pre_hook`.

    Raises:
        RuntimeError: if only one of the network and the weights is folded.
    """
    folded = FOLDED in module._buffers
    name = type(module).__name__
    if folded and any(key.startswith(f'{prefix}subnet') and key.endswith('.gamma') for key in state_dict):
        raise RuntimeError(f'a {name} folded by switch_to_deploy() needs folded weights, but got unfolded ones: load them into '
                           f'a newly built {name}, and fold it afterwards')
    if not folded and prefix + FOLDED in state_dict:
        raise RuntimeError(f'an unfolded {name} needs unfolded weights, but got folded ones: for inference, call '
                           'switch_to_deploy() first; folded weights cannot be trained, so for training load the unfolded '
                           'checkpoint')
