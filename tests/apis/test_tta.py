# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Test-time augmentation: merged boxes and masks, and the default views."""
from types import SimpleNamespace

import pytest
import torch
from mmdet.models import DetTTAModel
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmpretrain.models.heads import MultiLabelClsHead
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from torch import nn

from revcol_mm import config_path
from revcol_mm.apis import tta
from revcol_mm.classification import HeadScoreTTA
from revcol_mm.detection import InstanceTTAModel
from revcol_mm.segmentation import SegmentorTTAModel

SIZE = (20, 30)  # height, width


class Detector(nn.Module):
    """Stands in for a detector, whose predictions are in its input."""

    def test_step(self, data):
        return data['data_samples']


def merge(*views, **kwargs):
    return InstanceTTAModel(Detector(), **kwargs).test_step(
        dict(inputs=[None] * len(views), data_samples=[[sample] for sample in views]))[0].pred_instances


def view(instances, flip=None, masks=True):
    """A view with (x1, y1, x2, y2, score, label) instances, whose masks are their boxes; flipped as mmdet hands it out."""
    rows = torch.tensor(instances, dtype=torch.float32).reshape(-1, 6)
    boxes = rows[:, :4].clone()
    pixels = torch.zeros(len(rows), *SIZE, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(pixels, boxes.long().tolist()):
        mask[y1:y2, x1:x2] = True
    if flip in ('horizontal', 'diagonal'):
        boxes[:, [0, 2]] = SIZE[1] - boxes[:, [2, 0]]
        pixels = pixels.flip(-1)
    if flip in ('vertical', 'diagonal'):
        boxes[:, [1, 3]] = SIZE[0] - boxes[:, [3, 1]]
        pixels = pixels.flip(-2)
    sample = DetDataSample(metainfo=dict(ori_shape=SIZE, flip=flip is not None, flip_direction=flip))
    sample.pred_instances = InstanceData(bboxes=boxes, scores=rows[:, 4], labels=rows[:, 5].long())
    if masks:
        sample.pred_instances.masks = pixels
    return sample


TWO = [(2, 3, 12, 15, .9, 0), (15, 2, 28, 10, .7, 1)]


def assert_same(got, wanted):
    assert torch.equal(got.bboxes, wanted.bboxes)
    assert torch.equal(got.scores, wanted.scores)
    assert torch.equal(got.labels, wanted.labels)
    assert torch.equal(got.masks, wanted.masks)


@pytest.mark.parametrize('nms', ['nms', 'soft_nms'])
def test_the_identity_alone_gives_the_plain_result_bit_for_bit(nms):
    # Overlapping boxes of one class, which another soft-NMS would rescore.
    instances = [*TWO, (4, 4, 14, 16, .8, 0)]
    assert_same(merge(view(instances), tta_cfg=dict(nms=dict(type=nms, iou_threshold=0.7))), view(instances).pred_instances)


@pytest.mark.parametrize('flip', ['horizontal', 'vertical', 'diagonal'])
def test_a_flipped_view_alone_gives_the_plain_result(flip):
    assert_same(merge(view(TWO, flip)), view(TWO).pred_instances)


@pytest.mark.parametrize('flip', ['horizontal', 'vertical', 'diagonal'])
def test_views_that_agree_give_the_plain_result(flip):
    assert_same(merge(view(TWO), view(TWO, flip), view(TWO)), view(TWO).pred_instances)


def test_an_object_that_only_one_view_finds_is_kept_with_its_mask():
    got = merge(view(TWO[:1]), view(TWO, 'horizontal'))
    assert_same(got, view(TWO).pred_instances)


def test_the_mask_is_the_vote_of_the_views_weighted_by_their_scores():
    # The best box has the smaller mask; the two others outvote it at the pixels that only they have: .8 + .3 > .9.
    best, others = (2, 2, 12, 12, .9, 0), (2, 2, 14, 12)
    got = merge(view([best]), view([(*others, .8, 0)], 'horizontal'), view([(*others, .3, 0)]))
    assert torch.equal(got.bboxes, torch.tensor([[2., 2., 12., 12.]]))
    assert torch.equal(got.masks, view([(*others, .9, 0)]).pred_instances.masks)
    got = merge(view([best]), view([(*others, .5, 0)], 'horizontal'), view([(*others, .3, 0)]))  # .5 + .3 < .9
    assert torch.equal(got.masks, view([best]).pred_instances.masks)


def test_a_box_without_area_has_an_empty_mask():
    got = merge(view([(10, 10, 10, 15, .9, 0)]), view([(10, 10, 10, 15, .9, 0)], 'horizontal'))
    assert len(got) and not got.masks.any()


def test_boxes_of_another_class_neither_suppress_nor_vote():
    got = merge(view([(2, 2, 12, 12, .9, 0)]), view([(2, 2, 14, 12, .8, 1)]))
    assert got.labels.tolist() == [0, 1]
    assert torch.equal(got.masks, torch.cat([view([(2, 2, 12, 12, .9, 0)]).pred_instances.masks,
                                             view([(2, 2, 14, 12, .8, 1)]).pred_instances.masks]))


def test_boxes_without_masks_and_no_boxes_at_all():
    got = merge(view(TWO, masks=False), view(TWO, 'horizontal', masks=False))
    assert torch.equal(got.bboxes, view(TWO).pred_instances.bboxes) and 'masks' not in got
    got = merge(view([]), view([], 'horizontal'))
    assert len(got) == 0 and got.masks.shape == (0, *SIZE)
    assert_same(merge(view([]), view(TWO)), view(TWO).pred_instances)


def test_at_most_max_per_img_boxes_the_best_first():
    got = merge(view(TWO[1:]), view(TWO), tta_cfg=dict(max_per_img=1))
    assert_same(got, view(TWO[:1]).pred_instances)


def test_soft_nms_rescores_across_views_and_keeps_masks_with_their_boxes():
    nms = dict(type='soft_nms', iou_threshold=0.5, min_score=0.05)
    got = merge(view(TWO[:1]), view([TWO[1], (4, 4, 14, 16, .8, 0)]), tta_cfg=dict(nms=nms))
    assert got.scores[0] == pytest.approx(.9) and (got.scores[1:] <= .8).all()
    for box, mask in zip(got.bboxes.long().tolist(), got.masks):
        assert mask[box[1]:box[3], box[0]:box[2]].float().mean() > 0.5


@pytest.mark.parametrize('name', ['cascade_rcnn_revcol_nano_digits', 'htc_revcol_nano_digits'])
@pytest.mark.parametrize('flip', ['horizontal', 'vertical'])
def test_a_flipped_view_of_a_real_detector_is_flipped_back_once(name, flip):
    # Cascades, which would flip their masks back by themselves.
    cfg = Config.fromfile(config_path(f'demo/{name}'))
    cfg.model.test_cfg.rcnn.update(score_thr=0., max_per_img=5)
    with DefaultScope.overwrite_default_scope('mmdet'):
        detector = MODELS.build(cfg.model).eval()

    def predict(model, image, **meta):
        sample = DetDataSample(metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96), batch_input_shape=(64, 96),
                                             scale_factor=(1., 1.), **meta))
        tta = isinstance(model, InstanceTTAModel)
        with torch.no_grad():
            return model.test_step(dict(inputs=[[image]] if tta else [image],
                                        data_samples=[[sample]] if tta else [sample]))[0].pred_instances

    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    plain = predict(detector, image)
    got = predict(InstanceTTAModel(detector), image, flip=True, flip_direction=flip)  # an image that is a flipped view
    assert len(plain) == 5 and plain.masks.any()
    assert torch.equal(got.masks, plain.masks.flip(-1 if flip == 'horizontal' else -2))
    along = 0 if flip == 'horizontal' else 1
    mirrored = plain.bboxes.clone()
    mirrored[:, [along, along + 2]] = (96, 64)[along] - plain.bboxes[:, [along + 2, along]]
    assert torch.equal(got.bboxes, mirrored) and torch.equal(got.scores, plain.scores)


