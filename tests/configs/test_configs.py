# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Every config builds, trains a step and predicts, at an eighth of its width; and its settings are those of the release."""

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from torch import nn

from tests.common import CONFIGS, gradients_of, load_config, mostly_slow, narrow

ALL = sorted(path.relative_to(CONFIGS).with_suffix('').as_posix() for place in ('*.py', 'demo/*.py')
             for path in CONFIGS.glob(place))
#: One config of every kind of model, the demo's for some heads; the others differ from it in numbers.
KINDS = ('cascade_rcnn_revcol_t', 'cascade_rcnn_revcol_t_k7_1x', 'mask_rcnn_revcol_t', 'upernet_revcol_t', 'revcol_t_in1k',
         'revcol_b_in22k', 'revcol_b_in1k_384_ft', 'revcol_vit_s_in1k',
         'hrnet_columns_in1k', 'revnet_convnext_in1k', *(name for name in ALL if name.startswith('demo/')))
RELEASE = 'https://github.com/megvii-research/RevCol/releases/download/checkpoint/revcol_'


def build(cfg: Config, crop: int = 64) -> nn.Module:
    """A model for the CPU, without pre-trained weights; segmentors for crops of 64 pixels."""
    cfg.model.backbone.init_cfg = None
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (crop, crop)
        if cfg.model.test_cfg.mode == 'slide':
            cfg.model.test_cfg.update(crop_size=(crop, crop), stride=(crop * 2 // 3, crop * 2 // 3))
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)  # as mmengine's runner does
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        model.init_weights()
    return model


def narrow_model(name: str, **kwargs) -> nn.Module:
    return build(narrow(load_config(name)), **kwargs)


def images(cfg: Config, sizes=None, objects=None) -> dict:
    """A batch of noise with labels, as a data loader hands it over: two images of 128 (detection) or 64 pixels."""
    if cfg.default_scope == 'mmdet':
        sizes = sizes or [(128, 128)] * 2
        return demo_mm_inputs(
            len(sizes), [(3, *size) for size in sizes], num_items=objects or [3] * len(sizes), num_classes=10, with_mask=True,
            with_semantic=cfg.model.type == 'HybridTaskCascade')
    inputs, samples = [], []
    for size in sizes or [(64, 64)] * 2:
        inputs.append(torch.randint(0, 256, (3, *size), dtype=torch.uint8))
        if cfg.default_scope == 'mmseg':
            labels = torch.randint(0, cfg.model.decode_head.num_classes, (1, *size))
            samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=dict(img_shape=size, ori_shape=size)))
        else:
            samples.append(DataSample().set_gt_label(3))
    return dict(inputs=inputs, data_samples=samples)


def loss_of(model: nn.Module, data: dict) -> torch.Tensor:
    model.train()
    return model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))[0]


def predictions(model: nn.Module, data: dict) -> list:
    model.eval()
    with torch.no_grad():
        return model(**model.data_preprocessor(data, False), mode='predict')


@pytest.mark.parametrize('name', mostly_slow(ALL, KINDS))
def test_every_config_trains_a_step_and_predicts(name):
    cfg = load_config(name)
    if not name.startswith('demo/'):  # those are small already
        narrow(cfg)
    model = build(cfg, crop=128 if name.startswith('demo/') else 64)
    cfg.optim_wrapper.type = 'OptimWrapper'  # mixed precision wants a GPU
    for key in ('loss_scale', 'dtype'):
        cfg.optim_wrapper.pop(key, None)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    # Padding has the label 255, for which mmseg's cross entropy looks up a class weight: images of the crop's size.
    sizes = [(128, 128)] * 2 if cfg.default_scope == 'mmseg' and name.startswith('demo/') else None
    loss = loss_of(model, images(cfg, sizes))
    loss.backward()
    assert torch.isfinite(loss)
    gradients = gradients_of(model.backbone)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert any(key.startswith('stem') for key in gradients)
    optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert len(predictions(model, images(cfg))) == 2


# lr, layer decay, drop path, weight decay, images per GPU, pre-training
CASCADE = {
    'cascade_rcnn_revcol_t': (2e-4, 0.85, 0.3, 0.05, 2, RELEASE + 'tiny_1k.pth'),
    'cascade_rcnn_revcol_s': (2e-4, 0.85, 0.4, 0.05, 2, RELEASE + 'small_1k.pth'),
    'cascade_rcnn_revcol_b': (2e-4, 0.9, 0.4, 0.05, 2, RELEASE + 'base_1k.pth'),
    'cascade_rcnn_revcol_b_in22k': (1e-4, 0.9, 0.4, 0.05, 2, RELEASE + 'base_22k.pth'),
    'cascade_rcnn_revcol_l_in22k': (1e-4, 0.85, 0.5, 0.05, 2, RELEASE + 'large_22k.pth'),
}
UPERNET = {
    'upernet_revcol_t': (6e-5, 1.0, 0.3, 0.01, 2, RELEASE + 'tiny_1k.pth'),
    'upernet_revcol_s': (4e-5, 1.0, 0.3, 0.01, 2, RELEASE + 'small_1k.pth'),
    'upernet_revcol_b': (4e-5, 1.0, 0.3, 0.01, 2, RELEASE + 'base_1k.pth'),
    'upernet_revcol_b_in22k': (4e-5, 0.9, 0.3, 0.01, 2, RELEASE + 'base_22k.pth'),
    'upernet_revcol_l_in22k': (4e-5, 0.9, 0.3, 0.01, 2, RELEASE + 'large_22k.pth'),
    'upernet_revcol_h': (4e-5, 0.9, 0.3, 0.01, 1, 'checkpoints/revcol_huge_megdata_k7.pth'),
}


