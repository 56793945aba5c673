# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Data-loader workers end with the training that they load for."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.registry import FUNCTIONS
from mmengine.runner import Runner

from benchmarks.drills import CONFIG
from revcol_mm.engine import workers
from revcol_mm.engine.workers import WorkersEndWithTraining

ROOT = Path(__file__).resolve().parents[2]


class Draws(torch.utils.data.Dataset):
    """What the worker's generators give first."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return dict(drawn=(torch.rand(1).item(), np.random.rand()), mark=os.environ.get('OWN_MARK'))


class Runner_(WorkersEndWithTraining, Runner):
    pass


def load(build, **settings):
    loader = build(dict(dataset=Draws(), batch_size=1, num_workers=2, sampler=dict(type='DefaultSampler', shuffle=False),
                        **settings), seed=5)
    return list(loader)


def test_workers_draw_the_random_numbers_of_mmengine():
    assert load(Runner_.build_dataloader) == load(Runner.build_dataloader)


@FUNCTIONS.register_module()
def own_worker_init_fn(worker_id, mark):
    os.environ['OWN_MARK'] = f'{mark}{worker_id}'


def test_the_worker_init_fn_of_the_config_is_called():
    batches = load(Runner_.build_dataloader, worker_init_fn=dict(type='own_worker_init_fn', mark='w'))
    assert [batch['mark'] for batch in batches] == [['w0'], ['w1']]


@pytest.mark.skipif(sys.platform != 'linux', reason='Linux signals the death of a parent')
@pytest.mark.parametrize('context, ended', [('fork', [1]), ('spawn', [1]), ('forkserver', [])])
def test_a_worker_ends_at_once_if_another_process_than_its_training_is_its_parent(monkeypatch, context, ended):
    exits = []
    monkeypatch.setattr(workers.ctypes, 'CDLL', lambda *args, **kwargs: SimpleNamespace(prctl=lambda *args: 0))
    monkeypatch.setattr(workers.os, '_exit', exits.append)
    loader = Runner_.build_dataloader(dict(dataset=Draws(), batch_size=1, num_workers=1, multiprocessing_context=context,
                                           sampler=dict(type='DefaultSampler')), seed=5)
    loader.worker_init_fn(0)
    assert exits == ended


def children(pid):
    try:
        return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except FileNotFoundError:
        return []


def alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='Linux signals the death of a parent')
@pytest.mark.parametrize('start_method', ['fork', 'spawn'])
def test_the_workers_of_a_killed_training_end(tmp_path, start_method):
    (tmp_path / 'config.py').write_text(CONFIG + f"""
train_dataloader.update(num_workers=2, dataset=dict(type='DrillImages', large=True))
env_cfg.update(mp_cfg=dict(mp_start_method={start_method!r}))
default_hooks.update(checkpoint=None)
""")
    training = subprocess.Popen(
        [sys.executable, str(ROOT / 'tools' / 'train.py'), 'config.py', '--work-dir', 'work'], cwd=tmp_path, text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1'), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in training.stdout:
        if 'Iter(train) [      3/' in line:
            break
    workers = children(training.pid)
    training.send_signal(signal.SIGKILL)
    training.wait()
    training.stdout.close()
    assert len(workers) >= 2
    deadline = time.monotonic() + 5
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in workers if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
