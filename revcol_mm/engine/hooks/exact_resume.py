# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A resumed run is the uninterrupted one."""
import copy
import warnings
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
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
    generators (torch on the CPU and the GPU, numpy, Python). Resuming restores them, also in the middle of an epoch. The
    batches that the run consumed before are not read again: the sampler is advanced instead.

    With data-loader workers, the seeds of a batch follow from the run's seed, the process's rank, the pass over the data and
    the batch's number in it. So they do not depend on the number of workers, and passes differ (mmengine seeds workers that
    are not persistent alike in every epoch). The random numbers that a validation uses do not change those of the training.

    A run that goes on with another batch size, number of processes or number of samples is not exact, but its schedules end
    where they should, and with ``auto_scale_lr`` its learning rate is that of the new batch.

    A checkpoint is saved before the validation of its iteration, and a killed run may not have finished that validation. So a
    resumed run begins with it: its weights can become the best ones, and EarlyStoppingHook, whose count is stored, counts it.
    If its weights are the best ones, mmengine saves the checkpoint again after the validation. The resumed run repeats the
    validation then, too, but ReduceOnPlateau schedules, which have seen its metric, do not see it twice.

    A file of the best weights holds no states of the optimizer and its schedules. A run that goes on from it is not exact: the
    optimizer starts anew, and the schedules are put where they were, except those of ReduceOnPlateau, which begin anew.

    Between two updates of an accumulated gradient, one process stores the gradients, too. Several processes have different
    gradients, which are not stored; the log has a warning.

    Not covered: states that a data set, a transform or a part of the model keeps outside the checkpoint, iterable data sets,
    and train loops other than mmengine's two. In runs of several processes, checkpoints of hooks other than mmengine's
    CheckpointHook are not covered either.

    In a config: ``default_hooks = dict(exact_resume=dict(type='ExactResumeHook'))``. The package's tools add it.

    Raises:
        ValueError: before training, if a run has the hook twice.
    """

    # After the hooks that change what a checkpoint holds, right before CheckpointHook (VERY_LOW, 90).
    priority = 85

    def __init__(self) -> None:
        self.loaded: dict = {}  # the entry of the checkpoint that was loaded last
        self.missing: set[str] = set()  # what that checkpoint does not hold
        self.processes: list[dict] = []  # what all processes gave when they met last
        self.position: dict[str, int] = {}  # epochs and iterations that are done, and batches of the pass
        self.batches: NumberedBatches | None = None
        self.before_validation: dict | None = None
        self.warned_of_gradients = False

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        self.loaded = checkpoint.get('exact_resume') or {}
        self.missing = {'optimizer', 'param_schedulers'} - set(checkpoint)
        states = (checkpoint.get('optimizer') or {}).get('state') or {}
        for state in states.values():
            if 'step' in state:  # mmengine loads onto the GPU, from where the optimizer would fetch each count in each step
                state['step'] = torch.as_tensor(state['step']).cpu()

    def before_train(self, runner) -> None:
        if sum(isinstance(hook, ExactResumeHook) for hook in runner.hooks) > 1:
            raise ValueError('ExactResumeHook must stand once among the hooks of a run, but it stands there several times: '
                             'remove it from custom_hooks, or from default_hooks')
        loop, loader, resumed = runner.train_loop, runner.train_loop.dataloader, runner.iter > 0
        self.by_epoch, self.batches, self.seed = isinstance(loop, EpochBasedTrainLoop), None, runner.seed
        reason = _why_not_exact(loop)
        if reason:
            runner.logger.warning(f'this run cannot be resumed exactly: {reason}')
            return
        if not resumed:  # the checkpoint gave the weights to start from
            self.loaded = {}
        sampler = type(getattr(loader.batch_sampler, 'sampler', None)).__name__
        if sampler in ('GroupMultiSourceSampler', 'CustomSampleSizeSampler'):
            runner.logger.warning(f'this run cannot be resumed exactly, because a {sampler} does not begin anew in each pass')
        if resumed and get_world_size() > 2 and getattr(runner.model, 'find_unused_parameters', True) is False:
            runner.logger.warning('resuming is not exact to the last bit: DistributedDataParallel adds up the first gradients '
                                  'of a run in another order. With find_unused_parameters=True from the beginning of the run '
                                  'it does not')
        place = self._find_place(runner, loader) if resumed else {}
        if resumed and 'optimizer' in self.missing:
            runner.logger.warning('resuming is not exact: the checkpoint holds no optimizer state, as files of the best '
                                  'weights, so the optimizer starts anew')
        if resumed and self.missing and runner.param_schedulers:
            self._replay_schedules(runner)
        for hook, state in zip(_early_stopping(runner), self.loaded.get('early_stopping', [])):
            vars(hook).update(state)
        self.seed = place.get('seed', self.seed)
        self.position = dict(epoch=runner.epoch, iter=runner.iter, batch=place.get('batch', 0))
        # The workers of an iteration loop have begun to read: with other seeds, and from the first batch on.
        has_begun = loader.num_workers and not self.by_epoch
        inner = loader.batch_sampler
        if resumed or has_begun:
            inner = _fresh_batch_sampler(runner, loader, place.get('sampler_seed'))
        if isinstance(inner, NumberedBatches):  # of an earlier run in this process
            inner = inner.batch_sampler
        self.batches = NumberedBatches(inner, (self.seed, get_rank()) if loader.num_workers else None)
        vars(loader)['batch_sampler'] = self.batches  # DataLoader refuses an assignment
        if loader.num_workers:  # starting workers draws a number; those of an uninterrupted run may have been started before
            loader.generator = torch.Generator().manual_seed(self.seed + get_rank())
        if resumed:
            self._restore_gradients(runner)
        if not self.by_epoch:
            self._skip(place)
            if resumed or has_begun:
                loop.dataloader_iterator = loader._iterator = None
            loop.dataloader_iterator = IterationBatches(loader, loop.iter, keep_states=not (resumed or has_begun))
        elif place.get('batch'):
            runner.logger.info(f'going on in epoch {loop.epoch + 1} after batch {place["batch"]} of {len(loader)}')
            self._skip(place)
            run_iter = loop.run_iter
            loop.run_iter = lambda idx, data_batch: run_iter(idx + place['batch'], data_batch)  # until the epoch ends
        elif 'now' in place:
            set_generator_states(place['now'])
        if resumed and _validation_is_due(runner, within_epoch=self.by_epoch and bool(place.get('batch'))):
            # It is called now, after all other hooks, and before the loop asks whether to stop.
            runner.register_hook(_FirstValidation(self.loaded.get('validated', False)), priority='LOWEST')
        self.loaded = {}

    def _find_place(self, runner, loader: DataLoader) -> dict[str, Any]:
        """Where this process goes on: the ``pass`` over the data, the ``batch`` in it, and what else was stored."""
        stored, rank, settings = self.loaded.get('processes', []), get_rank(), _settings(runner, loader)
        for process in filter(None, stored):
            process['settings'].setdefault('accumulated', 1)  # which older checkpoints do not hold
        first = next((process for process in stored if process), None)
        place, reason = {key: value for key, value in (first or {}).items() if key not in ('now', 'start')}, None
        if first is None:
            reason = 'the checkpoint holds no states of the random number generators, because ExactResumeHook did not write it'
            place = self._place_without_states(runner, loader)
        elif (first['epoch'], first['iter']) != (runner.epoch, runner.iter):
            reason = (f'the checkpoint holds the states of iteration {first["iter"]}, but its meta data name iteration '
                      f'{runner.iter}')
            place = self._place_without_states(runner, loader)
        elif first['settings'] != settings:
            reason = f'the checkpoint was written by {_describe(first["settings"])}, and now there are {_describe(settings)}'
            samples_done = first['batch'] * (first['settings']['batch_size'] or 1) * first['settings']['processes']
            # A part of a batch is read twice rather than not at all.
            place['batch'] = samples_done // ((settings['batch_size'] or 1) * settings['processes'])
            if self.by_epoch:
                place['batch'] = min(place['batch'], len(loader))
                self._move(runner, place['epoch'] * len(loader) + place['batch'])
            if 'optimizer' not in self.missing:  # a new one has the learning rate of the new batch
                self._fit_schedules(runner, first['settings'], settings)
        elif stored[rank] is None:
            reason = f'the checkpoint does not hold the states of process {rank}, because not all processes took part in saving'
        else:
            place = stored[rank]
            workers = f'the checkpoint was written with {place["workers"]} data-loader workers, and now there are ' \
                      f'{loader.num_workers}'
            if bool(place['workers']) != bool(loader.num_workers):
                reason = f'{workers}; without workers, the data take their random numbers from the main process'
            elif place['workers'] != loader.num_workers:
                runner.logger.warning(f'{workers}: resuming is not exact where transforms keep images or generators from '
                                      'sample to sample; otherwise it is')
        if reason:
            runner.logger.warning(f'resuming is not exact: {reason}')
        return place

    def _move(self, runner, iteration: int) -> None:
        """Goes on at another iteration than the checkpoint's, with a new count of the accumulated gradients."""
        runner.train_loop._iter = iteration
        # mmengine never sets the counts of the wrappers in an OptimWrapperDict.
        if getattr(runner.optim_wrapper, '_accumulative_counts', 1) > 1:
            runner.optim_wrapper.initialize_count_status(runner.model, iteration, runner.max_iters)
        if self.loaded.pop('gradients', None):
            runner.logger.warning('the gradients accumulated since the last update are left out, because the iterations are '
                                  'others now')

    def _fit_schedules(self, runner, before: dict, now: dict) -> None:
        """Puts the schedules, which mmengine resumes with their numbers of iterations, where a run of these settings would be.

        With ``auto_scale_lr``, the learning rate follows the batch.
        """
        schedulers, wrapper = runner.param_schedulers, runner.optim_wrapper
        if not isinstance(schedulers, list) or isinstance(wrapper, OptimWrapperDict):
            return
        sizes = [(settings['batch_size'] or 1) * settings['processes'] * settings['accumulated'] for settings in (before, now)]
        factor = sizes[1] / sizes[0] if (runner.cfg.get('auto_scale_lr') or {}).get('enable') else 1.
        if factor != 1:
            for group in wrapper.param_groups:
                for key in {'lr', 'initial_lr'} & set(group):
                    group[key] *= factor
            for scheduler in (scheduler for scheduler in schedulers if scheduler.param_name == 'lr'):
                scheduler.base_values = [value * factor for value in scheduler.base_values]
                scheduler._last_value = [value * factor for value in scheduler._last_value]
            runner.logger.warning(f'the learning rate is {factor:g} times that of the checkpoint, as auto_scale_lr wants it')
        if self.by_epoch and not all(scheduler.by_epoch for scheduler in schedulers):
            self._replay_schedules(runner)

    def _replay_schedules(self, runner) -> None:
        length, wrapper = len(runner.train_loop.dataloader), runner.optim_wrapper
        if isinstance(wrapper, OptimWrapperDict) or not runner.cfg.get('param_scheduler'):
            runner.logger.warning(f'the schedules are not those of iteration {runner.iter}: that needs one optimizer, and a '
                                  'runner that was built with a config that has param_scheduler')
            return
        for name in {scheduler.param_name for scheduler in runner.param_schedulers}:
            for group in (group for group in wrapper.param_groups if f'initial_{name}' in group):
                group[name] = group[f'initial_{name}']
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of steps of the schedules without a step of the optimizer
            if hasattr(runner, 'strategy'):
                schedulers = runner.strategy.build_param_scheduler(runner.cfg.param_scheduler, wrapper, dict(
                    epoch_length=length, max_epochs=runner.max_epochs, max_iters=runner.max_iters))
                runner.strategy.param_schedulers = schedulers
            else:
                schedulers = runner.build_param_scheduler(runner.cfg.param_scheduler)
            runner.param_schedulers = schedulers
            for iteration in range(1, runner.iter + 1):
                for scheduler in schedulers:
                    if not scheduler.by_epoch or self.by_epoch and iteration % length == 0:
                        scheduler.step()
        anew = ', except those that depend on a metric (ReduceOnPlateau), which begin anew' * bool(_on_plateau(runner))
        runner.logger.warning(f'the schedules go on at iteration {runner.iter} as those of a run that had these settings from '
                              f'the start{anew}')

    def _place_without_states(self, runner, loader: DataLoader) -> dict[str, int]:
        length = len(loader)
        if self.by_epoch:
            batch = runner.iter - runner.epoch * length
            number, batch = runner.epoch, batch if 0 <= batch <= length else 0
        elif type(getattr(loader.batch_sampler, 'sampler', None)).__name__ == 'InfiniteSampler':
            number, batch = 0, runner.iter
        else:
            number, batch = divmod(runner.iter, length)
        return {'pass': number, 'batch': batch}

    def _skip(self, place: dict) -> None:
        self.batches.next_pass, self.batches.skip = place.get('pass', 0), place.get('batch', 0)
        if 'now' in place:
            self.batches.states = place['start'], place['now']

    def _restore_gradients(self, runner) -> None:
        gradients = self.loaded.get('gradients', {})
        if gradients is None:
            runner.logger.warning('resuming is not exact: the checkpoint lies between two updates of an accumulated gradient, '
                                  'and several processes do not store their gradients')
        elif gradients:
            for name, parameter in _plain(runner.model).named_parameters():
                if name in gradients:
                    parameter.grad = gradients[name].to(parameter.device, copy=True)
            runner.logger.info('the gradients accumulated since the last update are taken from the checkpoint: none is lost')

    def before_train_epoch(self, runner) -> None:
        if self.by_epoch and self.batches is not None:
            self.batches.next_pass = runner.epoch

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        # Hooks save after the step. Those before this one in the order do so before its after_train_iter.
        if self.batches is not None:
            batch = batch_idx + 1 if self.by_epoch else runner.train_loop.dataloader_iterator.taken
            self.position = dict(epoch=runner.epoch, iter=runner.iter + 1, batch=batch)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        if any(not hook.by_epoch and (hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
                                      or hook.save_last and hook.is_last_train_iter(runner)) for hook in _savers(runner)):
            self._gather(runner)

    def after_train_epoch(self, runner) -> None:
        if self.by_epoch and self.batches is not None:
            vars(runner.train_loop).pop('run_iter', None)  # the next epoch counts from 0
            self.position = dict(epoch=runner.epoch + 1, iter=runner.iter, batch=0)
        if any(hook.by_epoch and (hook.every_n_epochs(runner, hook.interval, hook.save_begin)
                                  or hook.save_last and hook.is_last_train_epoch(runner)) for hook in _savers(runner)):
            self._gather(runner)

    def before_val(self, runner) -> None:
        self.before_validation = generator_states()
        if any(hook.save_best for hook in _savers(runner)):
            self._gather(runner)  # validation may write checkpoints; all processes are here, but not all write

    def after_val(self, runner) -> None:
        if self.before_validation is not None:
            set_generator_states(self.before_validation)
        self.before_validation = None

    def _gather(self, runner) -> None:
        if self.batches is not None:
            self.processes = all_gather_object(self._own(runner))

    def _own(self, runner) -> dict[str, Any]:
        """What this process stores."""
        loader, start, now = runner.train_loop.dataloader, self.batches.start, self.before_validation or generator_states()
        number = self.batches.pass_number
        if self.batches.states:  # a resumed run that has not asked for a batch yet
            (start, now), number = self.batches.states, self.batches.next_pass
        elif start is None:  # nor has one whose checkpoint held no states
            start, number = now, self.batches.next_pass
        return {**self.position, 'pass': self.position['epoch'] if self.by_epoch else number,
                'start': start, 'now': now, 'seed': int(self.seed),
                'sampler_seed': getattr(getattr(self.batches, 'sampler', None), 'seed', None),
                'workers': loader.num_workers, 'settings': _settings(runner, loader)}

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        if self.batches is None:
            return
        rank, processes = get_rank(), self.processes
        if not processes or any(processes[rank][key] != value for key, value in self.position.items()):
            # Another hook saves. The other processes may not be here, so they cannot be asked.
            processes = [None] * get_world_size()
            processes[rank] = self._own(runner)
        checkpoint['exact_resume'] = dict(
            processes=processes, validated=self.before_validation is not None,
            early_stopping=[dict(wait_count=hook.wait_count, best_score=hook.best_score) for hook in _early_stopping(runner)])
        # After a validation, mmengine's CheckpointHook writes numbers that are too high by one.
        checkpoint['meta'].update(epoch=self.position['epoch'], iter=self.position['iter'])
        if 'optimizer' in checkpoint and _between_updates(runner.optim_wrapper):
            self._store_gradients(runner, checkpoint['exact_resume'])

    def _store_gradients(self, runner, entry: dict) -> None:
        if get_world_size() == 1:
            entry['gradients'] = {name: parameter.grad.detach().cpu()
                                  for name, parameter in _plain(runner.model).named_parameters() if parameter.grad is not None}
            return
        entry['gradients'] = None
        if not self.warned_of_gradients:
            self.warned_of_gradients = True
            runner.logger.warning(
                f'the checkpoint of iteration {self.position["iter"]} lies between two updates of an accumulated gradient, and '
                'with several processes the gradients are not stored: resuming from it is not exact. Save every N iterations, '
                'where N is a multiple of optim_wrapper.accumulative_counts')


