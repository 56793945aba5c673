# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Where a process's random numbers come from, and which batch of the data is next: what a run needs to go on exactly."""
import random
from typing import Any, Iterator

import numpy as np
import torch
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import DataLoader


def generator_states() -> dict[str, Any]:
    """The states of this process's random number generators: torch's (CPU, and the current GPU), numpy's and Python's.

    Returns:
        dict: tensors, numbers and None only, so that safe loading reads it.
    """
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, next_gauss = random.getstate()
    states = dict(torch=torch.get_rng_state(), numpy=torch.from_numpy(keys.astype(np.int64)),
                  numpy_rest=(int(position), int(has_gauss), float(gauss)),
                  python=torch.tensor(words), python_rest=(version, next_gauss))
    if torch.cuda.is_available():
        states['cuda'] = torch.cuda.get_rng_state()
    return states


def set_generator_states(states: dict[str, Any]) -> None:
    """Takes up what :func:`generator_states` returned. A GPU's state is left out where there is no GPU."""
    torch.set_rng_state(states['torch'].cpu())
    np.random.set_state(('MT19937', states['numpy'].cpu().numpy().astype(np.uint32), *states['numpy_rest']))
    version, next_gauss = states['python_rest']
    random.setstate((version, tuple(states['python'].tolist()), next_gauss))
    if 'cuda' in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'].cpu())


def seed_worker(origin: tuple[int, ...]) -> None:
    """Seeds torch's CPU generator, numpy's and Python's.

    Args:
        origin (tuple[int]): non-negative integers. Other numbers or another order of them give other seeds.
    """
    words = np.random.SeedSequence(origin).generate_state(8)
    np.random.seed(words[:4])
    random.seed(words[4:6].tobytes())
    # Not torch.manual_seed, which also queues a seed for CUDA: workers have none.
    torch.default_generator.manual_seed(int(words[6]) << 32 | int(words[7]))


def _receive(indices: list, origin: tuple[int, ...]) -> list:
    seed_worker(origin)
    return indices


class SeededBatch(list):
    """The indices of a batch's samples. Whichever worker takes it from its queue is seeded for this batch.

    A worker unpickles one batch at a time, right before it reads the samples. So the seeds need neither the worker's history
    nor a change of the data set.
    """

    def __init__(self, indices: list, origin: tuple[int, ...]) -> None:
        super().__init__(indices)
        self.origin = origin

    def __reduce__(self) -> tuple:
        return _receive, (list(self), self.origin)


class NumberedBatches:
    """A batch sampler that knows which pass over the data it is in, and can begin within one.

    Args:
        batch_sampler (Iterable): the batch sampler that it stands for; its attributes are found here, too.
        origin (tuple[int], optional): the seed and the rank, from which, with the pass and the batch's number in it, the
            workers' seeds are made. None: there are no workers. Default: None.

    Attributes:
        next_pass (int): number of the pass that begins next.
        pass_number (int): number of the pass that began last; -1 before the first.
        start (dict): the generators' states when that pass began.
        skip (int): how many batches of the pass that begins next were consumed before the run was resumed.
        states (tuple, optional): the generators' states when that pass began, and those with which it goes on.
    """

    def __init__(self, batch_sampler: Any, origin: tuple[int, ...] | None = None) -> None:
        self.batch_sampler = batch_sampler
        self.origin = origin
        self.next_pass, self.pass_number = 0, -1
        self.start: dict[str, Any] | None = None
        self.skip, self.states = 0, None

    def __getattr__(self, name: str) -> Any:
        if name == 'batch_sampler':  # not set yet
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list]:
        # Nothing happens before the first batch is asked for: DataLoader makes iterators that it never uses, and draws a number
        # after it has made this one, which the states to go on with must not lose.
        self.pass_number, self.next_pass = self.next_pass, self.next_pass + 1
        (skip, states), (self.skip, self.states) = (self.skip, self.states), (0, None)
        if states:
            set_generator_states(states[0])
        self.start = generator_states()
        batches = iter(self.batch_sampler)
        for _ in range(skip):
            next(batches, None)
        if states:
            set_generator_states(states[1])
        pass_number = self.pass_number
        for number, batch in enumerate(batches, skip):
            yield batch if self.origin is None else SeededBatch(batch, (*self.origin, pass_number, number))


class IterationBatches:
    """Takes the place of mmengine's endless iterator over the training data in an iteration loop, and counts.

    Args:
        loader (DataLoader): the training data, with :class:`NumberedBatches`.
        calls_without_batch (int): how many of the first calls of next() return None, because their batches were consumed before
            the run was resumed. mmengine's loop asks for all of them, and would have every image decoded again. Default: 0.
        keep_states (bool): whether making the loader's iterator leaves the generators as they are. Default: False.

    Attributes:
        taken (int): batches of the pass that were consumed.
    """

    def __init__(self, loader: DataLoader, calls_without_batch: int = 0, keep_states: bool = False) -> None:
        self.loader, self.calls_without_batch, self.keep_states = loader, calls_without_batch, keep_states
        self.first_pass = loader.batch_sampler.next_pass
        self.pass_number, self.taken = self.first_pass, loader.batch_sampler.skip
        self.iterator: _InfiniteDataloaderIterator | None = None

    def __iter__(self) -> 'IterationBatches':
        return self

    def __next__(self) -> Any:
        if self.calls_without_batch:
            self.calls_without_batch -= 1
            return None
        if self.iterator is None:
            self.iterator = self._begin()
        batch = next(self.iterator)
        if self.pass_number != self.loader.batch_sampler.pass_number:
            self.pass_number, self.taken = self.loader.batch_sampler.pass_number, 0
        self.taken += 1
        return batch

    def skip_iter(self, num_iters: int) -> None:
        """onedl-mmengine's loop asks in this way for what mmengine's requests one by one when it resumes."""
        for _ in range(num_iters):
            next(self)

    def _begin(self) -> _InfiniteDataloaderIterator:
        sampler = getattr(self.loader.batch_sampler, 'sampler', None)
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(self.first_pass)
        states = generator_states() if self.keep_states else None
        iterator = _InfiniteDataloaderIterator(self.loader)
        if states:
            set_generator_states(states)
        iterator._epoch = self.first_pass
        return iterator
