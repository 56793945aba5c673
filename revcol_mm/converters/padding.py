# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Kernel padding (appendix D.3.1): a pre-trained k×k depthwise kernel becomes the centre of a larger one."""
import copy
from dataclasses import dataclass, field
from typing import Any, Mapping

import torch
from torch import Tensor, nn

from ..checkpoint.kernels import KERNEL, STD, draw_border, kernel_size_of, kernels_of, pad_kernel
from ..checkpoint.loading import check_weights, find_state_dict
from ..checkpoint.safe import CheckpointError
from .backbone import find_backbone


@dataclass
class PaddingReport:
    """What :func:`pad_checkpoint` did.

    Attributes:
        size_before (int): old size of the kernels.
        size (int): new size of the kernels.
        std (float), seed (int): standard deviation and seed of the border.
        kernels (dict[str, list[str]]): the padded names of each set of weights, by its key in the file ('' for a bare state
            dict).
        moments (int): number of tensors of the optimizer state that were padded with zeros.
        notes (list[str]): sentences that the user must read.
    """
    size_before: int
    size: int
    std: float
    seed: int
    kernels: dict[str, list[str]] = field(default_factory=dict)
    moments: int = 0
    notes: list[str] = field(default_factory=list)


def pad_checkpoint(checkpoint: Any, size: int, std: float = STD, seed: int = 0,
                   filename: str = 'the checkpoint') -> tuple[Any, PaddingReport]:
    """Pads every depthwise kernel of the RevCol in a checkpoint. Everything else stays as it is.

    The checkpoint is a bare state dict, ``{'model': …}`` or ``{'state_dict': …}``, also of a whole detector or segmentor.
    Averaged copies of the weights (``ema_state_dict``, ``state_dict_ema``) get the same border as the weights. Optimizer
    moments of the kernels are padded with zeros, so that training can be resumed. If they cannot be distinguished from other
    moments, the optimizer state is left out, and the report says so.

    Args:
        checkpoint (Any): from :func:`~revcol_mm.checkpoint.read_checkpoint`. It is not changed.
        size (int): new kernel size, odd and larger than the present one.
        std (float): standard deviation of the border. Default: 1e-7.
        seed (int): seed of the border. Default: 0.
        filename (str): name of the file in messages. Default: 'the checkpoint'.

    Returns:
        tuple[Any, PaddingReport]: the padded checkpoint, which shares all other tensors with ``checkpoint``, and the report.

    Raises:
        CheckpointError: if there is no complete RevCol, if kernel sizes differ, if weights are unusable before or after padding
            (see :func:`~revcol_mm.checkpoint.loading.check_weights`), or if size, std or seed have a wrong value.
    """
    weights, wrapping = find_state_dict(checkpoint, filename)
    backbone = find_backbone(weights, filename)
    if size % 2 == 0:
        raise CheckpointError(f'size must be odd, so that the kernel has a centre, but got {size}')
    if size <= backbone.kernel_size:
        raise CheckpointError(f'size must be larger than that of {filename}, {backbone.kernel_size}, but got {size}')
    if not -2**63 <= seed < 2**64:
        raise CheckpointError(f'seed must be an integer of at most 64 bits, but got {seed}')
    if not 0 <= std < float('inf'):
        raise CheckpointError(f'std must be finite and not negative, but got {std}')

    report = PaddingReport(backbone.kernel_size, size, std, seed)
    generator, borders, done = torch.Generator().manual_seed(seed), {}, {}

    def pad(key: str, kernel: Tensor) -> Tensor:
        place = (kernel.untyped_storage().data_ptr(), kernel.storage_offset(), kernel.shape, kernel.stride())
        if place not in done:  # kernels that share memory also share it after padding
            name = KERNEL.fullmatch(key)['name']
            if name not in borders:  # the weights and their averages get the same border
                borders[name] = draw_border(kernel.shape[0], size, std, generator)
            if len(borders[name]) != len(kernel):
                raise CheckpointError(f'{filename}: {key} must have the same channels in all copies of the weights, but has '
                                      f'{len(kernel)} channels in one place and {len(borders[name])} in another')
            padded = pad_kernel(kernel, borders[name])
            done[place] = nn.Parameter(padded, kernel.requires_grad) if isinstance(kernel, nn.Parameter) else padded
        return done[place]

    def pad_all(where: str, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        kernels, place = kernels_of(weights), f'{filename}[{where!r}]' if where else filename
        check_weights(find_state_dict(weights, place)[0], place)
        if kernel_size_of(kernels, place) != report.size_before:
            raise CheckpointError(f'{filename} has kernels of mixed sizes: those of {where!r} are not '
                                  f'{report.size_before}×{report.size_before}')
        larger = {key: pad(key, kernel) for key, kernel in kernels.items()}
        check_weights(larger, f'{place}, padded with std={std}')
        weights = copy.copy(weights)  # keeps the attribute _metadata that torch stores
        weights.update(larger)
        report.kernels[where] = list(kernels)
        return weights

    if wrapping is None:
        padded = pad_all('', checkpoint)
    else:
        padded = copy.copy(checkpoint)
        for where, value in checkpoint.items():
            if isinstance(value, Mapping) and kernels_of(value):
                padded[where] = pad_all(where, value)
    if padded.get('optimizer') is not None and padded['optimizer'] != {}:
        try:
            padded['optimizer'] = _pad_moments(padded['optimizer'], weights, report)
        except _Unclear as reason:
            del padded['optimizer']
            report.moments = 0
            report.notes.append(f'WITHOUT the optimizer state, which cannot be padded: {reason}. Training can start from this '
                                'file (load_from), but not resume')
    if any(kernel.dtype == torch.float16 for kernel in kernels_of(weights).values()):
        report.notes.append('the weights are float16, so the border is rounded to multiples of its smallest step, 6e-8')
    return padded, report


class _Unclear(ValueError):
    pass


def _pad_moments(optimizer: Any, weights: Mapping[str, Tensor], report: PaddingReport) -> Any:
    """Returns the state of an optimizer, or of a dict of optimizers, with zero-padded moments of the depthwise kernels.

    A moment has the shape of its parameter. If no other parameter has the shape of a kernel, the shape identifies the moments
    of the kernels. Otherwise the names that layer-decay constructors write into the parameter groups identify them.
    """
    if not isinstance(optimizer, Mapping):
        raise _Unclear(f'it must be a dict, but is of type {type(optimizer).__name__}')
    if 'state' not in optimizer or 'param_groups' not in optimizer:
        parts = {key: value for key, value in optimizer.items() if isinstance(value, Mapping) and 'state' in value}
        if not parts:
            raise _Unclear("there is no 'state' and 'param_groups' in it")
        return {**optimizer, **{key: _pad_moments(value, weights, report) for key, value in parts.items()}}
    if not isinstance(optimizer['state'], Mapping):
        raise _Unclear(f"its 'state' must be a dict, but is of type {type(optimizer['state']).__name__}")
    kernels = kernels_of(weights)
    shapes = {kernel.shape for kernel in kernels.values()}
    others = [key for key, value in weights.items() if value.shape in shapes and key not in kernels]
    names = _names(optimizer['param_groups']) if others else {}
    margin = (report.size - report.size_before) // 2
    state = {}
    for index, moments in optimizer['state'].items():
        tensors = [value for value in moments.values() if isinstance(value, Tensor) and value.dim()] if isinstance(
            moments, Mapping) else []
        if len({value.shape for value in tensors}) > 1:
            raise _Unclear('it holds more than elementwise moments')
        state[index] = moments
        if not tensors or tensors[0].shape not in shapes:
            continue
        name = index if isinstance(index, str) else names.get(index)  # FSDP stores the state by name
        if others and name is None:
            raise _Unclear(f'{others[0]} has the shape of a depthwise kernel, and the parameters have no names')
        if not others or KERNEL.fullmatch(name):
            state[index] = {key: nn.functional.pad(value, [margin] * 4) if isinstance(value, Tensor) and value.dim() else value
                            for key, value in moments.items()}
            report.moments += len(tensors)
    return {**optimizer, 'state': state}


def _names(groups: list[dict]) -> dict[int, str]:
    try:
        return {index: str(name) for group in groups for index, name in zip(group['params'], group.get('param_names', ()))}
    except (AttributeError, LookupError, TypeError):
        raise _Unclear("its 'param_groups' must be a list of dicts with 'params'") from None
