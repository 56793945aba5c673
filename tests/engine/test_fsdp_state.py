# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The optimizer's state in a sharded checkpoint is that of a training that is not sharded."""
import multiprocessing
import os

import torch

from benchmarks.drills import DrillModel, free_port
from revcol_mm.apis import cpu
from revcol_mm.engine import RevColFSDPStrategy

BATCH = dict(inputs=[*torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))], label=[0, 1])
OPTIMIZER = dict(type='AdamW', lr=0.)  # the weights stay, so that rounding errors do not grow


def shard(rank, port, path):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    cpu._init_gloo('pytorch')
    strategy = RevColFSDPStrategy(work_dir=os.path.dirname(path), experiment_name='sharded')
    model, wrapper = strategy.prepare(DrillModel(), optim_wrapper=dict(type='OptimWrapper', optimizer=OPTIMIZER))
    for _ in range(2):
        model.train_step(BATCH, wrapper)
    optimizer, weights = strategy.optim_state_dict(), strategy.model_state_dict()
    if rank == 0:
        torch.save(dict(optimizer=optimizer, weights=weights), path)
    torch.distributed.barrier()
    os._exit(0)


def test_both_moments_are_those_of_a_training_that_is_not_sharded(tmp_path):
    path, port, fork = str(tmp_path / 'state.pth'), free_port(), multiprocessing.get_context('fork')
    processes = [fork.Process(target=shard, args=(rank, port, path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]

    contents = torch.load(path, weights_only=True)
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
