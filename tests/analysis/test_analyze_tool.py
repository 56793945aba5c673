# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""tools/analyze.py on the demo's models of all three packages, with random weights."""
import argparse
import json

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample
from PIL import Image
from torch.utils.data import ConcatDataset

from revcol_mm.analysis import cka, layercam, memory
from revcol_mm.analysis.features import build_analysed
from revcol_mm.apis.config import load_config
from revcol_mm.apis.errors import LaunchError
from revcol_mm.apis.inference import predict_image, read_image
from revcol_mm.datasets import make_digits
from revcol_mm.models import RevCol
from revcol_mm.utils.memory import count_step
from tests.common import CONFIGS, load_tool, mostly_slow
from tests.export.demo import spread_scores

analyze = load_tool('analyze')

MODELS_OF = dict(cascade='cascade_rcnn_revcol_nano_digits', dino='dino_revcol_nano_digits', vit='mask_rcnn_revcol_vit_digits',
                 htc='htc_revcol_nano_digits', upernet='upernet_revcol_nano_digits',
                 mask2former='mask2former_revcol_nano_digits', classifier='revcol_nano_digits_cls',
                 plain_classifier='revcol_nano_digits_pretrain')


def config_of(name: str) -> str:
    return str(CONFIGS / 'demo' / f'{MODELS_OF[name]}.py')


def read(name: str, options: dict | None = None):
    return load_config(argparse.Namespace(config=config_of(name), cfg_options=options, work_dir=None, launcher='none',
                                          local_rank=0))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The digits, small, and where a test asks for it, a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp('analysis')
    make_digits(folder / 'data' / 'digits', num_train=1, num_val=8, size=64)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    """The demo's configs look for data/digits."""
    monkeypatch.chdir(folder)
    return folder


def checkpoint_of(here, name: str) -> str:
    path = here / f'{name}.pth'
    if not path.exists():
        cfg = read(name)
        if cfg.get('data_preprocessor'):
            cfg.model.data_preprocessor = cfg.data_preprocessor
        torch.manual_seed(1)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
            model.init_weights()
        spread_scores(model)
        torch.save(dict(state_dict=model.state_dict()), path)
    return str(path)


def image_of(here) -> str:
    return str(sorted((here / 'data/digits/val').iterdir())[0])


def run(*arguments) -> None:
    analyze.main([str(argument) for argument in arguments])


def sentence(*arguments) -> str:
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert isinstance(end.value.code, str) and end.value.code.startswith('error: ') and '\n' not in end.value.code
    return end.value.code


@pytest.mark.parametrize('name', mostly_slow(MODELS_OF, ['cascade', 'upernet', 'classifier']))
def test_the_explained_score_is_that_of_the_prediction_and_its_maps_are_there(here, name):
    inferencer = build_analysed(read(name), checkpoint_of(here, name), 'cpu')
    path = image_of(here)
    results, labels, _ = predict_image(inferencer, path, read_image(path), draw=False)
    found = layercam.explain(inferencer, path)
    columns = inferencer.model.backbone.num_columns
    assert found.maps.shape == (4, columns, *found.image.shape[:2])
    assert found.maps.min() >= 0 and found.maps.max() == 1 and np.isfinite(found.maps).all()
    # The box's score reads one level of the ViT's pyramid, and so 6 of the 12 features: that level of the last column, the
    # level above it in the column before, and so on.
    assert (found.maps.max((2, 3)) > 0).mean() >= 0.5
    if labels is not None:
        assert found.label == np.bincount(labels.flatten()).argmax()
    elif 'bbox' in results[0]:
        best = max(results, key=lambda result: result['score'])
        x, y, width, height = best['bbox']
        assert (found.label, found.score) == (best['category_id'], pytest.approx(best['score'], rel=1e-4))
        scale = found.image.shape[1] / Image.open(path).width
        assert found.box == pytest.approx([scale * value for value in (x, y, x + width, y + height)], rel=1e-3, abs=1e-2)
    else:
        assert found.label == results[0]['category_id']