@pytest.mark.parametrize('name,expected', [*CASCADE.items(), *UPERNET.items()])
def test_rates_are_the_releases(name, expected):
    cfg = load_config(name)
    optimizer, backbone = cfg.optim_wrapper.optimizer, cfg.model.backbone
    assert (optimizer.type, optimizer.betas) == ('AdamW', (0.9, 0.999))
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.constructor == 'LayerDecayOptimWrapperConstructor'
    assert (optimizer.lr, cfg.optim_wrapper.paramwise_cfg.layer_decay_rate, backbone.drop_path_rate, optimizer.weight_decay,
            cfg.train_dataloader.batch_size, backbone.init_cfg.checkpoint) == expected
    assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size
    assert backbone.reversible


@pytest.mark.parametrize('name,epochs,drops,warmup', [
    *[(name, 36, [27, 33], 500) for name in CASCADE],
    *[(f'cascade_rcnn_revcol_{name}_1x', 12, [8, 11], 500) for name in ('t', 's', 'b', 't_k5', 't_k7', 't_k11')],
    ('mask_rcnn_revcol_t', 12, [8, 11], 500), ('htc_revcol_h', 72, [63, 69], 500)])
def test_detectors_warm_up_and_drop_at_the_papers_epochs(name, epochs, drops, warmup):
    cfg = load_config(name)
    first, second = cfg.param_scheduler
    assert (first.type, first.start_factor, first.end, first.by_epoch) == ('LinearLR', 0.001, warmup, False)
    assert (second.type, second.milestones, second.end, second.gamma) == ('MultiStepLR', drops, epochs, 0.1)
    assert cfg.train_cfg.max_epochs == epochs


@pytest.mark.parametrize('name,crop,stride,channels,warmup', [
    ('upernet_revcol_t', 512, 341, 512, 1500), ('upernet_revcol_s', 512, 341, 512, 1500),
    ('upernet_revcol_b', 512, 426, 512, 1500), ('upernet_revcol_b_in22k', 640, 426, 512, 1500),
    ('upernet_revcol_l_in22k', 640, 426, 512, 3000), ('upernet_revcol_h', 640, 426, 1440, 3000)])
def test_segmentors_crop_slide_and_warm_up_as_the_release(name, crop, stride, channels, warmup):
    cfg = load_config(name)
    test, transforms = cfg.model.test_cfg, {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert (test.mode, test.crop_size, test.stride) == ('slide', (crop, crop), (stride, stride))
    assert cfg.model.data_preprocessor.size == transforms['RandomCrop'].crop_size == (crop, crop)
    for pipeline in (cfg.train_dataloader.dataset.pipeline, cfg.test_dataloader.dataset.pipeline,
                     cfg.val_dataloader.dataset.pipeline):
        scale, = (step.scale for step in pipeline if step.type in ('RandomResize', 'Resize'))
        assert scale == (4 * crop, crop)
    ratios = [step.scale[1] / crop for step in cfg.tta_pipeline[1].transforms[0]]
    assert ratios == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75] and len(cfg.tta_pipeline[1].transforms[1]) == 2
    assert cfg.model.decode_head.channels == channels
    assert (cfg.model.auxiliary_head.channels, cfg.model.auxiliary_head.in_index) == (256, 2)
    first, second = cfg.param_scheduler
    assert (first.type, first.start_factor, first.end) == ('LinearLR', 1e-6, warmup)
    assert (second.type, second.power, second.begin, second.end) == ('PolyLR', 1.0, warmup, 160000)
    assert cfg.train_cfg.max_iters == 160000


@pytest.mark.parametrize('name,kernel', [
    ('htc_revcol_h', 7), ('dino_revcol_h_o365', 7), ('upernet_revcol_h', 7), ('mask2former_revcol_h', 13)])
def test_padded_kernels_start_from_the_file_that_the_padder_writes(name, kernel):
    backbone = load_config(name).model.backbone
    assert backbone.kernel_size == kernel
    assert backbone.init_cfg.checkpoint.endswith(f'_k{kernel}.pth')


@pytest.mark.parametrize('kernel', [5, 7, 11])
def test_the_kernels_of_table_8_are_padded_while_they_are_loaded(kernel):
    backbone, smaller = (load_config(name).model.backbone for name in (f'cascade_rcnn_revcol_t_k{kernel}_1x',
                                                                       'cascade_rcnn_revcol_t_1x'))
    assert (backbone.kernel_size, backbone.pad_pretrained) == (kernel, True)
    assert backbone.init_cfg.checkpoint == smaller.init_cfg.checkpoint and backbone.init_cfg.checkpoint.startswith('https://')


