# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A resumed run is the uninterrupted one."""
import copy
from typing import Any

from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import DATA_SAMPLERS, HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ..seeding import IterationBatches, NumberedBatches, generator_states, set_generator_states


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """A resumed run goes on bit by bit as the uninterrupted one would have.

    Checkpoints get an entry ``exact_resume``: for every process its place in the data and the states of its random number
    generators (torch on the CPU and the GPU, numpy, Python). Resuming restores them. The batches that were had before are not
    read again: the sampler is advanced instead, also to the middle of an epoch.

    With data-loader workers, every batch is read with random numbers that follow from the run's seed, the process's rank, the
    pass over the data and the batch's number in it. So they do not depend on how many workers there are, and passes differ
    (mmengine seeds workers that are not persistent alike in every epoch). What a validation draws is undone, so that it does
    not matter whether it was run.

    Between two updates of an accumulated gradient, one process stores the gradients, too. Several processes have different
    ones, which are not stored: the log has a warning.

    Not covered, and named in the log where it can be known: states that a data set or a transform keeps from sample to sample
    (generators of its own, images for mosaics), iterable data sets, train loops other than mmengine's two, and checkpoints of
    hooks that are not mmengine's CheckpointHook, in runs of several processes.

    In a config: ``default_hooks = dict(exact_resume=dict(type='ExactResumeHook'))``. The package's tools add it.
    """

    # After the hooks that change what a checkpoint holds, right before CheckpointHook (VERY_LOW, 90).
    priority = 85

    def __init__(self) -> None:
        self.loaded: dict | None = None
        self.processes: list[dict | None] = []
        self.position: dict[str, int] = {}
        self.before_validation: dict | None = None
        self.warned_of_gradients = False

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        self.loaded = checkpoint.get('exact_resume')

    def before_train(self, runner) -> None:
        if sum(isinstance(hook, ExactResumeHook) for hook in runner.hooks) > 1:
            raise ValueError('ExactResumeHook must stand once among the hooks of a run, but it stands there several times: '
                             'remove it from custom_hooks, or from default_hooks')
        loop, resumed = runner.train_loop, runner.iter > 0
        self.by_epoch = isinstance(loop, EpochBasedTrainLoop)
        self.seed, self.position = runner.seed, dict(epoch=runner.epoch, iter=runner.iter, batch=0)
        self.batches: NumberedBatches | None = None
        reason = _why_not(loop)
        if reason:
            runner.logger.warning(f'this run cannot be resumed exactly: {reason}')
            return
        loader = loop.dataloader
        place = self._place(runner, loader) if resumed else None
        if place and 'seed' in place:
            self.seed = place['seed']
        renewed = resumed or (loader.num_workers and not self.by_epoch)
        inner = _fresh_batch_sampler(runner, loader, (place or {}).get('sampler_seed')) if renewed else loader.batch_sampler
        if isinstance(inner, NumberedBatches):  # of an earlier run in this process
            inner = inner.batch_sampler
        self.batches = NumberedBatches(inner, (self.seed, get_rank()) if loader.num_workers else None)
        # DataLoader refuses an assignment. No iterator of it is in use: mmengine's is replaced below.
        vars(loader)['batch_sampler'] = self.batches
        if self.by_epoch:
            self._continue_epoch(runner, place)
        else:
            self._continue_iterations(loop, loader, place)
        self.loaded = None

    def _place(self, runner, loader: DataLoader) -> dict[str, Any]:
        """Where this process goes on: ``epoch``, ``iter``, ``pass`` over the data, ``batch``, and what else was stored."""
        length, rank, processes = len(loader), get_rank(), get_world_size()
        stored = self.loaded['processes'] if self.loaded else []
        place = stored[rank] if rank < len(stored) else None
        batch_size = getattr(loader.batch_sampler, 'batch_size', None)
        if place and (len(stored), place['batch_size']) == (processes, batch_size):
            runner.train_loop._epoch, runner.train_loop._iter = place['epoch'], place['iter']
            if bool(place['workers']) != bool(loader.num_workers):
                runner.logger.warning(
                    f'resuming is not exact: the checkpoint was written with {place["workers"]} data-loader workers, and there '
                    f'are {loader.num_workers} now; without workers, the data take their random numbers from the main process')
            elif place['workers'] != loader.num_workers:
                runner.logger.warning(
                    f'the checkpoint was written with {place["workers"]} data-loader workers, and there are '
                    f'{loader.num_workers} now: resuming is not exact where transforms keep images or generators from sample '
                    'to sample; otherwise it is')
            return place
        first = next((process for process in stored if process), None)
        if first is None:
            reason = 'the checkpoint holds no states of the random number generators, because ExactResumeHook did not write it'
            place = dict(epoch=runner.epoch, iter=runner.iter)
            place['pass'] = runner.epoch
            place['batch'] = runner.iter - runner.epoch * length
            if not self.by_epoch:
                endless = type(getattr(loader.batch_sampler, 'sampler', None)).__name__ == 'InfiniteSampler'
                place['pass'], place['batch'] = (0, runner.iter) if endless else divmod(runner.iter, length)
            elif not 0 <= place['batch'] <= length:
                place['batch'] = 0
        elif len(stored) == processes and first['batch_size'] == batch_size:
            reason = f'the checkpoint does not hold the states of process {rank}, because not all processes took part in saving'
            place = {key: value for key, value in first.items() if key not in ('now', 'start')}
        else:
            reason = (f'the checkpoint was written by {len(stored)} processes with {first["batch_size"]} samples in a batch, '
                      f'and there are {processes} processes with {batch_size} now')
            place = {key: value for key, value in first.items() if key not in ('now', 'start')}
            had = first['batch'] * (first['batch_size'] or 1) * len(stored)
            place['batch'] = had // ((batch_size or 1) * processes)  # a part of a batch is had twice rather than not at all
            if self.by_epoch:
                place['batch'] = min(place['batch'], length)
                place['iter'] = place['epoch'] * length + place['batch']
        runner.logger.warning(f'resuming is not exact: {reason}')
        runner.train_loop._epoch, runner.train_loop._iter = place['epoch'], place['iter']
        return place

    def _continue_epoch(self, runner, place: dict | None) -> None:
        if not place:
            return
        loop, first = runner.train_loop, place['batch']
        if first:
            runner.logger.info(f'going on in epoch {place["epoch"] + 1} after batch {first} of {len(loop.dataloader)}')
            self._skip(place)
            run_iter = loop.run_iter
            loop.run_iter = lambda idx, data_batch: run_iter(idx + first, data_batch)
        elif 'now' in place:
            set_generator_states(place['now'])
        self._restore_gradients(runner)

    def _continue_iterations(self, loop: IterBasedTrainLoop, loader: DataLoader, place: dict | None) -> None:
        if place:
            self._skip(place)
            self._restore_gradients(loop.runner)
        if place or loader.num_workers:
            # Its workers have begun to read: with other seeds, and from the first batch on.
            loop.dataloader_iterator = loader._iterator = None
        loop.dataloader_iterator = IterationBatches(loader, loop.iter, keep_states=not (place or loader.num_workers))

    def _skip(self, place: dict) -> None:
        self.batches.next_pass, self.batches.skip = place['pass'], place['batch']
        if 'now' in place:
            self.batches.states = place['start'], place['now']

    def _restore_gradients(self, runner) -> None:
        gradients = (self.loaded or {}).get('gradients')
        if gradients:
            for name, parameter in _plain(runner.model).named_parameters():
                if name in gradients:
                    parameter.grad = gradients[name].to(parameter.device, copy=True)
            runner.logger.info('the gradients accumulated since the last update are taken from the checkpoint: none is lost')

    def before_train_epoch(self, runner) -> None:
        if self.by_epoch and self.batches is not None:
            self.batches.next_pass = runner.epoch

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        taken = batch_idx + 1
        if not self.by_epoch and self.batches is not None:
            taken = runner.train_loop.dataloader_iterator.taken
        self.position = dict(epoch=runner.epoch, iter=runner.iter + 1, batch=taken)
        if any(not hook.by_epoch and (hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
                                      or hook.save_last and hook.is_last_train_iter(runner)) for hook in _savers(runner)):
            self._gather(runner)

    def after_train_epoch(self, runner) -> None:
        if self.by_epoch:
            vars(runner.train_loop).pop('run_iter', None)  # the next epoch counts from 0
            self.position = dict(epoch=runner.epoch + 1, iter=runner.iter, batch=0)
        if any(hook.by_epoch and (hook.every_n_epochs(runner, hook.interval, hook.save_begin)
                                  or hook.save_last and hook.is_last_train_epoch(runner)) for hook in _savers(runner)):
            self._gather(runner)

    def before_val(self, runner) -> None:
        self.before_validation = generator_states()
        if self.position and any(hook.save_best for hook in _savers(runner)):
            self._gather(runner)  # validation may write checkpoints; all processes are here, but not all write

    def after_val(self, runner) -> None:
        if self.before_validation is not None:
            set_generator_states(self.before_validation)
        self.before_validation = None

    def _own(self, runner) -> dict[str, Any]:
        own = dict(self.position, seed=int(self.seed), now=self.before_validation or generator_states())
        if self.batches is not None:
            loader = runner.train_loop.dataloader
            sampler_seed = getattr(getattr(self.batches, 'sampler', None), 'seed', None)
            own.update(start=self.batches.start, workers=loader.num_workers, sampler_seed=sampler_seed,
                       batch_size=getattr(self.batches, 'batch_size', None))
            own['pass'] = self.position['epoch'] if self.by_epoch else self.batches.pass_number
        return own

    def _gather(self, runner) -> None:
        self.processes = all_gather_object(self._own(runner))

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        rank, processes = get_rank(), self.processes
        if self.batches is None:
            return
        if not processes or any(processes[rank][key] != value for key, value in self.position.items()):
            # Saved by another hook: the other processes may not be here, so they cannot be asked.
            processes = [None] * get_world_size()
            processes[rank] = self._own(runner)
        entry: dict[str, Any] = dict(processes=processes)
        if 'optimizer' in checkpoint and _between_updates(runner.optim_wrapper):
            if len(processes) == 1:
                entry['gradients'] = {name: parameter.grad.detach().cpu()
                                      for name, parameter in _plain(runner.model).named_parameters()
                                      if parameter.grad is not None}
            elif not self.warned_of_gradients:
                self.warned_of_gradients = True
                runner.logger.warning(
                    f'the checkpoint of iteration {self.position["iter"]} lies between two updates of an accumulated gradient, '
                    'and with several processes the gradients are not stored: resuming from it is not exact. Save every N '
                    'iterations, where N is a multiple of optim_wrapper.accumulative_counts')
        checkpoint['exact_resume'] = entry