PIPELINE = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(1333, 800), keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs', meta_keys=('img_id', 'ori_shape'))]


def test_default_views_are_the_test_pipeline_at_several_scales_plain_and_flipped():
    load, augment = tta.default_tta_pipeline(PIPELINE, (1.0, 0.5))
    resizes, flips, annotations, pack = augment['transforms']
    assert load == PIPELINE[0]
    assert [step['scale'] for step in resizes] == [(1333, 800), (666, 400)]
    assert [step['prob'] for step in flips] == [0, 1]  # the plain view first: its annotations are those that are drawn
    assert annotations == [PIPELINE[2]]
    assert pack[0]['meta_keys'] == ('img_id', 'ori_shape', 'flip', 'flip_direction')


@pytest.mark.parametrize('kind', ['mmdet.PackDetInputs', 'mmseg.PackSegInputs', 'mmpretrain.PackInputs'])
def test_default_views_always_tell_whether_they_are_flipped(kind):
    for keys in (dict(meta_keys=['ori_shape']), {}):
        views = tta.default_tta_pipeline([*PIPELINE[:2], dict(type=kind, **keys)], (1.0, ))[-1]
        assert {'flip', 'flip_direction'} <= set(TRANSFORMS.build(views['transforms'][-1][0]).meta_keys)


