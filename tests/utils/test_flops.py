# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Parameters and multiply-adds: the paper's tables, mmengine's counter, and arithmetic by hand."""
from unittest import mock

import pytest
import torch
from mmcv.transforms import CenterCrop
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from torch import nn

from revcol_mm.utils.configs import config_path
from revcol_mm.utils.flops import build_on_meta, count, count_model, default_shape
from tests.common import CHANNELS, count_config, mostly_slow, run_tool, small_arch

# config: parameters in M, FLOPs in G (None: not printed), tables 2 and 3 of the paper, and of the ConvNeXt paper
CONVNEXT_T = 'mmdet::convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py'
PUBLISHED = {
    'cascade_rcnn_revcol_t': (88, 741),
    'cascade_rcnn_revcol_s': (118, 833),
    'cascade_rcnn_revcol_b': (196, 988),
    'cascade_rcnn_revcol_l_in22k': (330, 1453),
    'upernet_revcol_t': (60, 937),
    'upernet_revcol_s': (90, 1031),
    'upernet_revcol_l_in22k': (306, 2610),
    'upernet_revcol_h': (2421, None),
    'dino_revcol_h': (2180, None),
    'mask2former_revcol_h': (2439, None),
    CONVNEXT_T: (86, 741),
}


def load(name: str) -> Config:
    return Config.fromstring(f'_base_ = {name!r}', '.py') if '::' in name else Config.fromfile(config_path(name))


def counted(name: str) -> dict:
    if name != CONVNEXT_T:
        return count_config(name)
    linspace = torch.linspace  # its drop path rates are read from a tensor, which the meta device does not hold
    with mock.patch('torch.linspace', lambda *args, **kwargs: linspace(*args, **dict(kwargs, device='cpu'))):
        return count(load(name))


@pytest.mark.parametrize('name', mostly_slow(PUBLISHED, ['cascade_rcnn_revcol_t', 'upernet_revcol_t', CONVNEXT_T]))
def test_counts_are_the_published_ones_within_one_percent(name):
    params, macs = PUBLISHED[name]
    total = counted(name)['total']
    assert total.params / 1e6 == pytest.approx(params, rel=0.01)
    if macs:
        assert total.macs / 1e9 == pytest.approx(macs, rel=0.01)


@pytest.mark.slow
def test_upernet_b_is_what_its_parts_add_up_to_not_what_is_printed():
    """122M cannot hold a backbone of 138M. 1169G leaves 15.6G of a backbone at 224² for which table 1 prints 16.6G."""
    parts = counted('upernet_revcol_b')
    assert parts['backbone'].params / 1e6 == pytest.approx(138, rel=0.01)
    assert parts['total'].macs / 1e9 == pytest.approx(1169, rel=0.02)
    assert parts['backbone'].macs / 1e9 == pytest.approx(16.6 * (512 * 2048) / 224**2, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['htc_revcol_h', 'dino_revcol_h'])
def test_a_huge_backbone_alone_needs_more_than_the_paper_prints_for_the_detector(name):
    """Table 1: 2537G at 640². At 1280×800 that is 6342G, and 7×7 kernels add a little; table 2 prints 4417G and 4012G."""
    backbone = counted(name)['backbone']
    assert backbone.macs / 1e9 == pytest.approx(2537 * (800 * 1280) / 640**2, rel=0.01)


def narrow(name: str) -> Config:
    """The config with a backbone of 8 to 64 channels, and 3×3 kernels so that it is small; heads as they are."""
    cfg = load(name)
    channels = [8, 16, 32, 64]
    cfg.model.backbone.update(arch=dict(channels=channels, depths=[1, 1, 1, 1], num_columns=2), init_cfg=None)
    for part in ('neck', 'decode_head'):
        if part in cfg.model:
            cfg.model[part].in_channels = channels
    if 'auxiliary_head' in cfg.model:
        cfg.model.auxiliary_head = None
    return cfg


