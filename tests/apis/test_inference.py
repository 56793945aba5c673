# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""tools/infer.py and tools/export_onnx.py on small models of all three packages."""
import contextlib
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from pycocotools.coco import COCO

from revcol_mm import runtime
from revcol_mm.apis import config, errors, inference, test
from revcol_mm.apis.inference import _classes_and_palette, build_inferencer, find_images, load_weights, output_names, predict
from revcol_mm.checkpoint import CheckpointError
from revcol_mm.datasets import make_digits
from revcol_mm.utils.configs import config_path
from tests.common import ROOT, load_tool

CONFIGS = dict(detection='cascade_rcnn_revcol_nano_digits', segmentation='upernet_revcol_nano_digits',
               classification='revcol_nano_digits_cls')


infer, export_onnx = load_tool('infer'), load_tool('export_onnx')


def config_of(task: str) -> str:
    return str(ROOT / 'configs' / 'demo' / f'{CONFIGS[task]}.py')


@pytest.fixture(scope='module')
def workshop(tmp_path_factory):
    """A folder with images, and a checkpoint of random weights for each demo config, without class names in it."""
    folder = tmp_path_factory.mktemp('inference')
    make_digits(folder / 'digits', num_train=1, num_val=3, size=96)
    for task in CONFIGS:
        cfg = Config.fromfile(config_of(task))
        if 'data_preprocessor' in cfg:
            cfg.model.data_preprocessor = cfg.data_preprocessor
        config._register_packages(cfg, 'x.py')
        torch.manual_seed(1)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), folder / f'{task}.pth')
    return folder


@pytest.fixture
def images(workshop) -> list:
    return sorted(str(path) for path in (workshop / 'digits' / 'val').iterdir())


def run(workshop, task: str, *arguments) -> None:
    infer.main([config_of(task), str(workshop / f'{task}.pth'), *map(str, arguments), '--device', 'cpu'])


def read(folder: Path) -> tuple:
    """images.json, predictions.json, both read by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / 'images.json'))
        found = truth.loadRes(str(folder / 'predictions.json'))
    return truth.dataset, list(found.anns.values())


def test_detections_are_coco_results(workshop, images, tmp_path):
    run(workshop, 'detection', *images, '--out', tmp_path)
    listing, found = read(tmp_path)
    assert [entry['file_name'] for entry in listing['images']] == images
    assert [category['name'] for category in listing['categories']] == list('0123456789')
    assert found and {entry['image_id'] for entry in found} <= {1, 2, 3}
    assert all(len(entry['bbox']) == 4 and entry['segmentation']['size'] == [96, 96] and 0 <= entry['score'] <= 1
               for entry in found)
    assert sorted(path.name for path in (tmp_path / 'vis').iterdir()) == [f'{Path(path).stem}.jpg' for path in images]


def test_detections_are_those_of_mmdet(workshop, images, tmp_path):
    """Boxes and masks against mmdet's inferencer, used as its own documentation says."""
    from mmdet.apis import DetInferencer
    run(workshop, 'detection', images[0], '--out', tmp_path, '--no-pictures')
    expected = DetInferencer(model=config_of('detection'), weights=str(workshop / 'detection.pth'), device='cpu',
                             show_progress=False)(images[0])['predictions'][0]
    found = json.loads((tmp_path / 'predictions.json').read_text())
    boxes = np.array([entry['bbox'] for entry in found])
    boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_allclose(boxes, expected['bboxes'], atol=1e-3)  # float32, of coordinates up to 96
    assert [entry['category_id'] for entry in found] == expected['labels']
    assert [entry['segmentation']['counts'] for entry in found] == [mask['counts'] for mask in expected['masks']]
    assert not (tmp_path / 'vis').exists()


