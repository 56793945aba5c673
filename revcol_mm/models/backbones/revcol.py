# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RevCol: reversible columns of ConvNeXt blocks (ICLR 2023, https://arxiv.org/abs/2212.11696, section 2.2, appendix A)."""
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS
from torch import Tensor, nn

from ...checkpoint.kernels import pad_on_load
from ...checkpoint.loading import FOLDED
from ..layers import ConvNeXtBlock, LayerNorm2d, check_positive_int, infers_on_cpu, init_weights, linear_norm, patch_norm
from .base import Column, ColumnStack
from .deploy import InferenceColumn, check_folding


class UpPath(nn.Module):
    """Adds the features of a higher level to those of this level: Linear, LayerNorm, nearest interpolation, sum."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.channel_reschedule = linear_norm(in_channels, out_channels)

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """Returns the sum of ``base``, the features of this level so far, and the features x of the higher level."""
        x = self.channel_reschedule(x.permute(0, 2, 3, 1))  # (N, C, H, W) -> (N, H, W, C)
        (height, width), size = x.shape[1:3], base.shape[-2:]
        if infers_on_cpu(x) and size == (2 * height, 2 * width):  # each pixel is added to four, without a copy in between
            four = base.permute(0, 2, 3, 1).reshape(-1, height, 2, width, 2, x.shape[-1])
            return (four + x[:, :, None, :, None]).view(-1, *size, x.shape[-1]).permute(0, 3, 1, 2)
        return base + F.interpolate(x.permute(0, 3, 1, 2), size=size, mode='nearest')


class Fusion(nn.Module):
    """Sum of the downward path (from y[l-1]; at level 0 it is x itself) and the upward paths (figure 5c).

    Args:
        channels (Sequence[int]): C0 … C3.
        level (int): l.
        above (Sequence[int]): levels of the column before that are read: l + 1, and in RevCol-H also 3 at level 0.
    """

    def __init__(self, channels: Sequence[int], level: int, above: Sequence[int]) -> None:
        super().__init__()
        self.down = patch_norm(channels[level - 1], channels[level], 2) if level else nn.Identity()
        for name, higher in zip(('up', 'up2'), above):
            self.add_module(name, UpPath(channels[higher], channels[level]))

    def forward(self, below: Tensor, *p: Tensor) -> Tensor:
        x = self.down(below)
        for name, feature in zip(('up', 'up2'), p):
            x = self._modules[name](feature, x)
        return x


@MODELS.register_module()
class RevCol(ColumnStack):
    """Reversible Column Network: columns that all read the stem's output, joined by reversible connections.

    The input is (N, in_channels, H, W) with H, W ≥ 32. The output is a tuple of the last column's features, contiguous, at
    strides 4, 8, 16 and 32. The parameters have the names of the authors' released checkpoints, which load without conversion.

    Args:
        arch (str | dict): 'tiny', 'small', 'base', 'large', 'xlarge' or 'huge' ('t', 's', 'b', 'l', 'xl', 'h'), or a dict
            with ``channels`` (4 widths), ``depths`` (blocks per level), ``num_columns``, and optionally
            ``deep_to_shallow=True``: level 0 also reads level 3 of the column before, as in RevCol-H. Default: 'base'.
        in_channels (int): channels of the image. Default: 3.
        kernel_size (int): size of the depthwise convolutions, odd. Default: 3.
        drop_path_rate (float): stochastic depth rate. It rises linearly from 0 over the blocks of a column, and is the same in
            every column. Default: 0.
        layer_scale_init_value (float): initial value of LayerScale. Default: 1e-6.
        out_indices (Sequence[int]): levels to return. Default: (0, 1, 2, 3).
        out_norm_cfg (dict | None): a norm on each output, with parameters ``norm{level}``. The type 'LN' (or 'LN2d') is
            LayerNorm over the channels. Default: None, as in the release.
        frozen_stages (int): -1 freezes nothing, 0 the stem, k the stem and the first k *columns*, γ included: no gradients and
            eval mode. Single levels cannot be frozen, because each level feeds the next column. Default: -1.
        reversible (bool): whether to train without stored activations of the columns; the backward pass rebuilds them (see
            :mod:`revcol_mm.reversible`). Without gradients, and in eval mode, the plain path runs. Default: False.
        stored_columns (int): with ``reversible``, the number of columns whose activations are stored all the same, counted from
            the last column. Each one saves the time of rebuilding it. Their memory does not depend on the number of columns.
            With ``num_columns`` or more this is plain training. Without ``reversible`` it has no effect. Default: 0.
        drift_threshold (float | None): largest accepted drift of the rebuilt features, relative to the largest feature.
            Default: None, the value of :data:`~revcol_mm.reversible.DRIFT_THRESHOLD` for the dtype.
        on_drift (str): what to do above the threshold, 'raise' or 'warn'. Default: 'raise'.
        with_cp (bool): whether to checkpoint every column with :mod:`torch.utils.checkpoint`. It keeps the features of every
            column, so memory still grows with the columns. With ``reversible`` it checkpoints the stored columns, and needs
            at least one. Default: False.
        pad_pretrained (bool): whether to pad smaller kernels of a checkpoint to ``kernel_size`` while it is loaded, as
            ``tools/pad_kernels.py`` does (appendix D.3.1). Default: False, such a checkpoint is an error.
        init_cfg (dict | None): ``dict(type='Pretrained', checkpoint=path_or_url)`` loads released or own checkpoints, also
            of whole models; see :func:`revcol_mm.checkpoint.load_pretrained`. Default: None, truncated normal (std 0.02).

    Attributes:
        drift (float): largest relative drift of the last reversible backward pass.

    Raises:
        TypeError, ValueError: if an argument has another type or value. The message names both.
    """

    ARCHS = {  # the list at the start of section 3
        'tiny': dict(channels=(64, 128, 256, 512), depths=(2, 2, 4, 2), num_columns=4),
        'small': dict(channels=(64, 128, 256, 512), depths=(2, 2, 4, 2), num_columns=8),
        'base': dict(channels=(72, 144, 288, 576), depths=(1, 1, 3, 2), num_columns=16),
        'large': dict(channels=(128, 256, 512, 1024), depths=(1, 2, 6, 2), num_columns=8),
        'xlarge': dict(channels=(224, 448, 896, 1792), depths=(1, 2, 6, 2), num_columns=8),
        'huge': dict(channels=(360, 720, 1440, 2880), depths=(1, 2, 6, 2), num_columns=8, deep_to_shallow=True),
    }
    ALIASES = dict(t='tiny', s='small', b='base', l='large', xl='xlarge', h='huge')
    ARCH_OPTIONS = dict(deep_to_shallow=False)

    def __init__(self, arch: str | dict = 'base', in_channels: int = 3, kernel_size: int = 3, drop_path_rate: float = 0.,
                 layer_scale_init_value: float = 1e-6, out_indices: Sequence[int] = (0, 1, 2, 3),
                 out_norm_cfg: dict | None = None, frozen_stages: int = -1, reversible: bool = False,
                 drift_threshold: float | None = None, on_drift: str = 'raise', with_cp: bool = False,
                 pad_pretrained: bool = False, init_cfg: dict | None = None, stored_columns: int = 0) -> None:
        arch = self.read_arch(arch)
        super().__init__(arch['depths'], arch['num_columns'], out_indices, frozen_stages, reversible, drift_threshold, on_drift,
                         with_cp, init_cfg, stored_columns)
        check_positive_int('in_channels', in_channels)
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be an odd positive integer, but got {kernel_size!r}')
        self.channels, self.kernel_size, self.in_channels = arch['channels'], kernel_size, in_channels

        self.stem = patch_norm(in_channels, self.channels[0], 4)
        rates = self.drop_path_rates(drop_path_rate)
        self.add_columns(lambda first: self.build_column(
            first,
            block=lambda level, index: ConvNeXtBlock(self.channels[level], kernel_size, rates[index], layer_scale_init_value),
            above=[(1, 3) if arch['deep_to_shallow'] else (1, ), (2, ), (3, ), ()]))
        if out_norm_cfg is not None:
            for level in self.out_indices:
                self.add_module(f'norm{level}', _build_out_norm(out_norm_cfg, self.channels[level]))
        self.apply(init_weights)
        self.pad_pretrained = pad_pretrained
        if pad_pretrained:
            self.register_load_state_dict_pre_hook(pad_on_load)
        self.register_load_state_dict_pre_hook(check_folding)
        self.freeze_stages()

    def build_column(self, first: bool, block: Callable[[int, int], nn.Module], above: Sequence[tuple[int, ...]]) -> nn.Module:
        """Builds a column; see :class:`~.base.Column` for the arguments."""
        return Column(self.depths, [(1, width, 1, 1) for width in self.channels], first=first, block=block, above=above,
                      fusion=lambda level, above: Fusion(self.channels, level, above))

    def forward(self, x: Tensor, outputs: Sequence[tuple[int, int]] | None = None) -> tuple[Tensor, ...]:
        """Returns features of the last column, or of any column.

        Args:
            x (Tensor): images, (N, in_channels, H, W), H and W ≥ 32.
            outputs (Sequence[tuple[int, int]] | None): (column, level) of each feature to return, both counted from 0, without
                output norms. In reversible training, features of inner columns have exact gradients too, and are not stored.
                Columns after the last one in ``outputs`` do not run. Default: None, the levels ``out_indices`` of the last
                column.

        Returns:
            tuple[Tensor]: one feature for each entry, (N, C[l], H/4/2^l, W/4/2^l) rounded down, contiguous.

        Raises:
            RuntimeError: if the weights are in channels-last format.
            ValueError: if the images have another shape, or if an output does not exist.
        """
        self._check_input(x)
        if outputs is not None:
            outputs = [tuple(output) for output in outputs]
            missing = [output for output in outputs if output[0] not in range(self.num_columns) or output[1] not in range(4)]
            if missing or not outputs:
                raise ValueError(f'outputs must hold (column, level) pairs, with columns from 0 to {self.num_columns - 1} and '
                                 f'levels from 0 to 3, but got {missing}')
        features = self.run_columns(self.stem(x.contiguous(memory_format=torch.channels_last)), outputs)
        if outputs is not None:
            return features
        return tuple(self._modules[f'norm{level}'](feature).contiguous() if f'norm{level}' in self._modules else feature
                     for level, feature in zip(self.out_indices, features))

    def switch_to_deploy(self) -> None:
        """Folds the network for inference, in place. It computes the same function in fewer steps. This cannot be undone.

        In every block, LayerScale is multiplied into ``pwconv2``, and the norm's weight and bias into ``pwconv1``. The γ of the
        shortcuts become constants. DropPath and the first column's γ are removed. In float32 the outputs agree to about 1e-6 of
        the largest output. Fold in float32 and convert afterwards: in float16, a weight times a small LayerScale may become 0.

        Load the weights before folding. The state dict of a folded network has a format of its own, marked by the key
        ``deployed``: it loads only into a folded network, and an unfolded one loads only into an unfolded network; everything
        else raises a RuntimeError. A folded network is in eval mode, and ``train()`` raises a RuntimeError.

        Raises:
            ValueError: if the weights are not float32 or float64.
        """
        if FOLDED in self._buffers:
            return
        dtype = self.stem[0].weight.dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f'switch_to_deploy() needs float32 or float64 weights, but got {dtype}: fold first, then convert')
        self.eval()
        for block in [module for module in self.modules() if isinstance(module, ConvNeXtBlock)]:
            block.fold()
        for index, column in enumerate(self.columns):
            self._modules[f'subnet{index}'] = InferenceColumn(column)
        self.requires_grad_(False)
        self.register_buffer(FOLDED, torch.ones((), dtype=torch.bool, device=self.stem[0].weight.device))

    def train(self, mode: bool = True) -> 'RevCol':
        if mode and FOLDED in self._buffers:
            raise RuntimeError('a RevCol that switch_to_deploy() has folded cannot be trained, because LayerScale and the γ of '
                               'its shortcuts are not parameters any more: build a new one and load the checkpoint into it')
        return super().train(mode)

    def _check_input(self, x: Tensor) -> None:
        self.check_images(x, least=32)
        weight = getattr(self.columns[0].levels[1].fusion.down[0], 'weight', None)  # FSDP flattens or moves it
        if weight is not None and weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(
                memory_format=torch.channels_last):
            raise RuntimeError(
                'the weights of RevCol must be contiguous, but got the channels-last format, as after '
                "detector.to(memory_format=torch.channels_last). In a detector, mmcv's RoIAlign would then read channels-last "
                'features as if they were contiguous, and return wrong values. RevCol itself already computes in '
                'channels-last: undo the change with .to(memory_format=torch.contiguous_format)')


def _build_out_norm(cfg: dict, channels: int) -> nn.Module:
    if not isinstance(cfg, dict):
        raise TypeError(f"out_norm_cfg must be a dict such as dict(type='LN'), or None, but got {cfg!r}")
    cfg = dict(cfg)
    if cfg.get('type') in ('LN', 'LN2d', nn.LayerNorm):  # mmcv's LN normalises the last dimension
        cfg.pop('type')
        return LayerNorm2d(channels, **dict(dict(eps=1e-6), **cfg))
    return build_norm_layer(cfg, channels)[1]
