# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Detectors as ONNX files, against mmdet's own predictions."""
import copy
import functools

import onnx
import pytest
import torch
from mmdet.models.roi_heads.mask_heads import fcn_mask_head
from mmdet.structures import DetDataSample

from revcol_mm.export import export_model, exported_net
from revcol_mm.export import model as exporting
from revcol_mm.export.boxes import decode, paste_masks
from tests.common import mostly_slow
from tests.export.demo import SIZES, TRACED, make_model, other_size, random_images, run_file


def without_masks(cfg) -> None:
    cfg.model.roi_head.update(mask_head=None, mask_roi_extractor=None)


def boxes_by_class(cfg) -> None:
    for head in cfg.model.roi_head.bbox_head:
        head.reg_class_agnostic = False


def agnostic(cfg) -> None:
    without_masks(cfg)
    cfg.model.roi_head.bbox_head.reg_class_agnostic = True
    cfg.model.test_cfg.rcnn.nms.update(class_agnostic=True, iou_threshold=0.7)
    cfg.model.test_cfg.rpn.min_bbox_size = 4


def large_boxes(cfg) -> None:
    cfg.model.test_cfg.rpn.min_bbox_size = 33


def shallow(cfg) -> None:
    cfg.model.encoder.num_layers = cfg.model.decoder.num_layers = 1


MODELS = {
    'Cascade Mask R-CNN': ('cascade_rcnn_revcol_nano_digits', lambda cfg: None),
    'Cascade R-CNN': ('cascade_rcnn_revcol_nano_digits', without_masks),
    'Cascade Mask R-CNN with boxes by class': ('cascade_rcnn_revcol_nano_digits', boxes_by_class),
    'Mask R-CNN on ViT': ('mask_rcnn_revcol_vit_digits', lambda cfg: None),
    'Faster R-CNN on ViT': ('mask_rcnn_revcol_vit_digits', without_masks),
    'Faster R-CNN, class-agnostic': ('mask_rcnn_revcol_vit_digits', agnostic),
    'Mask R-CNN on ViT, large boxes': ('mask_rcnn_revcol_vit_digits', large_boxes),
    'DINO': ('dino_revcol_nano_digits', shallow),
}
EXPORTED = ['Cascade Mask R-CNN', 'Mask R-CNN on ViT, large boxes', 'Faster R-CNN, class-agnostic', 'DINO']


@functools.cache
def detector(name: str):
    return make_model(*MODELS[name])


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """Files by the model's name. Each is made once, and checked at one size only."""
    folder = tmp_path_factory.mktemp('exported')

    @functools.cache
    def export(name: str):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exporting, 'TRACED', TRACED)
            export_model(detector(name), str(folder / f'{name}.onnx'), sizes=[(96, 96)])
        return folder / f'{name}.onnx'

    return export


def predict(model, images, size) -> list[dict[str, torch.Tensor]]:
    """mmdet's own predictions, as its test loop makes them, and the values that it compares with the masks' threshold."""
    height, width = images.shape[-2:]
    info = dict(img_shape=(height, width), ori_shape=size, scale_factor=(width / size[1], height / size[0]))
    samples = [DetDataSample(metainfo=dict(info)) for _ in images]
    paste, values = fcn_mask_head._do_paste_mask, []

    def record(*args, **kwargs):
        part, place = paste(*args, **kwargs)
        values.append(torch.zeros(size))
        values[-1][place] = part[0]
        return part, place

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(fcn_mask_head, '_do_paste_mask', record)
        samples = model.test_step(dict(inputs=[image.flip(0) for image in images], data_samples=samples))
    return [dict(boxes=sample.pred_instances.bboxes, scores=sample.pred_instances.scores, labels=sample.pred_instances.labels,
                 masks=sample.pred_instances.get('masks'), values=torch.stack(values) if values else torch.zeros(0, *size))
            for sample in samples]


