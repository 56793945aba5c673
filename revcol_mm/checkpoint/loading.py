# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Loading the weights of a backbone from any kind of checkpoint that holds them."""
import re
from collections import Counter
from typing import Any, Iterable, Mapping

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .kernels import compare_kernels, pad_on_load
from .safe import CheckpointError, first_names, read_checkpoint

#: Buffer that marks a folded network (``RevCol.switch_to_deploy``) in its state dict.
FOLDED = 'deployed'
# Keys of the weights in a file: the first is that of mmengine and mmcv, the second that of the authors' classification code.
WRAPPINGS = ('state_dict', 'model')
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
WEIGHT = re.compile(r'(^|\.)(stem|subnet\d+)\.|(^|\.)(weight|bias)$')
COUNTERS = ('num_batches_tracked', FOLDED)  # integers among the weights of every network


def find_state_dict(checkpoint: Any, filename: str) -> tuple[dict[str, Tensor], str | None]:
    """Returns the weights in a checkpoint, and their key in it (None for a bare state dict).

    Raises:
        CheckpointError: if there are no weights, or if the name of a weight is not a string.
    """
    if isinstance(checkpoint, Mapping):
        for wrapping in (*WRAPPINGS, None):
            inside = checkpoint if wrapping is None else checkpoint.get(wrapping)
            entries = inside.items() if isinstance(inside, Mapping) else ()
            weights = {key: value for key, value in entries if isinstance(value, Tensor)}
            nameless = [key for key in weights if not isinstance(key, str)]
            if nameless:
                raise CheckpointError(f'{filename}: the names of weights must be strings, but got '
                                      f'{first_names(map(repr, nameless))}')
            if weights:
                return weights, wrapping
    found = f'the keys {first_names(checkpoint)}' if isinstance(checkpoint, Mapping) else f'a {type(checkpoint).__name__}'
    raise CheckpointError(f"{filename} holds no weights: it must be a state dict, {{'state_dict': …}} or {{'model': …}}, but "
                          f'holds {found}')


def find_meta(checkpoint: Any, filename: str) -> Mapping[str, Any]:
    """Returns the 'meta' of a checkpoint, or {} if there is none.

    Raises:
        CheckpointError: if 'meta' is not a dict.
    """
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    if not isinstance(meta, (Mapping, type(None))):
        raise CheckpointError(f"{filename}: its 'meta' must be a dict, but is of type {type(meta).__name__}: delete this entry")
    return meta or {}


