# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The optimizer constructor: layer ids against those of the authors' code, and what follows from them."""
import gzip
import importlib
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.optim import LinearLR, MultiStepLR, build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn

import revcol_mm  # noqa: F401
from revcol_mm.models import RevCol
from tests.common import DATA, build_optimizer, parameter_groups, small_arch

LAYER_IDS = json.loads(gzip.decompress((DATA / 'official_layer_ids.json.gz').read_bytes()))
TINY = dict(type='RevCol', arch=small_arch())
NUM_LAYERS = 5 - 1 + 3 - 1 + 3  # blocks of a column, columns, and the stem, the first block and the heads


class Detector(nn.Module):
    """Stands in for the models of all packages: a backbone, and a head outside of it."""

    def __init__(self, **backbone):
        super().__init__()
        self.backbone = RevCol(TINY['arch'], **backbone)
        self.head = nn.Linear(32, 4)


@pytest.mark.parametrize('size', list(LAYER_IDS))
def test_layer_ids_of_every_parameter_equal_those_of_the_authors(size):
    with torch.device('meta'):
        backbone = RevCol(size)
    wanted = LAYER_IDS[size]
    got = {name: backbone.get_layer_depth(f'backbone.{name}', 'backbone.') for name, _ in backbone.named_parameters()}
    assert {name: layer for name, (layer, _) in got.items()} == wanted['layer_id']
    assert {count for _, count in got.values()} == {wanted['num_layers']}
    assert backbone.get_layer_depth('neck.weight', 'backbone.') == (wanted['head_layer_id'], wanted['num_layers'])


def test_rates_follow_the_layer_ids():
    with torch.device('meta'):
        model = nn.ModuleDict(dict(backbone=RevCol('tiny'), head=nn.Linear(2, 2)))
    groups = parameter_groups(build_optimizer(model, layer_decay_rate=0.85))
    wanted = LAYER_IDS['tiny']
    for name, layer in wanted['layer_id'].items():
        if not name.startswith('subnet0.alpha'):
            assert groups[f'backbone.{name}']['lr'] == pytest.approx(0.1 * 0.85**(wanted['num_layers'] - layer - 1)), name
    assert groups['head.weight']['lr'] == 0.1


def test_biases_norms_and_gamma_are_not_decayed():
    groups = parameter_groups(build_optimizer(Detector(), layer_decay_rate=0.9))
    for name, group in groups.items():
        free = name.endswith('.bias') or '.norm.' in name or name.endswith('.gamma') or '.alpha' in name or (
            name.endswith(('stem.1.weight', 'down.1.weight', 'channel_reschedule.1.weight')))
        assert group['weight_decay'] == (0 if free else 0.05), name


def test_biases_and_norms_are_not_decayed_where_the_optimizer_chooses_the_decay():
    wrapper = build_optim_wrapper(Detector(), ConfigDict(
        type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.1), constructor='LayerDecayOptimWrapperConstructor'))
    decays = {group['group_name'].rpartition('layer_')[2].partition('_')[2]: group['weight_decay']
              for group in wrapper.optimizer.param_groups}
    assert decays == dict(decay=0.01, no_decay=0)  # torch's default


def test_decay_gamma_decays_the_shortcuts_gamma_and_nothing_else_in_addition():
    without, with_gamma = (parameter_groups(build_optimizer(Detector(), **options)) for options in ({}, dict(decay_gamma=True)))
    changed = {name for name in without if without[name]['weight_decay'] != with_gamma[name]['weight_decay']}
    assert changed == {f'backbone.subnet{column}.alpha{level}' for column in (1, 2) for level in range(4)}


def test_parameters_without_gradient_are_left_out_and_all_others_are_there_once():
    model = Detector(frozen_stages=2)
    wrapper = build_optimizer(model, layer_decay_rate=0.9)
    names = [name for group in wrapper.optimizer.param_groups for name in group['param_names']]
    assert sorted(names) == sorted(name for name, param in model.named_parameters() if param.requires_grad)
    assert not any(name.startswith(('backbone.stem', 'backbone.subnet0', 'backbone.subnet1')) for name in names)


def test_the_first_group_has_the_rate_that_the_config_names():
    groups = build_optimizer(Detector(), layer_decay_rate=0.5).optimizer.param_groups
    assert groups[0]['lr'] == 0.1 and groups[0]['group_name'].startswith(f'layer_{NUM_LAYERS - 1}_')


def test_wrapped_models_get_the_same_groups():
    model = Detector()
    plain = build_optimizer(model, layer_decay_rate=0.9)
    wrapped = build_optimizer(nn.ModuleDict(dict(module=model)), layer_decay_rate=0.9)
    assert parameter_groups(plain).keys() == parameter_groups(wrapped).keys()
    assert [group['lr'] for group in plain.optimizer.param_groups] == [group['lr'] for group in wrapped.optimizer.param_groups]


