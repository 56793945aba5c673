# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RevCol as an ONNX file with free batch size, height and width, checked in onnxruntime before it appears."""
import copy
import os
import os.path as osp
import tempfile
import warnings
from typing import Sequence

import torch

from ..checkpoint import CheckpointError
from ..checkpoint.files import check_output
from ..models import RevCol

#: Heights and widths at which an export is checked, odd ones among them.
SIZES = ((64, 64), (97, 131), (160, 65))
#: Largest accepted difference from torch, relative to the largest value of the output.
TOLERANCE = 1e-4
INPUT = 'images'


def export_onnx(backbone: RevCol, path: str, sizes: Sequence[tuple[int, int]] = SIZES, opset: int = 17,
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
        ValueError: for a smaller ``opset``, or sizes that RevCol does not take.
        RuntimeError: if onnxruntime computes something else.
    """
    import onnx
    if opset < 17:
        raise ValueError(f'opset must be 17 or later, which has LayerNorm, but got {opset}')
    for output in (path, f'{path}.data'):
        check_output(output, '', force)
    backbone = copy.deepcopy(backbone).cpu().float()
    backbone.switch_to_deploy()
    outputs = [f'level{level}' for level in backbone.out_indices]
    axes = {name: {0: 'batch', 2: f'{name}_height', 3: f'{name}_width'} for name in (INPUT, *outputs)}
    folder, name = osp.split(osp.abspath(path))
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f'.{name}.') as temporary:
            file = osp.join(temporary, name)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of the input's check, which becomes a constant
                # The tracing exporter: the one built on torch.export takes minutes for as many columns.
                torch.onnx.export(backbone, (torch.zeros(1, backbone.in_channels, *SIZES[1]), ), file, dynamo=False,
                                  opset_version=opset, input_names=[INPUT], output_names=outputs, dynamic_axes=axes)
            if len(os.listdir(temporary)) > 1:  # more than protobuf's 2 GB: one file of weights instead of one per tensor
                model = onnx.load(file)
                file = osp.join(temporary, 'whole', name)
                os.mkdir(osp.dirname(file))
                onnx.save(model, file, save_as_external_data=True, location=f'{name}.data')
            onnx.checker.check_model(file)
            differences = compare(backbone, file, sizes)
            for entry in sorted(os.listdir(osp.dirname(file)), reverse=True):  # the weights first
                os.replace(osp.join(osp.dirname(file), entry), osp.join(folder, entry))
    except OSError as error:
        raise CheckpointError(f'{path} could not be written: {error.strerror or error}; no part of it was kept') from None
    return differences


@torch.no_grad()
def compare(backbone: RevCol, path: str, sizes: Sequence[tuple[int, int]] = SIZES) -> dict[tuple[int, int], float]:
    """Runs an ONNX file and the backbone on the same random images.

    Returns:
        dict: for each size, the largest difference relative to the largest value of an output.

    Raises:
        RuntimeError: if a difference is larger than :data:`TOLERANCE`, or if shapes differ.
    """
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    generator, differences = torch.Generator().manual_seed(0), {}
    for size in sizes:
        images = torch.randn(2, backbone.in_channels, *size, generator=generator)
        expected = backbone(images)
        found = [torch.from_numpy(output) for output in session.run(None, {INPUT: images.numpy()})]
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
