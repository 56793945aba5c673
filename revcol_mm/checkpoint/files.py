# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Writing checkpoints: a file is written completely or not at all, and the same contents give the same bytes."""
import os
import secrets
from contextlib import contextmanager
from typing import IO, Any, Iterator

import torch

from .loading import find_state_dict
from .safe import CheckpointError, import_safetensors


@contextmanager
def write_whole(path: str) -> Iterator[IO[bytes]]:
    """Opens a file that appears under its name when it is complete. If the writing is interrupted, ``path`` does not change.


    Raises:
        CheckpointError: if the file cannot be written (no such folder, full disk, …).
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f'.{name}.{secrets.token_hex(8)}.tmp')
    try:
        with open(temporary, 'xb') as file:  # gives the usual permissions of new files; mkstemp would give stricter ones
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f'{path} could not be written: {error.strerror or error}; no part of it was kept') from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def write_checkpoint(contents: Any, file: IO[bytes], safetensors: bool = False) -> None:
    """Writes a checkpoint into an open file. Its bytes depend on the contents only; given a path, torch would store the name.

    Args:
        contents (Any): what to save.
        file (IO[bytes]): from :func:`write_whole`.
        safetensors (bool): whether to write the safetensors format, which holds the weights only. Tensors that share memory are
            written separately. Default: False, torch's format.

    Raises:
        CheckpointError: if the package safetensors is needed and missing, or if there are no weights.
        OSError: if the writing fails.
    """
    if safetensors:
        save = import_safetensors().torch.save
        weights, _ = find_state_dict(contents, file.name)
        file.write(save({key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in weights.items()},
                        metadata={'format': 'pt'}))
        return
    try:
        torch.save(contents, file)
    except RuntimeError as error:  # torch's writer turns an OSError into a RuntimeError
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(0, str(error).splitlines()[0]) from None


def check_output(path: str, source: str, force: bool) -> None:
    """Raises CheckpointError if writing ``path`` would change ``source``, or replace a file without ``force``."""
    if os.path.exists(path):
        if os.path.exists(source) and os.path.samefile(path, source):
            raise CheckpointError(f'the output {path} is the input itself, which is never changed: give another --out')
        if not os.path.isfile(path):
            raise CheckpointError(f'the output {path} exists and is not a file: give another --out')
        if not force:
            raise CheckpointError(f'the output {path} exists; --force replaces it, --out names another')
    check_folder(path)


def check_folder(path: str) -> None:
    """Raises CheckpointError if the folder of the output ``path`` does not exist."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise CheckpointError(f'the output {path} has no folder: {folder} does not exist')
