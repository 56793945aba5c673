# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Features that overflow in the forward pass: the loss scaler skips the step, as with plain autograd, and the run goes on."""
import gc
import math
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.nn.parallel import DistributedDataParallel

from revcol_mm.models import RevCol
from tests.common import small_arch


def build(reversible: bool = True) -> RevCol:
    torch.manual_seed(0)
    return RevCol(small_arch(4), layer_scale_init_value=0.5, reversible=reversible).train()


def loss_of(net, dtype=None, images=None) -> torch.Tensor:
    if images is None:
        images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None):
        features = net(images)
    return sum(feature.float().square().mean() for feature in features)


def finite(parameters) -> bool:
    return all(parameter.grad.isfinite().all() for parameter in parameters if parameter.grad is not None)


@pytest.mark.filterwarnings('ignore:the features are not finite')
@pytest.mark.parametrize('dtype', [torch.bfloat16, None], ids=['bfloat16', 'float32'])
@pytest.mark.parametrize('level', range(4))
@pytest.mark.parametrize('column', range(4))
def test_wherever_features_stop_being_finite_the_gradients_are_not_finite_either(column, level, dtype):
    for value in (math.inf, math.nan):
        net = build()
        with torch.no_grad():
            net.columns[column].levels[level].blocks[0].pwconv2.bias.fill_(value)
        loss_of(net, dtype).backward()
        assert not finite(net.parameters()) and math.isnan(net.drift)


@pytest.mark.filterwarnings('ignore:the features are not finite')
@pytest.mark.parametrize('column', range(4))
def test_the_loss_scaler_treats_an_overflow_in_float16_as_with_plain_autograd(column):
    """The weights of a level times 1e8 for one step: the scale is halved, no parameter moves, and the next step is normal."""
    after = {}
    for reversible in (False, True):
        net = build(reversible)
        optimizer = torch.optim.SGD([parameter for parameter in net.parameters() if parameter.requires_grad], lr=0.01)
        scaler = torch.amp.GradScaler('cpu', init_scale=2.0**8)
        weights = [parameter for parameter in net.columns[column].levels[0].parameters()]
        scales = []
        for factor in (1e8, 1.0):
            with torch.no_grad():
                torch._foreach_mul_(weights, factor)
            optimizer.zero_grad()
            scaler.scale(loss_of(net, torch.float16)).backward()
            with torch.no_grad():
                torch._foreach_div_(weights, factor)
            before = [parameter.detach().clone() for parameter in net.parameters()]
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            moved = any(not torch.equal(old, new) for old, new in zip(before, net.parameters()))
            assert moved == (factor == 1.0)
        assert scales == [2.0**7, 2.0**7]
        after[reversible] = net
    assert 0 <= after[True].drift < 1e-3
    for plain, reversible in zip(after[False].parameters(), after[True].parameters()):
        torch.testing.assert_close(reversible, plain, rtol=1e-3, atol=1e-5)


def test_without_a_loss_scaler_the_user_is_told_once_that_the_training_has_diverged():
    net = build()
    with torch.no_grad():
        net.columns[2].levels[1].blocks[0].pwconv2.bias.fill_(math.inf)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(3):
            loss_of(net).backward()
    message, = (str(warning.message) for warning in caught if 'not finite' in str(warning.message))
    assert 'the training has diverged' in message


@pytest.mark.filterwarnings('ignore:the features are not finite')
def test_one_micro_batch_that_overflows_spoils_the_accumulated_gradient():
    net = build()
    loss_of(net).backward()
    assert finite(net.parameters())
    loss_of(net, images=torch.full((1, 3, 32, 32), math.inf)).backward()
    loss_of(net).backward()
    assert not finite(net.parameters()) and not math.isnan(net.drift)


def take_step(rank, folder) -> None:
    model = DistributedDataParallel(build())
    images = torch.full((1, 3, 32, 32), math.inf if rank else 1.0)
    loss_of(model, images=images).backward()
    torch.save(dict(finite=finite(model.parameters()), drift=model.module.drift), f'{folder}/result{rank}.pt')


def step_of_a_process(rank, folder) -> None:
    os.environ.update(MASTER_ADDR='127.0.0.1', GLOO_SOCKET_IFNAME='lo')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    try:
        take_step(rank, folder)
        gc.collect()  # the model, which must not outlive the group
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_an_overflow_in_one_process_makes_both_skip_the_step(tmp_path):
    mp.spawn(step_of_a_process, (str(tmp_path), ), nprocs=2)
    results = [torch.load(tmp_path / f'result{rank}.pt', weights_only=True) for rank in range(2)]
    assert [result['finite'] for result in results] == [False, False]
    assert [math.isnan(result['drift']) for result in results] == [False, True]


class Model(BaseModel):

    def __init__(self):
        super().__init__()
        self.backbone = build()

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return dict(loss=loss_of(self.backbone, images=torch.stack(list(inputs))))


class Recorder(Hook):
    """Reads the message hub after every iteration, as the logger does; and undoes the step."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.drifts = []

    def after_train_iter(self, runner, *args, **kwargs):
        self.drifts.append(runner.message_hub.log_scalars['train/drift'].current())
        runner.model.load_state_dict(Model().state_dict())


@pytest.mark.filterwarnings('ignore:the features are not finite')
def test_the_log_does_not_show_the_drift_of_the_step_before(tmp_path):
    recorder = Recorder()
    images = [dict(inputs=torch.full((3, 32, 32), value)) for value in (1.0, math.inf, 2.0)]
    Runner(Model(), str(tmp_path), experiment_name=tmp_path.name, train_dataloader=dict(
        dataset=images, batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False)),
        train_cfg=dict(by_epoch=False, max_iters=3), optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3)),
        custom_hooks=[dict(type='ReversibleDriftHook'), recorder], default_hooks=dict(checkpoint=None),
        log_level='ERROR').train()
    assert [math.isnan(drift) for drift in recorder.drifts] == [False, True, False]
