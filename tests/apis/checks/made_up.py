# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Small made-up data sets of the three packages, for the tests of the checks."""
import copy
import json
from pathlib import Path

import cv2
import numpy as np
from mmdet.datasets import CocoDataset
from mmengine.dataset import BaseDataset
from mmpretrain.datasets import CustomDataset
from torch import nn
from torch.utils.data import DataLoader

BOX = dict(bbox=[1, 1, 8, 8], area=64, iscrowd=0, segmentation=[[1, 1, 9, 1, 9, 9, 1, 9]])


def write_coco(folder: Path, name: str = 'train', categories: tuple = ('disc', 'square'), objects=('disc', 'square'),
               ids=None, change=lambda content: None) -> Path:
    """An annotation file with one image per object, of the category that is named."""
    ids = ids or {category: index + 1 for index, category in enumerate(categories)}
    (folder / name).mkdir(exist_ok=True)
    content = dict(images=[], annotations=[], categories=[dict(id=ids[name_], name=name_) for name_ in categories])
    for index, category in enumerate(objects):
        file = f'{index}.png'
        cv2.imwrite(str(folder / name / file), np.full((40, 50, 3), index, np.uint8))
        content['images'].append(dict(id=index, file_name=file, width=50, height=40))
        content['annotations'].append(dict(copy.deepcopy(BOX), id=index + 1, image_id=index, category_id=ids[category]))
    change(content)
    path = folder / f'{name}.json'
    path.write_text(json.dumps(content))
    return path


def coco_set(path: Path, classes=('disc', 'square'), **kwargs) -> CocoDataset:
    metainfo = None if classes is None else dict(classes=classes)
    return CocoDataset(ann_file=str(path), metainfo=metainfo, data_prefix=dict(img=str(path.with_suffix(''))),
                       filter_cfg=kwargs.pop('filter_cfg', None), **kwargs)


def names_of(dataset: BaseDataset) -> list[str]:
    """The class names of the objects, in the order of the images."""
    classes = dataset.metainfo['classes']
    return [classes[instance['bbox_label']] for index in range(len(dataset))
            for instance in dataset.get_data_info(index)['instances']]


def loaders(**datasets) -> dict[str, DataLoader]:
    return {name: DataLoader(dataset) for name, dataset in datasets.items()}


class Head(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes


def model_of(num_classes: int) -> nn.Module:
    return nn.ModuleDict(dict(bbox_head=Head(num_classes), rpn_head=Head(1)))


def write_folders(root: Path, *names: str) -> str:
    for index, name in enumerate(names):
        (root / name).mkdir(parents=True)
        cv2.imwrite(str(root / name / 'x.png'), np.full((8, 8, 3), index, np.uint8))
    return str(root)


def folder_names_of(dataset: CustomDataset) -> list[tuple[str, str]]:
    return [(Path(info['img_path']).parent.name, dataset.metainfo['classes'][info['gt_label']])
            for info in map(dataset.get_data_info, range(len(dataset)))]


def write_maps(root: Path, *values: list[int]) -> dict:
    for folder in ('img', 'map'):
        (root / folder).mkdir(parents=True)
    for index, row in enumerate(values):
        cv2.imwrite(str(root / 'img' / f'{index}.png'), np.zeros((2, len(row), 3), np.uint8))
        cv2.imwrite(str(root / 'map' / f'{index}.png'), np.array([row, row], np.uint8))
    return dict(data_root=str(root), img_suffix='.png', data_prefix=dict(img_path='img', seg_map_path='map'))


def check_maps(checks, dataset, num_classes: int = 2) -> None:
    checks.check(loaders(train=dataset), nn.ModuleDict(dict(decode_head=Head(num_classes))), {})
