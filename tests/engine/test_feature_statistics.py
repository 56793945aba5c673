# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The hook that logs statistics of the features."""
import json
import logging

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from revcol_mm.engine import FeatureStatisticsHook
from revcol_mm.models import HRNetColumns, RevCol, RevColViT, RevNetConvNeXt

ARCH = dict(channels=(4, 8, 8, 8), depths=(1, 1, 1, 1), num_columns=3)
VIT = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=2, num_columns=2)


class Model(BaseModel):

    def __init__(self, kind=RevCol, **backbone):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = kind(**backbone)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return dict(loss=sum(feature.square().mean() for feature in self.backbone(torch.stack(inputs))))


def train(folder, name, model, hooks=(), iterations=4):
    """Trains, and returns the entries of the vis backend's file and the lines of the log."""
    generator = torch.Generator().manual_seed(1)
    images = [dict(inputs=torch.randn(3, 32, 32, generator=generator)) for _ in range(2 * iterations)]
    runner = Runner(
        model, str(folder / name), experiment_name=f'{folder.name}_{name}', train_dataloader=dict(
            dataset=images, batch_size=2, sampler=dict(type='DefaultSampler', shuffle=False)),
        train_cfg=dict(by_epoch=False, max_iters=iterations), randomness=dict(seed=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=list(hooks), default_hooks=dict(checkpoint=None),
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]))
    lines = []
    runner.logger.addHandler(type('Lines', (logging.Handler, ), dict(emit=lambda self, record: lines.append(
        record.getMessage())))())
    runner.train()
    written = [json.loads(line) for file in (folder / name).rglob('scalars.json') for line in file.read_text().splitlines()]
    return [entry for entry in written if 'features/column0/level0/std' in entry], lines


WAYS = dict(plain={}, reversible=dict(reversible=True), stored=dict(reversible=True, stored_columns=1),
            checkpointed=dict(with_cp=True))


@pytest.mark.parametrize('way', WAYS)
def test_training_is_bit_equal_with_and_without_the_hook(tmp_path, way):
    models = []
    for name, hooks in dict(without=[], with_=[dict(type='FeatureStatisticsHook', interval=1)]).items():
        models.append(Model(arch=ARCH, layer_scale_init_value=1.0, drop_path_rate=0.3, **WAYS[way]))
        entries, _ = train(tmp_path, name, models[-1], hooks)
        assert len(entries) == 4 * bool(hooks)
    without, with_ = (model.state_dict() for model in models)
    assert not torch.equal(without['backbone.stem.0.weight'], Model(arch=ARCH).state_dict()['backbone.stem.0.weight'])
    assert all(torch.equal(value, with_[key]) for key, value in without.items())


@pytest.mark.parametrize('reversible', [False, True])
@pytest.mark.parametrize('kind, settings', [(RevCol, dict(arch=ARCH, layer_scale_init_value=1.0)),
                                            (RevColViT, dict(arch=VIT, img_size=32, patch_size=8))])
def test_the_numbers_are_those_of_the_features(tmp_path, kind, settings, reversible):
    model = Model(kind, reversible=reversible, **settings)
    with torch.no_grad():
        model.backbone.subnet1.alpha0.uniform_(-2, 2)
        model.backbone.subnet1.alpha1.view(-1)[5] = 1e-3
        gamma = model.backbone.subnet1.alpha0.clone()
    columns = {}
    for index, column in enumerate(model.backbone.columns):
        column.register_forward_hook(lambda module, args, output, index=index: columns.update({index: [
            feature.detach().clone() for feature in output]}))
    entry, = train(tmp_path, 'run', model, [dict(type='FeatureStatisticsHook', interval=1)], iterations=1)[0]
    for index, features in columns.items():
        for level, feature in enumerate(features):
            if kind is RevColViT:
                feature = feature.movedim(-1, 1)
            found = {name: entry[f'features/column{index}/level{level}/{name}'] for name in ('std', 'max', 'abs_max', 'dead')}
            assert found['std'] == pytest.approx(feature.double().std().item(), rel=1e-5)
            assert found['max'] == pytest.approx(feature.max().item(), rel=1e-6)
            assert found['abs_max'] == pytest.approx(feature.abs().max().item(), rel=1e-6)
            dead = [len(feature[:, channel].unique()) == 1 for channel in range(feature.shape[1])]
            assert found['dead'] == pytest.approx(sum(dead) / len(dead))
    assert entry['features/column1/level0/gamma_min'] == pytest.approx(gamma.min().item())
    assert entry['features/column1/level0/gamma_max'] == pytest.approx(gamma.max().item())
    assert entry['features/column1/level1/gamma_min'] == pytest.approx(1e-3)
    assert 'features/column0/level0/gamma_min' not in entry  # the first column has no shortcut


