# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Safe loading: loading a file never runs code from it, and the checkpoints that mmengine writes can be loaded.

:mod:`revcol_mm.patches` replaces mmengine's loaders by those of this module.
"""
import io
import os
import pickle
import struct
import tempfile
from argparse import Namespace
from collections import OrderedDict
from types import ModuleType
from typing import Any, Iterable

import numpy as np
import torch
from mmengine.fileio import get_file_backend
from mmengine.logging import HistoryBuffer
from mmengine.optim import scheduler
from mmengine.runner import CheckpointLoader

try:
    from numpy._core import multiarray
except ImportError:  # numpy 1
    from numpy.core import multiarray

NUMBER_KINDS = 'biufc'  # kinds of numpy dtypes: booleans, integers, floats, complex numbers


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, cannot be written, or does not fit the model. The message is one line and names the file."""


def _safe_getattr(owner: type, name: str) -> Any:
    """Replaces ``builtins.getattr``, which pickle calls for methods that an object refers to.

    It allows only the statistics of HistoryBuffer and the annealing functions of the one-cycle schedulers.
    """
    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(HistoryBuffer, name)
    if owner is scheduler.OneCycleParamScheduler and name in ('_annealing_cos', '_annealing_linear'):
        return getattr(scheduler.OneCycleParamScheduler, name)
    raise pickle.UnpicklingError(f'the file asks for the attribute {name!r} of {owner!r}, which no checkpoint needs')


def _safe_dtype(code: str, align: bool = False, copy: bool = True) -> np.dtype:
    """Replaces ``numpy.dtype``. It allows number types only, and always makes a copy.

    The pickle may overwrite the dtype's flags afterwards. With an object dtype, numpy would then use bytes of the file as
    pointers; with numpy's own instance of a dtype, every array of the process would change.
    """
    if isinstance(code, str) and np.dtype(code).kind in NUMBER_KINDS:
        return np.dtype(code, False, True)
    raise pickle.UnpicklingError(f'the file asks for the numpy dtype {code!r}, but arrays in checkpoints must hold numbers')


class _Settings:
    """Replaces dictionary classes of settings. Instances are OrderedDicts."""

    def __new__(cls, *args) -> OrderedDict:
        return OrderedDict(*args)


def safe_globals() -> list:
    """Returns the types of mmengine's checkpoints, for :func:`torch.serialization.add_safe_globals`."""
    dtypes = {type(np.dtype(code)) for code in '?bBhHiIlLqQefdgFDG'}
    allowed = [HistoryBuffer, np.ndarray, (_safe_getattr, 'builtins.getattr'), (_safe_dtype, 'numpy.dtype'), *dtypes]
    for package in ('numpy.core', 'numpy._core'):  # numpy 1, numpy 2
        allowed += [(multiarray._reconstruct, f'{package}.multiarray._reconstruct'),
                    (multiarray.scalar, f'{package}.multiarray.scalar')]
    allowed.append((scheduler.OneCycleParamScheduler, 'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler'))
    # Arguments of a command line: a class without code of its own, whose instances hold values.
    allowed.append(Namespace)
    # Settings in files: mmengine's configs, and those of the authors' classification code, whose training checkpoints hold a
    # configuration (yacs) and, by mistake, Python's function `input`.
    allowed += [(_Settings, 'mmengine.config.config.ConfigDict'), (_Settings, 'yacs.config.CfgNode'), (None, 'builtins.input')]
    return allowed


# The loaders replace mmengine's functions of the same names. mmengine's log shows the part of the name after 'load_from_'.

def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Loads a file. Raises FileNotFoundError if there is none, and the errors of :func:`torch.load` if it refuses the file.

    A file that ends in ``.safetensors`` is loaded by :func:`load_from_safetensors`.
    """
    if filename.endswith('.safetensors'):
        return load_from_safetensors(filename, map_location)
    return torch.load(_local_path(filename), map_location=map_location, weights_only=True)


def _local_path(filename: str) -> str:
    path = os.path.expanduser(filename)
    if not os.path.isfile(path):
        found = 'is not a file' if os.path.exists(path) else 'does not exist'
        raise FileNotFoundError(f'checkpoint {filename} {found} (looked from {os.getcwd()})')
    return path


def load_from_pavi(filename: str, map_location: Any = None) -> Any:
    """Loads from SenseTime's model cloud, ``pavi://…``. Its package ``pavi`` must be installed."""
    from pavi import modelcloud
    model = modelcloud.get(filename.removeprefix('pavi://'))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, model.name)
        model.download(path)
        return load_from_local(path, map_location)


