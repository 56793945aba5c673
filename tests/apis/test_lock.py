# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""One training at a time in a work folder."""
import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket

import pytest
from mmengine.config import Config

from benchmarks.drills import CONFIG, children
from revcol_mm.apis import lock, test, train
from revcol_mm.apis.errors import LaunchError

FORK = multiprocessing.get_context('fork')


def hold(folder, ready, child_ready):
    with lock.lock_work_dir(folder):
        FORK.Process(target=lambda: (child_ready.set(), signal.pause())).start()  # outlives its parent
        ready.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """Another process, which has the lock of the folder 'work', and a child of its own."""
    ready, child_ready = FORK.Event(), FORK.Event()
    process = FORK.Process(target=hold, args=(str(tmp_path / 'work'), ready, child_ready))
    process.start()
    pids = [process.pid]
    try:
        assert ready.wait(120) and child_ready.wait(120)
        pids += children(process.pid)
        yield process
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.join()


def test_a_second_training_is_refused_while_the_first_lives(holder, tmp_path):
    (tmp_path / 'config.py').write_text(CONFIG)
    with pytest.raises(LaunchError, match=rf'another training runs in \S+work: process {holder.pid} on {socket.gethostname()}, '
                       r'since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\..*--work-dir'):
        train.train([str(tmp_path / 'config.py'), '--work-dir', str(tmp_path / 'work')])
    assert os.listdir(tmp_path / 'work') == [lock.NAME]
    assert json.loads((tmp_path / 'work' / lock.NAME).read_text())['pid'] == holder.pid


def test_a_stopped_training_still_has_its_folder(holder, tmp_path):
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(LaunchError, match=f'process {holder.pid}'), lock.lock_work_dir(str(tmp_path / 'work')):
        pass


def test_a_killed_training_frees_the_folder_even_if_a_child_of_it_lives(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with lock.lock_work_dir(str(tmp_path / 'work')):
        assert json.loads((tmp_path / 'work' / lock.NAME).read_text())['pid'] == os.getpid()


def test_one_process_trains_in_a_folder_again_and_again(tmp_path):
    for _ in range(2):
        with lock.lock_work_dir(str(tmp_path / 'work')):
            pass


def test_other_processes_of_the_same_run_need_no_lock(holder, tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    with lock.lock_work_dir(str(tmp_path / 'work'), 'pytorch'):
        pass
    with pytest.raises(LaunchError), lock.lock_work_dir(str(tmp_path / 'work'), 'none'):  # RANK is another's
        pass


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, 'lockf', refuse)
    with pytest.warns(UserWarning, match='work lies on a file system without locks .*second training can start'):
        with lock.lock_work_dir(str(tmp_path / 'work')):
            pass


def test_a_test_in_the_folder_of_a_training_is_not_refused(holder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config.py').write_text(CONFIG + """
test_cfg = dict(type='TestLoop')
test_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(type='DrillImages'),
                       sampler=dict(type='DefaultSampler', shuffle=False))
test_evaluator = dict(type='DumpResults', out_file_path='scores.pkl')
train_cfg = dict(by_epoch=False, max_iters=1)
""")
    train.train(['config.py', '--work-dir', 'trained'])
    test.test(['config.py', 'trained/iter_1.pth', '--work-dir', 'work'])
    assert (tmp_path / 'scores.pkl').exists() and not (tmp_path / 'work' / 'config.py').exists()
    assert Config.fromfile('trained/config.py').work_dir == 'trained'