class _FirstValidation(Hook):
    """A resumed run validates the weights of its checkpoint first.

    Args:
        finished (bool): whether the checkpoint was saved after its validation had reached the schedules.
    """

    def __init__(self, finished: bool) -> None:
        self.finished, self.done = finished, False

    def before_train(self, runner) -> None:
        if self.done:  # a second training in this process
            return
        self.done = True
        runner.logger.info('the validation of the checkpoint follows, because the killed run may not have finished it')
        before = [(scheduler, copy.deepcopy(scheduler.state_dict()), [group[scheduler.param_name] for group in
                                                                      scheduler.optimizer.param_groups])
                  for scheduler in _on_plateau(runner) if self.finished]
        runner.val_loop.run()
        for scheduler, state, values in before:
            scheduler.load_state_dict(state)
            for group, value in zip(scheduler.optimizer.param_groups, values):
                group[scheduler.param_name] = value


def _on_plateau(runner) -> list:
    """The schedules that depend on a metric."""
    schedulers = runner.param_schedulers or []
    schedulers = [schedulers] if isinstance(schedulers, list) else schedulers.values()
    return [scheduler for group in schedulers for scheduler in group if getattr(scheduler, 'need_val_args', False)]


def _early_stopping(runner) -> list[EarlyStoppingHook]:
    return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]


def _validation_is_due(runner, within_epoch: bool) -> bool:
    """Whether mmengine's loops validate where the run goes on."""
    loop = runner.train_loop
    if runner.val_loop is None or within_epoch:
        return False
    loop._decide_current_val_interval()
    done, last = (runner.epoch, runner.max_epochs) if isinstance(loop, EpochBasedTrainLoop) else (runner.iter, runner.max_iters)
    return done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)


def _why_not_exact(loop: Any) -> str | None:
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


def _settings(runner, loader: DataLoader) -> dict[str, int | None]:
    """What the order of the samples and the updates depend on: with other settings a resumed run cannot be exact."""
    return dict(processes=get_world_size(), batch_size=getattr(loader.batch_sampler, 'batch_size', None),
                samples=len(loader.dataset), accumulated=getattr(runner.optim_wrapper, '_accumulative_counts', 1))


def _describe(settings: dict) -> str:
    return (f'{settings["processes"]} processes with {settings["batch_size"]} samples in a batch of {settings["samples"]} in '
            'all' + f', and {settings["accumulated"]} batches for an update' * (settings['accumulated'] > 1))


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
