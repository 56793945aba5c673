# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Segmentors and classifiers as ONNX files, against mmseg's and mmpretrain's own predictions."""
import functools

import pytest
import torch
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample

from revcol_mm.export import export_model, exported_net
from revcol_mm.export import model as exporting
from revcol_mm.export.segmentors import label_margin
from tests.common import mostly_slow
from tests.export.demo import SIZES, TRACED, make_model, other_size, random_images, run_file


def shallow(cfg) -> None:
    cfg.model.decode_head.pixel_decoder.encoder.num_layers = 1
    cfg.model.decode_head.transformer_decoder.num_layers = 3  # every level once


def padded(cfg) -> None:
    cfg.model.data_preprocessor.test_cfg = dict(size_divisor=32)


def binary(cfg) -> None:
    cfg.model.decode_head.update(num_classes=2, out_channels=1, threshold=0.5, loss_decode=dict(
        type='mmseg.CrossEntropyLoss', use_sigmoid=True))
    cfg.model.data_preprocessor.test_cfg = dict(size=(160, 160))


MODELS = {
    'UPerNet': ('upernet_revcol_nano_digits', lambda cfg: None),
    'UPerNet on padded images': ('upernet_revcol_nano_digits', padded),
    'UPerNet with a single class': ('upernet_revcol_nano_digits', binary),
    'Mask2Former': ('mask2former_revcol_nano_digits', shallow),
}


@functools.cache
def segmentor(name: str):
    return make_model(*MODELS[name])


@torch.no_grad()
def predict(model, images, size) -> tuple[torch.Tensor, torch.Tensor]:
    """mmseg's own label maps and logits, as its test loop makes them."""
    info = dict(img_shape=tuple(images.shape[-2:]), ori_shape=size)
    samples = model.test_step(dict(inputs=[image.flip(0) for image in images],
                                   data_samples=[SegDataSample(metainfo=dict(info)) for _ in images]))
    return (torch.stack([sample.pred_sem_seg.data[0] for sample in samples]),
            torch.stack([sample.seg_logits.data for sample in samples]))


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('size', [(61, 75), (32, 32)])
@torch.no_grad()
def test_network_in_torch_predicts_what_mmseg_does(name, size):
    model, net = segmentor(name), exported_net(segmentor(name), logits=True)
    images, original = random_images(2, size), other_size(size)
    if model.out_channels == 1:
        model.decode_head.threshold = predict(model, images, original)[1].median().item()
    labels, logits = net(images, torch.tensor(original))
    expected, expected_logits = predict(model, images, original)
    assert torch.equal(labels, expected) and labels.dtype == torch.int64
    # The last step, to the original size, has another kernel for several images than for one.
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-6 * expected_logits.abs().max().item())
    assert len(labels.unique()) > 1


@pytest.mark.parametrize('name', mostly_slow(['UPerNet on padded images', 'Mask2Former'], ['UPerNet on padded images']))
def test_file_predicts_what_mmseg_does_at_every_size(name, tmp_path, monkeypatch):
    """Label maps differ only where two classes are within 1e-5 of the largest logit, some 80 roundings."""
    monkeypatch.setattr(exporting, 'TRACED', TRACED)
    model = segmentor(name)
    deviations = export_model(model, str(tmp_path / 'net.onnx'), sizes=[(96, 96)], logits=True)
    assert list(deviations) == [(96, 96)] and deviations[96, 96].keys() == {'labels', 'logits'}
    for size in SIZES[:3]:
        images, original = random_images(3, size), other_size(size)
        found = run_file(tmp_path / 'net.onnx', images=images, size=torch.tensor(original))
        expected, logits = predict(model, images, original)
        assert found['labels'].shape == (3, *original)
        assert (found['logits'] - logits).abs().max() <= 1e-5 * logits.abs().max()
        best = logits.topk(2, dim=1).values
        wrong = found['labels'] != expected
        assert not ((best[:, 0] - best[:, 1])[wrong] > 1e-5 * logits.abs().max()).any()


def test_file_of_a_sliding_model_is_the_network_of_a_window(tmp_path, monkeypatch):
    """Windows added up by hand are mmseg's own sliding inference."""
    monkeypatch.setattr(exporting, 'TRACED', TRACED)
    model = make_model('upernet_revcol_nano_digits', lambda cfg: cfg.model.update(
        test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(40, 40))))
    export_model(model, str(tmp_path / 'net.onnx'), sizes=[(64, 64)])
    images = random_images(1, (90, 64))
    _, expected = predict(model, images, (90, 64))
    total, count = torch.zeros(1, 11, 90, 64), torch.zeros(90, 1)
    for top in (0, 26):
        total[:, :, top:top + 64] += run_file(tmp_path / 'net.onnx', images=images[:, :, top:top + 64])['logits']
        count[top:top + 64] += 1
    torch.testing.assert_close(total / count, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize('name', ['revcol_nano_digits_cls', 'revcol_nano_digits_cls_no_supervision',
                                  'revcol_nano_digits_pretrain'])
def test_classifiers_are_exported_with_their_scores(name, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, 'TRACED', TRACED)
    model = make_model(name)
    export_model(model, str(tmp_path / 'net.onnx'), sizes=[(64, 64)])
    for size in ((32, 32), (75, 131)):
        images = random_images(3, size)
        with torch.no_grad():
            samples = model.test_step(dict(inputs=images.flip(1), data_samples=[DataSample() for _ in images]))
            expected = torch.stack([sample.pred_score for sample in samples])
            assert torch.equal(exported_net(model)(images), expected)
        found = run_file(tmp_path / 'net.onnx', images=images)['scores']
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_margin_of_a_label_map_is_the_distance_to_the_best_class():
    logits = torch.tensor([[[1., 5.]], [[4., 4.9]], [[0., 0.]]])
    assert label_margin(torch.tensor([[1, 0]]), logits) == 0
    assert label_margin(torch.tensor([[1, 1]]), logits) == pytest.approx(0.1 / 5)
    assert label_margin(torch.tensor([[2, 0]]), logits) == pytest.approx(4 / 5)
    assert label_margin(torch.tensor([[3, 0]]), logits) == label_margin(torch.tensor([[1]]), logits) == float('inf')
    assert label_margin(torch.tensor([[0, 0]]), torch.tensor([[[0.4, 0.6]]]), 0.5) == pytest.approx(0.1)
