# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RevCol: reversible columns of ConvNeXt blocks (ICLR 2023, https://arxiv.org/abs/2212.11696, sections 3 and 3.5)."""
from typing import Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .reversible import DriftMonitor, ReversibleColumn, run_columns


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W): the fused kernel, without a copy when the input is channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W), channels-last in memory


class ConvNeXtBlock(nn.Module):
    """Depthwise k×k convolution, LayerNorm, Linear C→4C, GELU, Linear 4C→C, LayerScale, DropPath, residual.

    Args:
        channels: C.
        kernel_size: k, odd.
        drop_path_rate: probability of dropping the branch.
        layer_scale_init_value: initial value of LayerScale, the parameter ``gamma``.
        expansion: hidden channels of the two Linear layers, in units of C. Default: 4.
    """

    def __init__(self, channels: int, kernel_size: int = 3, drop_path_rate: float = 0.,
                 layer_scale_init_value: float = 1e-6, expansion: int = 4) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, expansion * channels)
        self.pwconv2 = nn.Linear(expansion * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels, ), float(layer_scale_init_value)))
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.dwconv(x).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        branch = self.pwconv2(F.gelu(self.pwconv1(self.norm(branch))))
        branch = (self.gamma * branch).permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
        return x + self.drop_path(branch)


