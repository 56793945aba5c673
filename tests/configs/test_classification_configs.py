# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The ImageNet configs hold the settings of the authors' release, and the networks of table 1."""
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS
from mmpretrain.datasets import ImageNet  # noqa: F401  registers the data sets

from revcol_mm import config_path
from revcol_mm.utils import flops
from tests.common import count_config, mostly_slow

# name: (peak lr, first lr, last lr, all per 1024 images), batch, epochs, warm-up epochs, weight decay, layer decay, drop path,
# clip grad, EMA decay, mixup, head init scale, resolution
SETTINGS = {
    'revcol_t_in1k': ((1e-3, 1e-5, 1e-6), 4096, 300, 20, 0.05, 1.0, 0.1, None, 0.9999, 0.8, None, 224),
    'revcol_t_in1k_no_supervision': ((1e-3, 1e-5, 1e-6), 4096, 300, 20, 0.05, 1.0, 0.1, None, 0.9999, 0.8, None, 224),
    'revcol_s_in1k': ((1e-3, 1e-5, 1e-6), 4096, 300, 20, 0.05, 1.0, 0.3, None, 0.9999, 0.8, None, 224),
    'revcol_s_in1k_no_supervision': ((1e-3, 1e-5, 1e-6), 4096, 300, 20, 0.05, 1.0, 0.3, None, 0.9999, 0.8, None, 224),
    'revcol_b_in1k': ((1e-3, 1e-5, 1e-8), 4096, 300, 20, 0.05, 1.0, 0.4, 5.0, 0.9999, 0.8, None, 224),
    'revcol_b_in1k_no_supervision': ((1e-3, 1e-5, 1e-8), 4096, 300, 20, 0.05, 1.0, 0.4, 5.0, 0.9999, 0.8, None, 224),
    'revcol_b_in22k': ((1.25e-4, 1e-5, 1e-7), 4096, 90, 5, 0.1, 1.0, 0.3, 10.0, None, 0.8, None, 224),
    'revcol_l_in22k': ((1.25e-4, 1e-5, 1e-7), 4096, 90, 5, 0.1, 1.0, 0.3, 10.0, None, 0.8, None, 224),
    'revcol_xl_in22k': ((1.25e-4, 1e-5, 1e-7), 4096, 90, 5, 0.1, 1.0, 0.4, 10.0, None, 0.8, None, 224),
    'revcol_b_in1k_224_ft': ((1e-4, None, 2e-7), 512, 30, 0, 1e-8, 0.9, 0.2, 10.0, None, None, 0.001, 224),
    'revcol_l_in1k_224_ft': ((5e-5, None, 2e-7), 512, 30, 0, 1e-8, 0.8, 0.3, 10.0, None, None, 0.001, 224),
    'revcol_b_in1k_384_ft': ((1e-4, None, 2e-7), 512, 30, 0, 1e-8, 0.9, 0.2, 10.0, None, None, 0.001, 384),
    'revcol_l_in1k_384_ft': ((5e-5, None, 2e-7), 512, 30, 0, 1e-8, 0.8, 0.3, 10.0, None, None, 0.001, 384),
    'revcol_xl_in1k_384_ft': ((2e-5, None, 2e-7), 512, 30, 0, 1e-8, 0.8, 0.4, 10.0, 0.9999, None, 0.001, 384),
    'revcol_h_in1k_640_ft': ((4e-5, None, 2e-8), 512, 20, 0, 1e-8, 0.8, 0.4, 100.0, 0.9999, None, 0.001, 640),
}

# Table 1: parameters and multiply-adds of the backbone and one classifier. 39.0G at 224² is of L, 350G at 384² of XL.
TABLE_1 = {
    'revcol_t_in1k': (30e6, 4.5e9),
    'revcol_s_in1k': (60e6, 9.0e9),
    'revcol_b_in1k': (138e6, 16.6e9),
    'revcol_b_in1k_384_ft': (138e6, 48.9e9),
    'revcol_l_in1k_224_ft': (273e6, 39.0e9),
    'revcol_l_in1k_384_ft': (273e6, 116e9),
    'revcol_xl_in1k_384_ft': (834e6, 350e9),
    'revcol_h_in1k_640_ft': (2150e6, 2537e9),
}

# The ablations, and the config whose training they share. Widths and depths are chosen here by the rule in docs/paper.md.
ABLATIONS = {
    **{f'revcol_4g5_col{columns}_in1k': 'revcol_t_in1k' for columns in (1, 8, 12, 20)},
    'revcol_t_col12_in1k': 'revcol_t_in1k', 'revcol_t_col16_in1k': 'revcol_t_in1k',
    'hrnet_columns_in1k': 'revcol_t_in1k', 'revnet_convnext_in1k': 'revcol_t_in1k',
    **{f'revcol_vit_b_col{columns}_in1k': 'revcol_vit_b_in1k' for columns in (1, 2, 4, 8)},
}