def test_default_views_of_a_pipeline_with_classes_as_types():
    pipeline = [dict(step, type=TRANSFORMS.get(step['type'])) for step in PIPELINE]
    load, augment = tta.default_tta_pipeline(pipeline, (1.0, 0.5))
    assert load == pipeline[0] and [len(views) for views in augment['transforms']] == [2, 2, 1, 1]


@pytest.mark.parametrize('given', [None, 'DetTTAModel', 'mmdet.DetTTAModel', DetTTAModel])
def test_detectors_get_the_model_that_merges_masks(given):
    cfg = Config(dict(default_scope='mmdet', model=dict(type='A', test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms')))),
                      test_dataloader=dict(dataset=dict(type='B', pipeline=PIPELINE))))
    if given:
        cfg.tta_model = dict(type=given, tta_cfg=dict(max_per_img=7))
    tta.set_tta(cfg)
    assert cfg.model.type == 'InstanceTTAModel' and cfg.model.module.type == 'A'
    assert cfg.model.tta_cfg == (dict(max_per_img=7) if given else dict(nms=dict(type='soft_nms'), max_per_img=100))
    assert cfg.test_dataloader.dataset.pipeline[-1].type == 'TestTimeAug'


@pytest.mark.parametrize('test_cfg', [dict(max_per_img=300), dict(rpn=dict(max_per_img=9), rcnn=dict(max_per_img=300))])
def test_the_detectors_own_number_of_boxes_is_kept(test_cfg):
    cfg = Config(dict(default_scope='mmdet', model=dict(type='A', test_cfg=test_cfg),
                      test_dataloader=dict(dataset=dict(type='B', pipeline=PIPELINE))))
    tta.set_tta(cfg)
    assert cfg.model.tta_cfg.max_per_img == 300


@pytest.mark.parametrize('given', [None, 'SegTTAModel', 'mmseg.SegTTAModel'])
def test_segmentors_get_the_model_that_knows_single_channels(given):
    cfg = Config(dict(default_scope='mmseg', model=dict(type='A'), **(dict(tta_model=dict(type=given)) if given else {}),
                      test_dataloader=dict(dataset=dict(type='B', pipeline=PIPELINE[:2]))))
    tta.set_tta(cfg)
    assert cfg.model.type == 'SegmentorTTAModel'


@pytest.mark.parametrize('given', [None, 'AverageClsScoreTTA', 'mmpretrain.AverageClsScoreTTA'])
def test_classifiers_get_the_model_that_predicts_the_label_of_the_mean(given):
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    cfg = Config(dict(default_scope='mmpretrain', model=dict(type='A'), **(dict(tta_model=dict(type=given)) if given else {}),
                      test_dataloader=dict(dataset=dict(type='B', pipeline=pipeline))))
    tta.set_tta(cfg)
    assert cfg.model.type == 'HeadScoreTTA'


@pytest.mark.parametrize('head, expected', [(nn.Identity(), [1]), (MultiLabelClsHead(thr=0.35), [1, 2]),
                                            (MultiLabelClsHead(topk=1), [1])])
def test_the_label_of_merged_class_scores_is_that_of_their_mean(head, expected):
    module = Detector()
    module.head = head
    views = [DataSample().set_pred_score(torch.tensor(scores)).set_pred_label([0])
             for scores in ([0.5, 0.4, 0.3], [0.0, 0.5, 0.5])]  # whose mean is 0.25, 0.45, 0.4
    merged, = HeadScoreTTA(module).test_step(dict(inputs=[None] * 2, data_samples=[[view] for view in views]))
    assert merged.pred_label.tolist() == expected and views[0].pred_label.tolist() == [0]


class Segmentor(nn.Module):
    """Stands in for a segmentor with one channel, whose predictions are in its input: mmseg returns probabilities."""
    out_channels, decode_head = 1, SimpleNamespace(threshold=0.3)

    def test_step(self, data):
        return data['data_samples']


def test_views_of_a_single_channel_are_averaged_as_probabilities():
    views = [torch.tensor([[[0.0, 0.1, 0.2, 0.9, 1.0]]]), torch.tensor([[[0.0, 0.3, 0.5, 0.9, 1.0]]])]
    samples = [[SegDataSample(seg_logits=PixelData(data=view), metainfo=dict(img_path='x'))] for view in views]
    merged, = SegmentorTTAModel(Segmentor()).test_step(dict(inputs=[None] * 2, data_samples=samples))
    assert merged.pred_sem_seg.data.flatten().tolist() == [0, 0, 1, 1, 1]  # means 0, 0.2, 0.35, 0.9, 1 against 0.3
