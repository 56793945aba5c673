# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RevCol as an ONNX file with free batch size, height and width."""
from typing import Callable, Sequence

import torch

from ..models import RevCol
from .files import check_request, write_onnx
from .rewrites import prepare

#: Heights and widths at which an export is checked, odd ones among them, and the size at which it is traced, none of them.
SIZES, TRACED = ((64, 64), (97, 131), (160, 65)), (89, 115)
#: Largest accepted difference from torch, relative to the largest value of the output.
TOLERANCE = 1e-4
INPUT = 'images'


def export_backbone(backbone: RevCol, path: str, sizes: Sequence[tuple[int, int]] = SIZES, opset: int = 17,
                    force: bool = False) -> dict[tuple[int, int], float]:
    """Writes a backbone, folded, as ONNX: input ``images`` (N, in_channels, H, W), outputs ``level0`` … as in ``out_indices``.

    A copy is folded (:meth:`RevCol.switch_to_deploy`) and exported in float32 on the CPU; the backbone does not change. The
    file holds the weights up to 2 GB; larger weights are in ``<path>.data`` beside it. It needs onnx and onnxruntime.

    Args:
        backbone (RevCol): the network to export.
        path (str): the file. It appears when the check has passed; otherwise an earlier file stays as it was.
        sizes (Sequence[tuple[int, int]]): heights and widths to check at. Default: :data:`SIZES`.
        opset (int): version of ONNX's operators, at least 17. Default: 17.
        force (bool): replace a file that exists. Default: False.

    Returns:
        dict: for each size, the largest difference between onnxruntime and torch, relative to the largest value of an output.

    Raises:
        CheckpointError: if the file exists or cannot be written.
        ModuleNotFoundError: if onnx or onnxruntime is missing.
        ValueError: for a smaller ``opset``, or sizes that RevCol does not take.
        RuntimeError: if onnxruntime computes something else.
    """
    check_request(path, opset, force)
    backbone = prepare(backbone)
    outputs = [f'level{level}' for level in backbone.out_indices]
    axes = {name: {0: 'batch', 2: f'{name}_height', 3: f'{name}_width'} for name in (INPUT, *outputs)}
    return write_onnx(backbone, {INPUT: torch.zeros(1, backbone.in_channels, *TRACED)}, outputs, axes, path, opset,
                      lambda run: compare(backbone, run, sizes), force=force)


@torch.no_grad()
def compare(backbone: RevCol, run: Callable, sizes: Sequence[tuple[int, int]] = SIZES) -> dict[tuple[int, int], float]:
    """Runs an ONNX file and the backbone on the same random images.

    Args:
        backbone (RevCol): the network.
        run (Callable): runs the file, (images=array) -> list of tensors.
        sizes (Sequence[tuple[int, int]]): heights and widths. Default: :data:`SIZES`.

    Returns:
        dict: for each size, the largest difference relative to the largest value of an output.

    Raises:
        RuntimeError: if a difference is larger than :data:`TOLERANCE`, or if shapes differ.
    """
    generator, differences = torch.Generator().manual_seed(0), {}
    for size in sizes:
        images = torch.randn(2, backbone.in_channels, *size, generator=generator)
        expected = backbone(images)
        found = run(images=images.numpy())
        shapes = [tuple(output.shape) for output in found]
        if shapes != [tuple(output.shape) for output in expected]:
            raise RuntimeError(f'at {size[0]}×{size[1]}, onnxruntime returns the shapes {shapes}, but torch '
                               f'returns {[tuple(output.shape) for output in expected]}; nothing was written')
        difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected))
        if not difference <= TOLERANCE:
            raise RuntimeError(f'at {size[0]}×{size[1]}, onnxruntime differs from torch by {difference:.2g} of the largest '
                               f'value, but at most {TOLERANCE:g} is allowed; nothing was written')
        differences[tuple(size)] = difference
    return differences
