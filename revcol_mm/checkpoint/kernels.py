# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The depthwise kernels of RevCol's blocks, and their padding to a larger size (appendix D.3.1)."""
import re
from collections import defaultdict
from typing import Mapping

import torch
from torch import Tensor, nn

from .safe import CheckpointError, first_names

KERNEL = re.compile(r'(?P<prefix>(?:.*\.)?)(?P<name>subnet\d+\.level\d\.blocks\.\d+\.dwconv\.weight)')
STD = 1e-7  # standard deviation of the border, as in the paper


def kernels_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the depthwise kernels of RevCol's blocks, (C, 1, k, k) each, by name."""
    return {key: value for key, value in weights.items() if isinstance(value, Tensor) and KERNEL.fullmatch(str(key))}


def kernel_size_of(kernels: Mapping[str, Tensor], filename: str) -> int:
    """Returns the size that all kernels have.

    Raises:
        CheckpointError: if there are no kernels, if their sizes differ, or if they are not depthwise kernels.
    """
    if not kernels:
        raise CheckpointError(f'{filename} holds no RevCol: a RevCol has names such as subnet0.level0.blocks.0.dwconv.weight')
    by_size = defaultdict(list)
    for key, value in kernels.items():
        if value.dim() != 4 or value.shape[1] != 1 or value.shape[2] != value.shape[3]:
            raise CheckpointError(f'{filename}: {key} must be a depthwise kernel of shape (C, 1, k, k), but got '
                                  f'{tuple(value.shape)}: give a checkpoint of a RevCol')
        by_size[value.shape[-1]].append(key)
    if len(by_size) > 1:
        raise CheckpointError(f'{filename} has kernels of mixed sizes, but all kernels of a RevCol have one size: ' + '; '.join(
            f'{size}×{size} in {len(keys)} ({first_names(keys, 2)})' for size, keys in sorted(by_size.items())))
    return next(iter(by_size))


def compare_kernels(shapes: Mapping[str, torch.Size], weights: Mapping[str, Tensor], filename: str, pads: bool = False) -> str:
    """Returns how the kernels of a file differ in size from those of a model, and what to do; '' if they do not differ.

    Args:
        shapes (Mapping[str, torch.Size]): names and shapes of the model's weights.
        weights (Mapping[str, Tensor]): weights of the file.
        filename (str): name of the file, for the command that pads it.
        pads (bool): whether the model pads smaller kernels itself (``pad_pretrained``). Default: False.
    """
    for key, kernel in kernels_of(weights).items():
        if key not in shapes or kernel.dim() != 4 or kernel.shape[:2] != shapes[key][:2]:
            continue
        size, wanted = kernel.shape[-1], shapes[key][-1]
        if size > wanted or (size < wanted and not pads):
            remedy = (f'build it with kernel_size={size}' if size > wanted else
                      f'pad them, python tools/pad_kernels.py {filename} --size {wanted}')
            return f'kernels of {size}×{size}, but the model has {wanted}×{wanted}: {remedy}'
    return ''


def draw_border(channels: int, size: int, std: float, generator: torch.Generator | None) -> Tensor:
    """Draws (channels, 1, size, size) from N(0, std²), in float32 on the CPU, so that every kernel dtype gets the same."""
    return torch.zeros(channels, 1, size, size).normal_(0., std, generator=generator)


def pad_kernel(kernel: Tensor, border: Tensor) -> Tensor:
    """Puts the kernel into the centre of ``border``.

    The border is rounded to the kernel's dtype. In float16 the smallest step near 0 is 6e-8: with the paper's std about a
    quarter of the border becomes 0, and the rest a small multiple of that step. The network still computes the same
    function and can be trained, because the gradient of a kernel does not depend on its value.

    Args:
        kernel (Tensor): (C, 1, k, k), of a floating-point dtype.
        border (Tensor): (C, 1, K, K), where K is odd and not smaller than k.

    Returns:
        Tensor: (C, 1, K, K), of the kernel's dtype, on its device.
    """
    padded = border.to(dtype=kernel.dtype, device=kernel.device, copy=True)
    start, size = (border.shape[-1] - kernel.shape[-1]) // 2, kernel.shape[-1]
    padded[..., start:start + size, start:start + size] = kernel.detach()
    return padded


def pad_on_load(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
    """Pads kernels that are smaller than ``module.kernel_size`` while they are loaded.

    It is a hook for :meth:`torch.nn.Module.register_load_state_dict_pre_hook`, which ``RevCol(pad_pretrained=True)`` registers.
    Then ``init_cfg``, ``load_from`` and ``load_state_dict`` pad in the same way as
    :func:`~revcol_mm.converters.pad_checkpoint` with seed 0.

    Raises:
        CheckpointError: if the kernels have several sizes or an even size, or if they are not depthwise kernels.
    """
    kernels = {key: kernel for key, kernel in kernels_of(state_dict).items() if key.startswith(prefix)}
    if not kernels:
        return
    size = kernel_size_of(kernels, 'the checkpoint')
    if size % 2 == 0:
        raise CheckpointError('kernels must have an odd size to be padded, because an even size has no centre, but the '
                              f'checkpoint has {size}×{size}')
    if size < module.kernel_size:
        generator = torch.Generator().manual_seed(0)
        for key, kernel in kernels.items():
            state_dict[key] = pad_kernel(kernel, draw_border(kernel.shape[0], module.kernel_size, STD, generator))
