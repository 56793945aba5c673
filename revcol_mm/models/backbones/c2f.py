# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RevCol with columns of C2f blocks. C2f is YOLOv8's block of convolutions with BatchNorm."""
from typing import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.registry import MODELS
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from .base import Column, ColumnStack


class Bottleneck(nn.Module):
    """Two 3×3 convolutions with a shortcut."""

    def __init__(self, channels: int, **conv) -> None:
        super().__init__()
        self.conv1 = ConvModule(channels, channels, 3, padding=1, **conv)
        self.conv2 = ConvModule(channels, channels, 3, padding=1, **conv)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class C2fBlock(nn.Module):
    """C2f: 1×1 convolution, split into two halves, a chain of bottlenecks on the second half, 1×1 convolution of all parts.

    Args:
        channels (int): C of the input and the output, even.
        num_bottlenecks (int): number of bottlenecks, which have C/2 channels. Default: 1.
        **conv: ``norm_cfg`` and ``act_cfg`` of :class:`mmcv.cnn.ConvModule`.
    """

    def __init__(self, channels: int, num_bottlenecks: int = 1, **conv) -> None:
        super().__init__()
        self.split = ConvModule(channels, channels, 1, **conv)
        self.bottlenecks = nn.Sequential(*(Bottleneck(channels // 2, **conv) for _ in range(num_bottlenecks)))
        self.join = ConvModule(channels // 2 * (2 + num_bottlenecks), channels, 1, **conv)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.split(x).chunk(2, dim=1))
        for bottleneck in self.bottlenecks:
            parts.append(bottleneck(parts[-1]))
        return self.join(torch.cat(parts, dim=1))


class ConvFusion(nn.Module):
    """Sum of the downward path (2×2 convolution, stride 2) and the upward path (1×1 convolution, nearest interpolation).

    Args:
        channels (Sequence[int]): C0 … C3.
        level (int): l. At level 0 the downward path is the identity on x.
        above (Sequence[int]): the level of the column before that is read; empty in the first column and at the last level.
        **conv: ``norm_cfg`` and ``act_cfg`` of :class:`mmcv.cnn.ConvModule`.
    """

    def __init__(self, channels: Sequence[int], level: int, above: Sequence[int], **conv) -> None:
        super().__init__()
        self.down = ConvModule(channels[level - 1], channels[level], 2, stride=2, **conv) if level else nn.Identity()
        if above:
            self.up = ConvModule(channels[above[0]], channels[level], 1, **conv)

    def forward(self, below: Tensor, *p: Tensor) -> Tensor:
        x = self.down(below)
        return x + F.interpolate(self.up(*p), size=x.shape[-2:], mode='nearest') if p else x


@MODELS.register_module()
class RevColC2f(ColumnStack):
    """RevCol with columns of C2f blocks (a community variant, for YOLO-like detectors).

    The input is (N, in_channels, H, W) with H, W ≥ 32. The output is a tuple of the last column's features, contiguous, at
    strides 4, 8, 16 and 32. A level is a fusion and ``depths[l]`` C2f blocks of one bottleneck each.

    In training, BatchNorm makes F depend on the whole batch. The reversible backward pass recomputes F from the same batch, and
    does not update the running statistics again, so that each batch counts once, as without ``reversible``.

    Args:
        arch (str | dict): 'nano', or a dict with ``channels`` (4 even widths), ``depths`` (C2f blocks per level) and
            ``num_columns``. Default: 'nano', which is (32, 64, 96, 128), (2, 3, 6, 3) and 5 columns.
        in_channels (int): channels of the image. Default: 3.
        out_indices (Sequence[int]): levels to return. Default: (0, 1, 2, 3).
        norm_cfg (dict): norm of every convolution. Default: BatchNorm with YOLO's momentum 0.03 and eps 1e-3.
        act_cfg (dict): activation of every convolution. Default: SiLU.
        norm_eval (bool): whether to keep BatchNorm in eval mode, which freezes its running statistics. Default: False.
        **kwargs: ``frozen_stages``, ``reversible``, ``stored_columns``, ``drift_threshold``, ``on_drift``, ``with_cp`` and
            ``init_cfg``, as in :class:`~revcol_mm.models.RevCol`, with its defaults. With ``with_cp``,
            :mod:`torch.utils.checkpoint` updates the running statistics twice per step.

    Raises:
        TypeError, ValueError: if an argument, or the shape of the images, is of another kind. The message names it.
    """

    ARCHS = {'nano': dict(channels=(32, 64, 96, 128), depths=(2, 3, 6, 3), num_columns=5)}
    ALIASES = dict(n='nano')

    def __init__(self, arch: str | dict = 'nano', in_channels: int = 3, out_indices: Sequence[int] = (0, 1, 2, 3),
                 norm_cfg: dict = dict(type='BN', momentum=0.03, eps=0.001),
                 act_cfg: dict = dict(type='SiLU', inplace=False), norm_eval: bool = False, **kwargs) -> None:
        arch = self.read_arch(arch)
        super().__init__(arch['depths'], arch['num_columns'], out_indices, **kwargs)
        self.channels, self.in_channels, self.norm_eval = arch['channels'], in_channels, norm_eval
        self.check_even_channels('C2f splits the channels into two halves')
        conv = dict(norm_cfg=norm_cfg, act_cfg=act_cfg, inplace=False)
        self.stem = ConvModule(in_channels, self.channels[0], 4, stride=4, **conv)
        self.add_columns(lambda first: Column(
            self.depths, [(1, width, 1, 1) for width in self.channels], first=first,
            fusion=lambda level, above: ConvFusion(self.channels, level, above, **conv),
            block=lambda level, index: C2fBlock(self.channels[level], **conv)))
        self.freeze_stages()

    def train(self, mode: bool = True) -> 'RevColC2f':
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns the features of the last column.

        Args:
            x (Tensor): images, (N, in_channels, H, W), H and W ≥ 32.

        Returns:
            tuple[Tensor]: for each l in ``out_indices``, (N, C[l], H/4/2^l, W/4/2^l) rounded down, contiguous.
        """
        self.check_images(x, least=32)
        return self.run_columns(self.stem(x))
