# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What every network of columns shares, whatever its blocks are.

A network of columns has a stem, ``num_columns`` columns that all read the stem's output, and a list of features to return.
A subclass makes two choices where it builds its :class:`Column`: the *fusion* of each level, which makes one input of y[l-1]
and the features of the column before, and the *blocks* after the fusion.
"""
import collections.abc
from typing import Any, Callable, Mapping, Sequence

import torch
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...checkpoint import load_pretrained
from ...reversible import DriftMonitor, ReversibleColumn, contiguous, run_reversibly
from ..layers import linear_norm


class Level(nn.Module):
    """F[l] = blocks ∘ fusion. Every block gets the keyword arguments ``context``."""

    def __init__(self, fusion: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.fusion = fusion
        self.blocks = nn.Sequential(*blocks)

    def forward(self, below: Tensor, *p: Tensor, **context: Any) -> Tensor:
        x = self.fusion(below, *p)
        for block in self.blocks:
            x = block(x, **context)
        return x


def build_levels(depths: Sequence[int], fusion: Callable[[int, tuple[int, ...]], nn.Module],
                 block: Callable[[int, int], nn.Module], above: Sequence[tuple[int, ...]]) -> list[Level]:
    """Builds the levels of a column; see :class:`Column` for the arguments."""
    levels, start = [], 0
    for level, depth in enumerate(depths):
        levels.append(Level(fusion(level, above[level]), [block(level, index) for index in range(start, start + depth)]))
        start += depth
    return levels


class Column(ReversibleColumn):
    """A column that is made of fusions and blocks. To use other fusions or blocks, pass other functions here.

    Args:
        depths (Sequence[int]): number of blocks of each level.
        gamma_shapes (Sequence[tuple[int]]): shape of each γ[l], broadcastable to the features of level l.
        fusion (Callable): ``fusion(level, above)`` builds the fusion of a level. This module is called with y[l-1] (the
            stem's output at level 0) and with p[j] of the column before for each level j in ``above``, which is empty in the
            first column.
        block (Callable): ``block(level, index)`` builds a block; ``index`` counts all blocks of the column, from 0.
        first (bool): whether this is the first column.
        above (Sequence[tuple[int]] | None): for each level, the levels of the column before that it reads. Default: None, the
            next higher level.
    """

    def __init__(self, depths: Sequence[int], gamma_shapes: Sequence[tuple[int, ...]],
                 fusion: Callable[[int, tuple[int, ...]], nn.Module], block: Callable[[int, int], nn.Module], first: bool,
                 above: Sequence[tuple[int, ...]] | None = None) -> None:
        if above is None:
            above = [(level + 1, ) for level in range(len(depths) - 1)] + [()]
        levels = build_levels(depths, fusion, block, [()] * len(depths) if first else above)
        super().__init__(levels, gamma_shapes, above, first)


class TokenFusion(nn.Module):
    """Fusion of levels that have one resolution: the sum of two paths, each with a Linear and a LayerNorm (appendix B.1).

    Args:
        channels (int): C of all levels.
        level (int): l. At level 0 the downward path is the identity on x.
        above (Sequence[int]): the level of the column before that is read; empty in the first column and at the last level.
    """

    def __init__(self, channels: int, level: int, above: Sequence[int]) -> None:
        super().__init__()
        self.down = linear_norm(channels, channels) if level else nn.Identity()
        if above:
            self.up = linear_norm(channels, channels)

    def forward(self, below: Tensor, *p: Tensor) -> Tensor:
        x = self.down(below)
        return x + self.up(*p) if p else x


class ColumnStack(BaseModule):
    """Base of the networks of columns. A subclass sets ``self.stem`` and calls :meth:`add_columns`.

    Args:
        depths (Sequence[int]): number of blocks of each level of a column.
        num_columns (int): number of columns.
        out_indices (Sequence[int]): levels to return.
        frozen_stages (int): -1 freezes nothing, 0 the stem, k the stem and the first k columns. Default: -1.
        reversible (bool): whether to train without stored activations of the columns. Default: False.
        stored_columns (int): with ``reversible``, number of columns, counted from the last one, whose activations are stored.
            With the number of columns or more this is plain training. Default: 0.
        drift_threshold (float | None): see :class:`~revcol_mm.reversible.DriftMonitor`. Default: None.
        on_drift (str): 'raise' or 'warn'. Default: 'raise'.
        with_cp (bool): whether to checkpoint every column; with ``reversible``, every stored column. Default: False.
        init_cfg (dict | None): for example ``dict(type='Pretrained', checkpoint=…)``. Default: None.

    Raises:
        TypeError, ValueError: if an argument has another type or value. The message names both.
    """

    #: Named architectures, and their short names.
    ARCHS: dict[str, dict] = {}
    ALIASES: dict[str, str] = {}
    #: Keys of an architecture, each with the length of its sequence of positive integers (None: a single integer); options.
    ARCH_KEYS: dict[str, int | None] = dict(channels=4, depths=4, num_columns=None)
    ARCH_OPTIONS: dict[str, Any] = {}
    #: Whether the columns have an inverse, without which they cannot be trained reversibly.
    INVERTIBLE = True

    def __init__(self, depths: Sequence[int], num_columns: int, out_indices: Sequence[int], frozen_stages: int = -1,
                 reversible: bool = False, drift_threshold: float | None = None, on_drift: str = 'raise',
                 with_cp: bool = False, init_cfg: dict | None = None, stored_columns: int = 0) -> None:
        super().__init__(init_cfg)
        self.depths, self.num_columns = tuple(depths), num_columns
        levels = range(len(self.depths))
        listed = isinstance(out_indices, collections.abc.Sequence)
        if not listed or not out_indices or any(index not in levels for index in out_indices):
            raise ValueError(f'out_indices must be a sequence of levels from 0 to {levels[-1]}, but got {out_indices!r}')
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= num_columns:
            raise ValueError('frozen_stages must be -1 (nothing is frozen), 0 (the stem) or a number of columns up to '
                             f'{num_columns} (the stem and these columns), but got {frozen_stages!r}')
        if not isinstance(stored_columns, int) or isinstance(stored_columns, bool) or stored_columns < 0:
            raise ValueError(f'stored_columns must be a number of columns, 0 or more, but got {stored_columns!r}')
        if reversible and not self.INVERTIBLE:
            raise ValueError(f'reversible must be False for {type(self).__name__}, because its columns have no inverse, but '
                             f'got {reversible!r}: with_cp=True stores less than plain training')
        if reversible and with_cp and not stored_columns:
            raise ValueError('only one of reversible and with_cp can be True, unless stored_columns is at least 1: reversible '
                             'training already rebuilds what with_cp recomputes, and it stores less')
        self.out_indices, self.frozen_stages = tuple(out_indices), frozen_stages
        self.reversible, self.stored_columns, self.with_cp = reversible, stored_columns, with_cp
        self.monitor = DriftMonitor(drift_threshold, on_drift)

    @classmethod
    def read_arch(cls, arch: str | dict) -> dict:
        """Checks an architecture, given by name or as a dict, and returns it as a dict with all options.

        Raises:
            ValueError: for an unknown name, and if keys are missing, unknown or hold no positive integers.
            TypeError: if it is neither a name nor a dict.
        """
        if isinstance(arch, str):
            name = cls.ALIASES.get(arch.lower(), arch.lower())
            if name not in cls.ARCHS:
                raise ValueError(f'arch must be one of {", ".join((*cls.ARCHS, *cls.ALIASES))}, or a dict, but got {arch!r}')
            return {**cls.ARCH_OPTIONS, **cls.ARCHS[name]}
        if not isinstance(arch, dict):
            raise TypeError(f'arch must be a name or a dict, but got {arch!r} of type {type(arch).__name__}')
        if set(cls.ARCH_KEYS) - set(arch) or set(arch) - set(cls.ARCH_KEYS) - set(cls.ARCH_OPTIONS):
            options = f', and optionally {", ".join(cls.ARCH_OPTIONS)}' if cls.ARCH_OPTIONS else ''
            raise ValueError(f'arch must be a dict with the keys {", ".join(cls.ARCH_KEYS)}{options}, but got {arch!r}')
        arch = {**cls.ARCH_OPTIONS, **arch}
        for key, count in cls.ARCH_KEYS.items():
            values = tuple(arch[key]) if count is not None and isinstance(arch[key], (list, tuple)) else (arch[key], )
            if len(values) != (count or 1) or any(not isinstance(value, int) or value < 1 for value in values):
                kind = 'a positive integer' if count is None else f'{count} positive integers'
                raise ValueError(f'arch[{key!r}] must be {kind}, but got {arch[key]!r}')
            arch[key] = arch[key] if count is None else values
        return arch

    def add_columns(self, build: Callable[[bool], nn.Module]) -> None:
        """Adds ``build(first)`` for every column, as ``subnet{i}``."""
        for index in range(self.num_columns):
            self.add_module(f'subnet{index}', build(index == 0))

    def check_even_channels(self, reason: str) -> None:
        """Raises ValueError unless all widths of the architecture are even, which they must be for this reason."""
        if any(width % 2 for width in self.channels):
            raise ValueError(f"arch['channels'] must be even numbers, because {reason}, but got {self.channels!r}")

    def check_images(self, x: Tensor, least: int) -> None:
        """Raises ValueError unless x has the shape (N, in_channels, H, W), with H and W of at least ``least`` pixels."""
        if x.dim() != 4 or x.shape[1] != self.in_channels or min(x.shape[-2:]) < least:
            raise ValueError(f'the input of {type(self).__name__} must have the shape (N, {self.in_channels}, H, W), with H '
                             f'and W of at least {least} pixels, but got {tuple(x.shape)}')

    def drop_path_rates(self, drop_path_rate: float) -> list[float]:
        """DropPath rate of each block of a column. It rises linearly over the column, and is the same in every column.

        Raises:
            ValueError: if the last block's rate, ``drop_path_rate``, is no number in [0, 1).
        """
        if not isinstance(drop_path_rate, (int, float)) or not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be a number in [0, 1), but got {drop_path_rate!r}')
        return torch.linspace(0, drop_path_rate, sum(self.depths), device='cpu').tolist()

    @property
    def columns(self) -> list[nn.Module]:
        """The columns, from the first to the last."""
        return [self._modules[f'subnet{index}'] for index in range(self.num_columns)]

    @property
    def drift(self) -> float:
        """Largest relative drift of the last reversible backward pass."""
        return self.monitor.drift

    def init_weights(self) -> None:
        """Loads the checkpoint of ``init_cfg``, if there is one. The constructor has initialised the weights before.

        Raises:
            ValueError: if ``init_cfg`` is of type 'Pretrained' and names no checkpoint.
        """
        if isinstance(self.init_cfg, dict) and self.init_cfg.get('type') in ('Pretrained', PretrainedInit):
            if not self.init_cfg.get('checkpoint'):
                raise ValueError("init_cfg of type 'Pretrained' must have a checkpoint, which is a path or URL, but got "
                                 f'{dict(self.init_cfg)}')
            load_pretrained(self, **{key: value for key, value in self.init_cfg.items() if key != 'type'})
            self._is_init = True
        else:
            super().init_weights()

    def run_columns(self, x: Tensor, outputs: Sequence[tuple[int, int]] | None = None,
                    context: Mapping[str, Any] | None = None) -> tuple[Tensor, ...]:
        """Returns the features of the given (column, level) pairs, contiguous.

        Args:
            x (Tensor): the stem's output.
            outputs (Sequence[tuple[int, int]] | None): the pairs. Default: None, the levels ``out_indices`` of the last column.
            context (Mapping | None): keyword arguments of every level. Default: None.
        """
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.float()  # every column adds to the gradient of x, and in half precision this sum would lose small terms
        if outputs is None:
            outputs = [(self.num_columns - 1, level) for level in self.out_indices]
        columns = self.columns[:1 + max(column for column, _ in outputs)]
        # Frozen columns run without a graph, unless x needs a gradient, which passes through them.
        frozen = 0 if x.requires_grad else min(max(self.frozen_stages, 0), len(columns))
        trains = self.training and torch.is_grad_enabled()
        join = frozen  # columns frozen … join-1 are rebuilt in the backward pass
        if self.reversible and trains:
            join = max(frozen, min(self.num_columns - self.stored_columns, len(columns)))
        taken: dict[tuple[int, int], Tensor] = {}
        p: Sequence[Tensor] | None = None

        def take(index: int) -> None:
            taken.update({(c, level): contiguous(p[level]) for c, level in outputs if c == index})

        for index in range(frozen):
            with torch.no_grad():
                p = columns[index](x, p, context=context)
            take(index)
        if frozen < join:
            keys = [(index, level) for index, level in outputs if frozen <= index < join]
            if join < len(columns):  # what the first stored column reads
                keys = keys + [(join - 1, level) for level in range(len(self.depths))]
            features = run_reversibly(columns[frozen:join], x, p, [(index - frozen, level) for index, level in keys],
                                      self.monitor, context)
            p = features[-len(self.depths):]
            taken.update((key, contiguous(feature)) for key, feature in zip(keys, features) if key in outputs)
        for index in range(join, len(columns)):
            if self.with_cp and trains:
                p = checkpoint(columns[index], x, p, context=context, use_reentrant=False)
            else:
                p = columns[index](x, p, context=context)
            take(index)
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
        """Returns the layer of a parameter, for layer-wise learning-rate decay.

        Block j of column i is layer i + j + 1, the number of steps to it in the grid of blocks and columns; j counts all blocks
        of the column, from 0. A fusion has the layer of the first block of its level, and γ that of the first block of its
        column. The stem is layer 0. All other parameters (output norms, and what is outside of the backbone) are one layer
        above the last block.

        Args:
            param_name (str): the parameter's name in the whole model.
            prefix (str): prefix of the backbone's names in the model, for example 'backbone.'. Default: ''.

        Returns:
            tuple[int, int]: layer id, and number of layers. The lr is multiplied by decay ** (num_layers − id − 1).
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