def per_image(name: str, outputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The outputs of a file by image: those of two-stage detectors have no dimension for it."""
    if name != 'DINO':
        return [outputs]
    return [dict(zip(outputs, values)) for values in zip(*outputs.values())]


def pair_up(found, expected) -> list[int]:
    """For each expected detection the nearest found one of its label; each is used once."""
    assert len(found['scores']) == len(expected['scores'])
    free, pairs = set(range(len(found['scores']))), []
    for box, score, label in zip(expected['boxes'], expected['scores'], expected['labels']):
        pairs.append(min((index for index in free if found['labels'][index] == label), key=lambda index: (
            (found['boxes'][index] - box).abs().max() + 100 * (found['scores'][index] - score).abs()).item()))
        free.remove(pairs[-1])
    return pairs


@pytest.mark.parametrize('name', [name for name in MODELS if 'large' not in name])
@pytest.mark.parametrize('size', [(61, 75), (32, 32)])
@torch.no_grad()
def test_network_in_torch_predicts_what_mmdet_does_bit_by_bit(name, size):
    model, net = detector(name), exported_net(detector(name))
    images, original = random_images(2 if name == 'DINO' else 1, size), other_size(size)
    outputs = per_image(name, dict(zip(net.outputs, net(images, torch.tensor(original)))))
    for found, expected in zip(outputs, predict(model, images, original), strict=True):
        assert len(expected['scores']) > 10
        for key in ('boxes', 'scores', 'labels'):
            assert torch.equal(found[key], expected[key]), key
        assert found['labels'].dtype == torch.int64
        if 'masks' in net.outputs:
            wrong = found['masks'] != expected['masks']
            assert not ((expected['values'][wrong] - 0.5).abs() > 1e-5).any()
            assert found['masks'].dtype == torch.bool and found['masks'].any() and not found['masks'].all()


@pytest.mark.parametrize('name', mostly_slow(EXPORTED, EXPORTED[:1]))
def test_file_predicts_what_mmdet_does_at_every_size(name, exported):
    """Sizes other than the traced one, odd ones, and 32 pixels, of which DINO's last level keeps one. Folding and the order of
    sums make the differences; the bounds are far below what a detection means."""
    path = exported(name)
    for size in [size for size in SIZES[:3] if 'large' not in name or min(size) > 33]:
        images, original = random_images(3 if name == 'DINO' else 1, size), other_size(size)
        outputs = per_image(name, run_file(path, images=images, size=torch.tensor(original)))
        for found, expected in zip(outputs, predict(detector(name), images, original), strict=True):
            order = pair_up(found, expected)
            assert len(order) > 10
            assert (found['boxes'][order] - expected['boxes']).abs().max() <= 0.01
            assert (found['scores'][order] - expected['scores']).abs().max() <= 1e-4
            if 'masks' in found:
                assert found['masks'].shape == (len(order), *original)
                wrong = found['masks'][order] != expected['masks']
                assert not ((expected['values'][wrong] - 0.5).abs() > 2e-3).any()  # boxes differ by up to 0.01 pixel


def test_image_with_nothing_to_find_has_empty_outputs(exported):
    """No proposal is as large as the model wants, so that every network after them gets a batch of none."""
    path = exported('Mask R-CNN on ViT, large boxes')
    outputs = run_file(path, images=random_images(1, (32, 33)), size=torch.tensor([30, 20]))
    shapes = {key: tuple(value.shape) for key, value in outputs.items()}
    assert shapes == dict(boxes=(0, 4), scores=(0, ), labels=(0, ), masks=(0, 30, 20))


def test_a_detector_that_finds_nothing_in_noise_is_compared_without_its_threshold(tmp_path, monkeypatch):
    def nothing_above(cfg) -> None:
        without_masks(cfg)
        cfg.model.test_cfg.rcnn.score_thr = 1.1

    model = make_model('mask_rcnn_revcol_vit_digits', nothing_above)
    compared = []
    compare = exporting.ExportedTwoStage.compare
    monkeypatch.setattr(exporting.ExportedTwoStage, 'compare',
                        lambda net, found, expected: compared.append(len(expected['scores'])) or compare(net, found, expected))
    export_model(model, str(tmp_path / 'net.onnx'), sizes=[(64, 64)])
    assert len(compared) == 2 and compared[0] > 10 and compared[1] == 0
    assert model.roi_head.test_cfg.score_thr == 1.1
    found = run_file(tmp_path / 'net.onnx', images=random_images(1, (64, 64)), size=torch.tensor([64, 64]))
    assert len(found['scores']) == 0


@torch.no_grad()
def test_proposals_without_a_detection_have_empty_outputs(exported):
    """In torch, whose networks take such batches as onnxruntime's do."""
    model = make_model('cascade_rcnn_revcol_nano_digits', lambda cfg: cfg.model.test_cfg.rcnn.update(score_thr=1.1))
    boxes, scores, labels, masks = exported_net(model)(random_images(1, (64, 40)), torch.tensor([30, 20]))
    assert [len(boxes), len(scores), len(labels)] == [0, 0, 0] and masks.shape == (0, 30, 20)


@pytest.mark.parametrize('name', mostly_slow(EXPORTED, EXPORTED[:1]))
def test_file_has_free_sizes_and_operators_of_onnx_only(name, exported):
    model = onnx.load(exported(name))
    assert {node.domain for node in model.graph.node} == {''} and not model.functions
    inputs = {value.name: [entry.dim_param or entry.dim_value for entry in value.type.tensor_type.shape.dim]
              for value in model.graph.input}
    assert inputs == dict(images=['batch' if name == 'DINO' else 1, 3, 'height', 'width'], size=[2])
    assert {entry.key: entry.value for entry in model.metadata_props}['task'] == 'detection'


def test_boxes_are_decoded_as_by_mmdet():
    coder = copy.deepcopy(detector('Cascade R-CNN').roi_head.bbox_head[0].bbox_coder)
    boxes, deltas = torch.rand(50, 4).sort(-1).values * 200, torch.randn(50, 4) * 20
    found = decode(coder, boxes, deltas, torch.tensor([90, 150]))
    assert torch.equal(found, coder.decode(boxes, deltas, max_shape=(90, 150)))
    assert found[:, 0::2].max() == 150 and found[:, 1::2].max() == 90
    coder.clip_border = False
    assert torch.equal(decode(coder, boxes, deltas, torch.tensor([90, 150])), coder.decode(boxes, deltas, max_shape=(90, 150)))


@pytest.mark.parametrize('box', [[3.2, 4.1, 40.7, 30.], [-8., -3.5, 20., 70.], [50., 10., 50., 30.], [0., 0., 0., 0.],
                                 [59.3, 44., 60., 45.], [20.5, 7., 20.5, 9.], [10.1, 10.2, 10.3, 10.4]])
def test_masks_are_pasted_as_by_mmdet(box):
    """Boxes beyond the image and without extent, too. The values are sums of four products, in another order."""
    masks, box = torch.rand(1, 28, 28), torch.tensor([box])
    part, place = fcn_mask_head._do_paste_mask(masks[None], box.clone(), 45, 60)
    expected = torch.zeros(1, 45, 60)
    expected[(slice(None), *place)] = part
    found = paste_masks(masks, box, torch.tensor([45, 60]))
    torch.testing.assert_close(found.nan_to_num(), expected.nan_to_num(), rtol=0, atol=1e-5)
