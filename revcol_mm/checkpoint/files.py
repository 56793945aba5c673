# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Writing checkpoints: a file is written completely or not at all, and the same contents give the same bytes.

Reading them: whether a file still has the bytes that were written.
"""
import errno
import io
import os
import secrets
import shutil
import zipfile
import zlib
from contextlib import contextmanager
from typing import IO, Any, Iterator

import torch

from .loading import find_state_dict
from .safe import CheckpointError, import_safetensors


@contextmanager
def write_whole(path: str, replace: bool = True) -> Iterator[IO[bytes]]:
    """Opens a file that appears under its name when it is complete. If the writing is interrupted, ``path`` does not change.

    Args:
        path (str): name of the file.
        replace (bool): whether to replace a file that has this name when the new one is complete. Default: True.

    Raises:
        CheckpointError: if the file cannot be written (no such folder, full disk, …), or if ``replace`` is False and another
            process has written ``path`` in the meantime.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f'.{name}.{secrets.token_hex(8)}.tmp')
    try:
        with open(temporary, 'xb') as file:  # gives the usual permissions of new files; mkstemp would give stricter ones
            yield file
        put_in_place(temporary, path, replace)
    except FileExistsError as error:
        raise CheckpointError(f'another process has created the output {error.filename2 or path} in the meantime: choose '
                              'another name, or replace it with force') from None
    except OSError as error:
        raise CheckpointError(f'{path} could not be written: {error.strerror or error}; no part of it was kept. Make room, or '
                              'choose another folder') from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


@contextmanager
def open_whole(path: str, mode: str) -> Iterator[IO[str]]:
    """Opens a text file as :func:`write_whole` does. It takes the arguments of ``open(path, 'w')``."""
    with write_whole(path) as file:
        text = io.TextIOWrapper(file, encoding='utf-8', write_through=True)
        yield text
        text.detach()  # write_whole syncs and closes the file


def put_in_place(temporary: str, path: str, replace: bool = True) -> None:
    """Renames a complete file, after its bytes are on the disk: a power cut leaves the old file or the new one.

    Args:
        temporary (str): the file, or a folder of files. It must be in the folder of ``path``.
        path (str): the new name.
        replace (bool): whether to replace a file or folder of this name. Default: True.

    Raises:
        FileExistsError: if ``replace`` is False and ``path`` exists.
        OSError: if the file system reports an error.
    """
    for folder, _, names in os.walk(temporary):
        for name in names:
            _sync(os.path.join(folder, name))
    _sync(temporary)
    if not replace:
        _rename_to_new_name(temporary, path)
    elif os.path.isdir(path):  # no folder replaces another in one step
        outdated = f'{temporary}.outdated'
        shutil.rmtree(outdated, ignore_errors=True)  # of a process that was killed here
        os.rename(path, outdated)
        os.rename(temporary, path)
        shutil.rmtree(outdated)
    else:
        os.replace(temporary, path)
    _sync(os.path.dirname(os.path.abspath(path)))


def _rename_to_new_name(temporary: str, path: str) -> None:
    try:
        os.link(temporary, path)  # a rename would replace a file that exists
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not os.path.isdir(path) or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def check_bytes(path: str) -> None:
    """Compares a checkpoint of torch's format with the checksums that it contains.

    :func:`torch.load` ignores them: if one byte of the file has changed, it loads other weights without an error. The
    whole file is read, about 0.4 GB/s on one CPU core. Files without checksums (torch before 1.6, safetensors) are not checked.

    Args:
        path (str): a local file that :func:`~revcol_mm.checkpoint.read_checkpoint` can read, or a folder of files.

    Raises:
        CheckpointError: if the bytes are not those that were written.
    """
    folder = os.path.isdir(path)
    for file in [os.path.join(path, name) for name in sorted(os.listdir(path))] if folder else [path]:
        if zipfile.is_zipfile(file):
            try:
                with zipfile.ZipFile(file) as archive:
                    damaged = archive.testzip()
                if not folder:
                    torch.load(file, map_location='cpu', weights_only=True, mmap=True)  # every tensor has its place
            except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
                raise CheckpointError(f'{file} is damaged: {str(error).splitlines()[0]}. Copy or download it again') from error
            if damaged is not None:
                raise CheckpointError(f'{file} is damaged: its part {damaged} does not have the checksum with which it was '
                                      'written. Copy or download it again')


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
            raise CheckpointError(f'the output {path} must not be the input, which is never changed: choose another name')
        if not os.path.isfile(path):
            raise CheckpointError(f'the output {path} must be a file, but is something else: choose another name')
        if not force:
            raise CheckpointError(f'the output {path} exists already: choose another name, or replace it with force')
    check_folder(os.path.dirname(path))


def check_folder(path: str, make: bool = False) -> None:
    """Raises CheckpointError if the folder of an output does not exist or is read-only; with ``make`` if it cannot be made."""
    existing = os.path.abspath(path)
    while make and not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        state = f'cannot be made: {existing} is a file' if make else 'does not exist'
        raise CheckpointError(f'the output folder {path} {state}; choose another one')
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(f'the output folder must be one that can be written to, but {existing} is read-only; choose '
                              'another one')