class UpPath(nn.Module):
    """A higher level's features, brought to this level: Linear, LayerNorm, nearest interpolation."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.channel_reschedule = nn.Sequential(
            nn.Linear(in_channels, out_channels), nn.LayerNorm(out_channels, eps=1e-6))

    def forward(self, x: Tensor, size: Tuple[int, int]) -> Tensor:
        x = self.channel_reschedule(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.interpolate(x, size=size, mode='nearest')


class Fusion(nn.Module):
    """Sum of the downward path (from y[l-1], or x itself at level 0) and the upward paths (figure 5c).

    Args:
        channels: C0 … C3.
        level: l.
        above: levels of the column before whose features come in: l + 1, and for RevCol-H's level 0 also 3.
    """

    def __init__(self, channels: Sequence[int], level: int, above: Sequence[int]) -> None:
        super().__init__()
        if level:
            self.down = nn.Sequential(
                nn.Conv2d(channels[level - 1], channels[level], kernel_size=2, stride=2),
                LayerNorm2d(channels[level], eps=1e-6))
        else:
            self.down = nn.Identity()
        self.num_up = len(above)
        for name, source in zip(('up', 'up2'), above):
            self.add_module(name, UpPath(channels[source], channels[level]))

    def forward(self, below: Tensor, *above: Tensor) -> Tensor:
        x = self.down(below)
        for name, source in zip(('up', 'up2'), above):
            x = x + self._modules[name](source, x.shape[-2:])
        return x


class Level(nn.Module):
    """F[l] = blocks ∘ fusion."""

    def __init__(self, fusion: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.fusion = fusion
        self.blocks = nn.Sequential(*blocks)

    def forward(self, below: Tensor, *above: Tensor) -> Tensor:
        return self.blocks(self.fusion(below, *above))


class ConvNeXtColumn(ReversibleColumn):
    """One column of :class:`RevCol`: four levels of ConvNeXt blocks."""

    def __init__(self, channels: Sequence[int], depths: Sequence[int], first: bool, deep_to_shallow: bool,
                 drop_path_rates: Sequence[float], **block) -> None:
        above = [(1, 3) if deep_to_shallow else (1, ), (2, ), (3, ), ()]
        levels, rates = [], iter(drop_path_rates)
        for index, (width, depth) in enumerate(zip(channels, depths)):
            fusion = Fusion(channels, index, () if first else above[index])
            blocks = [ConvNeXtBlock(width, drop_path_rate=next(rates), **block) for _ in range(depth)]
            levels.append(Level(fusion, blocks))
        super().__init__(levels, [(1, width, 1, 1) for width in channels], above, first)


@MODELS.register_module()
class RevCol(BaseModule):
    """Reversible Column Network: columns that all read the stem's output, joined by reversible connections.

    Input (N, in_channels, H, W) with H, W ≥ 32; output a tuple of the last column's features, contiguous, at strides 4, 8, 16
    and 32. Parameter names are those of the authors' released checkpoints, which load without conversion.

    Args:
        arch (str | dict): 'tiny', 'small', 'base', 'large', 'xlarge' or 'huge' ('t', 's', 'b', 'l', 'xl', 'h'), or a dict
            with ``channels`` (4 widths), ``depths`` (blocks per level), ``num_columns``, and optionally
            ``deep_to_shallow=True``: level 0 also receives level 3 of the column before, as in RevCol-H. Default: 'base'.
        in_channels (int): channels of the image. Default: 3.
        kernel_size (int): of the depthwise convolutions, odd. Default: 3.
        drop_path_rate (float): stochastic depth; rises linearly from 0 over the blocks of a column, and is the same in every
            column. Default: 0.
        layer_scale_init_value (float): Default: 1e-6.
        out_indices (Sequence[int]): levels to return. Default: (0, 1, 2, 3).
        out_norm_cfg (dict, optional): a norm on each output, parameters ``norm{level}``; type 'LN' (or 'LN2d') is LayerNorm over
            the channels. Default: None, as in the release.
        frozen_stages (int): -1 freezes nothing, 0 the stem, k the stem and the first k *columns* (each level feeds the next
            column, so levels cannot be frozen one by one): no gradients, γ included, and eval mode. Default: -1.
        reversible (bool): train without storing the columns' activations: the backward pass rebuilds them (see
            :mod:`revcol_mm.models.reversible`). Without gradients, and in eval mode, the plain path runs. Default: False.
        drift_threshold (float, optional): largest drift of rebuilt features, relative to the largest feature, that is accepted.
            Default: None, by dtype (:data:`~revcol_mm.models.reversible.DRIFT_THRESHOLD`).
        on_drift (str): 'raise' or 'warn' above the threshold. Default: 'raise'.
        with_cp (bool): checkpoint every column with :mod:`torch.utils.checkpoint`: keeps the features of every column, so
            memory still grows with the columns. Excludes ``reversible``, which replaces it. Default: False.
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=path_or_url)`` loads released or own checkpoints,
            whole models too; see :func:`revcol_mm.checkpoint.load_pretrained`. Default: None, truncated normal (std 0.02).

    Attributes:
        drift (float): largest relative drift of the last reversible backward pass.

    Raises:
        TypeError, ValueError: for arguments outside of the above, naming the argument and the value.
    """

    ARCHS: Dict[str, dict] = {  # table 9
        'tiny': dict(channels=(64, 128, 256, 512), depths=(2, 2, 4, 2), num_columns=4),
        'small': dict(channels=(64, 128, 256, 512), depths=(2, 2, 4, 2), num_columns=8),
        'base': dict(channels=(72, 144, 288, 576), depths=(1, 1, 3, 2), num_columns=16),
        'large': dict(channels=(128, 256, 512, 1024), depths=(1, 2, 6, 2), num_columns=8),
        'xlarge': dict(channels=(224, 448, 896, 1792), depths=(1, 2, 6, 2), num_columns=8),
        'huge': dict(channels=(360, 720, 1440, 2880), depths=(1, 2, 6, 2), num_columns=8, deep_to_shallow=True),
    }
    ALIASES = dict(t='tiny', s='small', b='base', l='large', xl='xlarge', h='huge')

    def __init__(self,
                 arch: Union[str, dict] = 'base',
                 in_channels: int = 3,
                 kernel_size: int = 3,
                 drop_path_rate: float = 0.,
                 layer_scale_init_value: float = 1e-6,
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 out_norm_cfg: Optional[dict] = None,
                 frozen_stages: int = -1,
                 reversible: bool = False,
                 drift_threshold: Optional[float] = None,
                 on_drift: str = 'raise',
                 with_cp: bool = False,
                 init_cfg: Optional[dict] = None) -> None:
        super().__init__(init_cfg)
        arch = self._read_arch(arch)
        self.channels, self.depths, self.num_columns = arch['channels'], arch['depths'], arch['num_columns']
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size={kernel_size!r}: an odd positive integer')
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate={drop_path_rate!r}: in [0, 1)')
        out_indices = tuple(out_indices)
        if not out_indices or any(index not in range(4) for index in out_indices):
            raise ValueError(f'out_indices={out_indices!r}: levels from 0 to 3')
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= self.num_columns:
            raise ValueError(f'frozen_stages={frozen_stages!r}: -1 (nothing), 0 (the stem) to {self.num_columns} (the stem and '
                             'that many columns)')
        if reversible and with_cp:
            raise ValueError('reversible=True and with_cp=True exclude each other: reversible training already rebuilds what '
                             'with_cp recomputes, and stores less')
        self.kernel_size, self.in_channels = kernel_size, in_channels
        self.out_indices, self.frozen_stages = out_indices, frozen_stages
        self.reversible, self.with_cp = reversible, with_cp
        self.monitor = DriftMonitor(drift_threshold, on_drift)

        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, self.channels[0], kernel_size=4, stride=4), LayerNorm2d(self.channels[0], eps=1e-6))
        rates = torch.linspace(0, drop_path_rate, sum(self.depths), device='cpu').tolist()
        for index in range(self.num_columns):
            self.add_module(f'subnet{index}', ConvNeXtColumn(
                self.channels, self.depths, first=index == 0, deep_to_shallow=arch['deep_to_shallow'],
                drop_path_rates=rates, kernel_size=kernel_size, layer_scale_init_value=layer_scale_init_value))
        if out_norm_cfg is not None:
            for level in out_indices:
                self.add_module(f'norm{level}', _build_out_norm(out_norm_cfg, self.channels[level]))
        self.apply(_init_weights)
        self._freeze_stages()

    @classmethod
    def _read_arch(cls, arch: Union[str, dict]) -> dict:
        if isinstance(arch, str):
            name = cls.ALIASES.get(arch.lower(), arch.lower())
            if name not in cls.ARCHS:
                raise ValueError(f'arch={arch!r}: one of {", ".join(cls.ARCHS)} ({", ".join(cls.ALIASES)}), or a dict')
            return dict(dict(deep_to_shallow=False), **cls.ARCHS[name])
        if not isinstance(arch, dict):
            raise TypeError(f'arch={arch!r}: a name or a dict, not {type(arch).__name__}')
        required, allowed = {'channels', 'depths', 'num_columns'}, {'deep_to_shallow'}
        if required - set(arch) or set(arch) - required - allowed:
            raise ValueError(f'arch={arch!r}: a dict with the keys {sorted(required)} and optionally {sorted(allowed)}')
        arch = dict(dict(deep_to_shallow=False), **arch)
        arch['channels'], arch['depths'] = tuple(arch['channels']), tuple(arch['depths'])
        for key in ('channels', 'depths'):
            if len(arch[key]) != 4 or any(not isinstance(n, int) or n < 1 for n in arch[key]):
                raise ValueError(f'arch[{key!r}]={arch[key]!r}: four positive integers')
        if not isinstance(arch['num_columns'], int) or arch['num_columns'] < 1:
            raise ValueError(f"arch['num_columns']={arch['num_columns']!r}: a positive integer")
        return arch

    @property
    def columns(self) -> List[ReversibleColumn]:
        """The columns, first to last."""
        return [self._modules[f'subnet{index}'] for index in range(self.num_columns)]

    @property
    def drift(self) -> float:
        return self.monitor.drift

    def init_weights(self) -> None:
        """Loads ``init_cfg``'s checkpoint, if there is one. The weights are initialised on construction."""
        if (self.init_cfg or {}).get('type') == 'Pretrained':
            from ..checkpoint import load_pretrained
            load_pretrained(self, **{key: value for key, value in self.init_cfg.items() if key != 'type'})
            self._is_init = True
        else:
            super().init_weights()

    def forward(self, x: Tensor, outputs: Optional[Sequence[Tuple[int, int]]] = None) -> Tuple[Tensor, ...]:
        """Features of the last column, or of any.

        Args:
            x: images, (N, in_channels, H, W), H and W ≥ 32.
            outputs: (column, level), both from 0, of each feature to return, without output norms. Inner columns' features
                have exact gradients in reversible training too, and are not stored for them. Default: None, the levels in
                ``out_indices`` of the last column.

        Returns:
            tuple[Tensor]: for each l in ``out_indices``, or each (column, l) in ``outputs``, (N, C[l], H/4/2^l, W/4/2^l)
            rounded down, contiguous.

        Raises:
            ValueError: for images of another shape, and outputs that do not exist.
        """
        self._check_input(x)
        if outputs is not None:
            outputs = [tuple(output) for output in outputs]
            missing = [output for output in outputs if output[0] not in range(self.num_columns) or output[1] not in range(4)]
            if missing:
                raise ValueError(f'outputs={missing}: (column, level) pairs, columns from 0 to {self.num_columns - 1} and '
                                 'levels from 0 to 3')
            return self._run_columns(self._run_stem(x), outputs)
        last = self.num_columns - 1
        features = self._run_columns(self._run_stem(x), [(last, level) for level in self.out_indices])
        return tuple(self._modules[f'norm{level}'](feature).contiguous() if f'norm{level}' in self._modules else feature
                     for level, feature in zip(self.out_indices, features))

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels or min(x.shape[-2:]) < 32:
            raise ValueError(f'input of shape {tuple(x.shape)}: RevCol takes (N, {self.in_channels}, H, W) with H and W of at '
                             'least 32 pixels')
        weight = self.subnet0.level1.fusion.down[0].weight
        if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
            raise RuntimeError(
                'the weights of RevCol are in channels-last format, as after detector.to(memory_format=torch.channels_last): '
                "the necks would hand channels-last features to mmcv's RoIAlign, which reads them as if they were contiguous "
                'and returns garbage. RevCol runs channels-last inside by itself; undo it with '
                '.to(memory_format=torch.contiguous_format)')

    def _run_stem(self, x: Tensor) -> Tensor:
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        device = x.device.type
        # Every column adds to the gradient of x; in half precision that sum would lose the small terms.
        return x.float() if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) else x

    def _run_columns(self, x: Tensor, outputs: Sequence[Tuple[int, int]]) -> Tuple[Tensor, ...]:
        """Features of the given (column, level) pairs, contiguous."""
        columns, frozen = self.columns, max(self.frozen_stages, 0)
        taken: Dict[Tuple[int, int], Tensor] = {}

        def take(index: int, features: Sequence[Tensor]) -> None:
            taken.update({(c, level): features[level].contiguous() for c, level in outputs if c == index})

        rebuild = self.reversible and self.training and torch.is_grad_enabled()
        p: Optional[Sequence[Tensor]] = None
        for index, column in enumerate(columns[:frozen] if rebuild else columns):
            if index < frozen:
                with torch.no_grad():
                    p = column(x, p)
            elif self.with_cp and self.training and torch.is_grad_enabled():
                p = checkpoint(column, x, p, use_reentrant=False)
            else:
                p = column(x, p)
            take(index, p)
        if rebuild and frozen < len(columns):
            wanted = [key for key in outputs if key not in taken]
            features = run_columns(columns[frozen:], x, p, [(c - frozen, level) for c, level in wanted], self.monitor)
            taken.update(zip(wanted, features))
        return tuple(taken[key] for key in outputs)

    def _freeze_stages(self) -> None:
        if self.frozen_stages >= 0:
            for module in (self.stem, *self.columns[:self.frozen_stages]):
                module.eval()
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'RevCol':
        super().train(mode)
        self._freeze_stages()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        """Where a parameter sits, for layer-wise learning-rate decay.

        Block j of a column (counted over its levels, from 0) in column i is layer i + j + 1: the number of steps to it in the
        grid of blocks and columns. A fusion counts as the first block of its level, γ as the
        first block of its column. The stem is layer 0, everything else (the output norms, and all outside of the backbone)
        one more than the last block.

        Args:
            param_name: the parameter's name in the whole model.
            prefix: what precedes the backbone's own names, e.g. 'backbone.'. Default: ''.

        Returns:
            tuple[int, int]: layer id, and number of layers; lr is scaled by decay ** (num_layers − id − 1).
        """
        num_layers = (sum(self.depths) - 1) + (self.num_columns - 1) + 3
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        name = param_name[len(prefix):].split('.')
        if name[0] == 'stem':
            return 0, num_layers
        if not name[0].startswith('subnet'):
            return num_layers - 1, num_layers
        column, block = int(name[0][len('subnet'):]), 0
        if name[1].startswith('level'):
            block = sum(self.depths[:int(name[1][len('level'):])])
            if name[2] == 'blocks':
                block += int(name[3])
        return block + column + 1, num_layers


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _build_out_norm(cfg: dict, channels: int) -> nn.Module:
    cfg = dict(cfg)
    if cfg.get('type') in ('LN', 'LN2d'):  # mmcv's LN normalises the last dimension
        cfg.pop('type')
        return LayerNorm2d(channels, **dict(dict(eps=1e-6), **cfg))
    return build_norm_layer(cfg, channels)[1]
