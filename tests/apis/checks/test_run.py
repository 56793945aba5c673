# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The table, and what is left behind."""
import gc
from types import SimpleNamespace

import pytest
from mmdet.datasets import CocoDataset
from mmengine.dataset import BaseDataset

from revcol_mm.apis.checks.report import table
from revcol_mm.apis.checks.run import DataChecks
from tests.apis.checks.made_up import BOX, coco_set, loaders, model_of, write_coco


def test_the_table_has_the_numbers_of_the_data_set(checks, tmp_path):
    def add(content):
        content['images'].append(dict(id=9, file_name='0.png', width=60, height=70))
        content['annotations'].append(dict(BOX, id=9, image_id=0, category_id=1, iscrowd=1))

    dataset = coco_set(write_coco(tmp_path, change=add), filter_cfg=dict(filter_empty_gt=False))
    text = table(dict(train=SimpleNamespace(dataset=dataset)), checks.records)
    row = [cell.strip() for cell in next(line for line in text.splitlines() if 'CocoDataset' in line).split('│')]
    assert row[1:-1] == ['train', 'CocoDataset', '2', '3', '1', '2', '2/0/0', '1', '50×40 to 60×70']


@pytest.mark.parametrize('common', [0, 1])
def test_images_of_the_validation_that_are_trained_on_are_a_warning_with_the_number(checks, tmp_path, said, common):
    def share(content):
        for image in content['images'][1:1 + common]:
            image['file_name'] = f'../train/{image["file_name"]}'

    train = coco_set(write_coco(tmp_path, objects=('disc', 'square', 'square')))
    val = coco_set(write_coco(tmp_path, 'val', change=share))
    checks.check(loaders(train=train, val=val), model_of(2), {})
    checks.check(loaders(val=train), model_of(2), {})  # without a training
    lines = [line for line in said if 'are in train_dataloader' in line]
    assert len(lines) == common and all(line.startswith(
        f'1 of the 2 images of val_dataloader (CocoDataset {tmp_path}/val.json) are in train_dataloader, too, such as '
        f'{tmp_path}/val/../train/1.png: ') for line in lines)


def test_the_libraries_are_as_before_when_the_checks_have_stopped(tmp_path):
    before = BaseDataset._serialize_data, CocoDataset.COCOAPI.__init__
    checks = DataChecks()
    checks.watch()
    assert BaseDataset._serialize_data is not before[0] and CocoDataset.COCOAPI.__init__ is not before[1]
    checks.stop()
    assert (BaseDataset._serialize_data, CocoDataset.COCOAPI.__init__) == before


def test_a_data_set_in_the_memory_of_one_that_is_gone_is_checked(checks, tmp_path):
    again = None
    while again is None:  # mostly the first time
        address = id(coco_set(write_coco(tmp_path)))
        gc.collect()
        empty = [CocoDataset.__new__(CocoDataset) for _ in range(10_000)]
        again = next((dataset for dataset in empty if id(dataset) == address), None)
    again.__init__(ann_file=str(write_coco(tmp_path, 'val', ('square', 'disc'))), metainfo=dict(classes=('square', 'disc')),
                   data_prefix=dict(img=str(tmp_path / 'val')))
    assert again.metainfo['classes'] == ('disc', 'square')