def load_from_ceph(filename: str, map_location: Any = None, backend: str = 'petrel') -> Any:
    """Loads from an object store, ``s3://…`` or ``petrel://…``, through mmengine's file backend."""
    contents = get_file_backend(filename, backend_args=dict(backend=backend)).get(filename)
    if filename.endswith('.safetensors'):
        return load_from_safetensors(filename, map_location, contents)
    return torch.load(io.BytesIO(contents), map_location=map_location, weights_only=True)


def load_from_safetensors(filename: str, map_location: Any = None, contents: bytes | None = None) -> dict[str, Any]:
    """Loads a file, or its contents if they are there already.

    Raises CheckpointError if it is damaged, if it has another format, or if safetensors is not installed.
    """
    safetensors = import_safetensors()
    try:
        device = str(map_location or 'cpu')
        weights = safetensors.torch.load(contents) if contents is not None else safetensors.torch.load_file(
            _local_path(filename), device='cpu' if device == 'meta' else device)
        return {key: value.to(device) for key, value in weights.items()}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f'{filename} must be a safetensors file, but is damaged or another file: {error}') from None


def import_safetensors() -> ModuleType:
    """Returns the package safetensors. Raises CheckpointError if it is not installed."""
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise CheckpointError('.safetensors files need the package safetensors: pip install safetensors') from None
    return safetensors


def is_local(filename: str) -> bool:
    """Whether this is a path: no URL, no ``zoo:NAME``, nor another address with a scheme."""
    return '://' not in filename and not filename.startswith('zoo:')


def without_query(url: str) -> str:
    """A URL up to its file, without ``?download=true`` and the like."""
    return url.partition('#')[0].partition('?')[0]


def local_name(address: str) -> str:
    """The path of a file for a local one, and otherwise the name of the file, which stands for one in the present folder."""
    return address if is_local(address) else os.path.basename(without_query(address))


def read_checkpoint(filename: str, map_location: str | torch.device = 'cpu', logger: str | None = 'current') -> Any:
    """Reads a checkpoint without running code from it.

    Args:
        filename (str): a path, a URL, ``zoo:CONFIG_NAME`` or another address that mmengine's ``CheckpointLoader`` knows, of a
            file in torch's format or in safetensors.
        map_location (str | torch.device): device of the tensors. Default: 'cpu'.
        logger (str | None): mmengine's logger for the line that names the file. Default: 'current'.

    Returns:
        Any: what was saved, usually a dict.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is empty, damaged, not a checkpoint, contains code, or cannot be downloaded.
    """
    filename = str(filename)
    if is_local(filename) and os.path.getsize(_local_path(filename)) == 0:
        raise CheckpointError(f'{filename} is empty, so it is not a checkpoint: copy or download it again')
    try:
        return CheckpointLoader.load_checkpoint(filename, map_location=map_location, logger=logger)
    except pickle.UnpicklingError as error:
        raise _explain(filename, str(error)) from None
    except (CheckpointError, PermissionError):
        raise
    except (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError,
            ValueError, struct.error) as error:
        if 'TorchScript' in str(error):  # torch's message advises to run it
            raise CheckpointError(f'{filename} is refused: it is a TorchScript archive, which is code, not data; nothing was '
                                  'run. Save the state_dict() of the model that it was made from') from None
        raise _unreadable(filename, (str(error).strip() or type(error).__name__).splitlines()[0]) from None


def _unreadable(filename: str, reason: str) -> CheckpointError:
    return CheckpointError(f'{filename} cannot be read as a checkpoint: it is damaged, cut off, or of another kind ({reason}). '
                           'Copy or download it again')


def _explain(filename: str, message: str) -> CheckpointError:
    """Says in one line why torch's loader, or a replacement of this module, has refused a file."""
    if 'the file asks for ' in message:
        reason = 'it asks for ' + message.split('the file asks for ', 1)[1].splitlines()[0]
    elif 'GLOBAL ' in message:
        found = message.split('GLOBAL ', 1)[1].splitlines()[0].split(' was not an allowed')[0].split(' whose module')[0]
        reason = f'it refers to {found}, which is code, not data'
    elif 'reduce for unrecognized function' in message:
        reason = 'loading it would call functions'
    else:
        return _unreadable(filename, message.strip().splitlines()[-1] if 'Unsupported operand' not in message else
                           'its bytes are not those of a checkpoint')
    return CheckpointError(f'{filename} is refused: {reason}. Nothing of it was run. In the program that wrote it, save only '
                           'the state_dict() of the model')


def first_names(names: Iterable[Any], limit: int = 4) -> str:
    """Returns the first few of many names, as text for a message."""
    names = [str(name) for name in names]
    return ', '.join(names[:limit]) + (', …' if len(names) > limit else '') if names else '(none)'