@pytest.mark.parametrize('scope, base, head', [
    ('mmdet', 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', 'roi_head.bbox_head.fc_cls.weight'),
    ('mmseg', 'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py', 'decode_head.conv_seg.weight'),
    ('mmpretrain', 'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py', 'head.fc.weight')])
def test_models_of_all_packages(scope, base, head):
    model = get_config(base).model
    model.backbone = ConfigDict(TINY)
    model.pop('pretrained', None)  # mmseg would hand it to the backbone
    channels = [8, 16, 24, 32]
    if scope == 'mmdet':
        model.neck.in_channels = channels
    elif scope == 'mmseg':
        model.decode_head.in_channels, model.auxiliary_head.in_channels = channels, 24
    else:
        model.head.in_channels = 32
        model.backbone.out_indices = (3, )
    for part in (model, model.get('decode_head'), model.get('auxiliary_head')):
        if part is not None and 'norm_cfg' in part:
            part.norm_cfg = dict(type='BN')
    importlib.import_module(f'{scope}.utils').register_all_modules()
    with torch.device('meta'):
        built = MODELS.build(model)
    groups = parameter_groups(build_optimizer(built, layer_decay_rate=0.5))
    assert groups[head]['lr'] == 0.1
    assert groups['backbone.stem.0.weight']['lr'] == pytest.approx(0.1 * 0.5**(NUM_LAYERS - 1))
    assert sum(len(group['param_names']) for group in {id(g): g for g in groups.values()}.values()) == sum(
        param.requires_grad for param in built.parameters())


def test_auto_scaled_rates_and_schedules_keep_the_ratios_between_the_layers():
    wrapper = build_optimizer(Detector(), layer_decay_rate=0.5)
    scales = [group['lr_scale'] for group in wrapper.optimizer.param_groups]
    runner = SimpleNamespace(_train_dataloader=dict(batch_size=4), world_size=2, param_schedulers=None,
                             logger=MMLogger.get_current_instance())
    Runner.scale_lr(runner, wrapper, dict(enable=True, base_batch_size=16))
    rates = [group['lr'] for group in wrapper.optimizer.param_groups]
    assert rates == pytest.approx([0.05 * scale for scale in scales])
    warmup = LinearLR(wrapper, start_factor=0.1, by_epoch=False, end=4)
    steps = MultiStepLR(wrapper, milestones=[6], by_epoch=False)
    for _ in range(8):
        wrapper.optimizer.step()
        warmup.step()
        steps.step()
    assert [group['lr'] for group in wrapper.optimizer.param_groups] == pytest.approx([0.005 * scale for scale in scales])


def test_custom_keys_multiply_rate_and_decay_of_the_longest_match():
    keys = dict(backbone=dict(lr_mult=0.1), head=dict(decay_mult=2.))
    groups = parameter_groups(build_optimizer(Detector(), custom_keys=keys))
    assert groups['backbone.stem.0.weight']['lr'] == pytest.approx(0.01)
    assert (groups['head.weight']['lr'], groups['head.weight']['weight_decay']) == (0.1, 0.1)


def test_a_custom_key_that_is_in_no_name_is_named(monkeypatch):
    said = []
    monkeypatch.setattr('revcol_mm.engine.optimizers.layer_decay.print_log',
                        lambda text, logger, level=logging.INFO: said.append(text) if level == logging.WARNING else None)
    build_optimizer(Detector(), custom_keys=dict(backbone=dict(lr_mult=0.1), backbones=dict(lr_mult=0.1)))
    assert len(said) == 1 and said[0].endswith("['backbones']")


def test_bad_settings_are_refused_with_the_name_and_the_way_out():
    with pytest.raises(ValueError, match=r"\['decay_rate'\].*_delete_"):
        build_optimizer(Detector(), decay_rate=0.7)
    with pytest.raises(ValueError, match='layer_decay_rate .*must .*, but got 1.5'):
        build_optimizer(Detector(), layer_decay_rate=1.5)
    with pytest.raises(ValueError, match=r"custom_keys\.head .*may hold lr_mult and decay_mult, but got \['lr_mul'\]"):
        build_optimizer(Detector(), custom_keys=dict(head=dict(lr_mul=0.1)))
    with pytest.raises(ValueError, match='optimizer must have lr'):
        build_optim_wrapper(Detector(), dict(optimizer=dict(type='AdamW'), constructor='LayerDecayOptimWrapperConstructor'))
    with pytest.raises(TypeError, match='get_layer_depth'):
        build_optimizer(nn.Linear(2, 2), layer_decay_rate=0.9)
    assert len(build_optimizer(nn.Linear(2, 2)).optimizer.param_groups) == 2  # without decaying rates any model will do
