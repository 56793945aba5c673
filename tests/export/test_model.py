# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What is refused, what a file is compared with, what is written, and the parts that are rewritten."""
import json
import os
import resource
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from mmcv.cnn.bricks.transformer import AdaptivePadding
from mmcv.ops import nms, soft_nms
from mmcv.transforms import CenterCrop
from torch import nn

from revcol_mm.checkpoint import CheckpointError
from revcol_mm.export import export_backbone, export_model, exported_net
from revcol_mm.export import model as exporting
from revcol_mm.export.detectors import check_nms, match_detections
from revcol_mm.export.metadata import describe, image_steps
from revcol_mm.export.rewrites import AveragePool, CornerPadding, linspace_by_range
from revcol_mm.models import RevCol
from tests.common import ROOT, load_config, load_tool, small_arch
from tests.export.demo import TRACED, make_model, random_images, run_file

CASCADE, DINO = 'cascade_rcnn_revcol_nano_digits', 'dino_revcol_nano_digits'
UPERNET, CLASSIFIER = 'upernet_revcol_nano_digits', 'revcol_nano_digits_pretrain'
FITTED = dict(type='Resize', keep_ratio=True, interpolation='bilinear', backend='cv2')


@pytest.fixture(scope='module')
def classifier():
    return make_model(CLASSIFIER)


@pytest.fixture(autouse=True)
def _traced_small(monkeypatch):
    monkeypatch.setattr(exporting, 'TRACED', TRACED)


def settings(**changes):
    return lambda cfg: cfg.merge_from_dict({key.replace('__', '.'): value for key, value in changes.items()})


def with_other_part(name: str, path: str):
    """A demo model whose part is of a class derived from its own, which may compute anything."""
    model = make_model(name)
    part = model.get_submodule(path) if path else model
    part.__class__ = type('Unknown', (type(part), ), {'__module__': type(part).__module__})
    return model


# Refusals --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, change, sentence', [
    ('htc_revcol_nano_digits', settings(), 'the model must be one of .* but is a HybridTaskCascade: export its backbone'),
    (CASCADE, settings(model__test_cfg__rcnn__nms=dict(type='soft_nms', iou_threshold=0.5)),
     r"model.test_cfg.rcnn.nms.type must be 'nms' .* but got 'soft_nms'"),
    (CASCADE, settings(model__test_cfg__rpn__nms=dict(type='nms', iou_threshold=0.5, max_num=5)),
     'model.test_cfg.rpn.nms must have type and iou_threshold.* but got .*max_num'),
    (CASCADE, settings(model__test_cfg__rcnn__mask_thr_binary=-1), 'mask_thr_binary must be a threshold of at least 0'),
    (DINO, settings(model__data_preprocessor__pad_size_divisor=32), 'pad_size_divisor must be 1 .* but got 32'),
    (UPERNET, settings(model__test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(32, 32)),
                       model__data_preprocessor__test_cfg=dict(size_divisor=32)), 'test_cfg must be None .* sliding windows'),
])
def test_what_cannot_be_exported_is_refused_before_anything_is_computed(name, change, sentence, tmp_path, monkeypatch):
    model = make_model(name, change)
    monkeypatch.setattr(exporting, 'prepare', None)
    with pytest.raises(ValueError, match=sentence):
        export_model(model, str(tmp_path / 'net.onnx'))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('name, path, sentence', [
    (CASCADE, '', 'the model must be one of'),
    (CASCADE, 'rpn_head', 'model.rpn_head must be a RPNHead'),
    (CASCADE, 'roi_head', 'model.roi_head must be a StandardRoIHead or CascadeRoIHead'),
    (CASCADE, 'roi_head.bbox_head.1', 'model.roi_head.bbox_head must be a ConvFCBBoxHead or'),
    (CASCADE, 'roi_head.mask_head.2', 'model.roi_head.mask_head must be a FCNMaskHead'),
    (CASCADE, 'roi_head.mask_roi_extractor.0', 'roi_extractor must be a SingleRoIExtractor'),
    (CASCADE, 'roi_head.bbox_roi_extractor.0.roi_layers.0', 'roi_layer must be a RoIAlign'),
    (CASCADE, 'data_preprocessor', 'model.data_preprocessor must be a DetDataPreprocessor'),
    (DINO, 'bbox_head', 'model.bbox_head must be a DINOHead'),
    (UPERNET, 'decode_head', 'model.decode_head must be a UPerHead or Mask2FormerHead'),
    (CLASSIFIER, 'head', 'model.head must be a RevColClsHead'),
])
def test_parts_of_another_kind_are_refused_by_type(name, path, sentence):
    with pytest.raises(ValueError, match=f'^{sentence}.* to be exported to ONNX, but .*Unknown'):
        exported_net(with_other_part(name, path))


