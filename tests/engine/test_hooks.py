# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The hook that logs the drift of reversible training."""
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

    def __init__(self, **backbone):
        super().__init__()
        self.backbone = RevCol(ARCH, layer_scale_init_value=1.0, **backbone)

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
        self.last = scalars['train/drift'].current() if count else None


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
    recorder = train(tmp_path, 2, reversible=True)
    assert [count for count, _ in recorder.entries] == [0, 1, 1, 2]
    assert recorder.last == recorder.entries[-1][1]
    assert 0 <= recorder.last < 1e-3  # the threshold of float32


def test_nothing_is_logged_without_reversible_training(tmp_path):
    recorder = train(tmp_path, 1, reversible=False)
    assert [count for count, _ in recorder.entries] == [0, 0, 0, 0]
    assert math.isnan(recorder.entries[-1][1])


@pytest.mark.parametrize('interval', [0, -1, 1.5, None])
def test_an_interval_that_is_no_positive_integer_is_refused(interval):
    with pytest.raises(ValueError, match=f'interval={interval}'):
        HOOKS.build(dict(type='ReversibleDriftHook', interval=interval))
