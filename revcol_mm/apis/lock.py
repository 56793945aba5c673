# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A lock, so that only one training at a time writes into a work folder."""
import contextlib
import errno
import json
import os
import os.path as osp
import socket
import time
import warnings
from typing import Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from .errors import LaunchError

NAME = 'training.lock'
RANKS = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')


def rank_of(launcher: str) -> int:
    """The rank that the launcher has given to this process; 0 without a launcher."""
    return int(os.environ.get(RANKS.get(launcher, ''), 0))


@contextlib.contextmanager
def lock_work_dir(work_dir: str, launcher: str = 'none') -> Iterator[None]:
    """A context in which no second training can start in ``work_dir``: its checkpoints and logs would mix with the first one's.

    The process of rank 0 holds the lock. The system releases it when this process ends, also when it is killed. It is a POSIX
    record lock: child processes do not inherit it, and it works between machines that share the folder through NFS, or another
    file system with such locks. If the file system has none, there is a warning, and the training starts.

    Args:
        work_dir (str): folder of logs and checkpoints. It is made if it does not exist.
        launcher (str): job launcher, which sets the rank in the environment. Default: 'none', a single process.

    Raises:
        LaunchError: if another training holds the lock. The message has its process, its machine and the time of its start.
    """
    if rank_of(launcher) != 0 or fcntl is None:
        yield
        return
    os.makedirs(work_dir, exist_ok=True)
    path = osp.join(work_dir, NAME)
    with open(path, 'a+', encoding='utf-8') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise LaunchError(f'another training runs in {work_dir}: {_owner(file)}. Wait until it ends, or name '
                                  'another folder with --work-dir') from None
            warnings.warn(f'{work_dir} lies on a file system without locks ({error.strerror}): a second training can start in '
                          'it')
        file.truncate(0)
        json.dump(dict(pid=os.getpid(), host=socket.gethostname(), started=time.strftime('%Y-%m-%d %H:%M:%S')), file)
        file.flush()
        yield


def _owner(file) -> str:
    file.seek(0)
    try:
        owner = json.load(file)
        return f'process {owner["pid"]} on {owner["host"]}, since {owner["started"]}'
    except (ValueError, KeyError, TypeError):
        return f'{file.name} does not say which'
