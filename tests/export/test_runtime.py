# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Exported files, run by revcol_mm/runtime.py, predict what the packages' own test does with an image."""
import numpy as np
import pytest
import torch
from mmcv.transforms import Resize
from mmdet.structures import DetDataSample
from mmseg.structures import SegDataSample

from revcol_mm.export import export_model
from revcol_mm.export import model as exporting
from revcol_mm.runtime import Model
from tests.export.demo import TRACED, make_model


@pytest.fixture(autouse=True)
def _traced_small(monkeypatch):
    monkeypatch.setattr(exporting, 'TRACED', TRACED)


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize('size', [(90, 64), (101, 133), (40, 50)])
def test_sliding_windows_give_the_label_map_of_mmseg(size, tmp_path):
    model = make_model('upernet_revcol_nano_digits', lambda cfg: cfg.model.update(
        test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(40, 40))))
    export_model(model, str(tmp_path / 'net.onnx'), sizes=[(64, 64)], metadata=dict(pipeline=[]))
    image = random_image(*size)
    with torch.no_grad():
        sample, = model.test_step(dict(inputs=[torch.from_numpy(image).permute(2, 0, 1)],
                                       data_samples=[SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))]))
    found = Model(str(tmp_path / 'net.onnx'), threads=1).predict(image[..., ::-1])['labels']
    best = sample.seg_logits.data.topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-5 * best.abs().max()).numpy()
    assert clear.mean() > 0.99 and len(np.unique(found)) > 1
    np.testing.assert_array_equal(found[clear], sample.pred_sem_seg.data[0].numpy()[clear])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mask_rcnn_revcol_vit_digits', 'dino_revcol_nano_digits'])
def test_detections_are_those_of_mmdet_in_the_original_image(name, tmp_path):
    model = make_model(name)
    step = dict(type='Resize', scale=[120, 80], keep_ratio=True, interpolation='bilinear', backend='cv2')
    export_model(model, str(tmp_path / 'net.onnx'), sizes=[(96, 96)], metadata=dict(pipeline=[step]))
    image = random_image(50, 91)
    found = Model(str(tmp_path / 'net.onnx'), threads=1).predict(image[..., ::-1])
    resized = Resize(scale=(120, 80), keep_ratio=True)(dict(img=image))
    info = dict(img_shape=resized['img_shape'], ori_shape=(50, 91), scale_factor=resized['scale_factor'])
    with torch.no_grad():
        sample, = model.test_step(dict(inputs=[torch.from_numpy(resized['img']).permute(2, 0, 1)],
                                       data_samples=[DetDataSample(metainfo=info)]))
    expected = sample.pred_instances
    assert len(expected) > 10 and found['boxes'].shape == (len(expected), 4)
    np.testing.assert_allclose(found['scores'], expected.scores, rtol=0, atol=1e-4)  # both by falling score
    sharp = np.diff(expected.scores, prepend=2, append=-1) < -1e-4  # no neighbour has nearly this score
    alone = sharp[:-1] & sharp[1:]
    assert alone.sum() > 5
    np.testing.assert_allclose(found['boxes'][alone], expected.bboxes[alone], rtol=0, atol=0.01)
    np.testing.assert_array_equal(found['labels'][alone], expected.labels[alone])
    if 'masks' in expected:
        assert found['masks'].shape == (len(expected), 50, 91)
        assert (found['masks'][alone] == expected.masks[alone].numpy()).mean() > 0.999
