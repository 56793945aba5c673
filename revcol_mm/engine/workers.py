# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Data-loader workers that end with their training."""
import ctypes
import multiprocessing
import os
import signal
import sys
from functools import partial
from typing import Callable

from torch.utils.data import DataLoader

PR_SET_PDEATHSIG = 1  # of Linux's prctl


class WorkersEndWithTraining:
    """Ends the data-loader workers when the process that started them ends, also when it is killed (on Linux).

    It stands before a runner of mmengine in the list of base classes. Without it, the workers of a killed training can wait
    for ever until their batch is read, and keep their memory.
    """

    @classmethod
    def build_dataloader(cls, *args, **kwargs) -> DataLoader:
        """As mmengine's; the ``worker_init_fn`` that it sets, or the config, is called as before."""
        loader = super().build_dataloader(*args, **kwargs)
        if loader.num_workers and sys.platform == 'linux':
            context = loader.multiprocessing_context or multiprocessing
            # The parent of a fork server's workers is the server, which ends with the training.
            parent = None if context.get_start_method(allow_none=True) == 'forkserver' else os.getpid()
            loader.worker_init_fn = partial(end_with_parent, parent, loader.worker_init_fn)
        return loader


def end_with_parent(parent: int | None, then: Callable[[int], None] | None, worker_id: int) -> None:
    """A ``worker_init_fn`` after which Linux kills the worker when the process that started it ends.

    Args:
        parent (int | None): process number of the training, if the training itself started the worker.
        then (callable | None): the ``worker_init_fn`` that is called afterwards.
        worker_id (int): number of the worker.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:  # it has ended before
        os._exit(1)
    if then is not None:
        then(worker_id)
