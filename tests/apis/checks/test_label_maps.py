# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Values of label maps that are no classes."""

import cv2
import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs
from PIL import Image

from revcol_mm.apis.checks.images import NamingPipeline, SampleError
from revcol_mm.apis.checks.run import DataChecks
from revcol_mm.apis.errors import LaunchError
from tests.apis.checks.made_up import check_maps, write_maps


def test_masks_of_0_and_255_are_refused(checks, tmp_path):
    dataset = BaseSegDataset(**write_maps(tmp_path, [0, 255], [255, 0]), metainfo=dict(classes=('a', 'b')))
    with pytest.raises(LaunchError, match='of 2 of 2 maps are 0, 255, of which 255 counts .*0 and 255 as 0 and 1'):
        check_maps(checks, dataset)


@pytest.mark.parametrize('maps, said', [
    ([[0, 255], [255, 0]], 'must hold at least two classes, .* are 0, 255, .*as 0 and 1.*, and name the background as a class'),
    ([[255, 255]], 'must hold at least two classes')])
def test_maps_of_one_class_and_ignored_pixels_teach_nothing(checks, tmp_path, maps, said):
    with pytest.raises(LaunchError, match=said):
        check_maps(checks, BaseSegDataset(**write_maps(tmp_path, *maps), metainfo=dict(classes=('crack', ))), 1)


def test_a_second_class_outside_of_the_sample_is_found(checks, tmp_path):
    maps = [[0, 255]] * 30
    maps[1] = [1, 255]
    check_maps(checks, BaseSegDataset(**write_maps(tmp_path, *maps), metainfo=dict(classes=('a', 'b'))))


def test_values_beyond_the_classes_are_refused_with_the_file(checks, tmp_path):
    dataset = BaseSegDataset(**write_maps(tmp_path, [0, 1], [0, 2]), metainfo=dict(classes=('a', 'b')))
    with pytest.raises(LaunchError, match=r'must be from 0 to 1 \(2 classes\) or 255.*map/1.png holds 2 \(2 pixels\)'):
        check_maps(checks, dataset)


def test_reduced_labels_are_counted_as_the_model_sees_them(checks, tmp_path):
    dataset = BaseSegDataset(**write_maps(tmp_path / 'good', [0, 1, 2]), metainfo=dict(classes=('a', 'b')),
                             reduce_zero_label=True)
    check_maps(checks, dataset)
    dataset = BaseSegDataset(**write_maps(tmp_path / 'own', [0, 1]), metainfo=dict(classes=('a', 'b')), reduce_zero_label=True)
    with pytest.raises(LaunchError, match=r'maps are 0, 1, of which 0 and 255 count .*set reduce_zero_label=False'):
        check_maps(checks, dataset)


