# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""One order of the classes per run."""

import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset, MultiImageMixDataset
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.dataset import BaseDataset, ClassBalancedDataset, ConcatDataset, RepeatDataset
from mmengine.evaluator import Evaluator
from mmpretrain.datasets import CustomDataset
from mmseg.datasets import BaseSegDataset

from revcol_mm.apis.checks import check_class_folders
from revcol_mm.apis.checks.run import DataChecks
from revcol_mm.apis.errors import LaunchError
from tests.apis.checks.made_up import (
    coco_set,
    folder_names_of,
    loaders,
    model_of,
    names_of,
    write_coco,
    write_folders,
    write_maps,
)


def test_the_names_of_a_detection_set_follow_the_order_of_its_file(checks, tmp_path, said):
    dataset = coco_set(write_coco(tmp_path), ('square', 'disc'))
    assert dataset.metainfo['classes'] == ('disc', 'square')
    assert names_of(dataset) == ['disc', 'square']
    assert len([line for line in said if 'the order of the labels is (disc, square)' in line]) == 1


def test_a_palette_follows_its_classes(checks, tmp_path):
    path = write_coco(tmp_path)
    dataset = CocoDataset(ann_file=str(path), metainfo=dict(classes=('square', 'disc'), palette=[(1, 1, 1), (2, 2, 2)]),
                          data_prefix=dict(img=str(tmp_path)))
    assert dataset.metainfo['palette'] == [(2, 2, 2), (1, 1, 1)]


def test_a_validation_file_of_another_order_gets_the_labels_of_the_training_file(checks, tmp_path, said):
    train = coco_set(write_coco(tmp_path))
    val = coco_set(write_coco(tmp_path, 'val', ('square', 'disc'), ('square', 'disc', 'disc')))
    assert names_of(train) == ['disc', 'square'] and names_of(val) == ['square', 'disc', 'disc']
    assert val.metainfo['classes'] == train.metainfo['classes'] == ('disc', 'square')
    assert any('val.json lists its categories as (square, disc)' in line for line in said)


def test_ids_in_any_order_and_with_gaps_keep_their_names(checks, tmp_path):
    train = coco_set(write_coco(tmp_path, ids=dict(disc=90, square=7)))
    val = coco_set(write_coco(tmp_path, 'val', ('square', 'disc'), ('square', 'disc'), dict(disc=3, square=55)))
    assert names_of(train) == ['disc', 'square'] and names_of(val) == ['square', 'disc']


def test_concatenated_sets_of_different_orders_are_labelled_alike(checks, tmp_path):
    first = coco_set(write_coco(tmp_path))
    second = coco_set(write_coco(tmp_path, 'more', ('square', 'disc'), ('square', )), ('square', 'disc'))
    assert names_of(ConcatDataset([first, second])) == ['disc', 'square', 'square']


def test_a_test_is_labelled_in_the_order_of_the_checkpoint(tmp_path):
    checks = DataChecks(('square', 'disc'))
    checks.watch()
    dataset = coco_set(write_coco(tmp_path), test_mode=True)
    checks.stop()
    assert dataset.metainfo['classes'] == ('square', 'disc') and names_of(dataset) == ['disc', 'square']


def test_the_evaluator_counts_every_class_as_the_category_of_its_name(checks, tmp_path):
    coco_set(write_coco(tmp_path))
    path = write_coco(tmp_path, 'val', ('square', 'disc'), ('square', 'disc'))
    val, metric = coco_set(path), CocoMetric(str(path))
    checks.check(loaders(val=val), model_of(2), dict(val=Evaluator([metric])))
    metric.dataset_meta = val.metainfo
    for index in range(2):
        instance, = val.get_data_info(index)['instances']
        prediction = dict(bboxes=np.array([instance['bbox']]), scores=np.array([0.9]),
                          labels=np.array([instance['bbox_label']]))
        prediction = {key: torch.as_tensor(value) for key, value in prediction.items()}
        metric.process({}, [dict(img_id=index, ori_shape=(40, 50), pred_instances=prediction)])
    assert metric.evaluate(2)['coco/bbox_mAP'] == 1.0


def test_two_categories_of_one_name_are_refused(checks, tmp_path):
    def rename(content):
        content['categories'].append(dict(id=3, name='disc'))

    with pytest.raises(LaunchError, match='every category in .*train.json must have a name of its own.*disc'):
        coco_set(write_coco(tmp_path, change=rename))


def test_a_forgotten_metainfo_is_refused_with_the_line_to_write(checks, tmp_path):
    with pytest.raises(LaunchError, match=r"but got person.*metainfo=dict\(classes=\('disc', 'square'\)\)"):
        coco_set(write_coco(tmp_path), None)


