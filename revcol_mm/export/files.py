# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Writing ONNX files: they are traced, checked in onnxruntime, and then renamed, so that no wrong one appears."""
import contextlib
import json
import os
import os.path as osp
import tempfile
import warnings
from typing import Any, Callable, Iterator, Mapping, Sequence, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint import CheckpointError
from ..checkpoint.files import check_output, put_in_place
from .precision import convert_to_half
from .rewrites import linspace_by_range

Result = TypeVar('Result')

#: Operators of ONNX's own domain only: every runtime knows them.
DOMAINS = ('', 'ai.onnx')


def check_request(path: str, opset: int, force: bool) -> None:
    """What can be said before anything is computed.

    Args:
        path (str): the file to write.
        opset (int): version of ONNX's operators.
        force (bool): replace files that exist.

    Raises:
        CheckpointError: if the file, or that of its weights beside it, exists or cannot be written.
        ModuleNotFoundError: if onnx or onnxruntime is missing.
        ValueError: for an ``opset`` below 17.
    """
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    if opset < 17:
        raise ValueError(f'opset must be 17 or later, which has LayerNorm, but got {opset}')
    for output in (path, f'{path}.data'):
        check_output(output, '', force)


def write_onnx(net: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], axes: Mapping[str, Mapping[int, str]],
               path: str, opset: int, check: Callable[[Callable], Result], metadata: Mapping[str, Any] | None = None,
               half: bool = False, force: bool = False) -> Result:
    """Traces a network and writes it. The file appears when ``check`` has passed; otherwise an earlier file stays as it was.

    Weights of up to 2 GB are in the file; larger ones are in ``<path>.data`` beside it.

    Args:
        net (nn.Module): called with ``inputs`` in their order; it returns a tensor or a tuple of them.
        inputs (Mapping[str, Tensor]): an example of every input, by its name in the file.
        outputs (Sequence[str]): names of the outputs.
        axes (Mapping): names of the sizes that are free, by input or output and by dimension.
        path (str): the file.
        opset (int): version of ONNX's operators.
        check (Callable): gets a function that runs the file, (name=array, …) -> list of tensors. An error in it refuses the
            file.
        metadata (Mapping | None): what the file tells about itself; values that are no text are written as JSON. Default: None.
        half (bool): whether to store the weights of convolutions and matrix products in float16. Default: False.
        force (bool): replace files that exist. Default: False.

    Returns:
        what ``check`` returned.

    Raises:
        CheckpointError: if the file cannot be written.
        RuntimeError: if an operator is not one of ONNX's own.
    """
    import onnx
    name = osp.basename(path)
    with place_files(path, force) as whole, tempfile.TemporaryDirectory(dir=osp.dirname(whole)) as temporary:
        file = osp.join(temporary, name)
        with warnings.catch_warnings(), linspace_by_range(), torch.no_grad():
            warnings.simplefilter('ignore')  # of checks of the input, which become constants
            # The tracing exporter: the one built on torch.export refuses sizes that depend on data.
            torch.onnx.export(net, tuple(inputs.values()), file, dynamo=False, opset_version=opset,
                              input_names=list(inputs), output_names=list(outputs),
                              dynamic_axes={key: dict(value) for key, value in axes.items()})
        model = onnx.load(file)
        check_operators(model)
        set_metadata(model, metadata or {})
        if half:
            convert_to_half(model)
        # The exporter writes one file per tensor where they exceed protobuf's 2 GB.
        external = dict(save_as_external_data=True, location=f'{name}.data') if len(os.listdir(temporary)) > 1 else {}
        file = osp.join(whole, name)
        onnx.save(model, file, **external)
        del model
        onnx.checker.check_model(file)
        return check(run_file(file))


@contextlib.contextmanager
def place_files(path: str, force: bool) -> Iterator[str]:
    """A temporary folder for an ONNX file and its ``.data``, which move to their place at the end, unless there is an error.

    Args:
        path (str): the file; the folder must hold one of its name, and at most its ``.data`` besides.
        force (bool): replace files that exist.

    Raises:
        CheckpointError: if they cannot be written.
    """
    folder, name = osp.split(osp.abspath(path))
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f'.{name}.') as temporary:
            whole = osp.join(temporary, 'whole')
            os.mkdir(whole)
            yield whole
            entries = sorted(os.listdir(whole), reverse=True)  # the weights first
            for entry in entries:
                put_in_place(osp.join(whole, entry), osp.join(folder, entry), replace=force)
            if force and f'{name}.data' not in entries and osp.exists(f'{path}.data'):  # of the file that is replaced
                os.unlink(f'{path}.data')
    except FileExistsError:
        raise CheckpointError(f'another process has created the output {path} in the meantime: choose another name, or '
                              'replace it with force') from None
    except OSError as error:
        raise CheckpointError(f'{path} could not be written: {error.strerror or error}; no part of it was kept. Make room, or '
                              'choose another folder') from None


def run_file(path: str) -> Callable[..., list[Tensor]]:
    """A function that runs a file, (name=array, …) -> list of tensors."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])

    def run(**inputs) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, inputs)]

    return run


def check_operators(model) -> None:
    """Raises RuntimeError for operators that not every runtime knows."""
    foreign = sorted({f'{node.domain}::{node.op_type}' for node in model.graph.node if node.domain not in DOMAINS})
    if foreign:
        raise RuntimeError(f"the network must consist of ONNX's own operators, but the export has {', '.join(foreign)}; "
                           'nothing was written')


def set_metadata(model, metadata: Mapping[str, Any]) -> None:
    """Gives an ONNX model these entries and no others; None is left out, and what is no text becomes JSON."""
    del model.metadata_props[:]
    for key, value in metadata.items():
        if value is not None:
            model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
