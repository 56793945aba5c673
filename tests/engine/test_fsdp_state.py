# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The optimizer's state in a sharded checkpoint is that of a training that is not sharded."""
import multiprocessing
import os
from types import SimpleNamespace

import pytest
import torch

from benchmarks.drills import DrillModel, free_port
from revcol_mm.apis import cpu
from revcol_mm.checkpoint import CheckpointError
from revcol_mm.engine import FeatureStatisticsHook, RevColFSDPStrategy

BATCH = dict(inputs=[*torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))], label=[0, 1])
OPTIMIZER = dict(type='AdamW', lr=0.)  # the weights stay, so that rounding errors do not grow


def shard(rank, port, path):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    cpu._init_gloo('pytorch')
    strategy = RevColFSDPStrategy(work_dir=os.path.dirname(path), experiment_name='sharded')
    model, wrapper = strategy.prepare(DrillModel(), optim_wrapper=dict(type='OptimWrapper', optimizer=OPTIMIZER))
    statistics = [statistics_of(model, lambda: model.train_step(BATCH, wrapper)) for _ in range(2)]
    optimizer, weights = strategy.optim_state_dict(), strategy.model_state_dict()
    strategy.load_optim_state_dict(plain_state())
    loaded = strategy.optim_state_dict()
    if rank == 0:
        torch.save(dict(optimizer=optimizer, weights=weights, loaded=loaded, statistics=statistics[1]), path)
    torch.distributed.barrier()
    os._exit(0)


def statistics_of(model, step):
    """What FeatureStatisticsHook finds in a step."""
    hook, runner = FeatureStatisticsHook(interval=1), SimpleNamespace(model=model, iter=0)
    hook.before_train_iter(runner, 0)
    step()
    for handle in hook.handles:
        handle.remove()
    return hook.statistics


def plain_state():
    """State of an optimizer without sharding, in which the moments of a parameter are its number."""
    optimizer = torch.optim.AdamW(DrillModel().parameters(), lr=0.25)
    for number, parameter in enumerate(optimizer.param_groups[0]['params']):
        optimizer.state[parameter] = dict(step=torch.tensor(2.), exp_avg=torch.full_like(parameter, number),
                                          exp_avg_sq=torch.full_like(parameter, number))
    return optimizer.state_dict()


@pytest.fixture(scope='module')
def contents(tmp_path_factory):
    """What two processes have saved."""
    path, port, fork = str(tmp_path_factory.mktemp('fsdp') / 'state.pth'), free_port(), multiprocessing.get_context('fork')
    processes = [fork.Process(target=shard, args=(rank, port, path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return torch.load(path, weights_only=True)


def test_both_moments_are_those_of_a_training_that_is_not_sharded(contents):
    sharded, model = contents['optimizer'], DrillModel()
    model.load_state_dict(contents['weights'])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.)
    for _ in range(2):
        optimizer.zero_grad()
        model(**BATCH, mode='loss')['loss'].backward()
        optimizer.step()
    named = {name: optimizer.state[parameter] for name, parameter in model.named_parameters() if parameter in optimizer.state}
    assert sharded['state'].keys() >= named.keys() and named
    for name, state in named.items():
        for kind, value in state.items():
            torch.testing.assert_close(sharded['state'][name][kind], value, rtol=1e-4, atol=1e-9)
    assert [len(group['params']) for group in sharded['param_groups']] == [len(list(model.parameters()))]


def test_statistics_of_the_features_are_those_of_a_training_that_is_not_sharded(contents):
    model = DrillModel()
    model.load_state_dict(contents['weights'])
    expected = statistics_of(model, lambda: model(**BATCH, mode='loss'))
    assert contents['statistics'].keys() == expected.keys() and any('gamma' in name for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(contents['statistics'][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_sharded_training_takes_the_state_of_one_that_is_not_sharded(contents):
    state = contents['loaded']['state']
    for number, (name, parameter) in enumerate(DrillModel().named_parameters()):
        assert all(torch.equal(state[name][kind], torch.full_like(parameter, number)) for kind in ('exp_avg', 'exp_avg_sq'))
    assert [group['lr'] for group in contents['loaded']['param_groups']] == [0.25]


def test_a_state_of_other_parameters_is_refused():
    strategy = SimpleNamespace(optim_wrapper=SimpleNamespace(optimizer=torch.optim.SGD([torch.ones(1)], lr=1.)))
    with pytest.raises(CheckpointError, match='must be of as many parameters .*, 1, but is of 2'):
        RevColFSDPStrategy.load_optim_state_dict(strategy, dict(state={0: {}}, param_groups=[dict(params=[0, 1])]))