@pytest.mark.parametrize('name', mostly_slow(['cascade', 'vit'], ['cascade']))
def test_a_box_a_class_and_the_mask_choose_the_detection(here, name):
    inferencer = build_analysed(read(name), checkpoint_of(here, name), 'cpu')
    path = image_of(here)
    results = [result for result in predict_image(inferencer, path, read_image(path), draw=False)[0]]
    other = results[len(results) // 2]
    x, y, width, height = other['bbox']
    found = layercam.explain(inferencer, path, other['category_id'], (x, y, x + width, y + height))
    assert (found.label, found.score) == (other['category_id'], pytest.approx(other['score'], rel=1e-3))
    mask = layercam.explain(inferencer, path, target='mask')
    box = layercam.explain(inferencer, path)
    assert (mask.label, mask.box) == (box.label, box.box) and mask.score != box.score and mask.maps.max() == 1
    assert not np.allclose(mask.maps, box.maps)
    with pytest.raises(ValueError, match=r'no box is predicted that overlaps \(-50, -50, -40, -40\)'):
        layercam.explain(inferencer, path, None, (-50, -50, -40, -40))


def test_layercam_writes_a_picture_for_each_image_and_names_those_left_out(here, tmp_path, capsys):
    broken = tmp_path / 'broken.png'
    broken.write_bytes(b'no image')
    arguments = ['layercam', config_of('upernet'), checkpoint_of(here, 'upernet'), image_of(here), broken, '--out',
                 tmp_path / 'maps', '--device', 'cpu', '--class', '3']
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 3 and 'left out' in capsys.readouterr().err
    picture, = (tmp_path / 'maps').iterdir()
    assert Image.open(picture).width > 300
    assert 'exists already' in sentence(*arguments)


def test_cka_writes_the_same_numbers_whatever_the_batch(here, tmp_path):
    arguments = ['cka', config_of('classifier'), checkpoint_of(here, 'classifier'), 'val', '--block', '40', '--device', 'cpu']
    options = ['--cfg-options', 'test_dataloader.num_workers=0']
    for batch in (7, 64):
        run(*arguments, '--batch', batch, '--between', '--out', tmp_path / str(batch), *options)
    small, large = (json.loads((tmp_path / batch / 'cka.json').read_text()) for batch in ('7', '64'))
    for name in ('images', 'labels'):
        assert np.array(small[name]) == pytest.approx(np.array(large[name]), abs=1e-5)
        assert np.array(small[name]).shape == (4, 4)
    matrix = np.array(small['between']['cka'])
    assert matrix.shape == (16, 16) and matrix.diagonal() == pytest.approx(1) and matrix == pytest.approx(matrix.T)
    highest = {name: np.nanmax(np.array(values, float)) for name, values in small['classes'].items()}
    assert len(highest) == 10 and max(highest, key=highest.get) == small['best_class']
    assert small['blocks'] * 40 + small['dropped_images'] == sum(
        1 for _ in (here / 'data/digits/crops/val').rglob('*.jpg'))
    assert all((tmp_path / '7' / f'{name}.png').is_file() for name in ('cka', 'between'))


@pytest.mark.parametrize('name', mostly_slow(['cascade', 'upernet', 'vit'], ['cascade', 'upernet']))
def test_the_labels_of_a_detection_or_segmentation_set_are_counts_or_areas(here, name, tmp_path, capsys):
    images = cka.find_images(read(name), ['val'])
    number = int(images[0]['labels'].numel())
    truth = json.loads((here / 'data/digits/annotations/instances_val.json').read_text())
    for index, entry in enumerate(sorted(truth['images'], key=lambda entry: entry['file_name'])):
        found = images[index]['labels']
        if name == 'upernet':
            labels = np.asarray(Image.open(here / 'data/digits/semantic/val' / entry['file_name'].replace('jpg', 'png')))
            assert found.tolist() == pytest.approx([(labels == label).mean() for label in range(number)])
        else:
            boxes = [box['category_id'] for box in truth['annotations'] if box['image_id'] == entry['id']]
            names = {category['id']: category['name'] for category in truth['categories']}
            assert found.tolist() == [sum(names[box] == str(label) for box in boxes) for label in range(number)]
    run('cka', config_of(name), checkpoint_of(here, name), here / 'data/digits', '--out', tmp_path, '--device', 'cpu',
        '--cfg-options', 'test_dataloader.num_workers=0')
    assert 'fewer images than --block 256: all 8 of them are one block' in capsys.readouterr().out


@pytest.mark.slow
def test_memory_counts_what_a_step_of_the_backbone_keeps(here, tmp_path, capsys):
    run('memory', config_of('plain_classifier'), '--shape', 64, 64, '--batch', 2, '--columns', 4, 2, '--out', tmp_path)
    found = json.loads((tmp_path / 'memory.json').read_text())
    assert (tmp_path / 'memory.png').is_file() and [row['columns'] for row in found['bytes']] == [2, 4]
    for row in found['bytes']:
        settings = read('plain_classifier').model.backbone
        settings.update(reversible=False, init_cfg=None)
        settings.arch.num_columns = row['columns']
        backbone = MODELS.build(settings)
        assert row['plain'] == count_step(backbone, torch.randn(2, 3, 64, 64)).kept  # with memory for it
        assert row['parameters'] == sum(4 * parameter.numel() for parameter in backbone.parameters())
    two, four = found['bytes']
    assert four['plain'] > 1.8 * two['plain'] and four['reversible'] < 1.1 * two['reversible']
    assert f'{four["reversible"] / 2**20:.1f}' in capsys.readouterr().out


def test_memory_takes_the_default_size_of_a_backbone_without_arch():
    cfg = read('plain_classifier')
    del cfg.model.backbone['arch']
    arch = memory.with_columns(cfg, 2).model.backbone.arch
    assert (arch.num_columns, tuple(arch.channels)) == (2, RevCol.ARCHS['base']['channels'])


NO_COLUMNS = """
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
"""


@pytest.mark.parametrize('command', ['layercam', 'cka', 'memory'])
def test_a_config_without_columns_is_refused(here, tmp_path, command):
    config = tmp_path / 'resnet.py'
    config.write_text(NO_COLUMNS)
    rest = dict(layercam=[checkpoint_of(here, 'cascade'), image_of(here), '--out', tmp_path / 'out'],
                cka=[checkpoint_of(here, 'cascade'), 'test', '--out', tmp_path / 'out'], memory=[])[command]
    assert 'must have a network of columns as its backbone (RevCol, RevColViT, RevColC2f), but has ResNet' in sentence(
        command, config, *rest)


def test_a_class_that_does_not_exist_is_refused(here, tmp_path):
    text = sentence('layercam', config_of('upernet'), checkpoint_of(here, 'upernet'), image_of(here), '--out', tmp_path,
                    '--class', '11')
    assert 'the class must be one of 0, 1, 2' in text and "but got '11'" in text


@pytest.mark.parametrize('name, options, expected', [
    ('plain_classifier', ['--target', 'pixel'], "the target must be left out for ImageClassifier, but got 'pixel'"),
    ('upernet', ['--target', 'box'], "the target must be pixel for EncoderDecoder, but got 'box'"),
    ('upernet', ['--box', '0', '0', '9', '9'], 'the box must be left out, because EncoderDecoder predicts no boxes'),
    ('dino', ['--target', 'mask'], "the target 'mask' needs a detector with mask heads"),
])
def test_a_target_of_another_kind_of_model_is_refused(here, tmp_path, name, options, expected):
    assert expected in sentence('layercam', config_of(name), checkpoint_of(here, name), image_of(here), *options,
                                '--out', tmp_path)


def test_images_that_are_not_there_are_refused(here, tmp_path):
    assert 'there is no image nowhere.jpg' in sentence('layercam', config_of('classifier'), checkpoint_of(here, 'classifier'),
                                                       'nowhere.jpg', '--out', tmp_path)


def test_a_folded_network_is_refused(here, tmp_path):
    cfg = read('plain_classifier')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
    model.backbone.switch_to_deploy()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'folded.pth')
    text = sentence('layercam', config_of('plain_classifier'), tmp_path / 'folded.pth', image_of(here), '--out', tmp_path)
    assert 'fold' in text


