# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Folding a network of columns for inference: what training needs and prediction does not becomes part of other weights."""
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..checkpoint.backbone import FOLDED
from .reversible import ReversibleColumn, keep_invertible, run_levels


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

    def forward(self, x: Tensor, p: Optional[Sequence[Tensor]], context: Optional[Mapping[str, Any]] = None
                ) -> Tuple[Tensor, ...]:
        """Features of this column, one per level; see :meth:`ReversibleColumn.forward`."""
        gammas = [self._buffers.get(f'alpha{index}') for index in range(self.num_levels)]
        return run_levels(self, gammas, x, p, context)


@torch.no_grad()
def fold_layer_scale(linear: nn.Linear, gamma: Tensor) -> None:
    """γ ∘ (W·h + b) = (diag(γ)·W)·h + γ ∘ b, rounded once."""
    gamma = gamma.double()
    linear.weight.copy_(gamma[:, None] * linear.weight.double())
    linear.bias.copy_(gamma * linear.bias.double())


@torch.no_grad()
def fold_affine(norm: nn.LayerNorm, linear: nn.Linear) -> None:
    """W·(w ∘ n + c) + b = (W·diag(w))·n + (W·c + b), rounded once: the norm in front of a Linear loses its weight and bias."""
    weight = linear.weight.double()
    linear.bias.copy_(linear.bias.double() + weight @ norm.bias.double())
    linear.weight.copy_(weight * norm.weight.double())
    norm.elementwise_affine, norm.weight, norm.bias = False, None, None


def check_folding(module: nn.Module, state_dict: Dict[str, Tensor], prefix: str, *args) -> None:
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
