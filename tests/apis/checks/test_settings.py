# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Settings that would be ignored or mean something else."""
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import CosineAnnealingLR

from revcol_mm.apis.checks import options
from revcol_mm.apis.checks.options import check_options
from revcol_mm.apis.checks.schedules import check_accumulation, check_schedulers, count_accumulation
from revcol_mm.apis.checks.settings import check_kinds, check_optimizer, check_reduced_labels, put_classes_right
from revcol_mm.apis.config import load_config
from revcol_mm.apis.errors import LaunchError
from revcol_mm.apis.test import parse_test_args
from revcol_mm.utils.configs import config_path


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


def test_a_scaled_learning_rate_needs_its_batch_size(cfg):
    cfg.optim_wrapper.accumulative_counts = 8
    del cfg.auto_scale_lr.base_batch_size
    for check in (check_accumulation, count_accumulation):
        with pytest.raises(LaunchError, match="must have the base_batch_size .*, but has {'enable': True}: add it"):
            check(cfg)


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


@pytest.mark.parametrize('key, meant', [
    ('model.test_cfg.rcnn.score_threshold', 'model.test_cfg.rcnn.score_thr'),
    ('train_dataloader.dataset.filter_cfg.min_sizes', 'train_dataloader.dataset.filter_cfg.min_size'),
    ('default_hooks.checkpoint.intervall', 'default_hooks.checkpoint.interval'),
    ('default_hooks.checkpoint.max_keep_ckpt', 'default_hooks.checkpoint.max_keep_ckpts'),
    ('train_dataloader.dataset.pipeline.1.with_boxx', 'train_dataloader.dataset.pipeline.1.with_bbox'),
    ('model.backbone.drop_path_rat', 'model.backbone.drop_path_rate')])
def test_misspelt_arguments_of_classes_and_of_plain_dicts_are_refused(key, meant):
    cfg = Config.fromfile(config_path('cascade_rcnn_revcol_t'))
    with pytest.raises(LaunchError, match=f'{key} is unknown: did you mean {meant}\\?'):
        check_options(cfg, {key: 1})


@pytest.mark.parametrize('config, keys', [
    ('cascade_rcnn_revcol_t', [
        'model.backbone.stored_columns', 'model.backbone.reversible', 'model.backbone.init_cfg', 'model.test_cfg.rcnn.nms.type',
        'train_dataloader.dataset.filter_cfg.min_size', 'train_dataloader.dataset.indices',
        'default_hooks.checkpoint.save_best', 'default_hooks.checkpoint.published_keys', 'default_hooks.exact_resume',
        'optim_wrapper.accumulative_counts', 'optim_wrapper.optimizer.betas', 'optim_wrapper.clip_grad.norm_type',
        'train_cfg.val_interval', 'train_cfg.dynamic_intervals', 'val_evaluator.classwise', 'test_dataloader.num_workers',
        'train_dataloader.dataset.metainfo.classes', 'model.roi_head.bbox_head.0.num_classes', 'env_cfg.dist_cfg.timeout',
        'visualizer.vis_backends.0.type', 'model.data_preprocessor.pad_size_divisor', 'param_scheduler.0.end_factor']),
    ('upernet_revcol_t', [
        'model.test_cfg.stride', 'model.decode_head.ignore_index', 'model.decode_head.dropout_ratio',
        'train_dataloader.dataset.reduce_zero_label', 'train_dataloader.sampler.seed', 'custom_hooks.0.momentum',
        'model.auxiliary_head.loss_decode.class_weight', 'train_dataloader.dataset.pipeline.0.imdecode_backend']),
    ('demo/revcol_nano_digits_cls', ['model.head.topk', 'model.train_cfg.augments', 'train_dataloader.dataset.classes'])])
def test_arguments_that_a_config_does_not_name_are_accepted(config, keys):
    check_options(Config.fromfile(config_path(config)), dict.fromkeys(keys, 1))


@pytest.mark.parametrize('config', ['htc_revcol_h', 'mask2former_revcol_t', 'revcol_t_in1k'])
def test_no_key_of_a_config_is_taken_for_another_one(config):
    cfg = load_config(parse_test_args([config_path(config), 'checkpoint']))  # which registers the package

    def walk(node, *above):
        if isinstance(node, list):
            for index, part in enumerate(node):
                walk(part, *above, str(index))
        elif isinstance(node, dict):
            for key, value in node.items():
                rest = {name: other for name, other in node.items() if name != key}
                assert key == 'type' or options._what_was_meant(key, rest, above, cfg.default_scope) is None, (above, key)
                walk(value, *above, key)

    for key in options.READ.intersection(cfg):
        walk(cfg._cfg_dict[key], key)


@pytest.mark.parametrize('key, value', [('custom_hooks', 'EMAHook'), ('custom_hooks', dict(type='EMAHook')),
                                        ('param_scheduler', 'cosine'), ('custom_hooks', ['EMAHook'])])
def test_lists_of_settings_must_be_lists_of_dicts(cfg, key, value):
    cfg[key] = value
    with pytest.raises(LaunchError, match=f'{key} must be a list of dicts'):
        check_kinds(cfg)


def test_data_sets_of_one_type_agree_on_the_label_zero():
    def cfg_of(**val) -> Config:
        train = dict(type='RepeatDataset', dataset=dict(type='ADE20KDataset'))
        return Config(dict(default_scope='mmseg', train_dataloader=dict(dataset=train), val_dataloader=dict(
            dataset=dict(type='ADE20KDataset', **val)), test_dataloader=dict(dataset=dict(type='BaseSegDataset'))))

    check_reduced_labels(cfg_of())
    check_reduced_labels(cfg_of(reduce_zero_label=True))  # which is the type's own value
    with pytest.raises(LaunchError, match='the same for every ADE20KDataset, but is True in train_dataloader and False in v'):
        check_reduced_labels(cfg_of(reduce_zero_label=False))


def test_an_unknown_optimizer_is_named(cfg):
    check_optimizer(cfg)
    cfg.optim_wrapper.optimizer.type = 'AdamWW'
    with pytest.raises(LaunchError, match=r"optim_wrapper.optimizer.type must be .*, but is 'AdamWW': did you mean AdamW\?"):
        check_optimizer(cfg)