def test_annotations_give_the_ids(workshop, images, tmp_path):
    annotations = json.loads((workshop / 'digits' / 'annotations' / 'instances_val.json').read_text())
    for entry in annotations['images']:
        entry['id'] += 500
    for category in annotations['categories']:
        category['id'] += 70
    (tmp_path / 'ann.json').write_text(json.dumps(annotations))
    run(workshop, 'detection', *images[:2], '--out', tmp_path, '--no-pictures', '--ann-file', tmp_path / 'ann.json')
    listing, found = read(tmp_path)
    ids = {entry['file_name']: entry['id'] for entry in annotations['images']}
    assert [entry['id'] for entry in listing['images']] == [ids[Path(path).name] for path in images[:2]]
    assert listing['categories'] == [{key: category[key] for key in ('id', 'name')} for category in annotations['categories']]
    assert {entry['category_id'] for entry in found} <= {category['id'] for category in annotations['categories']}


def test_label_maps_and_their_masks_agree(workshop, images, tmp_path):
    run(workshop, 'segmentation', *images, '--out', tmp_path)
    listing, found = read(tmp_path)
    assert [category['name'] for category in listing['categories']] == [*'0123456789', 'background']
    truth = COCO()
    truth.dataset, truth.imgs = listing, {entry['id']: entry for entry in listing['images']}
    for entry in listing['images']:
        labels = np.array(Image.open(tmp_path / 'maps' / f'{Path(entry["file_name"]).stem}.png'))
        assert labels.shape == (96, 96)
        rebuilt = np.full_like(labels, 255)
        for result in found:
            if result['image_id'] == entry['id']:
                rebuilt[truth.annToMask(result) == 1] = result['category_id']
        np.testing.assert_array_equal(rebuilt, labels)
    assert len(list((tmp_path / 'vis').iterdir())) == 3


def test_classes_are_ranked(workshop, images, tmp_path):
    run(workshop, 'classification', *images, '--out', tmp_path, '--deploy')
    found = json.loads((tmp_path / 'predictions.json').read_text())
    for image_id in (1, 2, 3):
        scores = [entry['score'] for entry in found if entry['image_id'] == image_id]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True) and 0 < sum(scores) <= 1
    assert len(list((tmp_path / 'vis').iterdir())) == 3


def test_broken_images_are_reported_and_left_out(workshop, images, tmp_path, capsys):
    (tmp_path / 'text.jpg').write_text('no image')
    (tmp_path / 'empty.png').touch()
    (tmp_path / 'cut.jpg').write_bytes(Path(images[0]).read_bytes()[:1000])
    Image.new('RGB', (1, 1)).save(tmp_path / 'one_pixel.png')
    with pytest.raises(SystemExit) as stop:
        run(workshop, 'segmentation', tmp_path, *images, '--out', tmp_path / 'out')
    assert stop.value.code == 3
    listing, _ = read(tmp_path / 'out')
    assert [entry['file_name'] for entry in listing['images']] == images
    errors = capsys.readouterr().err
    assert all(f'left out: {tmp_path / name}' in errors for name in ('text.jpg', 'empty.png', 'cut.jpg', 'one_pixel.png'))


def test_an_image_that_the_pipeline_cannot_resize_is_left_out(workshop, images, tmp_path):
    Image.new('RGB', (5000, 1)).save(tmp_path / 'thin.png')  # cv2.error, which is no ValueError
    with pytest.raises(SystemExit) as stop:
        run(workshop, 'detection', tmp_path / 'thin.png', *images, '--out', tmp_path / 'out')
    assert stop.value.code == 3
    assert [entry['file_name'] for entry in read(tmp_path / 'out')[0]['images']] == images


def test_nothing_but_broken_images_fails(workshop, tmp_path):
    (tmp_path / 'text.jpg').write_text('no image')
    with pytest.raises(SystemExit) as stop:
        run(workshop, 'classification', tmp_path, '--out', tmp_path / 'out')
    assert stop.value.code == 1


