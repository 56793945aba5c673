# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A process that does not answer ends the run, and is named."""
import multiprocessing
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
from mmengine.config import Config

from benchmarks.drills import free_port
from revcol_mm.apis import cpu, processes
from revcol_mm.apis.errors import LaunchError

FORK = multiprocessing.get_context('fork')  # they have everything imported


def meet(rank, size, port, victims, number, late, answers):
    """One of several processes. Victims send themselves a signal; the others report what they are told.

    A late signal comes when the others have seen an error already, and ask who is missing.
    """
    processes.SECONDS = 2 if number == signal.SIGSTOP else 20  # nobody waits for a process that has ended
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    cpu._init_gloo('pytorch', timeout=60)
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=3), torch.distributed.group.WORLD)
    try:
        with processes.name_lost_processes():
            torch.distributed.barrier()
            if rank in victims:
                time.sleep(late)
                os.kill(os.getpid(), number)
            if late:
                raise RuntimeError('gloo: connection closed')
            torch.distributed.all_reduce(torch.ones(1))
    except LaunchError as error:
        answers.put((rank, str(error)))
        answers.close()
        answers.join_thread()
    os._exit(0)


def answers_of_the_others(*victims, number, late=0., size=3):
    port, answers = free_port(), FORK.Queue()
    started = [FORK.Process(target=meet, args=(rank, size, port, victims, number, late, answers)) for rank in range(size)]
    for process in started:
        process.start()
    try:
        return dict(answers.get(timeout=60) for _ in range(size - len(victims)))
    finally:
        for process in started:
            process.kill()
            process.join()


def test_a_stopped_process_is_named():
    answers = answers_of_the_others(1, number=signal.SIGSTOP)
    assert answers[0].startswith('no answer from rank 1: its process is stopped or lost') and '--resume auto' in answers[0]
    assert 'another process of this run has ended' in answers[2]  # the first one, which has said it


@pytest.mark.slow
def test_a_stopped_first_process_is_named_by_all():
    for text in answers_of_the_others(0, number=signal.SIGSTOP).values():
        assert text.startswith('no answer from rank 0')


@pytest.mark.slow
def test_several_stopped_processes_are_all_named():
    answers = answers_of_the_others(1, 2, 3, number=signal.SIGSTOP, size=5)
    assert answers[0].startswith('no answer from rank 1, 2, 3: ')
    assert 'another process of this run has ended' in answers[4]


@pytest.mark.parametrize('late', [0., 0.5])
def test_of_a_killed_process_the_others_say_that_it_has_ended(late):
    for text in answers_of_the_others(1, number=signal.SIGKILL, late=late).values():
        assert text.startswith('another process of this run has ended')


def test_flexible_runner_gets_no_device_ids_on_the_cpu(monkeypatch):
    monkeypatch.setattr(cpu, '_init_gloo', lambda *args: None)
    cfg = Config(dict(launcher='pytorch', model=dict(), runner_type='FlexibleRunner'))
    cpu.fit_to_cpu(cfg)
    assert cfg.strategy.type == 'DDPStrategy' and cfg.strategy.model_wrapper.device_ids is None


@pytest.mark.parametrize('timeout', [0, -1, '10', [10]])
def test_the_timeout_is_a_positive_number_of_seconds(monkeypatch, timeout):
    for name, value in dict(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1').items():
        monkeypatch.setenv(name, value)
    cfg = Config(dict(launcher='pytorch', model=dict(), env_cfg=dict(dist_cfg=dict(timeout=timeout))))
    with pytest.raises(LaunchError, match='env_cfg.dist_cfg.timeout must be a positive number of seconds, but got'):
        cpu.fit_to_cpu(cfg)
