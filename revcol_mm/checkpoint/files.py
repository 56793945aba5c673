# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Writing checkpoints: whole or not at all, and the same bytes for the same contents."""
import os
import secrets
from contextlib import contextmanager
from typing import IO, Any, Iterator

import torch
from torch import Tensor

from .loading import find_state_dict
from .safe import CheckpointError, import_safetensors


@contextmanager
def write_whole(path: str) -> Iterator[IO[bytes]]:
    """A file that appears under its name once it is complete. Whatever interrupts the writing, ``path`` is left as it was.

    Raises:
        CheckpointError: it cannot be written (no such folder, full disk, …).
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f'.{name}.{secrets.token_hex(8)}.tmp')
    try:
        with open(temporary, 'xb') as file:  # with the permissions of any new file, which mkstemp's have not
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f'{path} could not be written: {error.strerror or error}; nothing is left of it') from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def write_checkpoint(contents: Any, file: IO[bytes], safetensors: bool = False) -> None:
    """Into an open file, so that the bytes depend on the contents only: given a path, torch would put the name inside.

    Args:
        contents: what to save.
        file: from :func:`write_whole`.
        safetensors: write this format, which holds tensors only: the weights, without anything around them. Tensors that
            share memory are written once each. Default: False, torch's format.
    """
    if safetensors:
        save = import_safetensors().torch.save
        weights, _ = find_state_dict(contents, file.name)
        file.write(save({key: _own_memory(value) for key, value in weights.items()}, metadata={'format': 'pt'}))
        return
    try:
        torch.save(contents, file)
    except RuntimeError as error:  # torch's writer reports a failed write in its own words
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(0, str(error).splitlines()[0]) from None


def _own_memory(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def check_output(path: str, source: str, force: bool) -> None:
    """Raises CheckpointError if writing ``path`` would change ``source``, or replace a file without ``force``."""
    if os.path.exists(path):
        if os.path.exists(source) and os.path.samefile(path, source):
            raise CheckpointError(f'the output {path} is the input itself, which is never changed')
        if not os.path.isfile(path):
            raise CheckpointError(f'the output {path} exists and is not a file')
        if not force:
            raise CheckpointError(f'the output {path} exists; --force replaces it, --out names another')
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise CheckpointError(f'the output {path} has no folder: {folder} does not exist')
