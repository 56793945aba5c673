# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A resumed run is the uninterrupted one: with two processes, and with the models of the demos."""
import json
import multiprocessing
import os
import random

import matplotlib.backends.backend_agg  # noqa: F401 - mmengine's visualizer imports it: once, not in every process
import numpy as np
import pytest
import torch
import torchvision  # noqa: F401 - and its log of the environment this
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS

from benchmarks.drills import free_port
from revcol_mm.apis import train
from revcol_mm.apis.runner import build_runner
from revcol_mm.datasets import make_digits

from ..common import ROOT
from .test_exact_resume import Noise, Toy

FORK = multiprocessing.get_context('fork')


def in_processes(function, *args, number=1, seconds=200):
    """Calls a function in processes of their own, which need not import anything again. All must succeed."""
    def run(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number), MASTER_PORT=port,
                          MASTER_ADDR='127.0.0.1')
        function(*args)
        os._exit(0)  # a process that tears down gloo while the other is still there can abort

    port = str(free_port())
    processes = [FORK.Process(target=run, args=(rank,)) for rank in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0] * number


def toy_config(folder, resume=None, sharded=False, workers=0, sampler='InfiniteSampler', by_epoch=False, accumulate=1, lr=1e-2,
               load_from=None):
    """Eight iterations, or three epochs of two batches for each of two processes."""
    length = dict(by_epoch=True, max_epochs=3) if by_epoch else dict(by_epoch=False, max_iters=8)
    cfg = Config(dict(
        model=dict(type='Toy'), work_dir=str(folder), load_from=load_from, launcher='pytorch', default_scope='mmengine',
        train_cfg=length, param_scheduler=dict(type='LinearLR', by_epoch=False, end=20),
        train_dataloader=dict(batch_size=2, num_workers=workers, drop_last=True, dataset=dict(type='Noise'),
                              sampler=dict(type=sampler, shuffle=True)),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=lr), paramwise_cfg=dict(bias_lr_mult=2.0),
                           accumulative_counts=accumulate),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
                           logger=dict(type='LoggerHook', interval=1)),
        log_processor=dict(by_epoch=False), randomness=dict(seed=3), env_cfg=dict(dist_cfg=dict(backend='gloo'))))
    if sharded:
        cfg.runner_type, cfg.strategy = 'FlexibleRunner', dict(type='RevColFSDPStrategy')
    if resume:
        cfg.resume, cfg.load_from = True, str(resume)
    return cfg


def train_toy(folder, resume=None, processes=2, **settings):
    def process():
        MODELS.register_module(module=Toy)
        DATASETS.register_module(module=Noise)
        runner = build_runner(toy_config(folder, resume, **settings))
        if resume:  # no test may pass because the generators begin alike
            torch.manual_seed(99), np.random.seed(98), random.seed(97)
        runner.train()

    in_processes(process, number=processes)


def load(folder, name):
    return torch.load(folder / name, weights_only=True)


def tensors(node, place=''):
    """All tensors of nested dicts and lists, by their place."""
    if isinstance(node, torch.Tensor):
        return {place: node}
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    return {key: value for name, part in items for key, value in tensors(part, f'{place}/{name}').items()}


def assert_same(one, other):
    for part in ('state_dict', 'optimizer'):
        first, second = tensors(one[part]), tensors(other[part])
        assert first and first.keys() == second.keys()
        assert not [key for key in first if not torch.equal(first[key], second[key])]


def logged(folder, key):
    """The values of every iteration in the log of the last run."""
    file = max(folder.glob('*/vis_data/scalars.json'))
    return {entry['step']: entry[key] for entry in map(json.loads, file.read_text().splitlines()) if key in entry}


def log_of(folder):
    return max(folder.glob('*/*.log')).read_text()


@pytest.mark.slow
@pytest.mark.parametrize('settings', [
    dict(), dict(sampler='DefaultSampler', workers=1), dict(sampler='DefaultSampler', by_epoch=True), dict(accumulate=2),
    dict(sharded=True), dict(sharded=True, workers=2), dict(sharded=True, sampler='DefaultSampler', by_epoch=True)],
    ids=['ddp', 'ddp-worker-passes', 'ddp-epochs', 'ddp-accumulation', 'fsdp', 'fsdp-workers', 'fsdp-epochs'])
