# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Entries of annotation files, and objects that are left."""
import contextlib
import re
import shutil

import pytest
from mmdet.datasets.api_wrappers import COCO, COCOeval
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.evaluation import CocoMetric
from mmengine.evaluator import Evaluator

from revcol_mm.apis.errors import LaunchError
from tests.apis.checks.made_up import BOX, coco_set, loaders, model_of, names_of, write_coco


def test_a_training_set_of_crowds_is_refused(checks, tmp_path):
    def crowd(content):
        for annotation in content['annotations']:
            annotation['iscrowd'] = 1

    with pytest.raises(LaunchError, match='its 2 images have none that counts; 2 annotations are crowds'):
        coco_set(write_coco(tmp_path, change=crowd))


def test_a_training_set_without_an_image_left_is_refused(checks, tmp_path):
    with pytest.raises(LaunchError, match='must have at least one image, but none is left'):
        coco_set(write_coco(tmp_path), filter_cfg=dict(filter_empty_gt=True, min_size=1000))


@pytest.mark.parametrize('filter_cfg, reasons', [
    (dict(filter_empty_gt=True, min_size=32), '2 of 4 .* those without objects of its classes, or with a side below 32 pixels'),
    (dict(filter_empty_gt=True), '1 of 4 .* those without objects of its classes'),
    (dict(min_size=32), '1 of 4 .* those with a side below 32 pixels')])
def test_images_that_mmdet_leaves_out_are_counted(checks, tmp_path, said, filter_cfg, reasons):
    def change(content):
        content['images'][1].update(width=31)
        del content['annotations'][2]

    path = write_coco(tmp_path, objects=('disc', 'square', 'square', 'square'), change=change)
    coco_set(path, filter_cfg=filter_cfg, test_mode=True)
    coco_set(path)
    assert not any('left out' in line for line in said)
    dataset = coco_set(path, filter_cfg=filter_cfg)
    line, = (line for line in said if 'left out' in line)
    assert re.search(rf'train.json: {reasons}\)$'.replace('.*', r'images are left out of the training \(filter_cfg:'), line)
    assert len(dataset) == 4 - int(reasons[0])


def test_a_class_without_objects_is_a_warning_with_the_number(checks, tmp_path, said):
    coco_set(write_coco(tmp_path, objects=('disc', 'disc')))
    assert any('1 of 2 classes have no object in CocoDataset' in line and line.endswith('square') for line in said)


def test_a_test_set_without_annotations_is_accepted_with_a_warning(checks, tmp_path, said):
    coco_set(write_coco(tmp_path, change=lambda content: content.update(annotations=[])), test_mode=True)
    assert any('must have objects of its classes' in line for line in said)


@pytest.mark.parametrize('box', [[1, 1, float('nan'), 8], [1, 1, float('inf'), 8], [1, 1, 8], None])
def test_a_box_that_is_not_finite_is_counted_and_named(checks, tmp_path, box):
    def spoil(content):
        content['annotations'][1]['bbox'] = box

    with pytest.raises(LaunchError, match=r'train.json must be four finite numbers.*1 of 2 \(id 2 in image 1: '):
        coco_set(write_coco(tmp_path, change=spoil))


@pytest.mark.parametrize('part, key, index', [('images', 'height', 1), ('images', 'width', 1), ('annotations', 'area', 2),
                                              ('annotations', 'bbox', 2)])
def test_entries_that_lack_what_mmdet_reads_are_named(checks, tmp_path, part, key, index):
    found = rf'every entry of {part} in .*train.json must have {key}, but 1 of 2 .*\(id {index}\)'
    with pytest.raises(LaunchError, match=found):
        coco_set(write_coco(tmp_path, change=lambda content: content[part][1].pop(key)))


def test_a_missing_iscrowd_is_0(checks, tmp_path, said):
    path = write_coco(tmp_path, change=lambda content: content['annotations'][0].pop('iscrowd'))
    metric = CocoMetric(str(path))
    assert metric._coco_api.anns[1]['iscrowd'] == 0
    assert any('1 of 2 annotations have no iscrowd' in line for line in said)


def test_objects_that_training_ignores_and_evaluation_counts_are_a_warning_with_the_number(checks, tmp_path, said):
    coco_set(write_coco(tmp_path, change=lambda content: [one.update(ignore=0) for one in content['annotations']]))
    assert not any('ignore=1' in line for line in said)
    dataset = coco_set(write_coco(tmp_path, change=lambda content: content['annotations'][1].update(ignore=1)))
    assert len(dataset.get_data_info(1)['instances']) == 0
    assert any('train.json: 1 of 2 annotations have ignore=1 (id 2)' in line for line in said)
    with pytest.raises(LaunchError, match=r'2 annotations are crowds \(iscrowd=1\) or ignored \(ignore=1\)'):
        coco_set(write_coco(tmp_path, change=lambda content: [one.update(ignore=1) for one in content['annotations']]))