class Run(nn.Module):
    """Backbone, neck and decode head with a plain tensor in and out, and without norms: what mmengine's counter can trace."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for module in list(self.modules()):
            for name, child in module.named_children():
                if 'norm' in type(child).__name__.lower():
                    setattr(module, name, nn.Identity())

    def forward(self, x):
        x = self.model.extract_feat(x)
        return self.model.decode_head(x) if hasattr(self.model, 'decode_head') else x


@pytest.mark.parametrize('name,parts', [('upernet_revcol_t', ('backbone', 'decode_head')),
                                        ('cascade_rcnn_revcol_t', ('backbone', 'neck'))])
def test_counts_agree_with_mmengines_counter_once_norms_are_removed(name, parts):
    """mmengine counts multiply-adds too, and interpolation and pooling besides, which is well below 1 % here."""
    from mmengine.registry import MODELS, DefaultScope
    cfg = narrow(name)
    ours = count(cfg, (64, 96))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).eval()
    theirs = get_model_complexity_info(Run(model), inputs=torch.zeros(1, 3, 64, 96), show_table=False, show_arch=False)
    assert sum(ours[part].macs for part in parts) == pytest.approx(theirs['flops'], rel=0.01)


def test_a_stages_heads_see_1000_boxes_and_100_masks():
    """By hand, for Mask R-CNN: a box is 7²·256 → 1024 → 1024 → 81 + 320; a mask is 4 convolutions of 3²·256² on 14², one
    transposed of 2²·256² on 14², and 256 → 80 on 28²."""
    parts = count(load('mask_rcnn_revcol_t'), (64, 64))
    assert parts['roi_head.bbox_head'].macs == 1000 * (7 * 7 * 256 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * 80))
    assert parts['roi_head.mask_head'].macs == 100 * (4 * 14**2 * 9 * 256**2 + 14**2 * 4 * 256**2 + 28**2 * 256 * 80)


def test_deformable_attention_is_counted_as_its_paper_does():
    """Deformable DETR, appendix A.1, for one layer with N queries and values, C channels and K sampled points per head: value
    and output projections 2NC², offsets and weights 3NMKC (M heads), sampling and summing 5NKC."""
    from mmcv.ops import MultiScaleDeformableAttention

    from revcol_mm.utils.flops import _FORMULAS, _meta_transformers, _Sizes
    tokens, channels, heads, points = 16 * 24 + 8 * 12, 64, 4, 2 * 4
    with torch.device('meta'):
        layer = MultiScaleDeformableAttention(channels, num_heads=heads, num_levels=2, batch_first=True).eval()
        query, points_at = torch.empty(1, tokens, channels), torch.empty(1, tokens, 2, 2)
    with torch.no_grad(), _meta_transformers(), torch.utils.flop_counter.FlopCounterMode(
            display=False, custom_mapping=_FORMULAS) as counter:
        layer(query, value=query, reference_points=points_at, level_start_index=torch.tensor([0, 16 * 24]),
              spatial_shapes=torch.tensor([[16, 24], [8, 12]]).as_subclass(_Sizes))
    assert counter.get_total_flops() / 2 == tokens * (2 * channels**2 + 3 * heads * points * channels + 5 * points * channels)


def test_parts_add_up_and_hold_all_parameters():
    cfg = load('mask2former_revcol_t')
    parts = count(cfg, (64, 64))
    total = parts.pop('total')
    assert total.macs == sum(part.macs for part in parts.values())
    assert total.params == sum(part.params for part in parts.values())
    assert total.params == sum(parameter.numel() for parameter in build_on_meta(cfg).parameters())
    assert list(parts) == ['backbone', 'decode_head'] and parts['decode_head'].macs


def test_counting_leaves_the_model_as_it_was():
    model = build_on_meta(load('mask_rcnn_revcol_t'))
    first = count_model(model, (64, 64))
    assert count_model(model, (64, 64)) == first
    assert not any('forward' in vars(module) for module in model.modules())


def test_the_channels_of_the_image_are_those_of_the_config():
    def backbone(channels: int) -> int:
        model = dict(type='ImageClassifier', backbone=dict(type='RevCol', arch=small_arch(), in_channels=channels))
        return count(Config(dict(default_scope='mmpretrain', model=model)), (64, 96))['backbone'].macs

    assert backbone(5) - backbone(3) == 2 * 4 * 4 * CHANNELS[0] * 16 * 24  # the stem: 4×4 pixels each


@pytest.mark.parametrize('backbone', [dict(type='mmpretrain.ConvNeXt', arch='atto'), dict(type='mmpretrain.SwinTransformer')])
def test_a_model_that_reads_values_while_it_is_built_is_counted_too(backbone):
    cfg = Config(dict(default_scope='mmpretrain', model=dict(type='ImageClassifier', backbone=backbone)))
    net = build_on_meta(cfg)
    assert {parameter.device.type for parameter in net.parameters()} == {'meta'}
    assert count_model(net, (224, 224))['backbone'].params == sum(parameter.numel() for parameter in net.parameters())


def test_nothing_is_allocated_for_a_huge_model():
    model = build_on_meta(load('dino_revcol_h'))
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize('shape', [(0, 64), (64, ), (64.0, 64)])
def test_a_shape_that_is_none_is_refused(shape):
    with pytest.raises(ValueError, match='two positive integers'):
        count(load('mask_rcnn_revcol_t'), shape)


def test_the_shape_of_a_classifier_is_that_of_its_crop_whose_type_may_be_a_class():
    loader = dict(dataset=dict(pipeline=[dict(type=CenterCrop, crop_size=8)]))
    assert default_shape(Config(dict(default_scope='mmpretrain', test_dataloader=loader))) == (8, 8)


def test_the_tool_prints_a_line_per_part():
    done = run_tool('get_flops', 'configs/mask_rcnn_revcol_t.py', '--shape', '64', '64')
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[-7:-1]] == [
        'backbone', 'neck', 'rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head', 'total']


@pytest.mark.parametrize('args,sentence', [
    (('configs/mask_rcnn_revcol_t.py', '--shape', '16', '16'), 'at least 32 pixels'),
    (('configs/none.py', ), 'no config configs/none.py'),
    (('configs/mask_rcnn_revcol_t.py', '--cfg-options', 'model.backbone.arch=giant'), "but got 'giant'")])
def test_the_tool_says_what_is_wrong_in_one_line(args, sentence):
    done = run_tool('get_flops', *args)
    assert done.returncode == 1
    assert done.stderr.startswith('error: ') and sentence in done.stderr and len(done.stderr.splitlines()) == 1
