# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What every network of columns shares, whatever its blocks are.

A network of columns is a stem, ``num_columns`` columns that all read the stem's output, and a rule which features to return.
Its own part is two choices, both made where it builds its :class:`Column`: the *fusion* of each level (how y[l-1] and the
features of the column before become one input), and the *blocks* behind it.
"""
import collections.abc
from typing import Any, Callable, Mapping, Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...checkpoint import load_pretrained
from ...reversible import DriftMonitor, ReversibleColumn, contiguous, run_reversibly


class Level(nn.Module):
    """F[l] = blocks ∘ fusion. What the call hands to every level (``context``) goes to every block."""

    def __init__(self, fusion: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.fusion = fusion
        self.blocks = nn.Sequential(*blocks)

    def forward(self, below: Tensor, *above: Tensor, **context: Any) -> Tensor:
        x = self.fusion(below, *above)
        for block in self.blocks:
            x = block(x, **context)
        return x


class Column(ReversibleColumn):
    """A column made of fusions and blocks: the one place where either is plugged in.

    Args:
        depths: blocks per level.
        gamma_shapes: shape of each γ[l], broadcastable to level l's features.
        fusion: ``fusion(level, sources)`` builds the fusion of a level: a module called with y[l-1] (the stem's output at level
            0) and one feature of the column before for each level in ``sources``, which is empty in the first column.
        block: ``block(level, index)`` builds a block; index counts over the levels of the column, from 0.
        first: whether this is the first column.
        above: for each level, the levels of the column before that it reads. Default: the next one.
    """

    def __init__(self, depths: Sequence[int], gamma_shapes: Sequence[tuple[int, ...]],
                 fusion: Callable[[int, tuple[int, ...]], nn.Module], block: Callable[[int, int], nn.Module], first: bool,
                 above: Sequence[tuple[int, ...]] | None = None) -> None:
        if above is None:
            above = [(level + 1, ) for level in range(len(depths) - 1)] + [()]
        levels, start = [], 0
        for level, depth in enumerate(depths):
            blocks = [block(level, index) for index in range(start, start + depth)]
            levels.append(Level(fusion(level, () if first else above[level]), blocks))
            start += depth
        super().__init__(levels, gamma_shapes, above, first)


class TokenFusion(nn.Module):
    """Fusion of levels at one resolution: Linear and LayerNorm on either path, and their sum (appendix B.1).

    Args:
        channels: C, of all levels.
        level: l; at level 0 the downward path is the identity on x.
        sources: levels of the column before: none or one.
    """

    def __init__(self, channels: int, level: int, sources: Sequence[int]) -> None:
        super().__init__()
        self.down = self._path(channels) if level else nn.Identity()
        if sources:
            self.up = self._path(channels)

    @staticmethod
    def _path(channels: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels, eps=1e-6))

    def forward(self, below: Tensor, *above: Tensor) -> Tensor:
        x = self.down(below)
        return x + self.up(*above) if above else x


class ColumnStack(BaseModule):
    """Base of the networks of columns: a subclass sets ``self.stem`` and calls :meth:`add_columns`.

    Args:
        depths (Sequence[int]): blocks per level of a column.
        num_columns (int): columns.
        out_indices (Sequence[int]): levels to return.
        frozen_stages (int): -1 freezes nothing, 0 the stem, k the stem and the first k columns.
        reversible (bool): train without storing the columns' activations.
        drift_threshold (float, optional): see :class:`~revcol_mm.models.reversible.DriftMonitor`.
        on_drift (str): 'raise' or 'warn'.
        with_cp (bool): checkpoint every column instead. Excludes ``reversible``.
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=…)``, or None.

    Raises:
        TypeError, ValueError: for arguments outside of the above, naming the argument and the value.
    """

    #: Named architectures, and short names of them.
    ARCHS: dict[str, dict] = {}
    ALIASES: dict[str, str] = {}
    #: Keys of an architecture, with the number of positive integers each holds (None: a single one); and its optional keys.
    ARCH_KEYS: dict[str, int | None] = dict(channels=4, depths=4, num_columns=None)
    ARCH_OPTIONS: dict[str, Any] = {}

    def __init__(self, depths: Sequence[int], num_columns: int, out_indices: Sequence[int], frozen_stages: int = -1,
                 reversible: bool = False, drift_threshold: float | None = None, on_drift: str = 'raise',
                 with_cp: bool = False, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.depths, self.num_columns = tuple(depths), num_columns
        levels = range(len(self.depths))
        listed = isinstance(out_indices, collections.abc.Sequence)
        if not listed or not out_indices or any(index not in levels for index in out_indices):
            raise ValueError(f'out_indices={out_indices!r}: levels from 0 to {len(self.depths) - 1}')
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= num_columns:
            raise ValueError(f'frozen_stages={frozen_stages!r}: -1 (nothing), 0 (the stem) to {num_columns} (the stem and '
                             'that many columns)')
        if reversible and with_cp:
            raise ValueError('reversible=True and with_cp=True exclude each other: reversible training already rebuilds what '
                             'with_cp recomputes, and stores less')
        self.out_indices, self.frozen_stages = tuple(out_indices), frozen_stages
        self.reversible, self.with_cp = reversible, with_cp
        self.monitor = DriftMonitor(drift_threshold, on_drift)

    @classmethod
    def read_arch(cls, arch: str | dict) -> dict:
        """The architecture that a name or a dict stands for, checked, its options filled in."""
        if isinstance(arch, str):
            name = cls.ALIASES.get(arch.lower(), arch.lower())
            if name not in cls.ARCHS:
                raise ValueError(f'arch={arch!r}: one of {", ".join((*cls.ARCHS, *cls.ALIASES))}, or a dict')
            return {**cls.ARCH_OPTIONS, **cls.ARCHS[name]}
        if not isinstance(arch, dict):
            raise TypeError(f'arch={arch!r}: a name or a dict, not {type(arch).__name__}')
        if set(cls.ARCH_KEYS) - set(arch) or set(arch) - set(cls.ARCH_KEYS) - set(cls.ARCH_OPTIONS):
            options = f', and optionally {", ".join(cls.ARCH_OPTIONS)}' if cls.ARCH_OPTIONS else ''
            raise ValueError(f'arch={arch!r}: a dict with the keys {", ".join(cls.ARCH_KEYS)}{options}')
        arch = {**cls.ARCH_OPTIONS, **arch}
        for key, count in cls.ARCH_KEYS.items():
            values = tuple(arch[key]) if count is not None and isinstance(arch[key], (list, tuple)) else (arch[key], )
            if len(values) != (count or 1) or any(not isinstance(value, int) or value < 1 for value in values):
                raise ValueError(f'arch[{key!r}]={arch[key]!r}: ' + (
                    'a positive integer' if count is None else f'{count} positive integers'))
            arch[key] = arch[key] if count is None else values
        return arch

    def add_columns(self, build: Callable[[bool], ReversibleColumn]) -> None:
        """Adds ``build(first)`` for every column, as ``subnet{i}``."""
        for index in range(self.num_columns):
            self.add_module(f'subnet{index}', build(index == 0))

    def drop_path_rates(self, drop_path_rate: float) -> list[float]:
        """Rate of each block of a column: rises linearly over the column, and is the same in every column."""
        if not isinstance(drop_path_rate, (int, float)) or not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate={drop_path_rate!r}: in [0, 1)')
        return torch.linspace(0, drop_path_rate, sum(self.depths), device='cpu').tolist()

    @property
    def columns(self) -> list[ReversibleColumn]:
        """The columns, first to last."""
        return [self._modules[f'subnet{index}'] for index in range(self.num_columns)]

    @property
    def drift(self) -> float:
        """Largest relative drift of the last reversible backward pass."""
        return self.monitor.drift

    def init_weights(self) -> None:
        """Loads ``init_cfg``'s checkpoint, if there is one. The weights are initialised on construction."""
        if isinstance(self.init_cfg, dict) and self.init_cfg.get('type') == 'Pretrained':
            if not self.init_cfg.get('checkpoint'):
                raise ValueError(f"init_cfg={dict(self.init_cfg)}: type='Pretrained' needs checkpoint, a path or URL")
            load_pretrained(self, **{key: value for key, value in self.init_cfg.items() if key != 'type'})
            self._is_init = True
        else:
            super().init_weights()

    def run_columns(self, x: Tensor, outputs: Sequence[tuple[int, int]] | None = None,
                    context: Mapping[str, Any] | None = None) -> tuple[Tensor, ...]:
        """Features of the given (column, level) pairs, contiguous.

        Args:
            x: the stem's output.
            outputs: Default: the levels ``out_indices`` of the last column.
            context: keyword arguments of every level.
        """
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.float()  # every column adds to the gradient of x; in half precision that sum would lose the small terms
        if outputs is None:
            outputs = [(self.num_columns - 1, level) for level in self.out_indices]
        columns = self.columns[:1 + max(column for column, _ in outputs)]
        # Frozen columns run without a graph, unless the gradient of the image is asked for, which passes through them.
        frozen = 0 if x.requires_grad else max(self.frozen_stages, 0)
        taken: dict[tuple[int, int], Tensor] = {}
        trains = self.training and torch.is_grad_enabled()
        rebuild = self.reversible and trains
        p: Sequence[Tensor] | None = None
        for index, column in enumerate(columns[:frozen] if rebuild else columns):
            if index < frozen:
                with torch.no_grad():
                    p = column(x, p, context=context)
            elif self.with_cp and trains:
                p = checkpoint(column, x, p, context=context, use_reentrant=False)
            else:
                p = column(x, p, context=context)
            taken.update({(c, level): contiguous(p[level]) for c, level in outputs if c == index})
        if rebuild and frozen < len(columns):
            wanted = [key for key in outputs if key not in taken]
            inner = [(column - frozen, level) for column, level in wanted]
            features = run_reversibly(columns[frozen:], x, p, inner, self.monitor, context)
            taken.update(zip(wanted, features))
        return tuple(taken[key] for key in outputs)

    def freeze_stages(self) -> None:
        """Puts the frozen stages in eval mode and takes their parameters out of training."""
        if self.frozen_stages >= 0:
            for module in (self.stem, *self.columns[:self.frozen_stages]):
                module.eval()
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'ColumnStack':
        super().train(mode)
        self.freeze_stages()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Where a parameter sits, for layer-wise learning-rate decay.

        Block j of a column (counted over its levels, from 0) in column i is layer i + j + 1: the number of steps to it in the
        grid of blocks and columns. A fusion counts as the first block of its level, γ as the
        first block of its column. The stem is layer 0, everything else (output norms, and all outside of the backbone) one
        more than the last block.

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