def strip_module(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes the ``module.`` that (Distributed)DataParallel puts before every name."""
    weights = dict(weights)
    while weights and all(key.startswith('module.') for key in weights):
        weights = {key[len('module.'):]: value for key, value in weights.items()}
    return weights


def find_prefix(weights: Iterable[str], names: Iterable[str]) -> str:
    """Returns the prefix of the module's ``names`` in the file ('', 'backbone.', …): the one with which most are found.

    Raises:
        CheckpointError: if two prefixes of one length fit equally well, such as those of a student and its teacher.
    """
    names, count = set(names), Counter()
    for key in weights:
        parts = key.split('.')
        count.update('.'.join(parts[:i]) + '.' * bool(i) for i in range(len(parts)) if '.'.join(parts[i:]) in names)
    found = min(count, key=lambda prefix: (-count[prefix], len(prefix)), default='')
    equal = [prefix for prefix in count if (count[prefix], len(prefix)) == (count[found], len(found))]
    if len(equal) > 1 and 2 * count[found] > len(names):
        raise CheckpointError(f'the checkpoint must hold one such network, but holds {len(equal)}, under {first_names(equal)}: '
                              "name one of these as prefix, for a backbone in init_cfg=dict(type='Pretrained', prefix=…)")
    return found


def load_pretrained(module: nn.Module,
                    checkpoint: str,
                    prefix: str | None = None,
                    map_location: str = 'cpu') -> None:
    """Loads the weights of a backbone safely from a released or own checkpoint, and logs what was loaded.

    The file is a bare state dict, ``{'model': …}`` or ``{'state_dict': …}``, with or without ``module.`` and ``backbone.``
    before the names; or a ``.safetensors`` file. It may also hold heads, classifiers and optimizers. The log says what was
    loaded, left out and missing. Output norms (``norm0`` …) may be missing, because the released files have none. On the meta
    device nothing is loaded.

    Args:
        module (nn.Module): a RevCol, or any module.
        checkpoint (str): path or URL.
        prefix (str | None): prefix of the module's names in the file, after ``module.``. Default: None, it is found.
        map_location (str): device of the file's tensors before they are copied into the module. Default: 'cpu'.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file cannot be read (see :func:`read_checkpoint`), if it does not hold all weights of the
            module, if shapes or kernel sizes differ, or if weights are unusable (see :func:`check_weights`). The module does
            not change then.
    """
    name = type(module).__name__
    if any(parameter.is_meta for parameter in module.parameters()):
        print_log(f'{name} is on the meta device: {checkpoint} is not loaded', logger='current')
        return
    contents = read_checkpoint(checkpoint, map_location)
    weights, wrapping = find_state_dict(contents, checkpoint)
    weights = strip_module(weights)
    own = {key: value.shape for key, value in module.state_dict().items()}
    if prefix is None:
        prefix = find_prefix(weights, own)
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    inside = {key[len(prefix):]: value for key, value in weights.items() if key.startswith(prefix)}
    found = {key: value for key, value in inside.items() if key in own}
    if not found:
        raise CheckpointError(f'{checkpoint} holds no weights of {name}' + (f' under {prefix!r}' if prefix else '') +
                              f': its names are {first_names(weights)}, but {name} needs {first_names(own)}: give another '
                              'checkpoint')
    check_weights(found, checkpoint)
    if getattr(module, 'pad_pretrained', False):
        pad_on_load(module, found, '')
    if (FOLDED in inside) != (FOLDED in own):
        raise CheckpointError(f'{checkpoint} holds a folded backbone (switch_to_deploy), but this {name} is not folded: give '
                              'the checkpoint that it was folded from' if FOLDED in inside else
                              f'this {name} is folded (switch_to_deploy), but {checkpoint} is not: load it first, then fold')
    families = set(map(_family, own))
    related = {key: value for key, value in inside.items() if _family(key) in families}  # not the heads beside it
    differences = find_differences(own, {**related, **found}, checkpoint, r'norm\d+\.')
    if differences:
        raise CheckpointError(f'{checkpoint} does not fit {name}: {differences}. Give a checkpoint of the same architecture')

    missing = [key for key in own if key not in found]
    module.load_state_dict(found, strict=False)
    rest = Counter(key.split('.')[0] for key in weights if not (key.startswith(prefix) and key[len(prefix):] in found))
    others = [key for key in contents if key != wrapping] if wrapping else []
    print_log(f'{name}: loaded {len(found)} of {len(own)} weights from {checkpoint}' +
              (f' (under {prefix!r})' if prefix else '') +
              '; left out: ' + (', '.join([*(f'{root} ({n})' for root, n in rest.items()), *map(str, others)]) or 'nothing') +
              '; missing: ' + (', '.join(missing) or 'nothing'), logger='current')


def check_weights(weights: Mapping[str, Tensor], filename: str) -> None:
    """Checks that a network can compute with the weights.

    Weights must be dense, finite, and of float16, bfloat16, float32 or float64. Integers are allowed only for counters, and for
    buffers of other networks (Swin's ``relative_position_index``): not inside a RevCol, and not for a weight or bias.

    Raises:
        CheckpointError: if weights are not like that. The message names them and their dtypes.
    """
    unfit = []
    for key, value in weights.items():
        integers_fit = key.split('.')[-1] in COUNTERS or not WEIGHT.search(key)
        if value.layout != torch.strided or value.is_meta:
            unfit.append(f'{key} ({value.dtype}, {"without data" if value.is_meta else value.layout})')
        elif value.dtype not in FLOATS and not (value.dtype in INTEGERS and integers_fit):
            unfit.append(f'{key} ({value.dtype})')
    if unfit:
        raise CheckpointError(f'{filename}: all weights must be dense and of float16, bfloat16, float32 or float64, but '
                              f'{len(unfit)} weights are not: {first_names(unfit)}. Convert them, and save the file again')
    bad = [key for key, value in weights.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(f'{filename}: {len(bad)} weights hold NaN or infinite values: {first_names(bad)}. All weights '
                              'must be finite: take an earlier checkpoint')


def find_differences(shapes: Mapping[str, torch.Size], weights: Mapping[str, Tensor], filename: str,
                     optional: str = r'.*num_batches_tracked$') -> str:
    """Returns how the weights of a file differ from those of a model, and what to do about kernels; '' if they fit.

    Args:
        shapes (Mapping[str, torch.Size]): names and shapes of the model's weights.
        weights (Mapping[str, Tensor]): weights of the file, under the names of the model.
        filename (str): name of the file, for the command that pads its kernels.
        optional (str): pattern of the names that may be missing. Default: counters of batches.
    """
    missing = [key for key in shapes if key not in weights and not re.match(optional, key)]
    surplus = [key for key in weights if key not in shapes]
    different = [f'{key} {tuple(value.shape)} instead of {tuple(shapes[key])}' for key, value in weights.items()
                 if key in shapes and value.shape != shapes[key]]
    found = [f'{len(names)} weights {word}: {first_names(names)}' for names, word in (
        (missing, 'are missing'), (surplus, 'have no place in the model'), (different, 'have another shape')) if names]
    kernels = compare_kernels(shapes, weights, filename)
    return '; '.join(found + [f'the file has {kernels}'] * bool(kernels))


def _family(key: str) -> str:
    return key.split('.')[0].rstrip('0123456789') if not re.match(r'norm\d+\.', key) else key
