# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Reversible training on several processes: gradients of two gloo processes equal those of one on the joint batch."""
import gc
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from revcol_mm.models import RevCol
from revcol_mm.reversible import ReversibleColumn
from tests.common import mostly_slow, small_arch

NARROW = small_arch(4, depths=(1, 1, 1, 1))


def build(stored_columns=0) -> RevCol:
    torch.manual_seed(0)
    return RevCol(NARROW, layer_scale_init_value=0.5, reversible=True, stored_columns=stored_columns).train()


def joint_batch() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def loss_of(features) -> torch.Tensor:
    return sum(feature.square().mean() for feature in features)


def train(rank, wrap, steps, folder, half=False, stored_columns=0) -> None:
    os.environ.update(MASTER_ADDR='127.0.0.1', GLOO_SOCKET_IFNAME='lo')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    try:
        state, drift = take_steps(rank, wrap, steps, half, stored_columns)
        if rank == 0:
            torch.save(dict(state=state, drift=drift), f'{folder}/result.pt')
        # gloo's threads let go of the last operation's tensors a little after it; an interpreter that ends meanwhile aborts.
        gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def take_steps(rank, wrap, steps, half, stored_columns) -> tuple:
    net = build(stored_columns)
    if wrap == 'fully_shard':
        mesh = torch.distributed.device_mesh.init_device_mesh('cpu', (2, ))
        for column in net.columns:
            fully_shard(column, mesh=mesh)
        model = fully_shard(net, mesh=mesh)
    elif wrap.startswith('fsdp'):
        policy = ModuleWrapPolicy({ReversibleColumn}) if wrap == 'fsdp_columns' else None
        model = FullyShardedDataParallel(net, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device('cpu'))
    else:
        model = DistributedDataParallel(net, find_unused_parameters=wrap == 'ddp_unused', static_graph=wrap == 'ddp_static')
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        if half:
            with torch.autocast('cpu', torch.bfloat16):
                loss = loss_of(model(joint_batch()))
        else:
            loss = loss_of(model(joint_batch()[2 * rank:2 * rank + 2]))
        loss.backward()
        optimizer.step()
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            state = {name.replace('_fsdp_wrapped_module.', ''): value.detach().clone()
                     for name, value in model.named_parameters()}
    else:
        state = {name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
                 for name, value in net.named_parameters()}
    return state, net.drift


def compare(net, start, state, tolerance) -> None:
    """Every trained parameter moved in ``state`` as it did in ``net``, and no other one moved."""
    assert set(state) == set(start)
    for name, value in net.named_parameters():
        if not value.requires_grad:
            assert torch.equal(value, start[name]) and torch.equal(state[name], start[name]), name
            continue
        moved = (value - start[name]).norm()
        assert moved > 5e-6, f'{name}: beside the 3e-7 for rounding a lost or doubled gradient must stand out'
        assert (state[name] - value).norm() <= tolerance * moved + 3e-7, name  # weights near 1 are rounded to 1.2e-7


@pytest.mark.parametrize('wrap, stored_columns', mostly_slow(
    [('ddp', 0), ('ddp_unused', 0), ('ddp_static', 0), ('ddp_static', 1), ('fsdp', 0), ('fsdp_columns', 0), ('fsdp_columns', 2),
     ('fully_shard', 0), ('fully_shard', 1)], [('ddp', 0)]))
def test_two_processes_train_as_one(wrap, stored_columns, tmp_path):
    steps = 2
    mp.spawn(train, (wrap, steps, str(tmp_path), False, stored_columns), nprocs=2)
    result = torch.load(tmp_path / 'result.pt', weights_only=True)
    net = build()
    start = {name: value.detach().clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net(joint_batch())).backward()
        optimizer.step()
    # The mean of two halves and one mean round differently, twice; a lost or doubled gradient would be 100 % off.
    compare(net, start, result['state'], tolerance=1e-4)
    assert result['drift'] < 1e-6


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: the order of bfloat16's sums depends on it
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize('wrap', ['ddp', 'fsdp_columns', 'fully_shard'])
def test_autocast_on_two_processes(wrap, one_thread, tmp_path):
    # Both see the same images here: bfloat16 sums of two halves would round differently.
    mp.spawn(train, (wrap, 1, str(tmp_path), True), nprocs=2)
    result = torch.load(tmp_path / 'result.pt', weights_only=True)
    net = build()
    start = {name: value.detach().clone() for name, value in net.named_parameters()}
    with torch.autocast('cpu', torch.bfloat16):
        loss = loss_of(net(joint_batch()))
    loss.backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1).step()
    compare(net, start, result['state'], tolerance=1e-6)
    assert result['drift'] == net.drift


@pytest.mark.parametrize('wrapper', ['fsdp', 'fully_shard'])
@pytest.mark.parametrize('part', ['level1', 'level1.blocks.0'])
def test_parts_of_a_column_sharded_by_themselves_are_refused(wrapper, part, tmp_path, monkeypatch):
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'lo')
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    try:
        net = build()
        module = net.subnet1.get_submodule(part)
        if wrapper == 'fully_shard':
            fully_shard(module, mesh=torch.distributed.device_mesh.init_device_mesh('cpu', (1, )))
        else:
            owner, _, name = part.rpartition('.')
            setattr(net.subnet1.get_submodule(owner), name,
                    FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device('cpu')))
        with pytest.raises(RuntimeError, match=f'{part} is sharded by itself'):
            net(joint_batch())
    finally:
        dist.destroy_process_group()
