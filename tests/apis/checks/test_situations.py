# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What users do with data of their own, through the functions of tools/train.py, tools/test.py and tools/infer.py."""
import argparse
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from revcol_mm.apis import test, train
from revcol_mm.apis.errors import LaunchError
from tests.apis.conftest import CLASSIFICATION, DETECTION, SEGMENTATION
from tests.common import load_tool

infer = load_tool('infer')
pytestmark = pytest.mark.usefixtures('own_surroundings', 'no_visualizer_of_another_run')
COLOURS = dict(disc=(255, 255, 255), square=(0, 0, 255))


def write_shapes(folder: Path, split: str, categories: tuple[str, str]) -> None:
    """Two images with one shape each: annotations in COCO's format, label maps, and a folder for each class."""
    for name in (split, f'maps/{split}', 'annotations', *(f'crops/{split}/{name}' for name in categories)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    content = dict(images=[], annotations=[], categories=[dict(id=10 * index + 5, name=name)
                                                          for index, name in enumerate(categories)])
    for index, (name, colour) in enumerate(COLOURS.items()):
        image, labels = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
        image[16:48, 16:48], labels[16:48, 16:48] = colour, 1
        cv2.imwrite(str(folder / split / f'{index}.png'), image)
        cv2.imwrite(str(folder / 'crops' / split / name / 'same.png'), image)
        cv2.imwrite(str(folder / 'maps' / split / f'{index}.png'), labels)
        content['images'].append(dict(id=index, file_name=f'{index}.png', width=64, height=64))
        content['annotations'].append(dict(
            id=index, image_id=index, category_id=10 * categories.index(name) + 5, bbox=[16, 16, 32, 32], area=1024, iscrowd=0,
            segmentation=[[16, 16, 48, 16, 48, 48, 16, 48]]))
    (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path:
    """Configs whose classes are (square, disc), a training file of (disc, square), and a validation file of (square, disc)."""
    folder = tmp_path_factory.mktemp('shapes')
    write_shapes(folder, 'train', ('disc', 'square'))
    write_shapes(folder, 'val', ('square', 'disc'))
    own = "classes = ('square', 'disc')"
    texts = dict(
        detection=DETECTION.replace('num_classes=10', 'num_classes=2'),
        segmentation=SEGMENTATION.replace('semantic/', 'maps/').replace("'.jpg'", "'.png'").replace(
            "(*classes, 'background')", "('ground', 'shape')").replace('range(11)', 'range(2)').replace(
            'num_classes=11', 'num_classes=2'),
        classification=CLASSIFICATION.replace('num_classes=10', 'num_classes=2').replace('(1, 5)', '(1, )').replace(
            'pipeline=pipeline)', 'pipeline=pipeline, metainfo=dict(classes=classes))').replace(
            'default_hooks = hooks', "default_hooks = dict(visualization=dict(type='VisualizationHook', interval=1), **hooks)\n"
            "visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])"))
    for name, text in texts.items():
        (folder / f'{name}.py').write_text(text.replace("classes = tuple('0123456789')", own).replace('{root}', str(folder)))
    return folder


@pytest.fixture(scope='module')
def detector(shapes) -> Path:
    """The checkpoint of a training whose config names the classes in another order than the file."""
    work = shapes / 'work'
    train.train([str(shapes / 'detection.py'), '--work-dir', str(work), '--cfg-options', 'train_cfg.max_iters=2'])
    return work / 'iter_2.pth'


def predicted_categories(shapes: Path, config: str, checkpoint, out: Path, *options: str) -> list[str]:
    infer.main([str(shapes / config), str(checkpoint), str(shapes / 'val' / '0.png'), '--out', str(out), '--no-pictures',
                '--device', 'cpu', *options])
    return [category['name'] for category in json.loads((out / 'images.json').read_text())['categories']]


# One order of the classes ----------------------------------------------------------------------------------------------------

def test_a_checkpoint_stores_the_names_in_the_order_of_the_training_file(detector):
    assert torch.load(detector, weights_only=True)['meta']['dataset_meta']['classes'] == ('disc', 'square')


def test_the_order_reaches_the_predictions_of_infer(detector, shapes, tmp_path):
    assert predicted_categories(shapes, 'detection.py', detector, tmp_path / 'out') == ['disc', 'square']


def test_infer_takes_the_order_of_the_file_for_a_checkpoint_without_names(detector, shapes, tmp_path, capsys):
    contents = torch.load(detector, weights_only=True)
    torch.save(dict(state_dict=contents['state_dict']), tmp_path / 'bare.pth')
    assert predicted_categories(shapes, 'detection.py', tmp_path / 'bare.pth', tmp_path / 'out') == ['disc', 'square']
    assert 'names no classes, so that its labels are taken for those of the data' in ''.join(capsys.readouterr())


def test_a_test_maps_a_file_of_another_order_to_the_checkpoint(detector, shapes, tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr('mmdet.evaluation.CocoMetric.compute_metrics', lambda self, results: labels.append(
        [self.dataset_meta['classes'], [self.cat_ids[label] for label in range(2)]]) or {})
    test.test([str(shapes / 'detection.py'), str(detector), '--work-dir', 'w'])
    assert labels == [[('disc', 'square'), [15, 5]]]  # ids in the validation file: square 5, disc 15


def test_folders_keep_their_names_up_to_the_predictions_of_infer(shapes, tmp_path):
    train.train([str(shapes / 'classification.py'), '--work-dir', 'w'])
    assert torch.load('w/iter_2.pth', weights_only=True)['meta']['dataset_meta']['classes'] == ('disc', 'square')
    assert predicted_categories(shapes, 'classification.py', 'w/iter_2.pth', tmp_path / 'out') == ['disc', 'square']
    torch.save(dict(state_dict=torch.load('w/iter_2.pth', weights_only=True)['state_dict']), 'bare.pth')
    assert predicted_categories(shapes, 'classification.py', 'bare.pth', tmp_path / 'bare') == ['disc', 'square']


@pytest.mark.slow
def test_a_single_class_as_a_text_is_one_class_in_infer(shapes, tmp_path):
    train.train([str(shapes / 'segmentation.py'), '--work-dir', 'w'])
    torch.save(dict(state_dict=torch.load('w/iter_2.pth', weights_only=True)['state_dict']), 'bare.pth')
    options = ('--cfg-options', 'test_dataloader.dataset.metainfo.classes=square')
    with pytest.raises(SystemExit, match=r'must be the 1 classes of .*model.decode_head .* is 2: set num_classes=1'):
        predicted_categories(shapes, 'segmentation.py', 'bare.pth', tmp_path / 'out', *options)


# Wrapped test sets -----------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize('wrap', ["dict(type='RepeatDataset', times=1, dataset=part)",
                                  pytest.param("dict(type='ConcatDataset', datasets=[part])", marks=pytest.mark.slow),
                                  "dict(type='ConcatDataset', datasets=[dict(type='RepeatDataset', times=1, dataset=part)])"])
def test_infer_and_tta_read_through_wrappers_of_the_test_set(detector, shapes, tmp_path, wrap):
    text = f'_base_ = {str(shapes / "detection.py")!r}\npart = _base_.test_dataloader.dataset\n'
    text += f'test_dataloader = dict(dataset=dict(_delete_=True, **{wrap}))\ndel part\n'
    (tmp_path / 'wrapped.py').write_text(text)
    infer.main(['wrapped.py', str(detector), str(shapes / 'val' / '0.png'), '--out', 'out', '--no-pictures', '--device', 'cpu'])
    assert len(json.loads(Path('out/images.json').read_text())['images']) == 1
    assert 'coco/bbox_mAP' in test.test(['wrapped.py', str(detector), '--work-dir', 'w', '--tta'])


def test_a_test_that_repeats_its_images_is_refused(detector, shapes, tmp_path):
    (tmp_path / 'twice.py').write_text(
        f'_base_ = {str(shapes / "detection.py")!r}\ntest_dataloader = dict(dataset=dict(_delete_=True, type="RepeatDataset", '
        'times=2, dataset=_base_.test_dataloader.dataset))\n')
    with pytest.raises(LaunchError, match=r'4 images have 2 ids: take each image once \(no RepeatDataset\)'):
        test.test(['twice.py', str(detector), '--work-dir', 'w'])


# Pictures and large images ---------------------------------------------------------------------------------------------------

def test_images_of_one_name_get_a_picture_each_in_classification(shapes):
    train.train([str(shapes / 'classification.py'), '--work-dir', 'w'])
    test.test([str(shapes / 'classification.py'), 'w/iter_2.pth', '--work-dir', 'w', '--show-dir', 'drawn'])
    assert sorted(path.name for path in Path('drawn').rglob('*.png')) == ['disc_same.png_0.png', 'square_same.png_0.png']


@pytest.mark.slow
def test_images_of_one_name_get_a_picture_each_in_detection(detector, shapes, tmp_path):
    content = json.loads((shapes / 'annotations' / 'instances_val.json').read_text())
    for image, folder in zip(content['images'], ('a', 'b')):
        (tmp_path / 'images' / folder).mkdir(parents=True)
        shutil.copy(shapes / 'val' / image['file_name'], tmp_path / 'images' / folder / 'same.png')
        image['file_name'] = f'{folder}/same.png'
    (tmp_path / 'same.json').write_text(json.dumps(content))
    loader = 'test_dataloader.dataset'
    test.test([str(shapes / 'detection.py'), str(detector), '--work-dir', 'w', '--show-dir', 'drawn', '--cfg-options',
               f'{loader}.data_root={tmp_path}', f'{loader}.ann_file=same.json', f'{loader}.data_prefix.img=images',
               f'test_evaluator.ann_file={tmp_path}/same.json'])
    assert sorted(path.name for path in Path('drawn').rglob('*.png')) == ['a_same.png', 'b_same.png']


# What is refused before the first iteration ----------------------------------------------------------------------------------

@pytest.mark.parametrize('config, option, found', [
    ('detection.py', 'visualizer.vis_backends.0.type=WandbVisBackend', 'needs the package wandb.*pip install wandb'),
    ('detection.py', "visualizer.vis_backends=[dict(type='LocalVisBackend')]", r'vis_backends\[0\] must be a dict with a type'),
    ('detection.py', 'train_dataloder.batch_size=1', 'did you mean train_dataloader.batch_size'),
    ('detection.py', 'model.roi_head.bbox_head.num_classes=3', r'model.roi_head.bbox_head .* is 3: set num_classes=2'),
    ('detection.py', 'train_dataloader.dataset.metainfo=None', r"metainfo=dict\(classes=\('disc', 'square'\)\)"),
    ('segmentation.py', 'model.decode_head.num_classes=3', r'model.decode_head .* is 3: set num_classes=2'),
    ('segmentation.py', ' '.join(f'{loader}_dataloader.dataset.reduce_zero_label=True' for loader in ('train', 'val', 'test')),
     'set reduce_zero_label=False'),
    ('segmentation.py', 'val_dataloader.dataset.reduce_zero_label=True', 'but is True in val_dataloader and False in train_'),
    ('detection.py', 'runner_type=FlexibleRunner model.roi_head.mask_head.num_classes=3', r'model.roi_head.mask_head .* is 3'),
    ('classification.py', 'model.head.num_classes=5', r'model.head .* is 5: set num_classes=2'),
])
def test_what_does_not_fit_is_refused_before_training(shapes, tmp_path, config, option, found):
    arguments = [str(shapes / config), '--work-dir', 'w', '--cfg-options', *option.split()]
    with pytest.raises(LaunchError, match=found):
        train.train(arguments)
    assert not list(tmp_path.rglob('*.pth'))


def test_top_5_of_two_classes_is_refused_before_the_test(shapes):
    train.train([str(shapes / 'classification.py'), '--work-dir', 'w'])
    with pytest.raises(LaunchError, match=r'topk of test_evaluator must be at most the 2 classes.*: set topk=\(1,\)'):
        test.test([str(shapes / 'classification.py'), 'w/iter_2.pth', '--work-dir', 'w', '--cfg-options',
                   'test_evaluator.topk=(1,5)'])


@pytest.mark.parametrize('arguments', [('--resume', '{work}'), ('--cfg-options', 'load_from={work}')])
def test_a_folder_in_place_of_a_checkpoint_is_refused_with_its_newest_one(detector, shapes, arguments):
    with pytest.raises(LaunchError, match='is a folder, whose newest checkpoint is .*iter_2.pth'):
        train.train([str(shapes / 'detection.py'), '--work-dir', 'w',
                     *(argument.replace('{work}', str(detector.parent)) for argument in arguments)])


@pytest.mark.slow
def test_a_checkpoint_with_arguments_of_a_command_line_is_tested(detector, shapes, tmp_path):
    contents = torch.load(detector, weights_only=True)
    contents['meta']['args'] = argparse.Namespace(lr=0.1, name='x')
    torch.save(contents, tmp_path / 'args.pth')
    assert 'coco/bbox_mAP' in test.test([str(shapes / 'detection.py'), 'args.pth', '--work-dir', 'w'])


@pytest.mark.slow
def test_a_dry_run_of_a_loop_by_iterations_loads_its_batches_with_workers(shapes, tmp_path, capsys):
    train.train([str(shapes / 'detection.py'), '--work-dir', 'w', '--dry-run', '--cfg-options',
                 'train_dataloader.num_workers=1', 'train_dataloader.persistent_workers=True'])
    assert 'All checks have passed' in capsys.readouterr().out and not list(tmp_path.rglob('*.pth'))