@pytest.mark.parametrize('kind, arch, columns', [
    (HRNetColumns, ARCH, 3), (RevNetConvNeXt, dict(channels=(4, 8, 8, 8), depths=(1, 2, 1, 1)), 1)])
def test_columns_without_a_shortcut_have_statistics_but_no_gamma(tmp_path, kind, arch, columns):
    model, features = Model(kind, arch=arch), {}
    for index, column in enumerate(model.backbone.columns):
        column.register_forward_hook(lambda module, args, output, index=index: features.update({index: output}))
    entry, = train(tmp_path, 'run', model, [dict(type='FeatureStatisticsHook', interval=1)], iterations=1)[0]
    names = {name for name in entry if name.startswith('features/')}
    assert names == {f'features/column{column}/level{level}/{name}' for column in range(columns) for level in range(4)
                     for name in ('std', 'max', 'abs_max', 'dead')}
    for index, levels in features.items():
        assert [entry[f'features/column{index}/level{level}/max'] for level in range(4)] == pytest.approx(
            [feature.max().item() for feature in levels])


class Constant(nn.Module):
    """A level with two channels of constant value."""

    def __init__(self, level):
        super().__init__()
        self.level = level

    def forward(self, *args, **kwargs):
        y = self.level(*args, **kwargs)
        return torch.cat([torch.zeros_like(y[:, :1]), torch.full_like(y[:, :1], 3.), y[:, 2:]], 1)


def test_a_channel_of_one_value_is_dead(tmp_path):
    model = Model(arch=ARCH, layer_scale_init_value=1.0)
    model.backbone.subnet0.level0 = Constant(model.backbone.subnet0.level0)
    entry, = train(tmp_path, 'run', model, [dict(type='FeatureStatisticsHook', interval=1)], iterations=1)[0]
    assert entry['features/column0/level0/dead'] == 2 / 4
    assert entry['features/column0/level1/dead'] == 0


def test_entries_come_every_interval_in_the_log_and_in_the_file(tmp_path):
    entries, lines = train(tmp_path, 'run', Model(arch=ARCH), [dict(type='FeatureStatisticsHook', interval=2)])
    assert [entry['step'] for entry in entries] == [2, 4]
    tables = [line.splitlines() for line in lines if line.startswith('statistics of the features')]
    assert len(tables) == 2 and all(len(table) == 2 + 3 * 4 for table in tables)
    std = entries[1]['features/column1/level0/std']
    assert tables[1][6].split()[:3] == ['column1', 'level0', f'{std:.3g}']


@pytest.mark.parametrize('interval', [0, -1, 1.5, None])
def test_an_interval_that_is_no_positive_integer_is_refused(interval):
    with pytest.raises(ValueError, match=f'interval must be a positive integer, but got {interval}'):
        HOOKS.build(dict(type='FeatureStatisticsHook', interval=interval))


def test_a_model_without_columns_is_refused():
    runner = type('Runner', (), dict(model=nn.Linear(2, 2)))()
    with pytest.raises(ValueError, match='needs a model with a network of columns, but Linear has none'):
        FeatureStatisticsHook().before_train(runner)
