# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What was pre-trained as a classifier becomes the backbone of detectors, segmentors and fine-tuned classifiers."""
import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS as ROOT
from mmpretrain.registry import MODELS

import revcol_mm.classification  # noqa: F401
from revcol_mm.checkpoint import pad_checkpoint
from revcol_mm.utils.configs import config_folder
from tests.common import CHANNELS, small_arch


def arch(deep_to_shallow=False):
    return small_arch(4, depths=(1, 1, 1, 1), deep_to_shallow=deep_to_shallow)


def pretrain(path, num_classes=10, kernel_size=3, deep_to_shallow=False):
    """A checkpoint as mmpretrain's training leaves it: all heads and decoders in it."""
    torch.manual_seed(0)
    model = MODELS.build(dict(
        type='IntermediateSupervisionClassifier',
        backbone=dict(type='RevCol', arch=arch(deep_to_shallow)),
        head=dict(type='IntermediateSupervisionHead', num_classes=num_classes, in_channels=CHANNELS)))
    with torch.no_grad():
        for parameter in model.parameters():  # as after training: no weight has the value that it starts from
            parameter.add_(0.05 * torch.randn_like(parameter))
    checkpoint = dict(state_dict=model.state_dict(), meta=dict(epoch=1))
    if kernel_size != 3:
        checkpoint, _ = pad_checkpoint(checkpoint, kernel_size)
    torch.save(checkpoint, path)
    return checkpoint['state_dict']


def pretrained_backbones():
    """Backbone of every config that starts from pre-trained weights."""
    found = {}
    for path in sorted(config_folder().glob('*.py')):
        backbone = (Config.fromfile(path).get('model') or {}).get('backbone') or {}
        if backbone.get('type') == 'RevCol' and (backbone.get('init_cfg') or {}).get('type') == 'Pretrained':
            found[path.stem] = backbone
    return found


BACKBONES = pretrained_backbones()


@pytest.mark.parametrize('name', BACKBONES)
def test_classification_weights_load_into_every_config_and_heads_are_left_out(name, tmp_path, caplog):
    backbone = copy.deepcopy(BACKBONES[name])
    deep_to_shallow = backbone.arch == 'huge'
    weights = pretrain(tmp_path / 'cls.pth', kernel_size=backbone.get('kernel_size', 3), deep_to_shallow=deep_to_shallow)
    backbone.arch = arch(deep_to_shallow)  # as the config says in all but width
    backbone.init_cfg.checkpoint = str(tmp_path / 'cls.pth')
    model = ROOT.build(backbone)
    logger = MMLogger.get_current_instance()  # mmengine's loggers stand apart from the others, which caplog listens to
    logger.addHandler(caplog.handler)
    model.init_weights()
    logger.removeHandler(caplog.handler)
    for key, value in model.state_dict().items():
        if not key.startswith('norm'):  # output norms are new
            torch.testing.assert_close(value, weights[f'backbone.{key}'], rtol=0, atol=0)
    heads = sum(key.startswith('head.') for key in weights)
    assert f'left out: head ({heads})' in caplog.text


@pytest.mark.parametrize('num_classes', [10, 1001], ids=['pyramid decoders', 'projection decoders'])
def test_fine_tuning_keeps_the_backbone_and_starts_a_new_classifier(num_classes, tmp_path):
    weights = pretrain(tmp_path / 'cls.pth', num_classes)
    model = MODELS.build(dict(
        type='ImageClassifier',
        backbone=dict(type='RevCol', arch=arch(), out_indices=(3, ),
                      init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'cls.pth'))),
        head=dict(type='RevColClsHead', num_classes=5, in_channels=32, init_scale=0.001)))
    model.init_weights()
    torch.testing.assert_close(model.backbone.subnet3.alpha2, weights['backbone.subnet3.alpha2'])
    torch.testing.assert_close(model.backbone.stem[0].weight, weights['backbone.stem.0.weight'])
    with torch.no_grad():
        scores = model(torch.rand(2, 3, 64, 64), mode='tensor')
    assert scores.shape == (2, 5)
    assert 0 < scores.abs().max() < 1e-3  # 0.001 of what LayerNorm and weights of std 0.02 give


def test_padded_weights_compute_what_the_pretrained_ones_did(tmp_path):
    pretrain(tmp_path / 'cls.pth')
    pretrain(tmp_path / 'cls_k7.pth', kernel_size=7)
    features = []
    for kernel_size, name in ((3, 'cls.pth'), (7, 'cls_k7.pth')):
        model = ROOT.build(dict(type='RevCol', arch=arch(), kernel_size=kernel_size,
                                init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / name))))
        model.init_weights()
        with torch.no_grad():
            features.append(model.eval()(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))))
    for before, after in zip(*features):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)  # a border of 1e-7 behind activations of order one
