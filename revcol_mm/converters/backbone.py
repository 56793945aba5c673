# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Finding the RevCol in a file by the names and shapes of the weights."""
import re
from dataclasses import dataclass
from typing import Collection, Mapping

import torch
from torch import Tensor

from ..checkpoint.kernels import KERNEL, kernel_size_of, kernels_of
from ..checkpoint.loading import FOLDED, find_differences
from ..checkpoint.safe import CheckpointError, first_names
from ..models import RevCol

#: A path of HRNetColumns between two columns. Its blocks have the names of RevCol's.
HRNET_PATH = re.compile(r'subnet\d+\.level\d\.fusion\.from\d\.')


@dataclass(frozen=True)
class Backbone:
    """A complete RevCol found in a state dict.

    Attributes:
        prefix (str): prefix of its names in the file: '', 'backbone.', 'module.backbone.' …
        arch (str | dict): name of the architecture, or a dict for :class:`~revcol_mm.models.RevCol` if it has no name.
        kernel_size (int): size of the depthwise convolutions.
        in_channels (int): channels of the image.
        names (frozenset[str]): names of its weights, without the prefix.
    """
    prefix: str
    arch: str | dict
    kernel_size: int
    in_channels: int
    names: frozenset


def find_backbone(weights: Mapping[str, Tensor], filename: str) -> Backbone:
    """Finds the RevCol in a state dict, and checks that it has all names and shapes of a RevCol of its size.

    Raises:
        CheckpointError: if there is no RevCol, more than one, or an incomplete or folded one.
    """
    if any(map(HRNET_PATH.search, weights)):
        raise CheckpointError(f"{filename} must hold a RevCol, but its columns are not RevCol's: they are joined by paths of "
                              'HRNetColumns. Give a checkpoint of a RevCol')
    kernels = kernels_of(weights)
    kernel_size = kernel_size_of(kernels, filename)
    prefixes = sorted({KERNEL.fullmatch(key)['prefix'] for key in kernels})
    if len(prefixes) > 1:
        raise CheckpointError(f'{filename} must hold one RevCol, but holds {len(prefixes)}, with the prefixes {prefixes}')
    prefix = prefixes[0]
    check_unfolded(weights, filename, prefix)
    own = {key[len(prefix):]: value for key, value in weights.items()
           if re.match(r'(stem|subnet\d+)\.', key[len(prefix):]) and key.startswith(prefix)}
    arch = _infer_arch(own, filename)
    in_channels = own['stem.0.weight'].shape[1] if 'stem.0.weight' in own and own['stem.0.weight'].dim() == 4 else 3
    try:
        with torch.device('meta'):
            expected = RevCol(arch, in_channels=in_channels, kernel_size=kernel_size).state_dict()
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f'{filename} holds no RevCol that can be built (its names and shapes say {arch}, kernels of '
                              f'{kernel_size}×{kernel_size}): {error}') from None
    differences = find_differences({key: value.shape for key, value in expected.items()}, own, filename)
    if differences:
        raise CheckpointError(f'{filename} holds an incomplete or inconsistent RevCol (its names and shapes say {arch}): '
                              f'{differences}')
    named = [name for name, known in RevCol.ARCHS.items() if dict(dict(deep_to_shallow=False), **known) == arch]
    return Backbone(prefix, named[0] if named else arch, kernel_size, in_channels, frozenset(own))


def check_unfolded(weights: Collection[str], filename: str, prefix: str) -> None:
    """Raises CheckpointError if the backbone under this prefix is folded, so that nothing can be trained or converted."""
    if prefix + FOLDED in weights:
        raise CheckpointError(f'{filename} holds a folded network of columns (switch_to_deploy), which is for inference only: '
                              'use the checkpoint that it was folded from')


def _infer_arch(own: Mapping[str, Tensor], filename: str) -> dict:
    columns, blocks, channels = set(), [set() for _ in range(4)], [0] * 4
    for key, value in own.items():
        column = re.match(r'subnet(\d+)\.', key)
        block = re.match(r'subnet\d+\.level([0-3])\.blocks\.(\d+)\.', key)
        columns.update(column.groups() if column else ())
        if block:
            blocks[int(block[1])].add(block[2])
            if key.endswith('.dwconv.weight'):
                channels[int(block[1])] = channels[int(block[1])] or value.shape[0]
    absent = [level for level in range(4) if not channels[level]]
    if absent:
        raise CheckpointError(f'{filename} holds only a part of a RevCol: it has no blocks of the levels {absent}')
    for what, numbers in (('columns', columns), *((f'blocks of level {level}', blocks[level]) for level in range(4))):
        if numbers != {str(number) for number in range(len(numbers))}:
            listed = first_names(sorted(numbers, key=lambda number: (len(number), number)), 20)
            raise CheckpointError(f'{filename} holds an incomplete or inconsistent RevCol: its {what} must have the numbers 0, '
                                  f'1, … without gaps, but have {listed}')
    depths = tuple(map(len, blocks))
    if len(columns) * sum(depths) > len(own):  # without this check, a small file could ask for a network of any size
        raise CheckpointError(f'{filename} holds only a part of a RevCol: it has {len(own)} weights for {len(columns)} columns '
                              f'of {depths} blocks')
    return dict(channels=tuple(channels), depths=depths, num_columns=len(columns),
                deep_to_shallow=any('.fusion.up2.' in key for key in own))
