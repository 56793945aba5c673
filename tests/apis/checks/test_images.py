# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Broken images, before the run and in it."""

import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets.transforms import PackDetInputs
from mmengine.dataset import Compose
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from revcol_mm.apis.checks.images import SampleError
from revcol_mm.apis.checks.run import DataChecks
from revcol_mm.apis.errors import LaunchError
from tests.apis.checks.made_up import coco_set, loaders, model_of, write_coco


@pytest.mark.parametrize('spoil, found', [
    (lambda path: path.write_bytes(b''), 'the file is empty'), (lambda path: path.unlink(), 'there is no such file'),
    (lambda path: path.write_bytes(b'no image'), 'cannot be read as an image'),
    (lambda path: path.write_bytes(path.read_bytes()[:60]), 'cannot be read as an image')])
def test_a_broken_image_is_named_before_the_run(checks, tmp_path, spoil, found):
    dataset = coco_set(write_coco(tmp_path))
    spoil(tmp_path / 'train' / '1.png')
    with pytest.raises(LaunchError, match=f'train/1.png: .*{found}'):
        checks.check(loaders(train=dataset), model_of(2), {})


def test_check_all_lists_every_broken_file(tmp_path, capsys):
    checks = DataChecks(check_all=True)
    checks.watch()
    dataset = coco_set(write_coco(tmp_path, objects=('disc', 'square') * 20))
    for index in (3, 11, 38):
        (tmp_path / 'train' / f'{index}.png').write_bytes(b'')
    with pytest.raises(LaunchError, match='but this is not so for 3'):
        checks.check(loaders(train=dataset), model_of(2), {})
    listed = [line.split(':')[0].rpartition('/')[2] for line in capsys.readouterr().out.splitlines() if '.png' in line]
    assert listed == ['3.png', '11.png', '38.png']


@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_that_fails_in_the_run_is_named_in_one_sentence(checks, tmp_path, workers):
    dataset = coco_set(write_coco(tmp_path, objects=('disc', 'square') * 20), pipeline=[LoadImageFromFile()])
    (tmp_path / 'train' / '1.png').write_bytes(b'')  # outside of the sample
    checks.check(loaders(train=dataset), model_of(2), {})
    assert isinstance(dataset.pipeline, Compose)
    with pytest.raises(SampleError) as error:
        list(DataLoader(dataset, num_workers=workers, collate_fn=list, multiprocessing_context='fork' if workers else None))
    assert 'train/1.png cannot be used' in str(error.value) and 'the file is empty' in str(error.value)
    assert '\n' not in str(error.value)


def test_an_image_of_another_size_than_the_annotation_file_says_is_refused(checks, tmp_path):
    dataset = coco_set(write_coco(tmp_path, change=lambda content: content['images'][1].update(width=40, height=50)))
    with pytest.raises(LaunchError, match='1.png: the image is 50×40, but its annotation file says 40×50'):
        checks.check(loaders(train=dataset), model_of(2), {})


@pytest.mark.parametrize('packing', [[], [PackDetInputs()], [
    dict(type='TestTimeAug', transforms=[[dict(type='Resize', scale=(20, 20))], [PackDetInputs()]])]])
def test_an_image_of_another_size_that_was_not_opened_is_named_when_it_is_met(checks, tmp_path, packing):
    def turn(content):  # as if it was annotated before it was turned
        content['images'][1].update(width=40, height=50)

    dataset = coco_set(write_coco(tmp_path, objects=('disc', 'square') * 20, change=turn),
                       pipeline=[LoadImageFromFile(), *packing])
    checks.check(loaders(train=dataset), model_of(2), {})
    dataset[0]
    with pytest.raises(SampleError, match='train/1.png cannot be used: the image is 50×40, but its annotation file says 40×50'):
        dataset[1]


@pytest.mark.parametrize('color_type, suffix, width, height', [
    ('color', 'png', 40, 50), ('unchanged', 'png', 50, 40), ('color', 'tif', 40, 50), ('unchanged', 'tif', 40, 50)])
def test_the_size_of_an_image_is_that_after_turning(checks, tmp_path, color_type, suffix, width, height):
    path = write_coco(tmp_path, change=lambda content: [
        image.update(width=width, height=height, file_name=f'{image["id"]}.{suffix}') for image in content['images']])
    for file in list(path.with_suffix('').iterdir()):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        Image.open(file).save(file.with_suffix(f'.{suffix}'), exif=exif)
    dataset = coco_set(path, pipeline=[dict(type='LoadImageFromFile', color_type=color_type)])
    assert dataset[0]['img'].shape[:2] == (height, width)  # as mmcv loads it
    checks.check(loaders(train=dataset), model_of(2), {})


@pytest.mark.parametrize('brightest, color_type, dark', [
    (4095, 'color', True), (100, 'grayscale', True), (4095, 'unchanged', False), (65535, 'color', False)])
@pytest.mark.parametrize('order', ['<u2', '>u2'])
def test_images_of_16_bits_that_become_almost_black_are_a_warning(checks, tmp_path, said, brightest, color_type, dark, order):
    path = write_coco(tmp_path, change=lambda content: [image.update(file_name=f'{image["id"]}.tif')
                                                        for image in content['images']])
    for index in range(2):
        Image.fromarray(np.full((40, 50), brightest, order)).save(tmp_path / 'train' / f'{index}.tif')
    dataset = coco_set(path, pipeline=[dict(type='LoadImageFromFile', color_type=color_type)])
    checks.check(loaders(train=dataset), model_of(2), {})
    assert (dataset[0]['img'].max() == brightest >> 8) == (color_type != 'unchanged')  # what OpenCV makes of it
    lines = [line for line in said if 'has images of 16 bits' in line]
    assert len(lines) == dark and all(f'no value is above {brightest}. Of' in line for line in lines)