def test_a_type_of_another_package_is_not_taken_for_its_namesake():
    model = make_model(CASCADE)
    model.rpn_head.__class__ = type('RPNHead', (type(model.rpn_head), ), {'__module__': 'mine.heads'})
    with pytest.raises(ValueError, match='^model.rpn_head must be a RPNHead .* but got mine.heads.RPNHead$'):
        exported_net(model)


def test_logits_are_for_segmentors(classifier):
    with pytest.raises(ValueError, match='^logits must be False for a ImageClassifier'):
        exported_net(classifier, logits=True)


@pytest.mark.parametrize('options, error, sentence', [
    (dict(opset=16), ValueError, 'opset must be 17 or later'),
    (dict(path='old.onnx'), CheckpointError, 'old.onnx exists already'),
    (dict(path='old'), CheckpointError, 'old.data exists already'),
    (dict(path='none/net.onnx'), CheckpointError, 'output folder none does not exist'),
    (dict(sizes=[(16, 40)]), ValueError, 'at least 32 pixels, but got'),
    (dict(sizes=[(64, 0)]), ValueError, 'sizes must be heights and widths of at least 1 pixel'),
])
def test_a_refused_request_writes_nothing(classifier, options, error, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('old.onnx', 'old.data'):
        (tmp_path / name).write_text('earlier')
    with pytest.raises(error, match=sentence):
        export_model(classifier, **dict(dict(path='net.onnx'), **options))
    assert sorted(os.listdir(tmp_path)) == ['old.data', 'old.onnx']
    assert (tmp_path / 'old.onnx').read_text() == 'earlier'


# The comparison --------------------------------------------------------------------------------------------------------------

def test_a_file_that_predicts_something_else_does_not_appear(classifier, tmp_path, monkeypatch):
    other = make_model(CLASSIFIER, settings(model__head__init_cfg=dict(type='Normal', layer='Linear', std=0.1)))
    monkeypatch.setattr(exporting, 'prepare', lambda model: other)
    with pytest.raises(RuntimeError, match='^at 64×64, the scores of .* and of torch differ by .*; nothing was written$'):
        export_model(classifier, str(tmp_path / 'net.onnx'), sizes=[(64, 64)])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('name, change, kind', [
    (DINO, lambda found: found[0][..., 3].add_(1.), 'unmatched'),
    (DINO, lambda found: found[1].sub_(0.01), 'unmatched'),
    (DINO, lambda found: found[0].add_(0.02), None),
    (CASCADE, lambda found: found[3].logical_not_(), 'masks'),
    (UPERNET, lambda found: found[0].clamp_(max=3), 'labels'),
    (UPERNET, lambda found: found[0].add_(20), 'labels'),
])
def test_every_kind_of_wrong_output_is_seen(name, change, kind):
    model = make_model(name)
    net = exported_net(model)

    def run(images, size):
        found = net(torch.from_numpy(images), torch.from_numpy(size))
        found = [value.clone() for value in (found if isinstance(found, tuple) else (found, ))]
        change(found)
        return found

    if kind is None:
        deviations = exporting.compare(model, net, run, [(64, 96)])[64, 96]
        assert deviations['unmatched'] == deviations['scores'] == 0
        assert deviations['boxes'] == pytest.approx(0.02, rel=1e-3)
    else:
        with pytest.raises(RuntimeError, match=f'at 64×96, the {kind} of onnxruntime and of torch differ by'):
            exporting.compare(model, net, run, [(64, 96)])


def test_detections_are_matched_once_with_the_nearest():
    box = torch.tensor([10., 10, 20, 20])
    found = dict(boxes=torch.stack([box + 0.05, box, box]), scores=torch.tensor([0.5, 0.5, 0.9]),
                 labels=torch.tensor([1, 1, 1]))
    expected = dict(boxes=torch.stack([box, box + 0.06, box]), scores=torch.tensor([0.5, 0.5, 0.9]),
                    labels=torch.tensor([1, 1, 2]))
    assert sorted(zip(*match_detections(found, expected))) == [(0, 1), (1, 0)]


# The file --------------------------------------------------------------------------------------------------------------------

def test_file_runs_in_a_process_without_torch(classifier, tmp_path):
    export_model(classifier, str(tmp_path / 'net.onnx'), sizes=[(64, 64)])
    images = random_images(2, (40, 57))
    np.save(tmp_path / 'images.npy', images.numpy())
    subprocess.run([sys.executable, '-c', f"""
import sys
sys.modules['torch'] = None
import numpy, onnxruntime
session = onnxruntime.InferenceSession({str(tmp_path / 'net.onnx')!r}, providers=['CPUExecutionProvider'])
scores, = session.run(None, dict(images=numpy.load({str(tmp_path / 'images.npy')!r})))
numpy.save({str(tmp_path / 'scores.npy')!r}, scores)
"""], check=True, timeout=120)
    with torch.no_grad():
        expected = exported_net(classifier)(images)
    np.testing.assert_allclose(np.load(tmp_path / 'scores.npy'), expected, rtol=0, atol=1e-5)


def test_model_stays_as_it_was(classifier, tmp_path):
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    classifier.train()
    export_model(classifier, str(tmp_path / 'net.onnx'), sizes=[(64, 64)])
    assert classifier.training and classifier.head.training
    classifier.eval()
    torch.testing.assert_close(classifier.state_dict(), before, rtol=0, atol=0)


def test_full_disk_leaves_the_earlier_file(classifier, tmp_path):
    (tmp_path / 'net.onnx').write_text('earlier')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match='net.onnx could not be written: File too large; no part of it was kept'):
            export_model(classifier, str(tmp_path / 'net.onnx'), sizes=[(64, 64)], force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ['net.onnx'] and (tmp_path / 'net.onnx').read_text() == 'earlier'


def test_large_weights_are_in_one_file_beside(classifier, tmp_path, monkeypatch):
    """The exporter writes one file per tensor above 2 GB; here it does so at any size."""
    export = torch.onnx.export

    def scatter(net, inputs, path, **options):
        export(net, inputs, path, **options)
        onnx.save(onnx.load(path), path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)

    monkeypatch.setattr(torch.onnx, 'export', scatter)
    export_model(classifier, str(tmp_path / 'net.onnx'), sizes=[(64, 64)])
    assert sorted(os.listdir(tmp_path)) == ['net.onnx', 'net.onnx.data']
    assert (tmp_path / 'net.onnx').stat().st_size < (tmp_path / 'net.onnx.data').stat().st_size
    images = random_images(2, (40, 57))
    with torch.no_grad():
        torch.testing.assert_close(run_file(tmp_path / 'net.onnx', images=images)['scores'], exported_net(classifier)(images))
    monkeypatch.undo()
    export_model(classifier, str(tmp_path / 'net.onnx'), sizes=[(64, 64)], force=True)
    assert os.listdir(tmp_path) == ['net.onnx']


def test_half_precision_halves_the_file(classifier, tmp_path):
    for name, half in (('single', False), ('half', True)):
        deviations = export_model(classifier, str(tmp_path / name), sizes=[(64, 64)], half=half)
    assert 1e-6 < deviations[64, 64]['scores'] < 0.02
    assert (tmp_path / 'half').stat().st_size < 0.6 * (tmp_path / 'single').stat().st_size
    graph = onnx.load(tmp_path / 'half').graph
    weights = {name for node in graph.node if node.op_type in ('Conv', 'MatMul') for name in node.input}
    types = {tensor.data_type for tensor in graph.initializer if tensor.name in weights}
    assert types == {onnx.TensorProto.FLOAT16}


def test_backbone_alone_has_its_levels_as_outputs(tmp_path):
    net = RevCol(small_arch(), out_indices=(1, 3)).eval()
    deviations = export_backbone(net, str(tmp_path / 'net.onnx'), sizes=[(64, 64), (33, 47)])
    assert list(deviations) == [(64, 64), (33, 47)] and max(deviations.values()) < 1e-5
    images = torch.randn(3, 3, 50, 70)
    found = run_file(tmp_path / 'net.onnx', images=images)
    assert list(found) == ['level1', 'level3']
    with torch.no_grad():
        for value, expected in zip(found.values(), net(images), strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# Metadata --------------------------------------------------------------------------------------------------------------------

def test_file_tells_what_it_is(classifier, tmp_path):
    cfg = load_config(f'demo/{CLASSIFIER}')
    meta = dict(dataset_meta=dict(classes=tuple('abcdefghij'), palette=[[index] * 3 for index in range(12)]))
    export_model(classifier, str(tmp_path / 'net.onnx'), sizes=[(64, 64)], metadata=describe(cfg, meta))
    found = {entry.key: entry.value for entry in onnx.load(tmp_path / 'net.onnx').metadata_props}
    assert found['task'] == 'classification' and found['config'] == CLASSIFIER and found['license'] == 'Apache-2.0'
    assert found['version'].startswith('revcol_mm ')
    assert json.loads(found['classes']) == list('abcdefghij')
    assert json.loads(found['palette']) == [[index] * 3 for index in range(10)]
    assert json.loads(found['pipeline']) == image_steps(cfg.test_dataloader.dataset.pipeline)


@pytest.mark.parametrize('name, expected', [
    ('cascade_rcnn_revcol_t', [dict(FITTED, scale=[1333, 800])]),
    ('upernet_revcol_t', [dict(FITTED, scale=[2048, 512])]),
    ('revcol_t_in1k', [dict(type='ResizeEdge', scale=256, edge='short', interpolation='bicubic', backend='pillow'),
                       dict(type='CenterCrop', crop_size=[224, 224])]),
])
def test_resizing_of_the_test_is_described(name, expected):
    assert image_steps(load_config(name).test_dataloader.dataset.pipeline) == expected


def test_classes_and_functions_as_types_are_described_by_their_names():
    assert image_steps([dict(type=CenterCrop, crop_size=3)]) == [dict(type='CenterCrop', crop_size=[3, 3])]
    check_nms(dict(type=nms, iou_threshold=0.5), 'test_cfg.nms')
    with pytest.raises(ValueError, match="test_cfg.nms.type must be 'nms' .*, but got 'soft_nms'"):
        check_nms(dict(type=soft_nms, iou_threshold=0.5), 'test_cfg.nms')


@pytest.mark.parametrize('step', [dict(type='Pad', size_divisor=32), dict(type='Resize', scale_factor=0.5),
                                  dict(type='LoadImageFromFile', color_type='grayscale'),
                                  dict(type='LoadImageFromFile', imdecode_backend='tifffile'),
                                  dict(type='CenterCrop', crop_size=3, auto_pad=True)])
def test_other_steps_of_a_test_are_refused(step):
    with pytest.raises(ValueError, match='of the test pipeline must|the test pipeline must'):
        image_steps([step])


# Rewritten parts -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('bins', [1, 2, 3, 6, (2, None), (None, 5)])
@pytest.mark.parametrize('size', [(1, 1), (4, 7), (6, 6), (13, 29)])
def test_average_pool_is_that_of_torch(bins, size):
    x = torch.randn(2, 3, *size, dtype=torch.double)
    # The matrix is divided in float32.
    torch.testing.assert_close(AveragePool(bins)(x), nn.AdaptiveAvgPool2d(bins)(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize('options', [dict(kernel_size=8, stride=8), dict(kernel_size=3, stride=2, dilation=2)])
@pytest.mark.parametrize('size', [(16, 24), (17, 31), (3, 1)])
def test_corner_padding_is_that_of_mmcv(options, size):
    padding, x = AdaptivePadding(padding='corner', **options), torch.randn(1, 2, *size)
    assert torch.equal(CornerPadding(padding)(x), padding(x))


@pytest.mark.parametrize('steps', [1, 2, 7, 1000])
@pytest.mark.parametrize('start', [0, 0.5])
def test_linspace_of_a_grid_is_exact(start, steps):
    expected = torch.linspace(start, start + steps - 1, steps)
    with linspace_by_range():
        assert torch.equal(torch.linspace(start, start + steps - 1, steps, dtype=torch.float32), expected)
    assert torch.linspace(0, 1, 3).tolist() == [0, 0.5, 1]


# The tool ------------------------------------------------------------------------------------------------------------------

def test_the_tool_exports_whole_models_by_default(tmp_path, capsys):
    tool = load_tool('export_onnx')
    torch.save(dict(state_dict=make_model(CLASSIFIER).state_dict()), tmp_path / 'net.pth')
    command = [str(ROOT / f'configs/demo/{CLASSIFIER}.py'), str(tmp_path / 'net.pth'), '--cfg-options',
               'model.backbone.arch.num_columns=1', '--check', '64', '48', '--check', '32', '33', '--out']
    tool.main([*command, str(tmp_path / 'net.onnx')])
    printed = capsys.readouterr().out
    assert '64×48: onnxruntime and torch differ by' in printed and '32×33' in printed
    assert list(run_file(tmp_path / 'net.onnx', images=random_images(1, (40, 40)))) == ['scores']
    with pytest.raises(SystemExit, match='net.onnx exists already: choose another name, or replace it with force'):
        tool.main([*command, str(tmp_path / 'net.onnx')])


def test_the_tool_refuses_with_a_sentence_before_it_reads_the_weights(tmp_path):
    torch.save(dict(state_dict=dict(other=torch.zeros(1))), tmp_path / 'net.pth')
    with pytest.raises(SystemExit, match='^error: the model must be one of .* but is a HybridTaskCascade: export its backbone'):
        load_tool('export_onnx').main([str(ROOT / 'configs/demo/htc_revcol_nano_digits.py'), str(tmp_path / 'net.pth'), '--out',
                                       str(tmp_path / 'net.onnx')])
    assert os.listdir(tmp_path) == ['net.pth']