def test_two_processes_resume_exactly(tmp_path, settings):
    train_toy(tmp_path / 'whole', **settings)
    train_toy(tmp_path / 'resumed', tmp_path / 'whole' / 'iter_4.pth', **settings)
    assert not (tmp_path / 'resumed' / 'iter_4.pth').exists()
    last = 'iter_6.pth' if settings.get('by_epoch') else 'iter_8.pth'
    assert_same(load(tmp_path / 'resumed', last), load(tmp_path / 'whole', last))


@pytest.mark.parametrize('sharded', [pytest.param(False, marks=pytest.mark.slow), True], ids=['ddp', 'fsdp'])
def test_the_logged_learning_rate_goes_on(tmp_path, sharded):
    train_toy(tmp_path / 'whole', sharded=sharded)
    train_toy(tmp_path / 'resumed', tmp_path / 'whole' / 'iter_4.pth', sharded=sharded)
    whole, resumed = (logged(tmp_path / name, 'base_lr') for name in ('whole', 'resumed'))
    assert resumed == {step: value for step, value in whole.items() if step > 4}
    assert len(set(whole.values())) == 8  # it changes in every iteration


@pytest.mark.slow
def test_accumulated_gradients_of_several_processes_are_named_as_lost(tmp_path):
    train_toy(tmp_path / 'whole', accumulate=2)
    assert 'the checkpoint of iteration 1 lies between two updates' in log_of(tmp_path / 'whole')
    train_toy(tmp_path / 'resumed', tmp_path / 'whole' / 'iter_3.pth', accumulate=2)
    assert 'resuming is not exact: the checkpoint lies between two updates' in log_of(tmp_path / 'resumed')


def test_another_number_of_processes_goes_on_and_says_so(tmp_path):
    train_toy(tmp_path / 'whole')
    train_toy(tmp_path / 'resumed', tmp_path / 'whole' / 'iter_4.pth', processes=1)
    assert 'resuming is not exact: the checkpoint was written by 2 processes' in log_of(tmp_path / 'resumed')
    assert load(tmp_path / 'resumed', 'iter_8.pth')['meta']['iter'] == 8


@pytest.mark.slow
def test_sharded_training_starts_from_a_file_of_weights_alone(tmp_path):
    weights = {name: torch.rand(parameter.shape) for name, parameter in Toy().named_parameters()}
    torch.save({f'module.{name}': value for name, value in weights.items()}, tmp_path / 'weights.pth')  # as DDP names them
    train_toy(tmp_path / 'run', sharded=True, lr=0., load_from=str(tmp_path / 'weights.pth'))
    trained = load(tmp_path / 'run', 'iter_8.pth')['state_dict']
    assert not [name for name, value in weights.items() if not torch.equal(trained[name], value)]


SHORT = ('train_cfg.max_iters=6', 'default_hooks.checkpoint.interval=2', 'train_dataloader.batch_size=2')
DEMOS = {
    'cascade_rcnn_revcol_nano_digits': SHORT,
    'upernet_revcol_nano_digits': SHORT,
    # Six iterations an epoch.
    'revcol_nano_digits_cls': ('train_cfg.max_epochs=2', 'train_dataloader.batch_size=4', 'train_dataloader.dataset.indices=24',
                               'default_hooks.checkpoint.by_epoch=False', 'default_hooks.checkpoint.interval=4'),
}


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('demos')
    make_digits(folder / 'data' / 'digits', num_train=16, num_val=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('name', DEMOS)
def test_the_demos_resume_exactly(digits, tmp_path, name, workers):
    def run(folder, *arguments):
        options = [*DEMOS[name], 'default_hooks.checkpoint.max_keep_ckpts=-1', 'model.backbone.drop_path_rate=0.3',
                   f'train_dataloader.num_workers={workers}', f'train_dataloader.persistent_workers={workers > 0}',
                   'val_dataloader=None', 'val_cfg=None', 'val_evaluator=None', 'randomness.seed=0']
        os.chdir(digits)
        train.train([str(ROOT / 'configs' / 'demo' / f'{name}.py'), '--work-dir', str(folder), *arguments,
                     '--cfg-options', *options])

    in_processes(run, tmp_path / 'whole')
    last = (tmp_path / 'whole' / 'last_checkpoint').read_text().rsplit('/', 1)[1]
    middle = 'iter_4.pth' if last == 'iter_6.pth' else 'iter_8.pth'
    in_processes(run, tmp_path / 'resumed', '--resume', str(tmp_path / 'whole' / middle))
    assert_same(load(tmp_path / 'resumed', last), load(tmp_path / 'whole', last))