def test_images_without_labels_are_refused(here, tmp_path):
    (tmp_path / 'flat').mkdir()
    Image.new('RGB', (64, 64)).save(tmp_path / 'flat' / 'a.jpg')
    arguments = ['cka', config_of('classifier'), checkpoint_of(here, 'classifier'), '--out', tmp_path / 'out']
    assert f'the labelled images of {tmp_path / "flat"} cannot be read' in sentence(*arguments, tmp_path / 'flat')
    assert 'must have labels' in sentence(*arguments, 'test', '--cfg-options', 'test_dataloader.dataset.with_label=False')
    assert 'DATA must be train, val or test' in sentence(*arguments, 'nowhere')
    assert not list((tmp_path / 'out').glob('*'))


def test_a_detection_set_without_boxes_of_the_classes_is_refused(here):
    cfg = read('cascade', {'test_dataloader.dataset.metainfo.classes': 'lion'})  # one class, not four letters
    with pytest.raises(LaunchError, match=r'the images of test must have boxes of the classes lion, but none has one'):
        cka.find_images(cfg, ['test'])
    assert cfg.test_dataloader.dataset.metainfo.classes == 'lion'  # the config is not changed


def test_a_set_of_background_images_is_joined_with_one_that_has_boxes(here, tmp_path):
    cfg = read('cascade')
    dataset = cfg.test_dataloader.dataset
    contents = json.loads((here / dataset.data_root / dataset.ann_file).read_text())
    (tmp_path / 'empty.json').write_text(json.dumps(dict(contents, annotations=[])))
    cfg.val_dataloader.dataset.ann_file = str(tmp_path / 'empty.json')
    images = cka.find_images(cfg, ['val', 'test'])
    assert len(images) == 16 and not images[0]['labels'].any() and images[8]['labels'].any()
    with pytest.raises(LaunchError, match='the images of val must have boxes of the classes 0, 1, 2'):
        cka.find_images(cfg, ['val'])


