# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Columns without reversible connections, joined by HRNet's fusion: the first row of table 6 of the RevCol paper."""
from typing import Any, Callable, Mapping, Sequence

from mmengine.registry import MODELS
from torch import Tensor, nn

from ...reversible import ReversibleColumn, run_levels
from ..layers import patch_norm
from .base import Level, build_levels
from .revcol import RevCol, UpPath


class HRNetFusion(nn.Module):
    """Sum of the downward path (from y[l-1]; at level 0 it is x itself) and one path from each level of the column before.

    The path from p[j] is HRNet's, in ConvNeXt's layers. For j < l it has l − j steps of a 2×2 convolution with stride 2 and
    LayerNorm, and GELU between two steps; the last step changes the width. For j = l it is the identity, and for j > l it is an
    :class:`~.revcol.UpPath`.

    Args:
        channels (Sequence[int]): C0 … C3.
        level (int): l.
        above (Sequence[int]): levels of the column before that are read: all of them, or none in the first column.
    """

    def __init__(self, channels: Sequence[int], level: int, above: Sequence[int]) -> None:
        super().__init__()
        self.level, self.above = level, tuple(above)
        self.down = patch_norm(channels[level - 1], channels[level], 2) if level else nn.Identity()
        for j in self.above:
            if j < level:
                steps = [patch_norm(channels[j], channels[level], 2)]
                for _ in range(level - j - 1):
                    steps = [patch_norm(channels[j], channels[j], 2), nn.GELU(), *steps]
                self.add_module(f'from{j}', nn.Sequential(*steps))
            elif j > level:
                self.add_module(f'from{j}', UpPath(channels[j], channels[level]))

    def forward(self, below: Tensor, *p: Tensor) -> Tensor:
        x = self.down(below)
        for j, feature in zip(self.above, p):
            if j > self.level:
                x = self._modules[f'from{j}'](feature, x)
            else:
                x = x + (feature if j == self.level else self._modules[f'from{j}'](feature))
        return x


class FusedColumn(nn.Module):
    """A column without shortcuts, y[l] = F[l](y[l-1], p[0], …, p[L-1]). It has no inverse, because F[l] itself reads p[l].

    Args:
        levels (Sequence[Level]): the L modules F[l].
        above (Sequence[tuple[int]]): for each level, the levels of the column before that it reads.
        first (bool): whether this is the first column, which has no column before it.
    """

    def __init__(self, levels: Sequence[Level], above: Sequence[tuple[int, ...]], first: bool) -> None:
        super().__init__()
        self.num_levels, self.above, self.first = len(levels), above, first
        self.gammas = [None] * self.num_levels
        for index, level in enumerate(levels):
            self.add_module(f'level{index}', level)

    levels = ReversibleColumn.levels

    def forward(self, x: Tensor, p: Sequence[Tensor] | None, context: Mapping[str, Any] | None = None
                ) -> tuple[Tensor, ...]:
        """Returns the features of this column, one per level, from the stem's output and those of the column before."""
        return run_levels(self, self.gammas, x, p, context)


@MODELS.register_module()
class HRNetColumns(RevCol):
    """RevCol without reversible connections: columns that are joined by HRNet's fusion, and have no shortcuts (section 3.5.2).

    Every level reads all levels of the column before it. Stem, blocks, outputs and arguments are those of
    :class:`~revcol_mm.models.RevCol`, but the columns have no inverse, so ``reversible=True`` is refused, and
    ``deep_to_shallow`` of an ``arch`` changes nothing.

    The paper describes this network in one sentence, and prints 35M parameters and 4.9 GFLOPs. With the widths and depths of
    RevCol-T, this one has 34.1M and 5.0 GFLOPs.

    Raises:
        TypeError, ValueError: as RevCol; ValueError also for ``reversible=True``.
    """

    INVERTIBLE = False

    def build_column(self, first: bool, block: Callable[[int, int], nn.Module], above: Sequence[tuple[int, ...]]) -> nn.Module:
        every = [() if first else tuple(range(len(self.depths)))] * len(self.depths)
        levels = build_levels(self.depths, lambda level, above: HRNetFusion(self.channels, level, above), block, every)
        return FusedColumn(levels, every, first)