def _why_not(loop: Any) -> str | None:
    loader = loop.dataloader
    if not isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
        return f'the train loop must be an EpochBasedTrainLoop or an IterBasedTrainLoop, but it is a {type(loop).__name__}'
    if not isinstance(loader, DataLoader):
        return f'the training data must come from a torch DataLoader, but it comes from a {type(loader).__name__}'
    if isinstance(loader.dataset, IterableDataset):
        return f'the data set must be indexed, but {type(loader.dataset).__name__} is iterable'
    if loader.batch_sampler is None:
        return 'the data loader must make batches, but its batch_size is None'
    return None


def _fresh_batch_sampler(runner, loader: DataLoader, seed: int | None) -> Any:
    """The loader's batch sampler before it was asked for anything, with this seed, or its own if None.

    An iteration loop's iterator has asked it for batches, and samplers such as InfiniteSampler do not begin anew. A resumed
    run may have drawn another seed.
    """
    batch_sampler, settings = loader.batch_sampler, runner._train_dataloader
    sampler = getattr(batch_sampler, 'sampler', None)
    seed = getattr(sampler, 'seed', None) if seed is None else seed
    if isinstance(settings, dict) and isinstance(settings.get('sampler'), dict):
        arguments = dict(dataset=loader.dataset, seed=seed)
        fresh = DATA_SAMPLERS.build(copy.deepcopy(settings['sampler']), default_args=arguments)
        if isinstance(settings.get('batch_sampler'), dict):
            return DATA_SAMPLERS.build(copy.deepcopy(settings['batch_sampler']),
                                       default_args=dict(sampler=fresh, batch_size=settings.get('batch_size')))
        if type(getattr(batch_sampler, 'batch_sampler', batch_sampler)) is BatchSampler:
            vars(loader)['sampler'] = fresh  # mmengine sets the epoch here
            return BatchSampler(fresh, loader.batch_size, loader.drop_last)
    elif sampler is not None:
        if hasattr(sampler, 'seed'):
            sampler.seed = seed
        if hasattr(sampler, '_indices_of_rank') and hasattr(sampler, 'indices'):  # mmengine's InfiniteSampler
            sampler.indices = sampler._indices_of_rank()
    return batch_sampler


def _savers(runner) -> list[CheckpointHook]:
    return [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]


def _between_updates(optim_wrapper: Any) -> bool:
    wrappers = optim_wrapper.values() if isinstance(optim_wrapper, OptimWrapperDict) else [optim_wrapper]
    return any(hasattr(wrapper, 'should_update') and not wrapper.should_update() for wrapper in wrappers)


def _plain(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model
