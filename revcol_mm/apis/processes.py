# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Finds the process of a distributed run that does not answer."""
import contextlib
import re
import time
from datetime import timedelta
from typing import Iterator

from torch import distributed

from .errors import LaunchError

SECONDS = 10  # in which a process must answer


@contextlib.contextmanager
def name_lost_processes() -> Iterator[None]:
    """A context that names the rank that does not answer, for processes that communicate through gloo.

    gloo's own error says that a message did not arrive, but not from which rank. So after such an error the other processes
    meet in a barrier that reports the missing ranks. NCCL's watchdog names the rank itself.

    Raises:
        LaunchError: if a process does not answer in time, or has ended.
    """
    if not distributed.is_initialized() or distributed.get_backend() != 'gloo':
        yield
        return
    # The barrier needs a group of its own, because an error closes the connections of the default group. Some processes may be
    # late here: the default group, which has more time, waits for them first.
    distributed.barrier()
    group = distributed.new_group(backend='gloo', timeout=timedelta(seconds=2 * SECONDS))
    try:
        yield
    except RuntimeError as error:
        if 'gloo' not in str(error):
            raise
        lost, reason = _find_lost(group), str(error).splitlines()[0]
        if lost is not None:
            raise LaunchError(f'no answer from rank {lost}: its process is stopped or lost, or slower than the others by more '
                              f'than env_cfg.dist_cfg.timeout (in seconds). Resume with --resume auto ({reason})') from error
        raise LaunchError('another process of this run has ended; its own message, or that of the launcher, says why. '
                          f'Resume with --resume auto ({reason})') from error


def _find_lost(group: distributed.ProcessGroup) -> str | None:
    """Finds the ranks that do not answer; None if all that are missing have ended.

    Rank 0 waits for the other ranks. They wait longer for rank 0, so a timeout there means that rank 0 does not answer. Ranks
    that are reported missing before the time is over have closed their connection: they have ended.
    """
    rank, start = distributed.get_rank(), time.monotonic()
    try:  # the time is rank 0's; the others take that of the group
        distributed.monitored_barrier(group, timedelta(seconds=SECONDS), wait_all_ranks=True)
    except RuntimeError as error:
        if rank:
            return '0' if 'Timed out' in str(error) else None
        found = re.search(r'Ranks? ([\d, ]+) failed', str(error))
        return found[1] if found and time.monotonic() - start >= SECONDS else None
    return None
