# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Settings that would be ignored or mean something else."""
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import CosineAnnealingLR

from revcol_mm.apis.checks.options import check_options
from revcol_mm.apis.checks.schedules import check_accumulation, check_schedulers, count_accumulation
from revcol_mm.apis.checks.settings import put_classes_right
from revcol_mm.apis.errors import LaunchError


@pytest.fixture
def cfg() -> Config:
    return Config(dict(
        data_root='data/', train_dataloader=dict(batch_size=2, dataset=dict(data_root='data/', ann_file='x.json')),
        model=dict(test_cfg=dict(rcnn=dict(max_per_img=100)), heads=[dict(num_classes=3)]),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3), paramwise_cfg=dict(layer_decay_rate=0.9)),
        param_scheduler=[], auto_scale_lr=dict(enable=True, base_batch_size=16)))


@pytest.mark.parametrize('key, remedy', [
    ('train_dataloder.batch_size', r'train_dataloder.batch_size is unknown: did you mean train_dataloader.batch_size\?'),
    ('modle.test_cfg.rcnn.max_per_img', r'did you mean model.test_cfg.rcnn.max_per_img\?'),
    ('model.test_cfg.rcnn.max_per_image', r'did you mean model.test_cfg.rcnn.max_per_img\?'),
    ('auto_scale_lr.base_batchsize', r'did you mean auto_scale_lr.base_batch_size\?'),
    ('data_root', 'only a variable of the config.*set train_dataloader.dataset.data_root instead'),
    ('nonsense', 'nonsense is unknown: remove it')])
def test_keys_that_nothing_reads_are_refused(cfg, key, remedy):
    with pytest.raises(LaunchError, match=remedy):
        check_options(cfg, {key: 1})


@pytest.mark.parametrize('key', ['train_dataloader.batch_size', 'model.heads.0.num_classes', 'model.backbone.init_cfg',
                                 'load_from', 'resume', 'randomness.seed', 'model.test_cfg.rcnn.score_thr'])
def test_keys_that_are_read_are_accepted(cfg, key):
    check_options(cfg, {key: 1})


def test_a_single_class_name_becomes_a_tuple_of_one_in_every_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'names.txt').write_text('a\nb\n')
    loader = Config(dict(loader=dict(dataset=dict(datasets=[dict(metainfo=dict(classes='square')), dict(classes='square'), dict(
        dataset=dict(metainfo=dict(classes='square'))), dict(metainfo=dict(classes='names.txt'))])))).loader
    put_classes_right(loader, 'train_dataloader')
    sets = loader.dataset.datasets
    assert [sets[0].metainfo.classes, sets[1].classes, sets[2].dataset.metainfo.classes] == [('square', )] * 3
    assert sets[3].metainfo.classes == 'names.txt'  # a file of names, which the libraries read


def test_classes_in_capital_letters_are_read():
    loader = Config(dict(loader=dict(dataset=dict(metainfo=dict(CLASSES=('a', 'b')))))).loader
    put_classes_right(loader, 'train_dataloader')
    assert loader.dataset.metainfo == dict(classes=('a', 'b'))


def test_accumulated_batches_count_when_the_learning_rate_is_scaled(cfg):
    cfg.optim_wrapper.accumulative_counts = 8
    with pytest.raises(LaunchError, match='accumulative_counts is 8.*base_batch_size to 16/8'):
        check_accumulation(cfg)
    count_accumulation(cfg)
    assert cfg.train_dataloader.batch_size / cfg.auto_scale_lr.base_batch_size == 1  # mmengine's factor
    count_accumulation(cfg)
    assert cfg.auto_scale_lr.base_batch_size == 2
    check_accumulation(cfg)


def test_an_absolute_end_of_a_cosine_becomes_a_ratio_of_every_rate(cfg):
    cfg.param_scheduler = [dict(type='CosineAnnealingLR', eta_min=1e-5, T_max=4, by_epoch=False)]
    with pytest.raises(LaunchError, match=r'param_scheduler\[0\].*eta_min=1e-05 is one rate for all: set eta_min_ratio=0.01'):
        check_schedulers(cfg, repair=False)
    check_schedulers(cfg)
    groups = [dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=rate) for rate in (1e-3, 1e-4)]
    optimizer = torch.optim.SGD(groups)
    arguments = {key: value for key, value in cfg.param_scheduler[0].items() if key != 'type'}
    scheduler = CosineAnnealingLR(optimizer, **arguments)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert [group['lr'] for group in optimizer.param_groups] == pytest.approx([1e-5, 1e-6])


@pytest.mark.parametrize('paramwise, scaled', [(dict(layer_decay_rate=0.9), False),
                                               (dict(custom_keys=dict(head=dict(lr_mult=10))), False), (dict(), True)])
@pytest.mark.parametrize('scheduler, found', [
    (dict(type='OneCycleLR', eta_max=1e-2), 'eta_max is one rate for all: use .*eta_min_ratio.*optimizer.lr=0.01'),
    (dict(type='OneCycleParamScheduler', param_name='lr', eta_max=1e-2), 'eta_max is one rate for all'),
    (dict(type='PolyLR', eta_min=1e-6), 'eta_min=1e-06 is one rate for all: set eta_min=0'),
    (dict(type='ReduceOnPlateauLR', min_value=1e-6), 'min_value=1e-06 is one rate for all')])
def test_schedules_to_one_rate_for_all_are_refused(cfg, scheduler, found, paramwise, scaled):
    cfg.optim_wrapper.paramwise_cfg, cfg.auto_scale_lr.enable = paramwise, scaled
    cfg.param_scheduler = scheduler
    with pytest.raises(LaunchError, match=found):
        check_schedulers(cfg)


@pytest.mark.parametrize('scheduler', [dict(type='PolyLR', eta_min=0.0), dict(type='CosineAnnealingLR', eta_min_ratio=0.1),
                                       dict(type='LinearLR', start_factor=0.1),
                                       dict(type='CosineAnnealingMomentum', eta_min=0.85)])
def test_relative_schedules_are_left_alone(cfg, scheduler):
    cfg.param_scheduler = [dict(scheduler)]
    check_schedulers(cfg)
    assert cfg.param_scheduler == [scheduler]


def test_one_rate_for_all_is_kept_where_all_have_one(cfg):
    cfg.optim_wrapper.paramwise_cfg, cfg.auto_scale_lr.enable = dict(layer_decay_rate=1.0), False
    cfg.param_scheduler = [dict(type='OneCycleLR', eta_max=1e-2)]
    check_schedulers(cfg)