def test_sets_of_different_classes_are_refused(checks, tmp_path):
    coco_set(write_coco(tmp_path))
    with pytest.raises(LaunchError, match=r'val.json must be those of .*train.json \(disc, square\), but they are \(disc\)'):
        coco_set(write_coco(tmp_path, 'val'), ('disc', ))


def test_sets_that_are_not_packed_are_refused_in_another_order(checks, tmp_path):
    dataset = coco_set(write_coco(tmp_path), ('square', 'disc'), serialize_data=False)
    with pytest.raises(LaunchError, match='remove serialize_data=False'):
        checks.check(loaders(train=dataset), model_of(2), {})


def test_the_names_of_a_classification_set_are_those_of_its_folders(checks, tmp_path, said):
    dataset = CustomDataset(data_root=write_folders(tmp_path / 'train', 'a', 'b', 'c'), metainfo=dict(classes=('c', 'a', 'b')))
    assert folder_names_of(dataset) == [('a', 'a'), ('b', 'b'), ('c', 'c')]
    assert any('the order of the labels is (a, b, c)' in line for line in said)


def test_folders_that_validation_lacks_do_not_shift_its_labels(checks, tmp_path):
    CustomDataset(data_root=write_folders(tmp_path / 'train', 'a', 'b', 'c'))
    val = CustomDataset(data_root=write_folders(tmp_path / 'val', 'b', 'c'))
    assert folder_names_of(val) == [('b', 'b'), ('c', 'c')] and val.metainfo['classes'] == ('a', 'b', 'c')


def test_folders_of_a_test_are_labelled_in_the_order_of_the_checkpoint(tmp_path):
    checks = DataChecks(('c', 'a', 'b'))
    checks.watch()
    dataset = CustomDataset(data_root=write_folders(tmp_path, 'a', 'b', 'c'))
    checks.stop()
    assert folder_names_of(dataset) == [('a', 'a'), ('b', 'b'), ('c', 'c')] and dataset.metainfo['classes'] == ('c', 'a', 'b')


def test_a_folder_that_is_no_class_is_refused(checks, tmp_path):
    CustomDataset(data_root=write_folders(tmp_path / 'train', 'a', 'b'))
    with pytest.raises(LaunchError, match='the folders in .*val/ must be classes of .*, but z are not'):
        CustomDataset(data_root=write_folders(tmp_path / 'val', 'a', 'z'))


def test_names_that_are_only_partly_folders_are_refused(checks, tmp_path):
    with pytest.raises(LaunchError, match='but B is no folder and b no class'):
        CustomDataset(data_root=write_folders(tmp_path, 'a', 'b'), metainfo=dict(classes=('a', 'B')))


def test_readable_names_of_coded_folders_are_kept(checks, tmp_path):
    dataset = CustomDataset(data_root=write_folders(tmp_path, 'n01', 'n02'), metainfo=dict(classes=('tench', 'goldfish')))
    assert folder_names_of(dataset) == [('n01', 'tench'), ('n02', 'goldfish')]


def test_labels_beyond_the_classes_are_refused(checks, tmp_path):
    (tmp_path / 'list.txt').write_text('x.png 0\ny.png 2\n')
    with pytest.raises(LaunchError, match='must be from 0 to 1, but 1 of 2 images have 2: correct .*list.txt'):
        CustomDataset(data_root=str(tmp_path), ann_file='list.txt', metainfo=dict(classes=('a', 'b')))


@pytest.mark.parametrize('build', [
    lambda folder: coco_set(write_coco(folder), 'square'),
    lambda folder: BaseSegDataset(**write_maps(folder, [0]), metainfo=dict(classes='square', palette=[[0] * 3] * 6))])
def test_a_text_is_one_class_also_where_no_tool_has_put_it_right(checks, tmp_path, build):
    assert build(tmp_path).metainfo['classes'] == ('square', )


def test_segmentation_sets_of_different_orders_are_refused(checks, tmp_path):
    BaseSegDataset(**write_maps(tmp_path / 'train', [0, 1]), metainfo=dict(classes=('a', 'b')))
    with pytest.raises(LaunchError, match=r'in the same order, \(a, b\), but they are \(b, a\)'):
        BaseSegDataset(**write_maps(tmp_path / 'val', [0, 1]), metainfo=dict(classes=('b', 'a')))


@pytest.mark.parametrize('wrap', [lambda dataset: RepeatDataset(dataset, 2), lambda dataset: ConcatDataset([dataset]),
                                  lambda dataset: ClassBalancedDataset(dataset, 1e-3),
                                  lambda dataset: MultiImageMixDataset(dataset, [], skip_type_keys=None)])