# Columns, parameters and multiply-adds that tables 5 and 6 print.
TABLES_5_AND_6 = {
    'revcol_4g5_col1_in1k': (1, 28e6, 4.4e9),
    'revcol_t_in1k': (4, 30e6, 4.5e9),
    'revcol_4g5_col8_in1k': (8, 34e6, 4.7e9),
    'revcol_4g5_col12_in1k': (12, 33e6, 4.4e9),
    'revcol_4g5_col20_in1k': (20, 35e6, 4.2e9),
    'hrnet_columns_in1k': (4, 35e6, 4.9e9),
    'revnet_convnext_in1k': (1, 34e6, 4.5e9),
}


def every(values):
    return pytest.mark.parametrize('name', values)


def read(name):
    return Config.fromfile(config_path(name))


def step(pipeline, kind):
    found = [transform for transform in pipeline if transform.type == kind]
    return found[0] if found else None


@every(SETTINGS)
def test_optimization_is_the_release_s(name):
    cfg = read(name)
    (lr, _, _), batch, epochs, _, weight_decay, layer_decay, _, clip, ema, *_ = SETTINGS[name]
    wrapper = cfg.optim_wrapper
    assert wrapper.type == 'AmpOptimWrapper'
    assert cfg.auto_scale_lr.base_batch_size == batch
    optimizer = dict(wrapper.optimizer)
    assert optimizer.pop('lr') == pytest.approx(lr * batch / 1024)
    assert optimizer == dict(type='AdamW', betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
    assert wrapper.constructor == 'LayerDecayOptimWrapperConstructor'
    assert wrapper.paramwise_cfg == dict(layer_decay_rate=layer_decay, decay_gamma=True)
    assert (wrapper.get('clip_grad') or {}).get('max_norm') == clip
    assert cfg.train_cfg.max_epochs == epochs
    averages = [1 - hook.momentum for hook in cfg.custom_hooks if hook.type == 'EMAHook']
    assert averages == ([] if ema is None else [pytest.approx(ema)])


@every(SETTINGS)
def test_learning_rate_warms_up_and_falls_as_the_release_s_for_any_batch(name):
    cfg = read(name)
    (peak, first, last), batch, epochs, warmup, *_ = SETTINGS[name]
    iterations, factor = 10, 0.25  # an epoch; --auto-scale-lr with a quarter of the batch
    scale = factor * batch / 1024
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr * factor)
    schedulers = []
    for settings in cfg.param_scheduler:
        settings = dict(settings, optimizer=OptimWrapper(optimizer), epoch_length=iterations)
        convert = settings.pop('convert_to_iter_based')
        kind = PARAM_SCHEDULERS.get(settings.pop('type'))
        schedulers.append(kind.build_iter_from_epoch(**settings) if convert else kind(**settings))
    rates = []
    for _ in range(epochs * iterations):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    if warmup:
        assert rates[0] == pytest.approx(first * scale)
        assert rates[:warmup * iterations] == sorted(rates[:warmup * iterations])
    assert max(rates) == pytest.approx(peak * scale)
    # The last of some hundred steps down a cosine is not its very end: 1e-4 of the peak above it, at most.
    assert rates[-1] == pytest.approx(last * scale, abs=1e-4 * peak * scale)
    assert rates[warmup * iterations:] == sorted(rates[warmup * iterations:], reverse=True)


@every(SETTINGS)
def test_model_and_augmentation_are_the_release_s(name):
    cfg = read(name)
    *_, drop_path, _, _, mixup, init_scale, resolution = SETTINGS[name]
    assert cfg.model.backbone.drop_path_rate == drop_path
    assert cfg.model.backbone.reversible
    assert cfg.model.head.get('init_scale') == init_scale
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == (21841 if '22k' in name else 1000)
    assert cfg.model.head.loss == dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')
    augments = (cfg.model.get('train_cfg') or {}).get('augments', [])
    assert augments == ([] if mixup is None else [dict(type='Mixup', alpha=mixup), dict(type='CutMix', alpha=1.0)])
    pipeline = cfg.train_dataloader.dataset.pipeline
    crop, augment = step(pipeline, 'RandomResizedCrop'), step(pipeline, 'RandAugment')
    assert (crop.scale, crop.interpolation) == (resolution, 'bicubic')
    assert (augment.magnitude_level, augment.magnitude_std) == (9, 0.5)
    assert step(pipeline, 'RandomErasing').erase_prob == 0.25


