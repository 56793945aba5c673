# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A resumed run is the uninterrupted one, bit by bit.

The toy's data set and model draw from torch's, numpy's and Python's generators, so that a single number more or less shows in
the weights. Runs are compared with one another only, never with a stored value.
"""
import logging
import pickle
import random
import time

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from revcol_mm.apis.runner import _add_exact_resume
from revcol_mm.engine import ExactResumeHook
from revcol_mm.engine.seeding import SeededBatch, generator_states, seed_worker, set_generator_states

from ..common import CONFIGS

SIZE = 10  # samples


class Noise(Dataset):
    """Samples that are their number and noise of all three generators."""

    reads = 0

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        Noise.reads += 1  # of this process
        return dict(inputs=torch.tensor([index, torch.rand(()).item(), np.random.rand(), random.random()]))


class Toy(BaseModel):

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        inputs = torch.stack(inputs)
        if mode == 'predict':
            return [torch.rand(2), np.random.rand(), random.random()]  # validation draws as well
        factor = np.random.rand() + random.random()
        return dict(loss=(self.layers(inputs) * factor).square().mean())


class Metric(BaseMetric):

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(count=len(results))


class Recorder(Hook):
    """Which samples were trained on, and with which noise; ends the run where told to."""

    priority = 'LOWEST'

    def __init__(self, stop=None, where='after_train_iter'):
        self.stop, self.where, self.seen, self.batch_indices, self.logged = stop, where, [], [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append(torch.stack(data_batch['inputs']))
        self.batch_indices.append(batch_idx)
        self.logged.append(runner.max_iters - runner.iter - 1)
        if self.where == 'after_train_iter' and runner.iter + 1 == self.stop:
            raise KeyboardInterrupt

    def after_val_iter(self, runner, *args, **kwargs):
        if self.where == 'after_val_iter' and runner.iter == self.stop:
            raise KeyboardInterrupt


def run(folder, recorder=None, *, by_epoch=False, workers=0, persistent=False, resume=False, interval=2, by_iter=True, end=None,
        hooks=(), hook=True, val=0, accumulate=1, seed=5, sampler=None, batch_size=2, save_best=None, loader=None,
        schedule=None, scales=False, load_from=None):
    """Trains the toy; a pass over its data has five batches of two."""
    recorder = recorder or Recorder()
    sampler = sampler or ('DefaultSampler' if by_epoch else 'InfiniteSampler')
    end = end or (3 if by_epoch else 9)
    train_cfg = dict(by_epoch=by_epoch, val_interval=val or 1000, **({'max_epochs': end} if by_epoch else {'max_iters': end}))
    default_hooks = dict(checkpoint=dict(
        type='CheckpointHook', by_epoch=by_epoch and not by_iter, interval=interval, save_best=save_best))
    if hook:
        default_hooks['exact_resume'] = dict(type='ExactResumeHook')
    validation = dict(val_dataloader=dict(dataset=Noise(), batch_size=5, num_workers=0, sampler=dict(
        type='DefaultSampler', shuffle=False)), val_cfg=dict(), val_evaluator=[Metric()]) if val else {}
    schedule = schedule or dict(type='CosineAnnealingLR', by_epoch=False, T_max=20, end=20)
    torch.manual_seed(0)  # the first weights: the model is made before the runner seeds
    model = Toy()
    runner = Runner(
        model, str(folder), experiment_name=f'{folder.name}{time.time_ns()}', train_cfg=train_cfg,
        train_dataloader=loader or dict(dataset=Noise(), batch_size=batch_size, num_workers=workers,
                                        persistent_workers=persistent, sampler=dict(type=sampler, shuffle=True)),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-2), accumulative_counts=accumulate),
        param_scheduler=schedule, cfg=Config(dict(param_scheduler=[schedule], auto_scale_lr=dict(enable=scales))),
        default_hooks=default_hooks, custom_hooks=[*hooks, recorder], resume=resume,
        load_from=str(folder / resume) if isinstance(resume, str) else load_from,
        randomness=dict(seed=seed), log_level='WARNING', **validation)
    runner._resume = bool(resume)
    Noise.reads = 0
    try:
        runner.train()
    except KeyboardInterrupt:
        assert recorder.stop is not None
    # Workers end now: Python's garbage collector would end them after their queues, which takes five seconds each.
    runner.train_loop.dataloader_iterator = runner.train_loop.dataloader._iterator = None
    recorder.runner = runner
    return recorder


def weights(recorder):
    model = recorder.runner.model
    return {**model.state_dict(), **{f'step {i}': s['exp_avg'] for i, s in enumerate(
        recorder.runner.optim_wrapper.optimizer.state_dict()['state'].values())}}


def assert_same(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different


def disturb():
    """The generators of a new process are elsewhere."""
    torch.manual_seed(99), np.random.seed(98), random.seed(97)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)  # between passes, two seconds


LOADERS = [dict(workers=0), dict(workers=1), pytest.param(dict(workers=2), marks=pytest.mark.slow),
           dict(workers=2, persistent=True), pytest.param(dict(workers=1, persistent=True), marks=pytest.mark.slow)]
LOOPS = [dict(), dict(sampler='DefaultSampler'), dict(by_epoch=True)]


@pytest.mark.parametrize('loader', LOADERS, ids=['main', 'one', 'two', 'two-persistent', 'one-persistent'])
@pytest.mark.parametrize('loop', LOOPS, ids=['iterations', 'passes', 'epochs'])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, loop, loader):
    whole = run(tmp_path / 'whole', **loop, **loader)
    run(tmp_path / 'cut', Recorder(stop=7), **loop, **loader)
    disturb()
    resumed = run(tmp_path / 'cut', resume='iter_6.pth', **loop, **loader)
    assert torch.equal(torch.cat(resumed.seen), torch.cat(whole.seen[6:]))
    assert_same(resumed, whole)


@pytest.mark.parametrize('loader', LOADERS, ids=['main', 'one', 'two', 'two-persistent', 'one-persistent'])
def test_a_checkpoint_between_epochs_resumes_exactly(tmp_path, loader):
    settings = dict(by_epoch=True, by_iter=False, interval=1, **loader)
    whole = run(tmp_path / 'whole', **settings)
    run(tmp_path / 'cut', Recorder(stop=8), **settings)
    disturb()
    assert_same(run(tmp_path / 'cut', resume='epoch_1.pth', **settings), whole)


@pytest.mark.parametrize('iteration', [3, 5, 8, 14, 15])
def test_an_epoch_is_continued_where_it_was_left(tmp_path, iteration):
    settings = dict(by_epoch=True, interval=1)
    whole = run(tmp_path / 'run', **settings)
    disturb()
    resumed = run(tmp_path / 'run', resume=f'iter_{iteration}.pth', **settings)
    assert len(resumed.seen) == 15 - iteration  # three epochs of five
    assert resumed.batch_indices == whole.batch_indices[iteration:]
    assert all(left >= 0 for left in resumed.logged)
    assert_same(resumed, whole)


def test_the_last_checkpoint_is_written_after_resuming_within_an_epoch(tmp_path):
    run(tmp_path, Recorder(stop=9), by_epoch=True, interval=4)
    run(tmp_path, resume='iter_8.pth', by_epoch=True, interval=4)
    assert torch.load(tmp_path / 'iter_15.pth', weights_only=True)['meta']['iter'] == 15


@pytest.mark.parametrize('by_epoch', [False, True])
def test_a_run_can_be_resumed_again_and_again(tmp_path, by_epoch):
    whole = run(tmp_path / 'whole', by_epoch=by_epoch, interval=1, sampler='DefaultSampler')
    last = None
    for stop in (2, 3, 6, None):
        last = run(tmp_path / 'cut', Recorder(stop=stop), by_epoch=by_epoch, interval=1, sampler='DefaultSampler',
                   resume=last is not None and f'iter_{last}.pth') and stop
        disturb()
    assert_same(run(tmp_path / 'cut', by_epoch=by_epoch, interval=1, sampler='DefaultSampler', resume='iter_6.pth'), whole)


@pytest.mark.parametrize('by_epoch', [False, True])
def test_a_killed_validation_costs_nothing(tmp_path, by_epoch):
    settings = dict(by_epoch=by_epoch, val=1 if by_epoch else 5, interval=5)
    whole = run(tmp_path / 'whole', **settings)
    run(tmp_path / 'cut', Recorder(stop=5, where='after_val_iter'), **settings)
    disturb()
    assert_same(run(tmp_path / 'cut', resume='iter_5.pth', **settings), whole)


@pytest.mark.parametrize('by_epoch', [False, True])
def test_weights_whose_validation_was_killed_are_validated_and_can_be_the_best(tmp_path, by_epoch):
    settings = dict(by_epoch=by_epoch, val=1 if by_epoch else 5, interval=5, save_best='acc', hooks=[Renamed()])
    whole = run(tmp_path / 'whole', **settings)
    run(tmp_path / 'cut', Recorder(stop=5, where='after_val_iter'), **settings)
    assert not list((tmp_path / 'cut').glob('best*'))
    disturb()
    run(tmp_path / 'cut', Recorder(stop=6), resume='iter_5.pth', **settings)  # which writes iter_5.pth again
    bests = [[path.name for path in (tmp_path / name).glob('best*')] for name in ('whole', 'cut')]
    assert bests[0] == bests[1] and len(bests[0]) == 1
    disturb()
    assert_same(run(tmp_path / 'cut', resume='iter_5.pth', **settings), whole)


def test_a_run_that_was_killed_in_its_last_validation_has_a_metric_when_it_is_resumed(tmp_path):
    settings = dict(val=5, interval=5, end=10, save_best='acc', hooks=[Improving()])
    run(tmp_path, Recorder(stop=10, where='after_val_iter'), **settings)
    assert [path.name for path in tmp_path.glob('best*')] == ['best_acc_iter_5.pth']
    resumed = run(tmp_path, resume='iter_10.pth', **settings)
    assert resumed.seen == [] and (tmp_path / 'best_acc_iter_10.pth').is_file()


@pytest.mark.parametrize('by_epoch, last, val, expected', [
    (False, 4, 5, []), (False, 5, 5, [5]), (False, 9, 5, [9]), (True, 5, 1, [5]), (True, 3, 1, []), (True, 5, 2, [])])
def test_only_a_validation_that_is_due_is_made(tmp_path, by_epoch, last, val, expected):
    made = []

    class Counts(Hook):
        def after_val(self, runner):
            made.append(runner.iter)

    settings = dict(by_epoch=by_epoch, val=val, interval=1)
    run(tmp_path, Recorder(stop=last), **settings) if last < 9 else run(tmp_path, **settings)
    run(tmp_path, Recorder(stop=last + 1), resume=f'iter_{last}.pth', hooks=[Counts()], **settings)
    assert made == expected


def test_the_checkpoint_that_validation_writes_again_resumes_exactly(tmp_path):
    settings = dict(val=5, interval=5, save_best='count')
    with pytest.raises(ValueError):
        run(tmp_path / 'none', **dict(settings, save_best='nothing known'))
    settings['save_best'] = 'acc'
    whole = run(tmp_path / 'whole', **settings, hooks=[Renamed()])
    run(tmp_path / 'cut', Recorder(stop=6), **settings, hooks=[Renamed()])
    disturb()
    assert (tmp_path / 'cut' / 'best_acc_iter_5.pth').exists()
    assert_same(run(tmp_path / 'cut', resume='iter_5.pth', **settings, hooks=[Renamed()]), whole)


class Renamed(Hook):
    priority = 'VERY_HIGH'

    def after_val_epoch(self, runner, metrics):
        metrics['acc'] = 1.0


class Falling(Renamed):

    def after_val_epoch(self, runner, metrics):
        metrics['acc'] = -float(runner.iter)


class Improving(Renamed):

    def after_val_epoch(self, runner, metrics):
        metrics['acc'] = float(runner.iter)


def test_validation_leaves_no_trace_in_the_training(tmp_path):
    assert_same(run(tmp_path / 'with', val=2), run(tmp_path / 'without'))


def test_the_average_of_the_weights_goes_on_exactly(tmp_path):
    hooks = [dict(type='EMAHook', momentum=0.1)]
    run(tmp_path / 'whole', hooks=hooks, interval=3)
    run(tmp_path / 'cut', Recorder(stop=7), hooks=hooks, interval=3)
    disturb()
    run(tmp_path / 'cut', hooks=hooks, interval=3, resume='iter_6.pth')
    one, other = (torch.load(tmp_path / name / 'iter_9.pth', weights_only=True) for name in ('whole', 'cut'))
    for part in ('state_dict', 'ema_state_dict'):
        assert all(torch.equal(value, other[part][key]) for key, value in one[part].items())


@pytest.mark.parametrize('iteration', [6, 7, 8])
def test_accumulated_gradients_are_not_lost(tmp_path, iteration):
    whole = run(tmp_path / 'run', accumulate=3, interval=1)
    disturb()
    assert_same(run(tmp_path / 'run', accumulate=3, interval=1, resume=f'iter_{iteration}.pth'), whole)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('by_epoch', [False, True])
def test_a_run_without_a_seed_keeps_the_order_of_its_samples(tmp_path, by_epoch, workers):
    settings = dict(by_epoch=by_epoch, seed=None, workers=workers)
    whole = run(tmp_path / 'run', **settings)
    disturb()
    assert_same(run(tmp_path / 'run', resume='iter_6.pth', **settings), whole)


@pytest.mark.parametrize('by_epoch', [False, True])
def test_torchs_own_shuffling_goes_on_exactly(tmp_path, by_epoch):
    def loader():
        return torch.utils.data.DataLoader(Noise(), batch_size=2, shuffle=True, collate_fn=pseudo_collate)

    whole = run(tmp_path / 'run', by_epoch=by_epoch, loader=loader())
    disturb()
    assert_same(run(tmp_path / 'run', by_epoch=by_epoch, loader=loader(), resume='iter_8.pth'), whole)


@pytest.mark.parametrize('loop', LOOPS, ids=['iterations', 'passes', 'epochs'])
def test_without_workers_and_validation_the_hook_changes_nothing(tmp_path, loop):
    assert_same(run(tmp_path / 'with', **loop), run(tmp_path / 'without', hook=False, **loop))


@pytest.mark.parametrize('persistent', [False, True])
def test_epochs_differ_in_their_random_numbers(tmp_path, persistent):
    seen = run(tmp_path, by_epoch=True, workers=2, persistent=persistent).seen
    noise = torch.cat(seen)[:, 1:]
    assert len(torch.unique(noise, dim=0)) == 3 * SIZE


def test_mmengine_alone_repeats_the_random_numbers_of_an_epoch(tmp_path):
    """Why the seeds are made anew; when this fails, mmengine has mended it."""
    noise = torch.cat(run(tmp_path, by_epoch=True, workers=2, hook=False).seen)[:, 1:]
    assert len(torch.unique(noise, dim=0)) == SIZE


def test_the_number_of_workers_does_not_change_the_samples(tmp_path):
    one, two = (run(tmp_path / str(workers), workers=workers) for workers in (1, 2))
    assert torch.equal(torch.cat(one.seen), torch.cat(two.seen))


def test_samples_are_not_read_again_to_skip_them(tmp_path):
    run(tmp_path, Recorder(stop=7))
    resumed = run(tmp_path, resume='iter_6.pth')
    assert len(resumed.seen) == 3
    assert Noise.reads == 6


def test_checkpoints_load_safely_and_hold_no_more_than_data(tmp_path):
    run(tmp_path)
    entry = torch.load(tmp_path / 'iter_6.pth', weights_only=True)['exact_resume']
    assert [process['iter'] for process in entry['processes']] == [6]


@pytest.fixture
def warnings_of(monkeypatch):
    said = []
    monkeypatch.setattr(logging.Logger, 'warning', lambda self, message, *args, **kwargs: said.append(str(message)))
    return said


def test_a_checkpoint_without_states_goes_on_and_says_so(tmp_path, warnings_of):
    run(tmp_path, hook=False, by_epoch=True)
    resumed = run(tmp_path, resume='iter_8.pth', by_epoch=True)
    assert len(resumed.seen) == 7
    assert any('resuming is not exact: the checkpoint holds no states' in message for message in warnings_of)


def test_other_workers_go_on_and_say_so(tmp_path, warnings_of):
    run(tmp_path, workers=1)
    run(tmp_path, resume='iter_8.pth', workers=0)
    assert any('not exact: the checkpoint was written with 1 data-loader workers' in message for message in warnings_of)
    warnings_of.clear()
    run(tmp_path, resume='iter_8.pth', workers=2)
    assert any('now there are 2: resuming is not exact where transforms keep' in message for message in warnings_of)


def test_another_batch_size_goes_on_without_losing_samples(tmp_path, warnings_of):
    whole = run(tmp_path, by_epoch=True)
    resumed = run(tmp_path, resume='iter_8.pth', by_epoch=True, batch_size=5)
    # Six of the ten samples of epoch 2 were had: it goes on with the sixth, which is had twice, in the second of two batches.
    assert torch.equal(resumed.seen[0][:, 0], torch.cat(whole.seen[5:10])[5:, 0])
    assert len(resumed.seen) == 3
    assert all(left >= 0 for left in resumed.logged)
    assert any('by 1 processes with 2 samples in a batch' in message for message in warnings_of)


def test_accumulated_gradients_are_counted_from_the_new_iteration_of_another_batch_size(tmp_path, warnings_of):
    class Begins(Hook):
        priority = 'LOWEST'

        def before_train(self, runner):
            self.count = runner.optim_wrapper.inner_count
            self.gradients = [parameter.grad for parameter in runner.model.parameters() if parameter.grad is not None]

    begins = Begins()
    run(tmp_path, Recorder(stop=9), by_epoch=True, accumulate=3, interval=8)  # iteration 8 is between two updates
    resumed = run(tmp_path, resume='iter_8.pth', by_epoch=True, accumulate=3, batch_size=5, hooks=[begins])
    assert (begins.count, resumed.runner.optim_wrapper.inner_count) == (3, 6)  # of three epochs of two batches
    assert not begins.gradients
    assert any('accumulated since the last update are left out' in message for message in warnings_of)


@pytest.mark.parametrize('scales', [False, True])
@pytest.mark.parametrize('schedule, by_epoch', [
    (dict(type='CosineAnnealingLR', by_epoch=True, T_max=3, convert_to_iter_based=True), True),
    (dict(type='LinearLR', by_epoch=True, start_factor=0.1, end=3, convert_to_iter_based=True), True),
    (dict(type='MultiStepLR', by_epoch=True, milestones=[1, 2]), True),
    (dict(type='CosineAnnealingLR', by_epoch=False, T_max=9), False)])
def test_the_schedule_with_another_batch_size_is_that_of_a_run_which_always_had_it(tmp_path, schedule, by_epoch, scales):
    rates = {}

    class Rates(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            rates.setdefault(runner, []).append(runner.optim_wrapper.param_groups[0]['lr'])

    settings = dict(by_epoch=by_epoch, schedule=schedule)
    run(tmp_path / 'first', interval=5, **settings)  # batches of two: five in an epoch
    resumed = run(tmp_path / 'first', resume='iter_5.pth', batch_size=5, scales=scales, hooks=[Rates()], **settings)
    whole = run(tmp_path / 'whole', batch_size=5, hooks=[Rates()], **settings)
    ours, expected = rates[resumed.runner], rates[whole.runner][-len(rates[resumed.runner]):]
    assert len(ours) == 4
    assert ours == pytest.approx([rate * (2.5 if scales else 1) for rate in expected])


@pytest.mark.parametrize('accumulate, factor', [(5, 1), (1, 0.2), (10, 2)])
def test_the_learning_rate_counts_the_batches_that_are_accumulated(tmp_path, warnings_of, accumulate, factor):
    run(tmp_path, Recorder(stop=3), batch_size=10, schedule=dict(type='ConstantLR', factor=1.))
    resumed = run(tmp_path, resume='iter_2.pth', batch_size=2, accumulate=accumulate, scales=True,
                  schedule=dict(type='ConstantLR', factor=1.))
    assert resumed.runner.optim_wrapper.param_groups[0]['lr'] == pytest.approx(1e-2 * factor)
    batches = f', and {accumulate} batches for an update' * (accumulate > 1)
    assert any(f'now there are 1 processes with 2 samples in a batch of 10 in all{batches}' in text for text in warnings_of)


def test_another_accumulation_alone_is_told(tmp_path, warnings_of):
    run(tmp_path, Recorder(stop=3))
    resumed = run(tmp_path, resume='iter_2.pth', accumulate=2, scales=True)
    assert any('the learning rate is 2 times that of the checkpoint' in text for text in warnings_of)
    assert len(resumed.seen) == 7 and resumed.runner.iter == 9


@pytest.mark.parametrize('schedule, by_epoch', [
    (dict(type='LinearLR', by_epoch=False, start_factor=0.1, end=8), False), (dict(type='StepLR', step_size=1), True)])
def test_a_file_of_the_best_weights_goes_on_in_the_schedule_and_says_that_it_is_not_exact(
        tmp_path, warnings_of, schedule, by_epoch):
    rates = {}

    class Rates(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            rates.setdefault(runner, []).append(runner.optim_wrapper.param_groups[0]['lr'])

    settings = dict(by_epoch=by_epoch, schedule=schedule, val=1 if by_epoch else 5, save_best='acc', end=2 if by_epoch else 9)
    whole = run(tmp_path, hooks=[Renamed(), Rates()], **settings)
    best, = tmp_path.glob('best_acc_*.pth')
    resumed = run(tmp_path, hooks=[Renamed(), Rates()], resume=best.name, **settings)
    assert rates[resumed.runner] == pytest.approx(rates[whole.runner][5:])
    assert any('not exact: the checkpoint holds no optimizer state' in message for message in warnings_of)


def test_early_stopping_goes_on_counting(tmp_path):
    def stopping():
        return EarlyStoppingHook('count', rule='greater', min_delta=1, patience=3)

    run(tmp_path, val=2, interval=2, end=4, hooks=[stopping()])
    resumed = run(tmp_path, val=2, interval=2, end=20, resume='iter_4.pth', hooks=[stopping()])
    whole = run(tmp_path / 'whole', val=2, interval=2, end=20, hooks=[stopping()])
    # The first validation is the best. Without its count the resumed run would end after iteration 12, and without the
    # validation at iteration 4, which comes after the checkpoint, at 10.
    assert (whole.runner.iter, resumed.runner.iter) == (8, 8)
    fresh = run(tmp_path / 'fresh', val=2, interval=2, end=20, load_from=str(tmp_path / 'iter_4.pth'), hooks=[stopping()])
    assert fresh.runner.iter == 8


def test_a_run_that_its_validation_stops_trains_no_further_epoch(tmp_path):
    def stopping():
        return EarlyStoppingHook('count', rule='greater', min_delta=1, patience=1)

    settings = dict(by_epoch=True, by_iter=False, val=1, interval=1, end=9)
    whole = run(tmp_path / 'whole', hooks=[stopping()], **settings)
    run(tmp_path / 'cut', Recorder(stop=10, where='after_val_iter'), hooks=[stopping()], **settings)
    resumed = run(tmp_path / 'cut', resume='epoch_2.pth', hooks=[stopping()], **settings)
    assert (whole.runner.epoch, resumed.runner.epoch) == (2, 2) and resumed.seen == []


@pytest.mark.parametrize('cut', ['before', 'after'])
def test_schedules_that_depend_on_a_metric_see_each_validation_once(tmp_path, cut):
    settings = dict(by_epoch=True, by_iter=False, val=1, interval=1, end=6, save_best='acc', hooks=[Falling()], schedule=dict(
        type='ReduceOnPlateauLR', monitor='acc', rule='greater', patience=1))
    whole = run(tmp_path / 'whole', **settings)
    # Killed in the validation of the best weights, or after mmengine has saved their checkpoint again.
    run(tmp_path / 'cut', Recorder(stop=5, where='after_val_iter') if cut == 'before' else Recorder(stop=6), **settings)
    disturb()
    resumed = run(tmp_path / 'cut', resume='epoch_1.pth', **settings)
    assert_same(resumed, whole)
    first, second = (other.runner.param_schedulers[0].state_dict() for other in (resumed, whole))
    assert first == second and first['_last_value'][0] < 1e-2


@pytest.mark.parametrize('by_epoch', [False, True])
def test_best_weights_of_a_run_that_was_resumed_without_states_can_be_resumed(tmp_path, by_epoch):
    settings = dict(by_epoch=by_epoch, val=1 if by_epoch else 5, interval=5, save_best='acc', hooks=[Renamed()])
    run(tmp_path, Recorder(stop=5, where='after_val_iter'), hook=False, **settings)
    run(tmp_path, Recorder(stop=6), resume='iter_5.pth', **settings)
    best, = tmp_path.glob('best*')
    assert run(tmp_path, resume=best.name, **settings).runner.iter == (15 if by_epoch else 9)


def test_weights_to_start_from_restore_no_states(tmp_path):
    run(tmp_path / 'first')
    (tmp_path / 'second').mkdir()
    (tmp_path / 'second' / 'start.pth').write_bytes((tmp_path / 'first' / 'iter_6.pth').read_bytes())
    recorder = Recorder()

    class Loads(Hook):
        def before_train(self, runner):
            runner.load_checkpoint(str(tmp_path / 'second' / 'start.pth'))

    run(tmp_path / 'second', recorder, hooks=[Loads()])
    fresh = run(tmp_path / 'third')
    assert torch.equal(torch.cat(recorder.seen)[:, 0], torch.cat(fresh.seen)[:, 0])
    assert len(recorder.seen) == 9


def test_the_best_checkpoint_and_the_last_one_count_the_iterations_that_are_done(tmp_path):
    run(tmp_path, val=4, interval=4, save_best='acc', hooks=[Renamed()], end=6)
    for name in ('best_acc_iter_4.pth', 'iter_4.pth'):
        contents = torch.load(tmp_path / name, weights_only=True)
        assert contents['meta']['iter'] == contents['exact_resume']['processes'][0]['iter'] == 4


class Saver(Hook):
    """Saves at iteration 5, after the schedulers' step (LOW, 70) and before ExactResumeHook's turn."""

    priority = 80

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == 5:
            runner.save_checkpoint(runner.work_dir, 'own.pth', by_epoch=False)


@pytest.mark.parametrize('by_epoch', [False, True])
def test_a_checkpoint_of_another_hook_resumes_exactly(tmp_path, by_epoch):
    whole = run(tmp_path, by_epoch=by_epoch, hooks=[Saver()])
    disturb()
    assert_same(run(tmp_path, by_epoch=by_epoch, resume='own.pth'), whole)


def test_a_checkpoint_whose_iteration_was_changed_goes_on_and_says_so(tmp_path, warnings_of):
    whole = run(tmp_path, interval=1)
    contents = torch.load(tmp_path / 'iter_2.pth', weights_only=True)
    contents['meta']['iter'] = 6
    torch.save(contents, tmp_path / 'changed.pth')
    resumed = run(tmp_path, resume='changed.pth')
    assert torch.equal(torch.cat(resumed.seen)[:, 0], torch.cat(whole.seen[6:])[:, 0])
    assert any('states of iteration 2, but its meta data name iteration 6' in message for message in warnings_of)


def test_another_data_set_goes_on_and_says_so(tmp_path, monkeypatch, warnings_of):
    run(tmp_path)
    monkeypatch.setattr(Noise, '__len__', lambda self: SIZE + 2)
    assert len(run(tmp_path, resume='iter_8.pth').seen) == 1
    assert any('2 samples in a batch of 10 in all, and now' in message for message in warnings_of)


def test_two_hooks_are_refused(tmp_path):
    with pytest.raises(ValueError, match='must stand once'):
        run(tmp_path, hooks=[ExactResumeHook()])


def test_a_hundred_thousand_iterations_are_skipped_in_seconds(tmp_path):
    run(tmp_path, Recorder(stop=2))
    file = tmp_path / 'iter_2.pth'
    checkpoint = torch.load(file, weights_only=True)
    checkpoint['meta']['iter'] = checkpoint['exact_resume']['processes'][0]['iter'] = 100_000
    checkpoint['exact_resume']['processes'][0]['batch'] = 100_000
    torch.save(checkpoint, file)
    begin = time.process_time()
    assert len(run(tmp_path, resume='iter_2.pth', end=100_002).seen) == 2
    assert time.process_time() - begin < 10  # 1.0 s on the machine where this was written


def test_generator_states_come_back():
    states = generator_states()
    first = torch.rand(3), np.random.randn(3), random.gauss(0, 1)  # randn and gauss keep a number for next time
    again = generator_states()
    second = torch.rand(3), np.random.randn(3), random.gauss(0, 1)
    for saved, drawn in ((again, second), (states, first)):
        set_generator_states(saved)
        assert torch.equal(torch.rand(3), drawn[0])
        assert np.array_equal(np.random.randn(3), drawn[1])
        assert random.gauss(0, 1) == drawn[2]


def test_other_origins_give_other_seeds():
    numbers = set()
    origins = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    for origin in origins:
        seed_worker(origin)
        numbers.update([torch.rand(()).item(), np.random.rand(), random.random()])
    assert len(numbers) == 3 * len(origins)


def test_a_batch_arrives_as_a_plain_list_with_its_seeds():
    received = pickle.loads(pickle.dumps(SeededBatch([3, 4], (5, 0, 1, 2))))
    number = torch.rand(())
    seed_worker((5, 0, 1, 2))
    assert type(received) is list and received == [3, 4]
    assert torch.equal(number, torch.rand(()))


@pytest.mark.parametrize('name', [
    'cascade_rcnn_revcol_t', 'htc_revcol_h', 'mask_rcnn_revcol_t', 'dino_revcol_h', 'upernet_revcol_t', 'mask2former_revcol_t',
    'revcol_t_in1k', 'revcol_b_in1k_224_ft', 'demo/revcol_nano_digits_pretrain', 'demo/upernet_revcol_nano_digits'])
def test_configs_name_the_hook(name):
    assert Config.fromfile(CONFIGS / f'{name}.py').default_hooks.exact_resume.type == 'ExactResumeHook'


def test_the_tools_add_the_hook_where_a_config_does_not_name_it():
    absent, left_out = Config(dict(custom_hooks=[])), Config(dict(default_hooks=dict(exact_resume=None)))
    own = Config(dict(custom_hooks=[dict(type='mmengine.ExactResumeHook')]))
    for cfg in (absent, left_out, own):
        _add_exact_resume(cfg)
    assert absent.default_hooks.exact_resume.type == 'ExactResumeHook'
    assert not left_out.default_hooks and not own.default_hooks
