# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What the bundled data set promises; its files are read back with the libraries that train on them."""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from sklearn.datasets import load_digits

from revcol_mm.datasets import digits as maker
from revcol_mm.datasets import make_digits
from tests.common import ROOT

TOOL = ROOT / 'tools' / 'make_digits.py'
SMALL = dict(num_train=40, num_val=20, size=96)


@pytest.fixture(scope='module', autouse=True)
def few_crops():
    """One crop of a sample, which is enough for everything but the number of crops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maker, '_CROPS_PER_SAMPLE', dict(train=1, val=1))
        yield


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'digits'
    assert make_digits(root, **SMALL)
    return root


def fingerprint(root):
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in root.rglob('*') if path.is_file()}


def annotations(root, split):
    return json.loads((root / 'annotations' / f'instances_{split}.json').read_text())


@pytest.mark.parametrize('split, count', [('train', 40), ('val', 20)])
def test_coco_reads_it_and_every_image_is_there(root, split, count):
    coco = COCO(root / 'annotations' / f'instances_{split}.json')
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == list('0123456789')
    assert len(coco.imgs) == count
    for image in coco.imgs.values():
        assert cv2.imread(str(root / split / image['file_name'])).shape == (96, 96, 3)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_boxes_and_areas_are_those_of_the_masks(root, split):
    for annotation in annotations(root, split)['annotations']:
        mask = coco_mask.decode(annotation['segmentation'])
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert annotation['bbox'] == [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        assert annotation['area'] == mask.sum() > 0


@pytest.mark.parametrize('split', ['train', 'val'])
def test_semantic_maps_agree_with_the_masks(root, split):
    data = annotations(root, split)
    for image in data['images']:
        expected = np.full((96, 96), 10, np.uint8)
        for annotation in data['annotations']:
            if annotation['image_id'] == image['id']:
                mask = coco_mask.decode(annotation['segmentation']).astype(bool)
                assert (expected[mask] == 10).all(), 'masks are of the visible parts: no pixel belongs to two digits'
                expected[mask] = annotation['category_id'] - 1
        path = root / 'semantic' / split / image['file_name'].replace('.jpg', '.png')
        assert (cv2.imread(str(path), cv2.IMREAD_UNCHANGED) == expected).all()


def test_digits_come_in_several_scales_and_sometimes_overlap(root):
    boxes = np.array([annotation['bbox'] for annotation in annotations(root, 'train')['annotations']])
    sides = boxes[:, 2:].max(1)
    assert sides.max() > 1.5 * sides.min()
    coco = COCO(root / 'annotations' / 'instances_train.json')
    overlaps = 0
    for image in coco.imgs:
        own = np.array([annotation['bbox'] for annotation in coco.imgToAnns[image]], float)
        overlaps += (coco_mask.iou(own, own, [0] * len(own)) > 0).sum() > len(own)
    assert 0 < overlaps < len(coco.imgs)


def test_training_and_validation_share_no_handwriting(root):
    used = {split: {annotation['sample'] for annotation in annotations(root, split)['annotations']} |
            {int(path.name[:4]) for path in (root / 'crops' / split).rglob('*.jpg')} for split in ('train', 'val')}
    assert not used['train'] & used['val']
    assert len(used['train'] | used['val']) == 1797


def test_the_split_does_not_depend_on_the_seed(root, tmp_path):
    make_digits(tmp_path / 'other', **SMALL, seed=5)
    names = [{path.name for path in (folder / 'crops' / 'val').rglob('*.jpg')} for folder in (root, tmp_path / 'other')]
    assert names[0] == names[1]
    assert fingerprint(root) != fingerprint(tmp_path / 'other')


def test_a_tuning_set_divides_the_handwriting_of_the_training_side(root, tmp_path):
    make_digits(tmp_path / 'tuning', 3, 2, tuning=True)
    own, tuning = ({split: {path.name[:4] for path in (folder / 'crops' / split).rglob('*.jpg')} for split in ('train', 'val')}
                   for folder in (root, tmp_path / 'tuning'))
    assert not tuning['train'] & tuning['val']
    assert tuning['train'] | tuning['val'] == own['train']
    assert make_digits(tmp_path / 'tuning', 3, 2), 'another set with the same counts replaces it'


def test_labels_are_those_of_the_original(root):
    target = load_digits().target
    for annotation in annotations(root, 'val')['annotations']:
        assert target[annotation['sample']] == annotation['category_id'] - 1
    for path in (root / 'crops').rglob('*.jpg'):
        assert target[int(path.name[:4])] == int(path.parent.name)


def test_masks_show_the_original_ink(root):
    """A digit that nothing covers, shrunk to the size of the original, looks like it: correlation, 1 if equal."""
    images = load_digits().images / 16
    coco = COCO(root / 'annotations' / 'instances_val.json')
    likeness = []
    for image in coco.imgs:
        own = coco.imgToAnns[image]
        boxes = np.array([annotation['bbox'] for annotation in own], float)
        alone = (coco_mask.iou(boxes, boxes, [0] * len(boxes)) > 0).sum(1) == 1
        for annotation in (annotation for annotation, kept in zip(own, alone) if kept):
            x, y, width, height = (int(value) for value in annotation['bbox'])
            mask = coco.annToMask(annotation)[y:y + height, x:x + width].astype(np.float32)
            ink = images[annotation['sample']]
            rows, columns = np.flatnonzero((ink > 0.4).any(1)), np.flatnonzero((ink > 0.4).any(0))
            ink = ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
            small = cv2.resize(mask, ink.shape[::-1], interpolation=cv2.INTER_AREA)
            likeness.append(np.corrcoef(small.ravel(), ink.ravel())[0, 1])
    assert len(likeness) > 10
    assert np.median(likeness) > 0.85


def test_the_same_arguments_give_the_same_bytes(root, tmp_path):
    make_digits(tmp_path / 'again', **SMALL)
    assert fingerprint(tmp_path / 'again') == fingerprint(root)


def test_an_existing_data_set_is_left_alone_or_replaced_by_another_one(tmp_path):
    root = tmp_path / 'digits'
    assert make_digits(root, 2, 1)
    before = (root / 'digits.json').stat().st_mtime_ns
    assert not make_digits(root, 2, 1)
    assert (root / 'digits.json').stat().st_mtime_ns == before
    assert make_digits(root, 3, 1)
    assert len(list((root / 'train').iterdir())) == 3
    assert os.listdir(tmp_path) == ['digits']


def test_what_it_did_not_make_is_not_overwritten(tmp_path):
    strange = tmp_path / 'photos'
    strange.mkdir()
    (strange / 'me.jpg').write_text('x')
    with pytest.raises(FileExistsError, match='photos exists and is not a data set that this tool made'):
        make_digits(strange, 2, 1)
    assert (strange / 'me.jpg').exists()
    own = tmp_path / 'digits'
    for folder in ('annotations', 'crops/train/3', 'train/more'):
        (own / folder).mkdir(parents=True)
    (own / 'digits.json').write_text(json.dumps(dict(maker=maker._MAKER)))  # of a set that was made with other arguments
    for name in ('train/more', 'notes.txt', 'annotations/instances_tiny.json', 'crops/train/3/mine.jpg'):
        if not (own / name).exists():
            (own / name).touch()
        with pytest.raises(FileExistsError, match=f'must hold only files that this tool made .* but holds {name}: move'):
            make_digits(own, 3, 1)
        os.rename(own / name, tmp_path / Path(name).name)  # it is there still


def test_nothing_half_written_stays_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError('no space left on device')

    monkeypatch.setattr(maker, '_write_image', fail)
    with pytest.raises(OSError, match='no space left'):
        make_digits(tmp_path / 'digits', 2, 1)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('argument, value', [('num_train', 0), ('num_val', -1), ('size', 32), ('seed', -1), ('size', 1.5)])
def test_bad_arguments_are_named(tmp_path, argument, value):
    with pytest.raises(ValueError, match=f'{argument} must be an integer of at least .*, but got {value}'):
        make_digits(tmp_path / 'digits', **{argument: value})


def test_the_tool_says_in_one_sentence_what_is_wrong(tmp_path):
    (tmp_path / 'digits').write_text('a file')
    done = subprocess.run([sys.executable, TOOL, tmp_path / 'digits'], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f'error: {tmp_path}/digits exists and is not a data set that this tool made: choose another folder\n'
