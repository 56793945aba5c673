# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A resumed run is the uninterrupted one: with two processes, and with the models of the demos."""
import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from revcol_mm.datasets import make_digits

from ..common import ROOT

pytestmark = pytest.mark.slow
TOY = ROOT / 'tests' / 'engine' / 'resume_processes.py'


def start(*command, cwd):
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    result = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout + result.stderr


def train_toy(folder, resume='-', processes=2, **settings):
    """Eight iterations, in a folder of their own."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    launch = ('-m', 'torch.distributed.run', '--nproc_per_node', processes, '--master_port', port)
    return start(*launch, TOY, folder, 8, resume, json.dumps(settings), cwd=folder.parent)


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


@pytest.mark.parametrize('settings', [
    dict(), dict(sampler='DefaultSampler', workers=1), dict(accumulate=2), dict(sharded=True), dict(sharded=True, workers=2)],
    ids=['ddp', 'ddp-worker-passes', 'ddp-accumulation', 'fsdp', 'fsdp-workers'])
def test_two_processes_resume_exactly(tmp_path, settings):
    train_toy(tmp_path / 'whole', **settings)
    train_toy(tmp_path / 'resumed', tmp_path / 'whole' / 'iter_4.pth', **settings)
    assert not (tmp_path / 'resumed' / 'iter_4.pth').exists()
    assert_same(load(tmp_path / 'resumed', 'iter_8.pth'), load(tmp_path / 'whole', 'iter_8.pth'))
    # It would also hold if all processes drew alike.
    one, other = load(tmp_path / 'whole', 'iter_8.pth')['exact_resume']['processes']
    assert one['iter'] == other['iter'] == 8


@pytest.mark.parametrize('sharded', [False, True], ids=['ddp', 'fsdp'])
def test_the_logged_learning_rate_goes_on(tmp_path, sharded):
    train_toy(tmp_path / 'whole', sharded=sharded)
    train_toy(tmp_path / 'resumed', tmp_path / 'whole' / 'iter_4.pth', sharded=sharded)
    whole, resumed = (logged(tmp_path / name, 'base_lr') for name in ('whole', 'resumed'))
    assert resumed == {step: value for step, value in whole.items() if step > 4}
    assert len(set(whole.values())) == 8  # it changes in every iteration


def test_accumulated_gradients_of_several_processes_are_named_as_lost(tmp_path):
    text = train_toy(tmp_path / 'whole', accumulate=2)
    assert 'the checkpoint of iteration 1 lies between two updates' in text


def test_another_number_of_processes_goes_on_and_says_so(tmp_path):
    train_toy(tmp_path / 'whole')
    text = train_toy(tmp_path / 'resumed', tmp_path / 'whole' / 'iter_4.pth', processes=1)
    assert 'resuming is not exact: the checkpoint was written by 2 processes' in text
    assert load(tmp_path / 'resumed', 'iter_8.pth')['meta']['iter'] == 8


SHORT = ('train_cfg.max_iters=6', 'default_hooks.checkpoint.interval=2', 'train_dataloader.batch_size=2')
DEMOS = {
    'cascade_rcnn_revcol_nano_digits': SHORT,
    'upernet_revcol_nano_digits': SHORT,
    # Six iterations an epoch.
    'revcol_nano_digits_cls': ('train_cfg.max_epochs=2', 'train_dataloader.batch_size=256',
                               'default_hooks.checkpoint.by_epoch=False', 'default_hooks.checkpoint.interval=4'),
}


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('demos')
    make_digits(folder / 'data' / 'digits', num_train=16, num_val=2)
    return folder


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('name', DEMOS)
def test_the_demos_resume_exactly(digits, tmp_path, name, workers):
    def train(folder, *arguments):
        options = [*DEMOS[name], 'default_hooks.checkpoint.max_keep_ckpts=-1', 'model.backbone.drop_path_rate=0.3',
                   f'train_dataloader.num_workers={workers}', f'train_dataloader.persistent_workers={workers > 0}',
                   'val_dataloader=None', 'val_cfg=None', 'val_evaluator=None', 'randomness.seed=0']
        return start(ROOT / 'tools' / 'train.py', ROOT / 'configs' / 'demo' / f'{name}.py', '--work-dir', folder, *arguments,
                     '--cfg-options', *options, cwd=digits)

    train(tmp_path / 'whole')
    last = (tmp_path / 'whole' / 'last_checkpoint').read_text().rsplit('/', 1)[1]
    middle = 'iter_4.pth' if last == 'iter_6.pth' else 'iter_8.pth'
    train(tmp_path / 'resumed', '--resume', tmp_path / 'whole' / middle)
    assert_same(load(tmp_path / 'resumed', last), load(tmp_path / 'whole', last))