@every([name for name in SETTINGS if not name.endswith('22k')])
def test_evaluation_crops_at_224_and_takes_the_whole_image_above(name):
    cfg = read(name)
    resolution = SETTINGS[name][-1]
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        pipeline = loader.dataset.pipeline
        if resolution == 224:
            resize = step(pipeline, 'ResizeEdge')
            assert (resize.scale, resize.edge, step(pipeline, 'CenterCrop').crop_size) == (256, 'short', 224)
        else:
            resize = step(pipeline, 'Resize')
            assert resize.scale == (resolution, resolution) and step(pipeline, 'CenterCrop') is None
        assert resize.interpolation == 'bicubic'


@every([name for name in SETTINGS if name.endswith(('in1k', '22k'))])
def test_training_from_scratch_supervises_inner_columns(name):
    model = flops.build_on_meta(read(name))
    assert type(model).__name__ == 'IntermediateSupervisionClassifier'
    decoder = 'ProjectionDecoder' if '22k' in name else 'PyramidDecoder'
    assert [type(block).__name__ for block in model.head.decoder_blocks] == 3 * [decoder]


@every([name for name in SETTINGS if name.endswith(('ft', 'no_supervision'))])
def test_fine_tuning_and_the_ablation_have_one_classifier(name):
    cfg = read(name)
    assert (cfg.model.type, cfg.model.head.type) == ('ImageClassifier', 'RevColClsHead')
    assert ('init_cfg' in cfg.model.backbone) == name.endswith('ft')


@every(mostly_slow(TABLE_1, ['revcol_t_in1k']))
def test_parameters_and_flops_are_those_of_table_1(name):
    params, macs = TABLE_1[name]
    cost = count_config(name)
    # The backbone alone: T's and S's printed figures fit without the classifier, and for the others it is 0.5 % at most.
    assert cost['backbone'].params == pytest.approx(params, rel=0.01)
    assert cost['total'].macs == pytest.approx(macs, rel=0.01)


@every(ABLATIONS)
def test_ablations_are_trained_as_the_network_that_they_vary(name):
    cfg, base = read(name), read(ABLATIONS[name])
    for key in ('optim_wrapper', 'param_scheduler', 'train_cfg', 'train_dataloader', 'auto_scale_lr', 'custom_hooks'):
        assert cfg[key] == base[key], key
    assert cfg.model.train_cfg == base.model.train_cfg
    # Intermediate supervision, except for a single column and for ViT blocks.
    single = flops.build_on_meta(cfg).backbone.num_columns == 1
    assert cfg.model.type == ('ImageClassifier' if single else base.model.type)


@every(mostly_slow(TABLES_5_AND_6, ['revnet_convnext_in1k']))
def test_parameters_and_flops_are_those_of_tables_5_and_6_within_three_percent(name):
    columns, params, macs = TABLES_5_AND_6[name]
    cfg = read(name)
    cost, backbone = count_config(name), flops.build_on_meta(cfg).backbone
    classifier = 1001 * backbone.channels[-1]  # the paper does not say whether it counts one
    for counted in (cost['backbone'].params, cost['backbone'].params + classifier):
        assert counted == pytest.approx(params, rel=0.03)
    assert cost['total'].macs == pytest.approx(macs, rel=0.03)
    assert backbone.num_columns == columns


@pytest.mark.slow
@pytest.mark.parametrize('name,columns', [('revcol_t_col12_in1k', 12), ('revcol_t_col16_in1k', 16)])
def test_figure_3_adds_columns_of_one_size(name, columns):
    def macs(name):
        return count_config(name)['backbone'].macs

    one = (macs('revcol_s_in1k') - macs('revcol_t_in1k')) / 4
    assert macs(name) == macs('revcol_t_in1k') + (columns - 4) * one
    assert one == pytest.approx(1.12e9, rel=0.03)  # table 5


@pytest.mark.slow
@pytest.mark.parametrize('columns,error', [(1, 0.03), (2, 0.03), (4, 0.03), (8, 0.075)])
def test_figure_6_has_32_blocks_of_one_width_at_about_18_gflops(columns, error):
    cfg = read(f'revcol_vit_b_col{columns}_in1k')
    backbone = flops.build_on_meta(cfg).backbone
    assert (backbone.num_columns, sum(backbone.depths)) == (columns, 32 // columns)
    assert backbone.embed_dims == 464
    # More columns have more fusions, 10 % of the FLOPs from one to eight: one width cannot give all four the same FLOPs.
    assert count_config(f'revcol_vit_b_col{columns}_in1k')['total'].macs == pytest.approx(18e9, rel=error)
