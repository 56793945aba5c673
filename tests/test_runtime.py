# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""revcol_mm/runtime.py against mmcv, torch and pycocotools, on small files made by hand."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import mmcv
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from mmcv.transforms import CenterCrop, Resize
from mmpretrain.datasets import ResizeEdge
from onnx import TensorProto, helper
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from revcol_mm import runtime
from tests.common import ROOT

RESIZE = dict(type='Resize', scale=[48, 32], keep_ratio=True, interpolation='bilinear', backend='cv2')


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (45, 71, 3)).astype(np.uint8)


def write(path: Path, nodes: list, outputs: dict[str, int], constants: dict[str, np.ndarray] | None = None, **metadata) -> str:
    """A file with uint8 images as its input, and float outputs unless their names say something else."""
    dims = {'images': ['batch', 3, 'height', 'width'], 'size': [2]}
    inputs = [helper.make_tensor_value_info('images', TensorProto.UINT8, dims['images'])]
    if any('size' in node.input for node in nodes):
        inputs.append(helper.make_tensor_value_info('size', TensorProto.INT64, dims['size']))
    graph = helper.make_graph(
        nodes, 'net', inputs, [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [onnx.numpy_helper.from_array(value, name) for name, value in (constants or {}).items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    for key, value in dict(dict(pipeline=[RESIZE]), **metadata).items():
        if value is None:
            continue
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    onnx.save(model, path)
    return str(path)


def detector(folder: Path) -> str:
    """Finds one box per image, of its original size, with a mask that is everywhere."""
    nodes = [helper.make_node('Cast', ['size'], ['floats'], to=TensorProto.FLOAT),
             helper.make_node('Gather', ['floats', 'order'], ['corner']),
             helper.make_node('Concat', ['zeros', 'corner'], ['box'], axis=0),
             helper.make_node('Reshape', ['box', 'row'], ['boxes']), helper.make_node('Identity', ['score'], ['scores']),
             helper.make_node('Identity', ['label'], ['labels']),
             helper.make_node('Concat', ['one', 'size'], ['shape'], axis=0),
             helper.make_node('Expand', ['true', 'shape'], ['masks'])]
    constants = dict(order=np.array([1, 0]), zeros=np.zeros(2, np.float32), row=np.array([1, 4]), label=np.array([1]),
                     score=np.array([0.9], np.float32), one=np.array([1]), true=np.array([True]))
    return write(folder / 'detector.onnx', nodes, dict(boxes=1, scores=1, labels=7, masks=9), constants, task='detection',
                 classes=['cat', 'dog'])


def classifier(folder: Path) -> str:
    """Scores of the three colours."""
    nodes = [helper.make_node('Cast', ['images'], ['floats'], to=TensorProto.FLOAT),
             helper.make_node('ReduceMean', ['floats'], ['mean'], axes=[2, 3], keepdims=0),
             helper.make_node('Softmax', ['mean'], ['scores'], axis=1)]
    return write(folder / 'classifier.onnx', nodes, dict(scores=1), task='classification', classes=['red', 'green', 'blue'])


def segmentor(folder: Path, **metadata) -> str:
    """Logits are the colours of the window, less their mean, so that they depend on the window."""
    nodes = [helper.make_node('Cast', ['images'], ['floats'], to=TensorProto.FLOAT),
             helper.make_node('ReduceMean', ['floats'], ['mean'], axes=[2, 3]),
             helper.make_node('Sub', ['floats', 'mean'], ['logits'])]
    return write(folder / 'segmentor.onnx', nodes, dict(logits=1), task='segmentation', mode='slide', crop_size=[16, 20],
                 stride=[10, 12], align_corners=False, **metadata)


@pytest.mark.parametrize('share', [0, 0.02, 0.5, 0.98, 1])
@pytest.mark.parametrize('shape', [(1, 1), (7, 5), (300, 211)])
def test_masks_are_encoded_as_by_pycocotools(share, shape):
    mask = np.random.default_rng(0).random(shape) < share
    expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert runtime.encode_mask(mask) == dict(size=list(shape), counts=expected['counts'].decode())


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('size', [(40, 31), (5, 20), (1, 1), (17, 9)])
def test_maps_are_resized_as_by_torch(align_corners, size):
    maps = torch.randn(3, 17, 9)
    expected = F.interpolate(maps[None], size=size, mode='bilinear', align_corners=align_corners)[0]
    assert torch.allclose(torch.from_numpy(runtime._resize_maps(maps.numpy(), size, align_corners)), expected, atol=1e-5)


@pytest.mark.parametrize('steps', [
    [Resize((48, 32), keep_ratio=True)], [Resize((48, 32))], [Resize((1333, 800), keep_ratio=True, interpolation='bicubic')],
    [Resize((48, 32), keep_ratio=True, backend='pillow')],
    *([ResizeEdge(30, edge, backend=backend, interpolation='bicubic'), CenterCrop(24)]
      for edge in ('short', 'long', 'width', 'height') for backend in ('pillow', 'cv2'))], ids=str)
def test_images_are_prepared_as_by_the_test_pipelines(tmp_path, image, steps):
    described = []
    for step in steps:
        entry = dict(vars(step), type=type(step).__name__)
        keys = ('type', 'scale', 'keep_ratio', 'edge', 'crop_size', 'interpolation', 'backend')
        described.append({key: entry[key] for key in keys if key in entry})
    for turned in (image, np.ascontiguousarray(image.transpose(1, 0, 2))):
        results = dict(img=turned, img_shape=turned.shape[:2])
        for step in steps:
            results = step(results)
        shutil.rmtree(tmp_path / 'files', ignore_errors=True)
        (tmp_path / 'files').mkdir()
        model = runtime.Model(write(tmp_path / 'files' / 'x.onnx', [helper.make_node('Identity', ['images'], ['scores'])],
                                    dict(scores=2), task='classification', pipeline=described))
        assert (model.prepare(turned) == results['img']).all()


def test_a_detector_gets_the_original_size(tmp_path, image):
    model = runtime.Model(detector(tmp_path))
    result = model.predict(image)
    assert result['boxes'].tolist() == [[0, 0, 71, 45]] and result['masks'].shape == (1, 45, 71)
    assert runtime.coco_results(model, result)[0]['bbox'] == [0, 0, 71, 45]


def test_a_classifier_reads_red_first(tmp_path):
    model = runtime.Model(classifier(tmp_path))
    red = np.zeros((40, 40, 3), np.uint8)
    red[..., 0] = 255
    Image.fromarray(red).save(tmp_path / 'red.png')
    for source in (red, str(tmp_path / 'red.png')):
        assert model.classes[model.predict(source)['scores'].argmax()] == 'red'


def test_windows_slide_as_in_mmseg(tmp_path, image):
    from mmseg.models import EncoderDecoder
    prepared = torch.from_numpy(mmcv.imrescale(image, (48, 32))).permute(2, 0, 1)[None].float()

    class Net:
        out_channels = 3
        test_cfg = type('Cfg', (), dict(crop_size=(16, 20), stride=(10, 12)))

        def encode_decode(self, window, _):
            return window - window.mean((2, 3), keepdim=True)

    logits = EncoderDecoder.slide_inference(Net(), prepared, [{}])
    expected = F.interpolate(logits, size=image.shape[:2], mode='bilinear')[0].argmax(0)
    found = runtime.Model(segmentor(tmp_path)).predict(image)['labels']
    assert (found == expected.numpy()).mean() > 0.999


def test_an_image_is_turned_as_its_exif_entry_says(tmp_path, image):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(image).save(tmp_path / 'turned.png', exif=exif)
    assert (runtime.read_image(tmp_path / 'turned.png') == mmcv.imread(str(tmp_path / 'turned.png'))[..., ::-1]).all()
    assert runtime.read_image(tmp_path / 'turned.png').shape == (71, 45, 3)


@pytest.mark.parametrize('make', [detector, classifier, segmentor])
def test_the_file_runs_alone_without_torch(tmp_path, image, make):
    """Copied to another folder, in a process in which PyTorch, OpenMMLab and this package cannot be imported."""
    shutil.copy(ROOT / 'revcol_mm' / 'runtime.py', tmp_path / 'copied.py')
    path = make(tmp_path)
    (tmp_path / 'images' / 'more').mkdir(parents=True)
    for name in ('a.png', 'b.png', 'more/a.png'):
        Image.fromarray(image).save(tmp_path / 'images' / name)
    (tmp_path / 'images' / 'broken.png').write_bytes(b'no image')
    blocked = ('import sys, runpy\n'
               'for name in ("torch", "mmengine", "mmcv", "revcol_mm", "pycocotools"): sys.modules[name] = None\n'
               'sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name="__main__")')
    done = subprocess.run([sys.executable, '-c', blocked, 'copied.py', path, 'images', '--out', 'out'], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 3 and 'left out: images/broken.png' in done.stderr, done.stderr
    assert len(list((tmp_path / 'out' / 'vis').rglob('*.jpg'))) == 3
    coco = COCO(str(tmp_path / 'out' / 'images.json'))
    found = coco.loadRes(str(tmp_path / 'out' / 'predictions.json')) if make is not classifier else None
    assert len(coco.imgs) == 3 and (found is None or len(found.anns) >= 3)


@pytest.mark.parametrize('value', [0, 255, 300, 5000, 30000, 65535])
def test_16_bits_are_read_alike_with_and_without_opencv(tmp_path, monkeypatch, value):
    for name in ('x.png', 'x.tif'):
        Image.fromarray(np.full((3, 4), value, np.uint16)).save(tmp_path / name)
        with monkeypatch.context() as without:
            expected = runtime.read_image(tmp_path / name)
            without.setattr(runtime, 'cv2', None)
            np.testing.assert_array_equal(runtime.read_image(tmp_path / name), expected)


def test_32_bits_are_refused_without_opencv(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, 'cv2', None)
    Image.fromarray(np.full((3, 4), 0.5, np.float32)).save(tmp_path / 'x.tif')
    with pytest.raises(ValueError, match='x.tif cannot be read as an image .*32 bits'):
        runtime.read_image(tmp_path / 'x.tif')


@pytest.mark.parametrize('make, name', [(detector, 'vis/x.jpg'), (segmentor, 'maps/x.png')])
def test_files_of_others_are_not_replaced(tmp_path, image, capsys, make, name):
    Image.fromarray(image).save(tmp_path / 'x.png')
    theirs = tmp_path / 'out' / name
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b'annotated by hand')
    assert runtime.main([make(tmp_path), str(tmp_path / 'x.png'), '--out', str(tmp_path / 'out')]) == 1
    assert f'{name} exists already' in capsys.readouterr().err and theirs.read_bytes() == b'annotated by hand'


def test_a_folder_that_cannot_be_made_is_an_error_before_the_run(tmp_path, image, capsys, monkeypatch):
    Image.fromarray(image).save(tmp_path / 'x.png')
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(runtime.Model, 'predict', None)  # it must not come to this
    arguments = [detector(tmp_path), str(tmp_path / 'x.png'), '--out', str(tmp_path / 'file'), '--no-pictures']
    assert runtime.main(arguments) == 1 and 'error: ' in capsys.readouterr().err


def test_a_provider_that_onnxruntime_cannot_start_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr('onnxruntime.get_available_providers', lambda: ['CUDAExecutionProvider', 'CPUExecutionProvider'])
    with pytest.raises(ValueError, match="provider 'cuda' cannot be used, because onnxruntime could not start CUDAEx"):
        runtime.Model(detector(tmp_path), 'cuda')


def test_images_are_not_replaced_by_what_is_made_of_them(tmp_path, image, capsys):
    (tmp_path / 'maps').mkdir()
    Image.fromarray(image).save(tmp_path / 'maps' / 'x.png')
    before = (tmp_path / 'maps' / 'x.png').read_bytes()
    assert runtime.main([segmentor(tmp_path), str(tmp_path / 'maps'), '--out', str(tmp_path), '--force']) == 1
    assert 'x.png is one of the images, which are never changed' in capsys.readouterr().err
    assert (tmp_path / 'maps' / 'x.png').read_bytes() == before and not (tmp_path / 'predictions.json').exists()


def test_label_maps_need_no_pillow_and_pictures_do(tmp_path, image, monkeypatch, capsys):
    Image.fromarray(image).save(tmp_path / 'x.png')
    path, out = segmentor(tmp_path), tmp_path / 'out'
    assert runtime.main([path, str(tmp_path / 'x.png'), '--out', str(out), '--no-pictures']) == 0
    expected = np.array(Image.open(out / 'maps' / 'x.png'))
    monkeypatch.setattr(runtime, 'Image', None)
    assert runtime.main([path, str(tmp_path / 'x.png'), '--out', str(tmp_path / 'pictures')]) == 1
    assert 'drawing needs Pillow: pip install Pillow, or add --no-pictures' in capsys.readouterr().err
    assert runtime.main([path, str(tmp_path / 'x.png'), '--out', str(out), '--no-pictures', '--force']) == 0
    np.testing.assert_array_equal(np.array(Image.open(out / 'maps' / 'x.png')), expected)


def test_an_image_that_is_too_wide_for_a_picture_is_left_out_alone(tmp_path, image, monkeypatch, capsys):
    monkeypatch.setattr(runtime.Model, 'prepare', lambda self, pixels: pixels)  # resized, it would have no height
    for name, pixels in (('a.png', image), ('b.png', np.zeros((1, 65600, 3), np.uint8))):
        Image.fromarray(pixels).save(tmp_path / name)
    path, out = detector(tmp_path), tmp_path / 'out'
    assert runtime.main([path, str(tmp_path / '*.png'), '--out', str(out)]) == 3
    assert 'b.png: its picture of 65600×1 cannot be written' in capsys.readouterr().err
    assert len(json.loads((out / 'predictions.json').read_text())) == 1


def test_the_tool_takes_a_file_before_it_imports_torch(tmp_path, image):
    Image.fromarray(image).save(tmp_path / 'x.png')
    blocked = ('import sys, runpy\nsys.modules["torch"] = None\nsys.argv = sys.argv[1:]\n'
               'runpy.run_path(sys.argv[0], run_name="__main__")')
    arguments = [ROOT / 'tools' / 'infer.py', '--out', 'out', detector(tmp_path), 'x.png']
    for _ in range(2):
        done = subprocess.run([sys.executable, '-c', blocked, *arguments], cwd=tmp_path, text=True, capture_output=True)
        if _ == 0:
            assert done.returncode == 0 and '1 of 1 images, 1 results' in done.stdout, done.stderr
    assert done.returncode == 1 and 'exists already' in done.stderr


@pytest.mark.parametrize('change, message', [
    (lambda path: path.write_bytes(b'text'), 'must be an ONNX file that onnxruntime can run, but is not'),
    (lambda path: path.unlink(), 'there is no file'),
    (lambda path: write(path, [helper.make_node('Identity', ['images'], ['y'])], dict(y=2)), 'metadata has no task'),
    (lambda path: write(path, [helper.make_node('Identity', ['images'], ['y'])], dict(y=2), task='detection', pipeline=None),
     r'metadata has no pipeline: .*metadata=describe\(cfg, meta\)'),
    (lambda path: write(path, [helper.make_node('Identity', ['images'], ['y'])], dict(y=2), task='detection',
                        pipeline=[dict(type='Rotate')]), 'are prepared by Rotate, which this version does not know')])
def test_unusable_files_are_refused(tmp_path, change, message):
    path = Path(detector(tmp_path))
    change(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        runtime.Model(str(path))


def test_other_unusable_input_is_refused(tmp_path, image):
    path = detector(tmp_path)
    with pytest.raises(ValueError, match="provider must be one of cpu.*, but got 'tpu'"):
        runtime.Model(path, 'tpu')
    model = runtime.Model(path)
    with pytest.raises(ValueError, match=r'an image must be an array \(H, W, 3\) of uint8, RGB, but got float32 \(45, 71, 3\)'):
        model.predict(image.astype(np.float32))
    with pytest.raises(ValueError, match='there is no image nothing.png'):
        model.predict('nothing.png')