def test_htc_plus_plus_has_its_parts():
    cfg = load_config('htc_revcol_h')
    assert all((head.type, head.num_shared_convs, head.num_shared_fcs, head.loss_bbox.type, head.loss_bbox.loss_weight)
               == ('ConvFCBBoxHead', 4, 1, 'GIoULoss', 10.0) for head in cfg.model.roi_head.bbox_head)
    assert cfg.model.roi_head.semantic_head.type == 'FusedSemanticHead'
    assert cfg.model.test_cfg.rcnn.nms.type == 'soft_nms' and cfg.tta_model.type == 'InstanceTTAModel'
    resize, = (step for step in cfg.train_dataloader.dataset.pipeline if step.type == 'RandomResize')
    assert resize.scale == [(1600, 400), (1600, 1400)]
    assert [step.type for step in cfg.train_pipeline_instaboost][:3] == ['LoadImageFromFile', 'InstaBoost', 'LoadAnnotations']


def test_dino_fine_tunes_what_objects365_pre_trained():
    first, second = load_config('dino_revcol_h_o365'), load_config('dino_revcol_h')
    assert first.train_dataloader.dataset.type == first.val_dataloader.dataset.type == 'Objects365V2Dataset'
    assert first.model.bbox_head.num_classes == 365 and second.model.bbox_head.num_classes == 80
    assert second.load_from == f'work_dirs/dino_revcol_h_o365/epoch_{first.train_cfg.max_epochs}.pth'
    assert second.train_dataloader.dataset.type == 'CocoDataset' and second.model.backbone.init_cfg is None


@pytest.mark.slow
def test_the_override_to_four_scales_in_dinos_base_is_right():
    text = (CONFIGS / '_base_/dino_revcol.py').read_text()
    lines = [line.strip('# \\') for line in text.splitlines() if line.startswith('#     ')]
    words = ' '.join(lines).replace('--cfg-options ', '').replace('"', '').split()
    cfg = load_config('dino_revcol_b_in22k')
    cfg.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in (word.split('=') for word in words)})
    model = build(narrow(cfg))
    assert [level.shape[-1] for level in model.extract_feat(torch.zeros(1, 3, 128, 128))] == [16, 8, 4, 2]
    assert torch.isfinite(loss_of(model, images(cfg, [(256, 256)] * 2)))


# What inputs may look like ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', mostly_slow(
    ['cascade_rcnn_revcol_t', 'dino_revcol_b_in22k', 'htc_revcol_h', 'mask_rcnn_revcol_t'], ['cascade_rcnn_revcol_t']))
def test_detectors_take_odd_sizes_a_batch_of_one_and_images_without_objects(name):
    cfg = narrow(load_config(name))
    model = build(cfg)
    assert torch.isfinite(loss_of(model, images(cfg, [(131, 157), (150, 149)], [2, 0])))
    loss = loss_of(model, images(cfg, [(133, 151)], [0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert len(predictions(model, images(cfg, [(133, 151)]))) == 1


@pytest.mark.parametrize('name,mode', [('upernet_revcol_t', 'slide'), ('upernet_revcol_t', 'whole'),
                                       ('mask2former_revcol_t', 'whole')])
def test_segmentors_predict_images_of_any_size(name, mode):
    """Smaller than the crop, odd, and larger than the crop: the map has the size of the image."""
    cfg = narrow(load_config(name))
    if cfg.model.test_cfg.mode != mode:
        cfg.model.test_cfg = dict(mode=mode)
    model = build(cfg)
    for size in ((37, 61), (65, 131)):
        sample, = predictions(model, images(cfg, [size]))
        assert sample.pred_sem_seg.data.shape[-2:] == size


@pytest.mark.slow
def test_segmentors_pad_training_images_smaller_than_the_crop():
    for name in ('upernet_revcol_t', 'mask2former_revcol_t'):
        cfg = narrow(load_config(name))
        assert torch.isfinite(loss_of(build(cfg), images(cfg, [(40, 51), (64, 33)])))


def test_segmentors_take_images_without_any_label():
    for name in ('upernet_revcol_t', 'mask2former_revcol_t'):
        cfg = narrow(load_config(name))
        data = images(cfg)
        for sample in data['data_samples']:
            sample.gt_sem_seg.data.fill_(255)
        assert not torch.isnan(loss_of(build(cfg), data))


def test_upernet_cannot_train_on_a_batch_of_one_and_mask2former_can():
    """UPerNet pools to 1×1, and the batch norm behind it then has one value per channel. With SyncBN it is the images of all
    processes that count, so one image on each of several GPUs works."""
    cfg = narrow(load_config('upernet_revcol_t'))
    with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
        loss_of(build(cfg), images(cfg, [(64, 64)]))
    cfg = narrow(load_config('mask2former_revcol_t'))
    assert torch.isfinite(loss_of(build(cfg), images(cfg, [(64, 64)])))
