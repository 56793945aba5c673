# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""One reversible column in RevNet's way: ConvNeXt blocks in equation 1, the second row of table 6 of the RevCol paper."""
from typing import Sequence

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...reversible import DriftMonitor, ReversibleColumn, contiguous, run_reversibly
from ..layers import ConvNeXtBlock, init_weights, patch_norm
from .base import ColumnStack


class ConvNeXtFunction(ConvNeXtBlock):
    """F_t(x_{t-1}): a ConvNeXt block without its residual, whose place γ·x_{t-2} takes."""

    def forward(self, below: Tensor, *p: Tensor) -> Tensor:
        x, = p or (below, )  # level 0 of a unit reads x_{t-1} of the unit before, level 1 what level 0 has just computed
        return self.drop_path(self._mix(self.dwconv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def build_unit(channels: int, drop_path_rate: float) -> ReversibleColumn:
    """Two steps of equation 1, t and t + 1, as a column with two levels of one shape::

        x_t     = F_t(x_{t-1})   + γ[0]·x_{t-2}        p = (x_{t-2}, x_{t-1}),   y = (x_t, x_{t+1})
        x_{t+1} = F_{t+1}(x_t)   + γ[1]·x_{t-1}

    γ starts at 1, RevNet's own shortcut.

    Args:
        channels (int): channels of each x.
        drop_path_rate (float): probability that the output of an F is dropped.
    """
    functions = [ConvNeXtFunction(channels, drop_path_rate=drop_path_rate) for _ in range(2)]
    return ReversibleColumn(functions, [(1, channels, 1, 1)] * 2, above=[(1, ), ()], gamma_init=1.)


class RevNetLevel(nn.Module):
    """Downsampling, which has no inverse, split into two groups of channels, reversible units, and both groups together."""

    def __init__(self, fusion: nn.Module, units: Sequence[ReversibleColumn]) -> None:
        super().__init__()
        self.fusion = fusion
        self.blocks = nn.ModuleList(units)

    def forward(self, x: Tensor, monitor: DriftMonitor | None) -> Tensor:
        x = self.fusion(x)
        p = x.chunk(2, dim=1)
        if monitor is not None:  # the units read no common input
            p = run_reversibly(list(self.blocks), x.new_empty(0), p, monitor=monitor)
        else:
            for unit in self.blocks:
                p = unit(None, p)
        return torch.cat(p, dim=1)


class RevNetColumn(nn.Module):
    """The four levels, one after the other."""

    def __init__(self, levels: Sequence[RevNetLevel]) -> None:
        super().__init__()
        for index, level in enumerate(levels):
            self.add_module(f'level{index}', level)

    def forward(self, x: Tensor, monitor: DriftMonitor | None = None) -> tuple[Tensor, ...]:
        """Returns the features of all levels. With a monitor, the backward pass rebuilds what lies inside of each level."""
        features = []
        for level in self._modules.values():
            x = level(x, monitor)
            features.append(x)
        return tuple(features)


@MODELS.register_module()
class RevNetConvNeXt(ColumnStack):
    """ConvNeXt as a RevNet: a single column whose levels are reversible, each by itself (equation 1, figure 2a, section 3.5.2).

    The channels of a level form two groups, x_{t-2} and x_{t-1}. Each unit of two blocks replaces both. Between the levels a
    2×2 convolution halves the resolution, which has no inverse, so reversible training keeps the input and the output of every
    level and rebuilds what lies between.

    The input is (N, in_channels, H, W) with H, W ≥ 32. The output is a tuple of the features, contiguous, at strides 4, 8, 16
    and 32.

    Args:
        arch (str | dict): 'tiny' ('t'), or a dict with ``channels`` (4 even widths, of both groups together) and ``depths``
            (units of two blocks per level). Default: 'tiny', which has the parameters and FLOPs of table 6.
        in_channels (int): channels of the image. Default: 3.
        drop_path_rate (float): stochastic depth rate. It rises linearly from 0 over the units. Default: 0.
        out_indices (Sequence[int]): levels to return. Default: (0, 1, 2, 3).
        **kwargs: ``frozen_stages``, ``reversible``, ``stored_columns``, ``drift_threshold``, ``on_drift``, ``with_cp`` and
            ``init_cfg``, as in :class:`~revcol_mm.models.RevCol`, with its defaults, for one column.

    Attributes:
        drift (float): largest relative drift of level 0 in the last reversible backward pass, which checks every level.

    Raises:
        TypeError, ValueError: if an argument, or the shape of the images, is of another kind. The message names it.
    """

    ARCHS = {'tiny': dict(channels=(192, 384, 768, 1536), depths=(2, 1, 3, 2))}
    ALIASES = dict(t='tiny')
    ARCH_KEYS = dict(channels=4, depths=4)

    def __init__(self, arch: str | dict = 'tiny', in_channels: int = 3, drop_path_rate: float = 0.,
                 out_indices: Sequence[int] = (0, 1, 2, 3), **kwargs) -> None:
        arch = self.read_arch(arch)
        super().__init__(arch['depths'], 1, out_indices, **kwargs)
        self.channels, self.in_channels = arch['channels'], in_channels
        self.check_even_channels('each level has two groups of channels')
        self.stem = patch_norm(in_channels, self.channels[0], 4)
        rates = iter(self.drop_path_rates(drop_path_rate))
        self.add_columns(lambda first: RevNetColumn([
            RevNetLevel(patch_norm(self.channels[level - 1], width, 2) if level else nn.Identity(), [
                build_unit(width // 2, next(rates)) for _ in range(depth)])
            for level, (width, depth) in enumerate(zip(self.channels, self.depths))]))
        self.apply(init_weights)
        self.freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns the features of the levels ``out_indices``.

        Args:
            x (Tensor): images, (N, in_channels, H, W), H and W ≥ 32.

        Returns:
            tuple[Tensor]: for each l in ``out_indices``, (N, C[l], H/4/2^l, W/4/2^l) rounded down, contiguous.
        """
        self.check_images(x, least=32)
        x, column = self.stem(x.contiguous(memory_format=torch.channels_last)), self.columns[0]
        trains = self.training and torch.is_grad_enabled()
        if trains and self.reversible and not self.stored_columns:
            features = column(x, self.monitor)
        elif trains and self.with_cp:
            features = checkpoint(column, x, use_reentrant=False)
        else:
            features = column(x)
        return tuple(contiguous(features[level]) for level in self.out_indices)