def test_annotations_without_masks_are_refused_where_the_pipeline_loads_masks(checks, tmp_path):
    path = write_coco(tmp_path, change=lambda content: content['annotations'][1].pop('segmentation'))
    with pytest.raises(LaunchError, match=r'must have a segmentation.*\(with_mask=True\), but 1 of 2 have none'):
        coco_set(path, pipeline=[LoadAnnotations(with_bbox=True, with_mask=True)])
    coco_set(path, pipeline=[LoadAnnotations(with_bbox=True)])


def test_panoptic_pipelines_need_no_masks_of_objects(checks, tmp_path):
    path = write_coco(tmp_path, change=lambda content: content['annotations'][1].pop('segmentation'))

    class LoadPanopticAnnotations(LoadAnnotations):  # mmdet's own needs a package that is not on PyPI
        pass

    coco_set(path, pipeline=[LoadPanopticAnnotations(with_bbox=True, with_mask=True)])


def test_the_order_of_a_file_that_is_read_from_a_copy_is_known(checks, tmp_path, monkeypatch):
    path = write_coco(tmp_path, categories=('square', 'disc'))  # mmdet numbers labels in this order

    @contextlib.contextmanager
    def fetched(name, **kwargs):  # as from an object store
        yield str(shutil.copy(path, tmp_path / 'copy.json'))

    monkeypatch.setattr('mmdet.datasets.coco.get_local_path', fetched)
    dataset = coco_set(path, classes=('disc', 'square'))
    assert dataset.metainfo['classes'][dataset.get_data_info(0)['instances'][0]['bbox_label']] == 'disc'


def test_an_evaluator_of_masks_needs_masks(checks, tmp_path):
    path = write_coco(tmp_path, change=lambda content: content['annotations'][1].pop('segmentation'))
    val, metric = coco_set(path), CocoMetric(str(path), metric=['bbox', 'segm'])
    with pytest.raises(LaunchError, match=r"metric is segm, but 1 of 2 have none \(id 2\).*val_evaluator.metric='bbox'"):
        checks.check(loaders(val=val), model_of(2), dict(val=Evaluator([metric])))


NO_MASKS = ([[1, 2]], [[]], [[1, 1, 9, 9]], [1, 1, 9, 1, 9, 9], [[1, 1, 9, 1, 9, 9, 1]], [[[1, 1], [9, 1], [9, 9]]])


@pytest.mark.parametrize('mask', NO_MASKS)
def test_a_mask_without_a_polygon_of_three_points_is_none(checks, tmp_path, mask):
    """mmdet's training would leave its object out in silence, and pycocotools' evaluation fail without a name."""
    path = write_coco(tmp_path, change=lambda content: content['annotations'][1].update(segmentation=mask))
    with pytest.raises(LaunchError, match=r'train.json must have a segmentation.* but 1 of 2 have none \(image id 1\)'):
        coco_set(path, pipeline=[LoadAnnotations(with_bbox=True, with_mask=True)])
    checks.watch()
    val, metric = coco_set(path), CocoMetric(str(path), metric=['bbox', 'segm'])
    with pytest.raises(LaunchError, match=r'must have a segmentation.* but 1 of 2 have none \(id 2\): add them'):
        checks.check(loaders(val=val), model_of(2), dict(val=Evaluator([metric])))


@pytest.mark.parametrize('part', [part for mask in NO_MASKS for part in mask[:1]])
def test_parts_of_a_mask_that_are_no_polygons_are_left_out_in_training_and_evaluation(checks, tmp_path, said, part):
    def spoil(content):
        content['annotations'][1]['segmentation'].insert(0, part)

    path = write_coco(tmp_path, change=spoil)
    dataset = coco_set(path, pipeline=[LoadAnnotations(with_bbox=True, with_mask=True)])
    assert dataset.get_data_info(1)['instances'][0]['mask'] == BOX['segmentation']
    coco = CocoMetric(str(path), metric='segm')._coco_api
    assert coco.annToMask(coco.anns[2]).sum() == 64
    assert any('train.json: 1 of 2 annotations (id 2) have parts' in line and line.endswith('are left out') for line in said)


