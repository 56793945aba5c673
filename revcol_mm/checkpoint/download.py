# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Downloads: a checkpoint is kept under its name only if it is complete and can be read; a broken download goes on later."""
import contextlib
import hashlib
import http.client
import logging
import os
import sys
from typing import Any, Iterator
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from mmengine.dist import get_dist_info
from mmengine.logging import print_log
from mmengine.runner import checkpoint as runner_checkpoint
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from .files import check_bytes, put_in_place
from .safe import CheckpointError, import_safetensors, load_from_local, local_name, read_checkpoint
from .zoo import Entry, find_published

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

#: Environment variable that names the place of the published weights: a folder, or the URL of one.
MIRROR = 'REVCOL_MM_WEIGHTS'
ATTEMPTS = 3  # connections that may break off before a download ends in an error
TIMEOUT = 60  # seconds without any data
CHUNK = 2**20  # bytes


def load_from_http(filename: str, map_location: Any = None, **kwargs) -> Any:
    """Downloads a file into torch's cache, if it is not there yet, and loads it. In a distributed run, process 0 downloads.

    mmengine's further arguments are ignored.

    Raises:
        CheckpointError: if the file cannot be downloaded or read. The message names the copy in the cache.
    """
    rank, world_size = get_dist_info()
    if world_size > 1:
        if rank == 0:
            download(filename)
        torch.distributed.barrier()
    path = download(filename)  # downloads again on a machine that does not share the cache of process 0
    try:
        return read_checkpoint(path, map_location, logger='silent')
    except CheckpointError as error:
        reason, copied = str(error).replace(path, filename), path == _places(filename)[0]  # not a file of REVCOL_MM_WEIGHTS
        raise CheckpointError(f'{reason}. It was read from {path}' + ': remove this file first' * copied) from None


def load_from_openmmlab(filename: str, map_location: Any = None) -> Any:
    """Loads a pre-trained model of OpenMMLab by name, ``open-mmlab://…`` or ``openmmlab://…``.

    Raises:
        KeyError: if mmengine does not know the name.
    """
    name = filename.partition('://')[2]
    address = runner_checkpoint.get_external_models()[runner_checkpoint.get_deprecated_model_names().get(name, name)]
    if address.startswith(('http://', 'https://')):
        return load_from_http(address, map_location)
    return load_from_local(os.path.join(runner_checkpoint._get_mmengine_home(), address), map_location)


def download(url: str) -> str:
    """Returns the path of a downloaded checkpoint, which is downloaded once.

    It is kept in torch's cache. A hash of the URL separates files of one name, such as ``best.pth`` of two runs. For a file of
    the model index, size and SHA-256 are checked as far as the index knows them, and the environment variable
    ``REVCOL_MM_WEIGHTS`` may name a folder, or the URL of one, in which the file of this name is used instead.

    Args:
        url (str): address of the file.

    Raises:
        CheckpointError: if the file cannot be had, is not complete, or is not what it should be. What a broken connection left
            is kept beside the final name, and the next call goes on from there. If the package that reads such files is
            missing.
    """
    published, address, name = find_published(url), url, local_name(url)
    mirror = os.environ.get(MIRROR) if published else None
    if mirror and '://' not in mirror:
        path = os.path.join(os.path.expanduser(mirror), name)
        if not os.path.isfile(path):
            raise CheckpointError(f'{MIRROR} names the folder {mirror}, which must hold {name}, but does not: put there what '
                                  f'{url} has, or unset {MIRROR}')
        _check_published(path, path, published)
        print_log(f'{path} is taken for {url} ({MIRROR})', logger='current')
        return path
    if mirror:
        address = f'{mirror.rstrip("/")}/{name}'
    path, part = _places(url)
    if os.path.exists(path):
        return path
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _exclusive(part):
            if not os.path.exists(path):  # another process may have downloaded it in the meantime
                print(f'Downloading {address} to {path}', file=sys.stderr)
                _fetch(address, part, published)
                try:
                    _check_contents(part, address, published)
                except CheckpointError:
                    os.unlink(part)
                    raise
                put_in_place(part, path)
    except OSError as error:
        raise CheckpointError(f'{path} could not be written: {error.strerror or error}. Make room, or name another cache with '
                              'the environment variable TORCH_HOME') from None
    return path


def remove_damaged(url: str) -> None:
    """Removes the copy of a file in torch's cache if it is damaged, so that :func:`download` downloads it once more.

    The whole copy is read; see :func:`~.files.check_bytes`.

    Raises:
        CheckpointError: if the package that reads such files is missing.
    """
    path, part = _places(url)
    with contextlib.suppress(OSError):  # a cache of others, in which nothing can be removed
        if _why_damaged(path, url):  # without the lock: all processes may read at the same time
            with _exclusive(part):
                reason = _why_damaged(path, url)  # another process may have replaced it in the meantime
                if reason:
                    os.unlink(path)
                    print_log(f'{reason}. It was the copy of {url}, and is removed', 'current', logging.WARNING)