def test_wrapped_sets_are_labelled_and_checked_like_others(checks, tmp_path, wrap):
    coco_set(write_coco(tmp_path))
    part = coco_set(write_coco(tmp_path, 'val', ('square', 'disc'), ('square', 'disc')), ('square', 'disc'))
    dataset = wrap(part)
    assert dataset.metainfo['classes'] == ('disc', 'square') and names_of(part) == ['square', 'disc']
    with pytest.raises(LaunchError, match=r'is 3: set num_classes=2'):
        checks.check(loaders(train=dataset), model_of(3), {})


def test_a_set_that_labels_by_name_is_mapped_to_the_order_of_the_training(checks, tmp_path):
    class Named(BaseDataset):
        def load_data_list(self):
            return [dict(img_path='x.png', img_id=0, instances=[dict(bbox=[0, 0, 9, 9], ignore_flag=0, bbox_label=0)])]

    coco_set(write_coco(tmp_path))
    named = Named(metainfo=dict(classes=('square', 'disc')))
    assert names_of(named) == ['square'] and named.metainfo['classes'] == ('disc', 'square')


def test_a_val_file_without_a_class_is_evaluated_as_if_it_had_no_object_of_it(checks, tmp_path, said):
    train = coco_set(write_coco(tmp_path, 'train', ('disc', 'ring', 'square'), ('disc', 'ring', 'square')),
                     classes=('disc', 'ring', 'square'))
    path = write_coco(tmp_path, 'val', ('square', 'disc'), ('square', 'disc', 'disc'))
    val = coco_set(path, classes=('disc', 'ring', 'square'), test_mode=True)
    assert names_of(val) == ['square', 'disc', 'disc']
    assert val.metainfo['classes'] == train.metainfo['classes'] == ('disc', 'ring', 'square')
    evaluator = Evaluator(CocoMetric(ann_file=str(path)))
    evaluator.dataset_meta = val.metainfo
    checks.check(loaders(train=train, val=val), model_of(3), dict(val=evaluator))
    predictions = [dict(img_id=index, ori_shape=(40, 50), pred_instances=dict(
        bboxes=torch.tensor([[1., 1, 9, 9]]), scores=torch.tensor([0.9]), labels=torch.tensor([label])))
        for index, label in enumerate([2, 0, 0])]
    evaluator.process(predictions)
    assert evaluator.evaluate(3)['coco/bbox_mAP'] == 1
    assert any('lacks the categories ring' in line for line in said)


def test_a_val_file_with_another_spelling_is_refused(checks, tmp_path):
    coco_set(write_coco(tmp_path))
    with pytest.raises(LaunchError, match="'disc' is 'Disc' there: write both alike"):
        coco_set(write_coco(tmp_path, 'val', ('Disc', 'square'), ('Disc', )), test_mode=True)


def test_a_training_file_without_a_class_is_refused(checks, tmp_path):
    with pytest.raises(LaunchError, match='must be categories of .*train.json, which has disc, square, but got ring'):
        coco_set(write_coco(tmp_path), classes=('disc', 'ring', 'square'))


def test_a_palette_that_is_too_short_is_refused(checks, tmp_path):
    with pytest.raises(LaunchError, match='metainfo.palette of .* must have a color for each of the 2 classes, but has 1'):
        CocoDataset(ann_file=str(write_coco(tmp_path)), metainfo=dict(classes=('disc', 'square'), palette=[(1, 2, 3)]),
                    data_prefix=dict(img=str(tmp_path / 'train')))


@pytest.mark.parametrize('folders, classes, message', [
    (('a', 'b', '.ipynb_checkpoints'), None, 'but .ipynb_checkpoints was made by another program: remove it'),
    (('a', 'b'), ('a', 'b', 'c'), 'but has 2. Without folder: c; without class: .none.. Make an empty folder'),
    (('a', 'b', 'c'), ('a', 'b'), 'Without folder: .none.; without class: c')])
def test_folders_that_are_not_the_classes_are_named(tmp_path, folders, classes, message):
    dataset = dict(type='CustomDataset', data_root=write_folders(tmp_path, *folders), metainfo=dict(classes=classes))
    cfg = Config(dict(default_scope='mmpretrain', train_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=dataset))))
    with pytest.raises(LaunchError, match=message):
        check_class_folders(cfg, ('train', ))


def test_folders_of_all_classes_are_accepted(tmp_path):
    dataset = dict(type='CustomDataset', data_root=write_folders(tmp_path, 'a', 'b'), classes=('b', 'a'))
    check_class_folders(Config(dict(default_scope='mmpretrain', val_dataloader=dict(dataset=dataset))), ('train', 'val'))