def test_an_earlier_run_is_not_replaced(workshop, images, tmp_path):
    run(workshop, 'classification', images[0], '--out', tmp_path, '--no-pictures')
    before = (tmp_path / 'predictions.json').read_bytes()
    with pytest.raises(SystemExit, match='error: .* replace it with force'):
        run(workshop, 'classification', images[1], '--out', tmp_path, '--no-pictures')
    assert (tmp_path / 'predictions.json').read_bytes() == before
    run(workshop, 'classification', images[1], '--out', tmp_path, '--no-pictures', '--force')


def test_files_of_others_in_the_folders_of_the_outputs_are_not_replaced(workshop, images, tmp_path):
    for name, task in (('vis/0.jpg', 'classification'), ('maps/0.png', 'segmentation')):
        (tmp_path / 'in').mkdir(exist_ok=True)
        (tmp_path / 'in' / '0.jpg').write_bytes(Path(images[0]).read_bytes())
        theirs = tmp_path / name
        theirs.parent.mkdir()
        theirs.write_bytes(b'annotated by hand')
        with pytest.raises(SystemExit, match=f'error: the output .*{name} exists'):
            run(workshop, task, tmp_path / 'in', '--out', tmp_path)
        assert theirs.read_bytes() == b'annotated by hand'
        theirs.unlink()


