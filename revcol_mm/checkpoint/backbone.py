# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What a file's names and shapes say about the RevCol in it."""
import re
from dataclasses import dataclass
from typing import Mapping, Union

import torch
from torch import Tensor

from .kernels import KERNEL, kernel_size_of, kernels_of
from .safe import CheckpointError, some

#: Buffer that marks a folded network (``RevCol.switch_to_deploy``) in its state dict.
FOLDED = 'deployed'


@dataclass(frozen=True)
class Backbone:
    """A complete RevCol found in a state dict.

    Attributes:
        prefix: what precedes its names: '', 'backbone.', 'module.backbone.' …
        arch: name, or a dict for :class:`~revcol_mm.models.RevCol` where it is none of the named ones.
        kernel_size: of the depthwise convolutions.
        in_channels: of the image.
        names: its own names, without the prefix.
    """
    prefix: str
    arch: Union[str, dict]
    kernel_size: int
    in_channels: int
    names: frozenset


def find_backbone(weights: Mapping[str, Tensor], filename: str) -> Backbone:
    """Size, kernel size and place of the RevCol in a state dict, checked against the names and shapes that such a RevCol has.

    Raises:
        CheckpointError: there is none, more than one, or an incomplete one, naming what is wrong.
    """
    from ..models.revcol import RevCol
    kernels = kernels_of(weights)
    kernel_size = kernel_size_of(kernels, filename)
    prefixes = sorted({KERNEL.fullmatch(key)['prefix'] for key in kernels})
    if len(prefixes) > 1:
        raise CheckpointError(f'{filename} holds several RevCols, under {prefixes}')
    prefix = prefixes[0]
    own = {key[len(prefix):]: value for key, value in weights.items()
           if re.match(r'(stem|subnet\d+)\.', key[len(prefix):]) and key.startswith(prefix)}
    arch = _infer_arch(own, filename)
    in_channels = own['stem.0.weight'].shape[1] if 'stem.0.weight' in own and own['stem.0.weight'].dim() == 4 else 3
    with torch.device('meta'):
        expected = RevCol(arch, in_channels=in_channels, kernel_size=kernel_size).state_dict()
    complaints = {'missing': [key for key in expected if key not in own],
                  'out of place': [key for key in own if key not in expected],
                  'of another shape': [key for key in own if key in expected and own[key].shape != expected[key].shape]}
    if any(complaints.values()):
        raise CheckpointError(
            f'{filename} holds an incomplete or inconsistent RevCol (taken for {arch}): ' + '; '.join(
                f'{len(keys)} weights {word}: {some(keys)}' for word, keys in complaints.items() if keys))
    named = [name for name, known in RevCol.ARCHS.items() if dict(dict(deep_to_shallow=False), **known) == arch]
    return Backbone(prefix, named[0] if named else arch, kernel_size, in_channels, frozenset(own))


def _infer_arch(own: Mapping[str, Tensor], filename: str) -> dict:
    columns, depths, channels = 0, [0] * 4, [0] * 4
    for key, value in own.items():
        column = re.match(r'subnet(\d+)\.', key)
        block = re.match(r'subnet\d+\.level([0-3])\.blocks\.(\d+)\.', key)
        columns = max(columns, int(column[1]) + 1) if column else columns
        if block:
            depths[int(block[1])] = max(depths[int(block[1])], int(block[2]) + 1)
            if key.endswith('.dwconv.weight'):
                channels[int(block[1])] = channels[int(block[1])] or value.shape[0]
    absent = [level for level in range(4) if not channels[level]]
    if absent:
        raise CheckpointError(f'{filename} holds a part of a RevCol only: no blocks of the levels {absent}')
    return dict(channels=tuple(channels), depths=tuple(depths), num_columns=columns,
                deep_to_shallow=any('.fusion.up2.' in key for key in own))