def test_masks_of_any_valid_kind_are_left_alone(checks, tmp_path, said):
    masks = [[BOX['segmentation'][0], [1.5, 1, 9, 1, 9, 9]], dict(counts=[0, 10, 1990], size=[40, 50])]
    path = write_coco(tmp_path, change=lambda content: [one.update(segmentation=mask) for one, mask in zip(
        content['annotations'], masks)])
    dataset = coco_set(path, pipeline=[LoadAnnotations(with_bbox=True, with_mask=True)])
    assert [dataset.get_data_info(index)['instances'][0]['mask'] for index in range(2)] == masks
    assert not any('segmentation' in line for line in said)


@pytest.mark.parametrize('ids, reason', [((0, 1), 'one with the id 0'), ((7, 7), 'only 1 different ids'),
                                         (('c1d0', 'e2f7'), 'ids that are no numbers (c1d0, e2f7)')])
def test_annotations_with_unusable_ids_are_numbered_anew(checks, tmp_path, said, ids, reason):
    """With the id 0, COCOeval takes a perfect detection for a false one; of two with one id, mmdet reads one twice.

    Texts do not go into COCOeval's array of matches.
    """
    def number(content):
        for annotation, index in zip(content['annotations'], ids):
            annotation['id'] = index

    path = write_coco(tmp_path, change=number)
    dataset = coco_set(path)
    assert names_of(dataset) == ['disc', 'square']
    coco = COCO(str(path))
    evaluation = COCOeval(coco, coco.loadRes([dict(image_id=index, category_id=index + 1, bbox=BOX['bbox'], score=0.9)
                                              for index in range(2)]), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)
    assert any(reason in line for line in said)


def test_ids_as_texts_are_refused(checks, tmp_path):
    def change(content):
        for annotation in content['annotations']:
            annotation['image_id'] = str(annotation['image_id'])

    with pytest.raises(LaunchError, match=r'every image_id in .* must be a number .* \(image_id 0, 1\): write numbers'):
        coco_set(write_coco(tmp_path, change=change))


def test_ids_of_images_or_categories_of_two_kinds_are_refused(checks, tmp_path):
    def change(content):
        content['images'][1]['id'] = content['annotations'][1]['image_id'] = 'second'

    with pytest.raises(LaunchError, match=r'ids of all images in .* must be numbers, or all texts, but 1 of 2 .*\(second\)'):
        coco_set(write_coco(tmp_path, change=change))
    checks.watch()
    with pytest.raises(LaunchError, match=r'ids of all categories in .* but 1 of 2 are texts \(d\)'):
        coco_set(write_coco(tmp_path, ids=dict(disc='d', square=3)))


def test_categories_with_texts_as_ids_are_evaluated(checks, tmp_path):
    coco_set(write_coco(tmp_path, ids=dict(disc='unused 0', square='b')))
    path = write_coco(tmp_path, 'val', categories=('disc', ), objects=('disc', ), ids=dict(disc='unused 0'))
    val, metric = coco_set(path), CocoMetric(str(path))
    checks.check(loaders(val=val), model_of(2), dict(val=Evaluator([metric])))
    assert [metric.cat_ids[label] for label in range(2)] == val.cat_ids == ['unused 0', 'unused 1']
    metric.classwise = True
    with pytest.raises(LaunchError, match=r'numbers for classwise=True of val_evaluator, .* texts \(unused 0, unused 1\)'):
        checks.check(loaders(val=val), model_of(2), dict(val=Evaluator([metric])))


def test_a_file_without_categories_is_refused(checks, tmp_path):
    with pytest.raises(LaunchError, match='must have categories.* but has none'):
        coco_set(write_coco(tmp_path, change=lambda content: content.update(categories=[])))


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_an_encoding_that_json_does_not_read_is_named(checks, tmp_path, encoding):
    path = write_coco(tmp_path)
    path.write_text(path.read_text(), encoding=encoding)
    with pytest.raises(LaunchError, match='Save it as UTF-8 without a byte order mark'):
        coco_set(path)


def test_boxes_given_by_two_corners_are_suspicious(checks, tmp_path, said):
    coco_set(write_coco(tmp_path, change=lambda content: content['annotations'][1].update(bbox=[30, 20, 45, 35], area=225)))
    assert any('1 of 2 boxes of' in line and 'end outside of their image' in line for line in said)


def test_boxes_inside_of_their_images_are_not(checks, tmp_path, said):
    coco_set(write_coco(tmp_path, change=lambda content: content['annotations'][1].update(bbox=[30, 20, 21, 21], area=441)))
    assert not any('outside' in line for line in said)