def test_outputs_of_an_earlier_run_are_no_images(tmp_path):
    for name in ('a.jpg', 'out/vis/a.jpg', 'out/maps/a.png', 'out/b.jpg'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    folder, out = str(tmp_path), str(tmp_path / 'out')
    for find in (find_images, runtime.find_images):
        assert len(find([folder], out)) == 4  # no run has been there
    (tmp_path / 'out' / 'images.json').write_text('{}')
    for find in (find_images, runtime.find_images):
        assert find([folder], out) == find([f'{folder}/**/*.*g'], out) == [f'{folder}/a.jpg', f'{folder}/out/b.jpg']
        assert find([f'{out}/vis/a.jpg'], out) == [f'{out}/vis/a.jpg']
        with pytest.raises((FileNotFoundError, ValueError), match='no image'):
            find([f'{out}/vis'], out)


def test_any_error_of_an_image_leaves_only_that_image_out(tmp_path, monkeypatch):
    monkeypatch.setattr(inference, 'read_image', lambda path: np.zeros((1, 1, 3), np.uint8))
    monkeypatch.setattr(inference, 'predict_image', lambda inferencer, path, *_: ([], None, None) if path == 'a.jpg' else [][0])
    summary = predict(SimpleNamespace(classes=('cat', )), ['a.jpg', 'b.jpg'], str(tmp_path))
    assert (summary.images, summary.skipped) == (1, {'b.jpg': 'list index out of range'})


def test_images_are_never_overwritten(workshop, images, tmp_path):
    (tmp_path / 'vis').mkdir()
    picture = tmp_path / 'vis' / 'a.jpg'
    picture.write_bytes(Path(images[0]).read_bytes())
    with pytest.raises(SystemExit, match='error: .* never changed'):
        run(workshop, 'classification', picture, '--out', tmp_path)
    assert picture.read_bytes() == Path(images[0]).read_bytes()


def test_the_ids_of_many_images_are_not_compared_with_each_other(tmp_path, monkeypatch):
    class Id(int):
        compared = 0
        __hash__ = int.__hash__

        def __eq__(self, other):
            Id.compared += 1
            return int(self) == other

    monkeypatch.setattr(inference, 'read_image', lambda path: np.zeros((1, 1, 3), np.uint8))
    monkeypatch.setattr(inference, 'predict_image', lambda *_: ([], None, None))
    monkeypatch.setattr(inference.Numbering, 'image', lambda self, path, index: Id(index % 60))
    summary = predict(SimpleNamespace(classes=('cat', )), [f'{index}.jpg' for index in range(100)], str(tmp_path))
    assert summary.images == 60 and len(summary.skipped) == 40
    assert '39, already: predict on only one' in summary.skipped['99.jpg']
    assert Id.compared <= 100


def test_a_classifier_reads_files_as_its_test_does(images):
    cfg = Config.fromfile(config_of('classification'))
    cfg.test_dataloader.dataset.pipeline[0].color_type = 'grayscale'
    inferencer = build_inferencer(cfg, None, 'cpu')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        expected, = inferencer.model.test_step(pseudo_collate([Compose(cfg.test_dataloader.dataset.pipeline)(
            dict(img_path=images[0]))]))
    found = inference.predict_sample(inferencer, images[0])
    torch.testing.assert_close(found.pred_score, expected.pred_score)


def test_an_image_that_is_too_wide_for_a_picture_is_left_out_alone(tmp_path, monkeypatch):
    shapes = dict(a=(4, 6, 3), b=(1, 65600, 3))
    monkeypatch.setattr(inference, 'read_image', lambda path: np.zeros(shapes[path], np.uint8))
    monkeypatch.setattr(inference, 'predict_image', lambda model, path, image, *_: ([dict(category_id=0)], None, image))
    summary = predict(SimpleNamespace(classes=('cat', )), ['a', 'b'], str(tmp_path))
    assert summary.images == 1 and 'its picture of 65600×1 cannot be written as JPEG' in summary.skipped['b']


def test_files_folders_and_globs_are_found(tmp_path):
    for name in ('a.jpg', 'b.PNG', 'notes.txt', 'inner/c.jpeg', 'in[1]/d.jpg'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [str(tmp_path / name) for name in ('a.jpg', 'b.PNG', 'in[1]/d.jpg', 'inner/c.jpeg')]
    assert find_images([str(tmp_path)]) == names
    assert find_images([str(tmp_path / '**' / '*.jp*g'), names[0]]) == [names[0], names[2], names[3]]
    assert find_images([names[0], str(tmp_path / 'inner' / '..' / 'a.jpg')]) == names[:1]
    with pytest.raises(FileNotFoundError, match='no image .*missing'):
        find_images([str(tmp_path / 'missing.jpg')])
    with pytest.raises(FileNotFoundError, match='there are no images .* in .*nothing'):
        (tmp_path / 'nothing').mkdir()
        find_images([str(tmp_path / 'nothing')])


def test_outputs_have_names_of_their_own():
    assert output_names(['x/a.jpg', 'y/b.jpg']) == ['a', 'b']
    assert output_names(['x/a.jpg', 'x/a.png']) == ['a.jpg', 'a.png']
    assert output_names(['x/a.jpg', 'y/a.jpg']) == [os.path.join('x', 'a'), os.path.join('y', 'a')]


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    net = torch.nn.Linear(3, 3)
    before = net.weight.clone()
    for weights, message in ((dict(net.state_dict(), more=torch.ones(1)), 'no place in the model: more'),
                             (dict(weight=torch.ones(3, 3)), 'missing: bias'),
                             (dict(weight=torch.ones(2, 3), bias=torch.ones(3)), 'another shape: weight'),
                             (dict(weight=torch.full((3, 3), torch.nan), bias=torch.ones(3)), 'NaN')):
        torch.save(dict(state_dict=weights), tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match=message):
            load_weights(net, str(tmp_path / 'x.pth'))
    assert torch.equal(net.weight, before)


def test_classes_come_from_the_checkpoint_first(workshop, tmp_path):
    contents = torch.load(workshop / 'classification.pth', weights_only=True)
    names = [f'digit {label}' for label in range(10)]
    torch.save(dict(contents, meta=dict(dataset_meta=dict(classes=names))), tmp_path / 'named.pth')
    cfg = config.load_config(infer.parse_args([config_of('classification'), 'x', 'y', '--out', 'z']))
    assert list(build_inferencer(cfg, str(tmp_path / 'named.pth'), 'cpu').classes) == names
    assert list(build_inferencer(cfg, str(workshop / 'classification.pth'), 'cpu').classes) == list('0123456789')


@pytest.mark.parametrize('name, number', [('cascade_rcnn_revcol_t', 80), ('upernet_revcol_t', 150), ('revcol_t_in1k', 1000)])
def test_classes_of_well_known_data_sets_need_not_be_named(name, number):
    cfg = config.load_config(test.parse_test_args([config_path(name), 'x.pth']))
    assert len(_classes_and_palette(cfg, {}, cfg.default_scope)[0]) == number
    dataset = cfg.test_dataloader.dataset
    dataset.type = f'{cfg.default_scope}.{dataset.type}'
    assert len(_classes_and_palette(cfg, {}, 'mmengine')[0]) == number
    dataset.type = 'BaseDataset'  # of mmengine, where no package has its own
    assert _classes_and_palette(cfg, {}, 'mmdet') == (None, None)


def test_some_classes_of_a_well_known_data_set_have_their_colours():
    cfg = config.load_config(test.parse_test_args([config_path('upernet_revcol_t'), 'x.pth']))
    whole = dict(zip(*_classes_and_palette(cfg, {}, 'mmseg')))
    cfg.test_dataloader.dataset.metainfo = dict(classes=('sky', 'wall'))
    assert _classes_and_palette(cfg, {}, 'mmseg') == (('sky', 'wall'), [whole['sky'], whole['wall']])
    cfg.test_dataloader.dataset.metainfo = dict(classes=('sky', 'unicorn'))
    assert _classes_and_palette(cfg, {}, 'mmseg') == (('sky', 'unicorn'), None)


def test_categories_of_annotations_are_not_guessed(workshop, images, tmp_path):
    annotations = workshop / 'digits' / 'annotations' / 'instances_val.json'
    with pytest.raises(SystemExit, match='error: .*instances_val.json.*metainfo'):
        run(workshop, 'classification', images[0], '--out', tmp_path, '--ann-file', annotations,
            '--cfg-options', 'test_dataloader.dataset.metainfo=None')
    assert os.listdir(tmp_path) == []


def test_a_config_without_a_test_predicts_with_its_test_pipeline(images, tmp_path):
    cfg = config.load_config(test.parse_test_args([config_path('revcol_b_in22k'), 'x.pth']))
    cfg.model.backbone.arch = dict(channels=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_columns=4)
    cfg.model.head.update(num_classes=7, in_channels=(8, 8, 8, 8))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / 'net.pth')
    inferencer = build_inferencer(cfg, str(tmp_path / 'net.pth'), 'cpu')
    assert inferencer.classes is None and cfg.test_dataloader is None
    assert predict(inferencer, images[:1], str(tmp_path / 'out'), draw=False).results == 5
    assert next(iter(inferencer.preprocess(images[:1])))['inputs'][0].shape == (3, 224, 224)
    cfg.test_pipeline = None
    with pytest.raises(errors.LaunchError, match='must have a test_dataloader, or a test_pipeline'):
        build_inferencer(cfg, str(tmp_path / 'net.pth'), 'cpu')


@pytest.mark.parametrize('arguments, sentence', [
    (['--device', 'nosuch'], "device 'nosuch' cannot be used"),
    (['--device', 'cuda:99'], "device 'cuda:99' cannot be used"),
    (['--out', 'file'], 'output folder file cannot be made: .*file is a file'),
    (['--out', 'file/inner/out'], 'output folder file/inner/out cannot be made: .*file is a file'),
    (['--ann-file', '.'], r'annotation file \. cannot be read: Is a directory'),
    (['--ann-file', 'none.json'], 'annotation file none.json cannot be read: No such file'),
    (['--cfg-options', 'model.backbone.arch=giant'], r"\.py cannot be built: ValueError: .*arch must .* got 'giant'"),
    (['--cfg-options', 'model.type=NoSuch'], r'\.py cannot be built: KeyError: .*NoSuch is not in'),
    (['--cfg-options', 'model=None'], 'must define a model, but has none'),
])
def test_mistakes_end_with_a_sentence(workshop, images, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    if arguments[0] != '--cfg-options':  # the model is not yet built
        monkeypatch.setattr('revcol_mm.apis.inference.build_errors', None)
    with pytest.raises(SystemExit, match=f'^error: .*{sentence}'):
        infer.main([config_of('classification'), str(workshop / 'classification.pth'), images[0], '--out', 'out', *arguments])
    assert os.listdir(tmp_path) == ['file']


@pytest.mark.parametrize('options, sentence', [
    (['model.backbone.arch=giant'], r"\.py cannot be built: ValueError: .*arch must .* got 'giant'"),
    (['model.type=NoSuch'], r'\.py cannot be built: KeyError: .*NoSuch is not in'),
    (['model=None'], 'must define a model, but has none'),
    (['default_scope=None', 'model.type=NoSuch'], r'\.py cannot be built: KeyError: .*NoSuch is not in'),
])
def test_mistakes_in_an_export_end_with_a_sentence(workshop, tmp_path, options, sentence):
    with pytest.raises(SystemExit, match=f'^error: .*{sentence}'):
        export_onnx.main([config_of('detection'), str(workshop / 'detection.pth'), '--out', str(tmp_path / 'net.onnx'),
                          '--cfg-options', *options])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('name, checkpoint, sentence', [
    ('classification', 'missing.pth', 'error: there is no checkpoint missing.pth'),
    ('missing', 'x.pth', 'error: there is no config'),
])
def test_missing_files_end_with_a_sentence(workshop, images, tmp_path, name, checkpoint, sentence):
    path = config_of(name) if name in CONFIGS else 'missing.py'
    with pytest.raises(SystemExit, match=sentence):  # as the tool runs main()
        infer.main([path, checkpoint, images[0], '--out', str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()


def test_exported_backbone_is_that_of_the_checkpoint(workshop, tmp_path, capsys):
    """onnxruntime against the model's own backbone, at a size that the tool did not check."""
    import onnxruntime
    export_onnx.main([config_of('detection'), str(workshop / 'detection.pth'), '--out', str(tmp_path / 'net.onnx'),
                      '--part', 'backbone'])
    printed = capsys.readouterr().out
    assert all(size in printed for size in ('64×64', '97×131', '160×65'))
    cfg = Config.fromfile(config_of('detection'))
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    load_weights(model, str(workshop / 'detection.pth'))
    x = torch.randn(1, 3, 75, 200)
    outputs = onnxruntime.InferenceSession(str(tmp_path / 'net.onnx')).run(None, dict(images=x.numpy()))
    with torch.no_grad():
        expected = model.eval().backbone(x)
    for output, feature in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(output, feature, rtol=0, atol=1e-4 * feature.abs().max().item())
    assert os.listdir(tmp_path) == ['net.onnx']


@pytest.mark.parametrize('part', ['model', 'backbone'])
def test_failed_export_leaves_nothing(workshop, tmp_path, part):
    with pytest.raises(SystemExit, match='error: .*at least 32'):
        export_onnx.main([config_of('classification'), str(workshop / 'classification.pth'),
                          '--out', str(tmp_path / 'net.onnx'), '--part', part, '--check', '16', '16'])
    assert os.listdir(tmp_path) == []


def test_an_image_beyond_the_limit_of_pillow_is_predicted(workshop, images, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)  # that of the images is 9216, and Pillow refuses twice its limit
    run(workshop, 'classification', images[0], '--out', tmp_path)
    assert len(json.loads((tmp_path / 'predictions.json').read_text())) == 5 and Image.MAX_IMAGE_PIXELS == 1000


def test_an_annotation_file_without_images_numbers_none(tmp_path):
    (tmp_path / 'none.json').write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}')
    with pytest.raises(ValueError, match='none.json has no image of this name'):
        inference.Numbering.from_annotations(str(tmp_path / 'none.json')).image('a.png', 0)
    assert inference.Numbering().image('a.png', 0) == 1
