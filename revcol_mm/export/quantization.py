# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""ONNX files whose convolutions and matrix products compute with 8-bit integers, for CPUs."""
import os.path as osp
import platform
import tempfile
import warnings
from itertools import chain
from pathlib import Path
from typing import Callable, Iterable, Mapping

import numpy as np

from ..apis.errors import quiet_log
from ..checkpoint.files import check_output
from .files import check_operators, place_files, run_file, set_metadata

#: Operators that compute with integers where one factor is a weight. Everything else stays in float32.
INTEGER = ('Conv', 'Gemm', 'MatMul')
#: What CPUs call their instructions that add products of 8-bit integers without overflow.
DOT_PRODUCTS = ('avx512_vnni', 'avx_vnni', 'asimddp')


def adds_without_overflow() -> bool:
    """Whether this CPU adds products of 8-bit integers without overflow. For others, weights should have 7 bits."""
    if platform.machine() == 'arm64':  # Apple's
        return True
    info = Path('/proc/cpuinfo')
    words = set(info.read_text().split()) if info.is_file() else set()
    return not words.isdisjoint(DOT_PRODUCTS)


def quantize_onnx(path: str, out: str, inputs: Iterable[Mapping[str, np.ndarray]], reduce_range: bool | None = None,
                  force: bool = False) -> None:
    """Writes a copy of an ONNX file whose convolutions and matrix products with weights compute with 8-bit integers.

    onnxruntime does it. Weights have one scale per output channel. Activations have one scale per tensor, from the smallest to
    the largest value that the inputs cause. The copy has run on the first of the inputs before it appears.

    Args:
        path (str): a file of :func:`export_model` or :func:`export_backbone`, in float32. It does not change.
        out (str): the file to write. An earlier one stays as it was if this fails.
        inputs (Iterable[Mapping[str, np.ndarray]]): inputs of the file by name, of some 50 to 500 typical images, in at least
            one of which a detector finds something.
        reduce_range (bool | None): whether weights have 7 bits instead of 8, so that a CPU without instructions for this adds
            two products without overflow. Default: None, as this CPU needs it.
        force (bool): replace a file that exists. Default: False.

    Raises:
        CheckpointError: if the file exists or cannot be written.
        ModuleNotFoundError: if onnx or onnxruntime is missing.
        ValueError: if there are no inputs, if nothing is found in any, or if the file is not in float32.
        RuntimeError: if a prediction of the copy is not finite.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    for output in (out, f'{out}.data'):
        check_output(output, path, force)
    model, name = onnx.load(path), osp.basename(out)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    precision = metadata.get('precision', 'float32')
    if precision != 'float32':
        raise ValueError(f'{path} must be in float32 to be quantized, but is in {precision}: export it again')
    rest = iter(inputs)
    first = next(rest, None)
    if first is None:
        raise ValueError('inputs must hold those of at least one image, but there are none')
    external = dict(save_as_external_data=True, location=f'{name}.data') if osp.exists(f'{path}.data') else {}
    with place_files(out, force) as folder, tempfile.TemporaryDirectory() as temporary:
        source, drafted, file = osp.join(temporary, 'source.onnx'), osp.join(temporary, name), osp.join(folder, name)
        names = _nodes_with_weights(model)
        onnx.save(model, source, **(dict(external, location='source.onnx.data') if external else {}))
        del model
        reader = _Reader(chain([first], rest), run_file(path))
        with warnings.catch_warnings(), quiet_log():  # which recommend a preparation that does not work with free sizes
            warnings.simplefilter('ignore')
            quantize_static(source, drafted, reader, QuantFormat.QDQ, list(INTEGER), per_channel=True,
                            reduce_range=not adds_without_overflow() if reduce_range is None else reduce_range,
                            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                            nodes_to_quantize=names, use_external_data_format=bool(external))
        if not reader.found:  # what comes behind the detections has seen no value
            raise ValueError('the model must find something in at least one of the images, but found nothing: give others')
        model = onnx.load(drafted)
        check_operators(model)
        set_metadata(model, dict(metadata, precision='int8'))
        onnx.save(model, file, **external)
        del model
        if not all(bool(output.isfinite().all()) for output in run_file(file)(**first)):
            raise RuntimeError('the predictions of the quantized file must be finite, but are not; nothing was written')


def _nodes_with_weights(model) -> list[str]:
    """Names of the nodes with a factor that does not depend on the image. Weights that modules share become theirs directly."""
    weights = {tensor.name for tensor in model.graph.initializer}
    shared = {node.output[0]: node.input[0] for node in model.graph.node
              if node.op_type == 'Identity' and node.input[0] in weights}
    names = []
    for node in model.graph.node:
        if node.op_type in INTEGER:
            node.input[:] = [shared.get(name, name) for name in node.input]
            if weights & set(node.input[:2]):
                names.append(node.name)
    return names


class _Reader:
    """Inputs as onnxruntime's calibration asks for them, and whether ``run`` has found something in one."""

    def __init__(self, inputs: Iterable[Mapping[str, np.ndarray]], run: Callable) -> None:
        self.inputs, self.run, self.found = iter(inputs), run, False

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        inputs = next(self.inputs, None)
        if inputs is not None and not self.found:
            self.found = all(output.numel() for output in self.run(**inputs))
        return inputs
