# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The depthwise kernels of RevCol's blocks, and how one becomes larger (appendix D.3.1)."""
import re
from collections import defaultdict
from typing import Mapping

import torch
from torch import Tensor, nn

from .safe import CheckpointError, some

KERNEL = re.compile(r'(?P<prefix>(?:.*\.)?)(?P<name>subnet\d+\.level\d\.blocks\.\d+\.dwconv\.weight)')
STD = 1e-7  # of the border; the paper's


def kernels_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The depthwise kernels of RevCol's blocks, (C, 1, k, k) each."""
    return {key: value for key, value in weights.items() if isinstance(value, Tensor) and KERNEL.fullmatch(str(key))}


def kernel_size_of(kernels: Mapping[str, Tensor], filename: str) -> int:
    """The one size that all kernels have.

    Raises:
        CheckpointError: there are none, of several sizes, or they are no depthwise kernels.
    """
    if not kernels:
        raise CheckpointError(f'{filename} holds no RevCol: no names such as subnet0.level0.blocks.0.dwconv.weight')
    by_size = defaultdict(list)
    for key, value in kernels.items():
        if value.dim() != 4 or value.shape[1] != 1 or value.shape[2] != value.shape[3]:
            raise CheckpointError(f'{filename}: {key} has the shape {tuple(value.shape)}; a depthwise kernel is (C, 1, k, k)')
        by_size[value.shape[-1]].append(key)
    if len(by_size) > 1:
        raise CheckpointError(f'{filename} has kernels of mixed sizes, so it is no RevCol that can be built: ' + '; '.join(
            f'{size}×{size} in {len(keys)} ({some(keys, 2)})' for size, keys in sorted(by_size.items())))
    return next(iter(by_size))


def draw_border(channels: int, size: int, std: float, generator: torch.Generator | None) -> Tensor:
    """N(0, std²) in float32 on the CPU, (channels, 1, size, size): the same numbers whatever the dtype of the kernel."""
    return torch.zeros(channels, 1, size, size).normal_(0., std, generator=generator)


def pad_kernel(kernel: Tensor, border: Tensor) -> Tensor:
    """The kernel in the centre of ``border``.

    The border is rounded to the kernel's dtype. float16 has a smallest step of 6e-8 there: at the paper's std about a
    quarter of the border becomes 0, and the rest a small multiple of that step. The network still computes the same
    function, and still trains, since the gradient of a kernel does not depend on its value.

    Args:
        kernel: (C, 1, k, k), of a floating-point dtype.
        border: (C, 1, K, K), K odd and not smaller than k.

    Returns:
        Tensor: (C, 1, K, K), of the kernel's dtype, on its device.
    """
    padded = border.to(dtype=kernel.dtype, device=kernel.device, copy=True)
    start, size = (border.shape[-1] - kernel.shape[-1]) // 2, kernel.shape[-1]
    padded[..., start:start + size, start:start + size] = kernel.detach()
    return padded


def pad_on_load(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
    """Pads kernels that are smaller than ``module.kernel_size`` while they are being loaded, whichever way.

    A hook for :meth:`torch.nn.Module.register_load_state_dict_pre_hook`: ``RevCol(pad_pretrained=True)`` registers it, and
    then ``init_cfg``, ``load_from`` and ``load_state_dict`` alike pad as :func:`pad_checkpoint` does with seed 0.

    Raises:
        CheckpointError: kernels of mixed or even sizes, or that are no depthwise kernels.
    """
    kernels = {key: kernel for key, kernel in kernels_of(state_dict).items() if key.startswith(prefix)}
    if not kernels:
        return
    size = kernel_size_of(kernels, 'the checkpoint')
    if size % 2 == 0:
        raise CheckpointError(f'the checkpoint has kernels of {size}×{size}: an even size has no centre, and cannot be padded')
    if size < module.kernel_size:
        generator = torch.Generator().manual_seed(0)
        for key, kernel in kernels.items():
            state_dict[key] = pad_kernel(kernel, draw_border(kernel.shape[0], module.kernel_size, STD, generator))
