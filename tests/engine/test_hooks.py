# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The hook that logs the drift of reversible training."""
import itertools
import math

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from revcol_mm.models import RevCol

ARCH = dict(channels=(4, 8, 8, 8), depths=(1, 1, 1, 1), num_columns=3)


class Model(BaseModel):

    def __init__(self, fickle=False, **backbone):
        super().__init__()
        self.backbone = RevCol(ARCH, layer_scale_init_value=1.0, **backbone)
        if fickle:
            calls = itertools.count(1)
            self.backbone.subnet0.level3.register_forward_hook(lambda module, args, output: output * next(calls)**1.5)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return dict(loss=sum(feature.square().mean() for feature in self.backbone(torch.stack(inputs))))


class Recorder(Hook):
    """Reads the message hub after every iteration, as the logger does."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.entries = []

    def after_train_iter(self, runner, *args, **kwargs):
        scalars = runner.message_hub.log_scalars
        count = len(scalars['train/drift'].data[0]) if 'train/drift' in scalars else 0
        self.entries.append((count, runner.model.backbone.drift))
        self.logged = list(scalars['train/drift'].data[0]) if count else []


def train(tmp_path, interval, **backbone):
    recorder = Recorder()
    images = [dict(inputs=torch.randn(3, 32, 32)) for _ in range(4)]
    Runner(Model(**backbone), str(tmp_path), experiment_name=tmp_path.name, train_dataloader=dict(
        dataset=images, batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False)),
        train_cfg=dict(by_epoch=False, max_iters=4), optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3)),
        custom_hooks=[dict(type='ReversibleDriftHook', interval=interval), recorder],
        default_hooks=dict(checkpoint=None), log_level='ERROR').train()
    return recorder


def test_the_drift_of_every_interval_stands_in_the_message_hub(tmp_path):
    # A first column that is never the same twice drifts by another amount in each iteration.
    recorder = train(tmp_path, 2, fickle=True, reversible=True, drift_threshold=1e9)
    drifts = [drift for _, drift in recorder.entries]
    assert len(set(drifts)) == 4 and min(drifts) > 1e-3
    assert [count for count, _ in recorder.entries] == [0, 1, 1, 2]
    assert recorder.logged == [drifts[1], drifts[3]]


def test_a_sound_run_logs_a_drift_of_the_size_of_rounding(tmp_path):
    recorder = train(tmp_path, 1, reversible=True)
    assert len(recorder.logged) == 4
    assert 0 <= max(recorder.logged) < 1e-6  # 2^-23 is 1.2e-7


def test_nothing_is_logged_without_reversible_training(tmp_path):
    recorder = train(tmp_path, 1, reversible=False)
    assert [count for count, _ in recorder.entries] == [0, 0, 0, 0]
    assert math.isnan(recorder.entries[-1][1])


@pytest.mark.parametrize('interval', [0, -1, 1.5, None])
def test_an_interval_that_is_no_positive_integer_is_refused(interval):
    with pytest.raises(ValueError, match=f'interval must be a positive integer, but got {interval}'):
        HOOKS.build(dict(type='ReversibleDriftHook', interval=interval))
