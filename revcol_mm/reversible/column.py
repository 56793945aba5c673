# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The multi-level reversible unit (RevCol, arXiv 2212.11696, sections 2.1 and 2.2.1), and the column that is made of it.

A column turns the features p of the column before it into its own features y, level by level::

    forward:  y[l] = F[l](y[l-1], p[j] for j in above[l]) + γ[l]·p[l]        l = 0 … L-1,   y[-1] = x, the stem's output
    inverse:  p[l] = (y[l] − F[l](y[l-1], p[j] for j in above[l])) / γ[l]    l = L-1 … 0,   every j in above[l] is > l

Equation 2 is the general form, in which F[l] reads any higher levels of the column before it; level 0 of RevCol-H reads two.
Equation 3 is the form of all other levels, which read one: above[l] = (l + 1, ). The last level reads none. The functions
:func:`level_inputs`, :func:`couple` and :func:`uncouple` are these equations as code. Inference and training, with and without
stored activations, call them.
"""
from typing import Any, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .parameters import find_parameters

#: Smallest |γ| (section 2.2.2). With a smaller one the inverse of a column would amplify rounding errors without bound.
MIN_GAMMA = 1e-3


def level_inputs(level: int, above: Sequence[int], x: Tensor, y: Sequence[Tensor], p: Sequence[Tensor] | None) -> list[Tensor]:
    """Returns what F[l] reads, in the forward pass and in the inverse: y[l-1] (x at level 0), and p[j] for j in above[l].

    Args:
        level (int): l.
        above (Sequence[int]): the levels of the column before that F[l] reads.
        x (Tensor): the stem's output.
        y (Sequence[Tensor]): features of this column, at least up to level l - 1.
        p (Sequence[Tensor] | None): features of the column before; None only if ``above`` is empty.
    """
    return [y[level - 1] if level else x, *(p[j] for j in above)]


def couple(f: Tensor, gamma: Tensor, p: Tensor) -> Tensor:
    """Forward: ``y[l] = F[l](…) + γ[l]·p[l]``.

    Args:
        f (Tensor): F[l](…), of the shape of p[l].
        gamma (Tensor): γ[l] as :func:`keep_invertible` returns it, of a shape that broadcasts to p[l]; for RevCol (1, C, 1, 1).
        p (Tensor): level l of the column before. Training passes it in float64, inference in the precision of f.

    Returns:
        Tensor: y[l], of the shape of p[l] and the wider dtype of the two.
    """
    return torch.addcmul(f, gamma, p)


def uncouple(y: Tensor, f: Tensor, gamma: Tensor) -> Tensor:
    """Inverse: ``p[l] = (y[l] − F[l](…)) / γ[l]``. Shapes and γ are those of :func:`couple`: no value of γ may be 0."""
    return (y - f).div_(gamma)


def keep_invertible(gamma: Tensor) -> Tensor:
    """Returns γ with |γ| raised to at least :data:`MIN_GAMMA`, its sign kept; a γ of exactly 0 becomes +MIN_GAMMA.

    The parameter itself is never changed, so that training, evaluation, EMA copies and sharded parameters all see the same
    value. The gradient passes straight through, so that a γ below the bound can grow again.
    """
    value = gamma.detach()
    bound = torch.where(value < 0, -MIN_GAMMA, MIN_GAMMA).to(value.dtype)
    value = torch.where(value.abs() < MIN_GAMMA, bound, value)
    return value + (gamma - gamma.detach()) if torch.is_grad_enabled() and gamma.requires_grad else value


def run_levels(column: nn.Module, gammas: Iterable[Tensor | None], x: Tensor, p: Sequence[Tensor] | None,
               context: Mapping[str, Any] | None = None) -> tuple[Tensor, ...]:
    """The forward equation in one precision, for plain autograd and for inference: y[0 … L-1] from x, p and γ.

    Args:
        column (nn.Module): has ``levels``, the modules F[l], and ``above``.
        gammas (Iterable[Tensor | None]): γ[l] of every level as :func:`keep_invertible` returns it. None stands for a level
            without a shortcut: ``y[l] = F[l](…)``.
        x (Tensor): the stem's output.
        p (Sequence[Tensor] | None): features of the column before; None for the first column.
        context (Mapping[str, Any] | None): keyword arguments that every level gets. Default: None, none.

    Returns:
        tuple[Tensor, ...]: the column's features, y[0] first.
    """
    y: list[Tensor] = []
    for index, (level, gamma) in enumerate(zip(column.levels, gammas)):
        f = level(*level_inputs(index, column.above[index], x, y, p), **(context or {}))
        y.append(f if gamma is None else couple(f, gamma, p[index]))
    return tuple(y)


class ReversibleColumn(nn.Module):
    """A column: L levels F[l], the γ[l] of their shortcuts, and which levels of the column before each F[l] reads.

    Any module can be a level: ``F[l](below, *p, **context)`` gets y[l-1] (the stem's output for l = 0), p[j] for each j in
    ``above[l]``, and what every level gets (an attention mask, for example), and returns a tensor of the shape of p[l].
    Submodules and parameters have the names of the released checkpoints: ``level{l}``, and ``alpha{l}`` for γ[l].

    Args:
        levels (Sequence[nn.Module]): the L modules F[l].
        gamma_shapes (Sequence[Sequence[int]]): shape of each γ[l], broadcastable to the features of level l.
        above (Sequence[Sequence[int]]): for each level, the levels of the column before that it reads; each must be > l. It is
            ignored in the first column.
        first (bool): whether this is the first column, which has no column before it: no upward path and no shortcut. Its γ
            are in the released files and have no effect; they are parameters without gradient. Default: False.
        gamma_init (float): initial value of γ. Default: 0.5.

    Raises:
        ValueError: if a level reads a level that is not higher than itself.
    """

    def __init__(self, levels: Sequence[nn.Module], gamma_shapes: Sequence[Sequence[int]],
                 above: Sequence[Sequence[int]], first: bool = False, gamma_init: float = 0.5) -> None:
        super().__init__()
        for level, higher in enumerate(above):
            if any(j <= level for j in higher):
                raise ValueError(f'above[{level}] must hold levels higher than {level} only, or the column cannot be inverted, '
                                 f'but got {higher}')
        self.first = first
        self.num_levels = len(levels)
        self.gamma_shapes = tuple(map(tuple, gamma_shapes))
        self.above = tuple(() if first else tuple(higher) for higher in above)
        for index, shape in enumerate(gamma_shapes):
            gamma = torch.full(shape, float(gamma_init))
            self.register_parameter(f'alpha{index}', nn.Parameter(gamma, requires_grad=not first))
        for index, level in enumerate(levels):
            self.add_module(f'level{index}', level)
        self._level_names = [tuple(name for name, _ in level.named_parameters()) for level in levels]

    @property
    def levels(self) -> list[nn.Module]:
        return [self._modules[f'level{index}'] for index in range(self.num_levels)]

    @property
    def gammas(self) -> list[Tensor]:
        return [getattr(self, f'alpha{index}') for index in range(self.num_levels)]

    def forward(self, x: Tensor, p: Sequence[Tensor] | None, call: Any = None,
                context: Mapping[str, Any] | None = None) -> tuple[Tensor, ...]:
        """Returns the features of this column, one per level.

        Args:
            x (Tensor): the stem's output.
            p (Sequence[Tensor] | None): features of the column before; None in the first column.
            call (ReversibleCall | None): the reversible pass that this call belongs to. It holds the context of all its
                columns, so ``context`` is not used then (see :func:`~revcol_mm.reversible.run_reversibly`). Default: None,
                plain autograd.
            context (Mapping | None): keyword arguments of every level, with plain autograd. Default: None.
        """
        if call is not None:
            return call.run_column(self, x, p)
        gammas = [None] * self.num_levels if self.first else map(keep_invertible, self.gammas)
        return run_levels(self, gammas, x, p, context)

    def level_parameters(self, index: int) -> dict[str, Tensor]:
        """Returns name and tensor of every parameter that F[index] uses; see :func:`~.parameters.find_parameters`."""
        return find_parameters(self._modules[f'level{index}'], self._level_names[index], f'level{index}')