def _why_damaged(path: str, url: str) -> str | None:
    """What is wrong with a file, if it is there."""
    try:
        if os.path.exists(path):
            _check_contents(path, path, find_published(url))
    except CheckpointError as error:
        return str(error)
    return None


def _places(url: str) -> tuple[str, str]:
    """Where the cache has a file, and the part of it that has arrived.

    Raises:
        CheckpointError: if the package that reads such files is missing, before anything is downloaded or removed.
    """
    stem, extension = os.path.splitext(local_name(url))
    if extension == '.safetensors':
        import_safetensors()
    name = f'{stem}-{hashlib.sha256(url.encode()).hexdigest()[:8]}{extension}'
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    return os.path.join(folder, name), os.path.join(folder, f'.partial-{name}')


@contextlib.contextmanager
def _exclusive(part: str) -> Iterator[None]:
    """While this context is open, no other process writes the file.

    If another process has it, we wait. An empty file is deleted at the end.
    """
    while True:
        with open(part, 'ab') as file:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                    continue
            except FileNotFoundError:  # the process before has renamed it, or removed it
                continue
            try:
                yield
            finally:
                if os.path.exists(part) and os.path.getsize(part) == 0:
                    os.unlink(part)
            return


class _BrokenOff(Exception):
    """A connection has ended before the file."""


def _fetch(address: str, part: str, published: Entry | None) -> None:
    """Completes a file, from the bytes on that are there. A connection that breaks off is followed by another one."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _fetch_rest(address, part, published)
        except _BrokenOff as error:
            if attempt == ATTEMPTS:
                raise _failed(address, f'{error}; {os.path.getsize(part)} bytes are kept, and the same command goes on from '
                                       'there') from None


def _fetch_rest(address: str, part: str, published: Entry | None) -> None:
    """Appends to the file what it lacks."""
    present = os.path.getsize(part)
    headers = {'User-Agent': 'revcol_mm', **({'Range': f'bytes={present}-'} if present else {})}
    try:
        response = urlopen(Request(address, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and present:  # nothing lies behind these bytes: they are all, or those of another file
            if error.headers.get('Content-Range') == f'bytes */{present}':
                return None
            os.truncate(part, 0)
            return _fetch_rest(address, part, published)
        raise _failed(address, f'the server answers {error.code} {error.reason}') from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no URL
        raise _failed(address, getattr(error, 'reason', None) or error) from None
    with response:
        if not response.headers.get('Content-Range', '').startswith(f'bytes {present}-'):  # the server sends all of it
            present = 0
        length = response.headers.get('Content-Length')
        total = None if length is None else present + int(length)
        if published and published.size and total not in (None, published.size):
            raise _another_file(address, f'{published.size} bytes', f'has {total}')
        with open(part, 'r+b') as file, Progress(
                TextColumn('{task.description}'), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
                console=Console(stderr=True), disable=not os.isatty(2)) as progress:
            file.truncate(present)
            file.seek(present)
            task = progress.add_task(os.path.basename(address), total=total, completed=present)
            while chunk := _read(response):
                file.write(chunk)
                progress.update(task, advance=len(chunk))
            if total is not None and file.tell() < total:
                raise _BrokenOff(f'the connection has ended after {file.tell()} of {total} bytes')


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOff(f'the connection has broken off ({error})') from None


def _check_contents(part: str, address: str, published: Entry | None) -> None:
    """Checks that a complete file is what it should be.

    Raises:
        CheckpointError: with the reason, which names the address.
    """
    try:
        if published:
            _check_published(part, address, published)
        check_bytes(part)
        read_checkpoint(part, 'meta', logger='silent')
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(part, address)) from None


def _check_published(path: str, source: str, published: Entry) -> None:
    """Compares a file with what the model index knows of it.

    Raises:
        CheckpointError: if its size or its SHA-256 is another one. The message names ``source``.
    """
    if published.size and os.path.getsize(path) != published.size:
        raise _another_file(source, f'{published.size} bytes', f'has {os.path.getsize(path)}')
    if published.sha256:
        with open(path, 'rb') as file:
            found = hashlib.file_digest(file, 'sha256').hexdigest()
        if found != published.sha256:
            raise _another_file(source, f'the SHA-256 {published.sha256}', f'has {found}')


def _another_file(source: str, wanted: str, found: str) -> CheckpointError:
    return CheckpointError(f'{source} must have {wanted}, as the model index says, but {found}: it is damaged or another file')


def _failed(address: str, reason: Any) -> CheckpointError:
    return CheckpointError(f'{address} could not be downloaded: {reason}. Try again, or download it yourself and give its '
                           f'path. For files of the model zoo, {MIRROR} may name a folder with them, or the URL of one')