def test_labels_that_are_the_same_everywhere_are_refused_and_repeated_names_are_numbered(here):
    inferencer = build_analysed(read('plain_classifier'), checkpoint_of(here, 'plain_classifier'), 'cpu')
    image = dict(inputs=torch.zeros(3, 32, 32, dtype=torch.uint8), data_samples=DataSample())

    def measure(labels):
        images = ConcatDataset([[dict(image, labels=row, inputs=torch.full((3, 32, 32), 9 * index, dtype=torch.uint8))
                                 for index, row in enumerate(labels)]])
        images.datasets[0] = type('Images', (list, ), dict(classes=('crane', 'dog', 'crane')))(images.datasets[0])
        return cka.measure(inferencer, images)

    with pytest.raises(ValueError, match='the labels must differ between the images, but all 8 images have the same ones'):
        measure(torch.eye(3)[[1] * 8])
    result = measure(torch.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1]])
    assert list(result.classes) == ['crane (0)', 'dog', 'crane (2)']
    assert not np.allclose(result.classes['crane (0)'], result.classes['crane (2)'])


@pytest.mark.slow
def test_images_of_several_sizes_need_a_shape(here, tmp_path):
    arguments = ['cka', config_of('plain_classifier'), checkpoint_of(here, 'plain_classifier'), 'val', '--block', '9999',
                 '--out', tmp_path, '--device', 'cpu', '--cfg-options', 'test_dataloader.num_workers=0']
    path = next((here / 'data/digits/crops/val').rglob('*.jpg'))
    kept = path.read_bytes()
    try:
        Image.open(path).resize((64, 48)).save(path)
        assert 'all images must have one size after the pipeline, but there are 48×64 and 64×64' in sentence(*arguments)
        run(*arguments, '--shape', 64, 64)
    finally:
        path.write_bytes(kept)
    assert (tmp_path / 'cka.png').is_file()