def test_colours_instead_of_numbers_are_refused(checks, tmp_path):
    arguments = write_maps(tmp_path, [0, 1])
    cv2.imwrite(str(tmp_path / 'map' / '0.png'), np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(LaunchError, match='must have one channel of class numbers'):
        check_maps(checks, BaseSegDataset(**arguments, metainfo=dict(classes=('a', 'b'))))


def test_a_class_that_no_map_shows_is_a_warning_with_the_number(checks, tmp_path, said):
    check_maps(checks, BaseSegDataset(**write_maps(tmp_path, [0, 1], [1, 0]), metainfo=dict(classes=('a', 'b', 'c'))), 3)
    assert any('1 of 3 classes (c) have no pixel' in line for line in said)


def test_reduced_labels_of_maps_that_number_from_0_are_refused_with_several_classes(checks, tmp_path):
    dataset = BaseSegDataset(**write_maps(tmp_path, [0, 1, 2]), metainfo=dict(classes=('a', 'b', 'c')), reduce_zero_label=True)
    with pytest.raises(LaunchError, match='set reduce_zero_label=False in the data sets of all data loaders'):
        check_maps(checks, dataset, 3)


def test_a_value_beyond_the_classes_outside_of_the_sample_is_named_when_it_is_met(checks, tmp_path):
    maps = [[0, 1]] * 30
    maps[1] = [0, 7]
    dataset = BaseSegDataset(**write_maps(tmp_path, *maps), metainfo=dict(classes=('a', 'b')), pipeline=[
        LoadImageFromFile(), LoadAnnotations(), PackSegInputs()])
    check_maps(checks, dataset)
    with pytest.raises(SampleError, match='map/1.png cannot be used: its label 7 is none of the 2 classes'):
        dataset[1]


def test_all_maps_are_looked_at_with_check_all(tmp_path):
    maps = [[0, 1]] * 30
    maps[1] = [0, 7]
    checks = DataChecks(check_all=True)
    with checks.watching():
        dataset = BaseSegDataset(**write_maps(tmp_path, *maps), metainfo=dict(classes=('a', 'b')))
    with pytest.raises(LaunchError, match='map/1.png holds 7'):
        check_maps(checks, dataset)


@pytest.mark.parametrize('limit, settings', [(255, {}), (256, dict(ignore_index=300)), (254, dict(reduce_zero_label=True))])
def test_more_classes_than_8_bits_tell_apart_are_refused_where_mmseg_loads_the_maps(tmp_path, limit, settings):
    def build(folder: str, count: int, pipeline: list) -> BaseSegDataset:
        values = [limit - 1 + ('reduce_zero_label' in settings)] * 2
        with DataChecks().watching():
            return BaseSegDataset(**write_maps(tmp_path / folder, values), **settings, pipeline=pipeline,
                                  metainfo=dict(classes=[str(index) for index in range(count)]))

    steps = [LoadImageFromFile(), LoadAnnotations(), PackSegInputs()]
    sample = build('most', limit, steps)[0]['data_samples']
    assert sample.gt_sem_seg.data.unique().tolist() == [limit - 1]  # the last class as such
    with pytest.raises(LaunchError, match=f'must have at most {limit} classes, because mmseg .* but it has {limit + 1}: '):
        build('more', limit + 1, steps)
    build('other', limit + 1, [LoadImageFromFile()])


def test_maps_without_names_for_their_values_are_refused(checks, tmp_path):
    with pytest.raises(LaunchError, match=r'must have names for the values of its label maps.*metainfo=dict\(classes='):
        BaseSegDataset(**write_maps(tmp_path, [0, 1]))


def test_sets_of_a_known_type_with_another_order_are_mapped_by_name(checks, tmp_path):
    class Shapes(BaseSegDataset):
        METAINFO = dict(classes=('ground', 'disc', 'square'), palette=[[0] * 3] * 3)

    Shapes(**write_maps(tmp_path / 'train', [0, 1, 2]))
    val = Shapes(**write_maps(tmp_path / 'val', [0, 1, 2]), metainfo=dict(classes=('square', 'disc', 'ground')),
                 pipeline=[LoadImageFromFile(), LoadAnnotations()])
    assert val.metainfo['classes'] == ('ground', 'disc', 'square')
    assert sorted(set(val[0]['gt_seg_map'].ravel().tolist())) == [0, 1, 2]
    assert val[0]['gt_seg_map'][0].tolist() == [0, 1, 2]


def test_a_label_map_must_have_the_size_of_its_image(checks, tmp_path):
    settings = write_maps(tmp_path, [0, 1])
    cv2.imwrite(str(tmp_path / 'map' / '0.png'), np.array([[0, 1, 1], [0, 1, 1]], np.uint8))
    dataset = BaseSegDataset(metainfo=dict(classes=('a', 'b')), **settings)
    with pytest.raises(LaunchError, match='map/0.png: the label map is 3×2, but its image is 2×2'):
        check_maps(checks, dataset)


@pytest.mark.parametrize('test_mode', [False, True])
def test_a_label_map_of_another_size_is_named_when_it_is_met(tmp_path, test_mode):
    settings = write_maps(tmp_path, [0, 1], [0, 1])
    steps = [dict(type='LoadImageFromFile'), dict(type=LoadAnnotations), dict(type='Resize', scale=(4, 4), keep_ratio=True),
             dict(type=PackSegInputs)]
    if test_mode:
        steps = [steps[0], steps[2], steps[1], steps[3]]
    dataset = BaseSegDataset(metainfo=dict(classes=('a', 'b')), pipeline=steps, test_mode=test_mode, **settings)
    dataset.pipeline = NamingPipeline(dataset)
    dataset[0]
    cv2.imwrite(str(tmp_path / 'map' / '1.png'), np.array([[0, 1, 1], [0, 1, 1]], np.uint8))
    with pytest.raises(SampleError, match='map/1.png cannot be used: a label map must have the size of its image'):
        dataset[1]


def test_a_map_that_is_too_large_for_pillow_is_named(checks, tmp_path, monkeypatch):
    dataset = BaseSegDataset(metainfo=dict(classes=('a', 'b')), **write_maps(tmp_path, [0, 1]))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1)
    with pytest.raises(LaunchError, match='map/0.png cannot be used: DecompressionBombError: Image size .4 pixels. exceeds'):
        check_maps(checks, dataset)


def test_a_map_of_one_bit_per_pixel_holds_the_classes_0_and_1(checks, tmp_path, said):
    settings = write_maps(tmp_path, [0, 1])
    Image.fromarray(np.array([[0, 1], [0, 1]], bool)).save(tmp_path / 'map' / '0.png')
    check_maps(checks, BaseSegDataset(metainfo=dict(classes=('a', 'b')), **settings))
    assert not any('have no pixel' in line for line in said)
