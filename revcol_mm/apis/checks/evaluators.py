# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Evaluators against the data loaders whose predictions they judge."""
import os.path as osp
from typing import Any, Iterator, Sequence

from ...checkpoint.safe import first_names
from ..errors import LaunchError
from .classes import unused_ids
from .common import name_of
from .report import Record


class LabelledIds(list):
    """Category ids in the order of the labels. Iterating gives them sorted.

    CocoMetric looks up the id of a label by index, and iterates to name the classes of COCOeval's results, which are sorted.
    """

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(super().__iter__()))


def check_evaluator(evaluator: Any, datasets: Sequence[Any], records: Sequence[Record], size: int, name: str) -> None:
    """The images of an evaluator's annotation file must be those of the loader; its categories get the order of the labels.

    Args:
        evaluator (Evaluator): mmengine's.
        datasets (Sequence[BaseDataset]): the loader's data sets, without their wrappers.
        records (Sequence[Record]): what is known of them.
        size (int): number of images that the loader gives.
        name (str): 'val' or 'test'.

    Raises:
        LaunchError: they are not the same, or a metric asks for what the data do not have.
    """
    classes = next((record.classes for record in records if record.classes), ())
    own = type(evaluator).__name__ == 'MultiDatasetsEvaluator' and len(evaluator.metrics) == len(datasets) == len(records)
    for index, metric in enumerate(evaluator.metrics):
        ranks = getattr(metric, 'topk', None)
        if isinstance(ranks, (tuple, list)) and classes and max(ranks) > len(classes):
            fitting = tuple(rank for rank in ranks if rank <= len(classes))
            raise LaunchError(f'the topk of {name}_evaluator must be at most the {len(classes)} classes of {name}_dataloader, '
                              f'but is {tuple(ranks)}: set topk={fitting or (1, )!r}')
        if hasattr(metric, '_coco_api') and hasattr(metric, 'metrics') and records and len(records) == len(datasets):
            if own:  # each metric judges the data set at its place
                _check_coco(metric, datasets[index:index + 1], records[index:index + 1], records[index].images, name)
            else:
                _check_coco(metric, datasets, records, size, name)


def _check_coco(metric: Any, datasets: Sequence[Any], records: Sequence[Record], size: int, name: str) -> None:
    names: dict[Any, str] = {}
    for record in records:
        names.update(record.names)
    if names and size > len(names):
        raise LaunchError(f'every image of {name}_dataloader must have an id of its own, because its evaluator tells them '
                          f'apart by it, but {size} images have {len(names)} ids: take each image once (no RepeatDataset), and '
                          'annotation files with different ids')
    coco = metric._coco_api
    if coco is None or not hasattr(coco, 'imgs'):
        return
    theirs = {index: osp.basename(image['file_name']) for index, image in coco.imgs.items()}
    if names != theirs:
        here, there = set(names.items()) - set(theirs.items()), set(theirs.items()) - set(names.items())
        raise LaunchError(f'{name}_evaluator.ann_file must list the images of {name}_dataloader ({name_of(datasets[0])}), but '
                          f'{len(here)} of its {len(names)} images ({first_names(sorted(here, key=str), 2)}) are not in it, '
                          f'and it has {len(there)} others ({first_names(sorted(there, key=str), 2)}): give both the same '
                          'annotation file')
    classes = records[0].classes or ()
    ids = {category['name']: index for index, category in coco.cats.items()}
    missing = [label for label in classes if label not in ids]
    if missing and set(ids) < set(classes):  # as in the loader's file, where they are classes without objects
        ids.update(zip(missing, unused_ids(coco.cats)))
        coco.cats.update({ids[name]: dict(id=ids[name], name=name) for name in missing})
    elif missing:
        raise LaunchError(f'{name}_evaluator.ann_file must have every class of {name}_dataloader as a category, but it lacks '
                          f'{first_names(missing)}: give both the same annotation file')
    if getattr(metric, 'classwise', False) and any(isinstance(index, str) for index in coco.cats):
        raise LaunchError(f'the ids of categories must be numbers for classwise=True of {name}_evaluator, but those of its '
                          f'ann_file are texts ({first_names(list(coco.cats))}): number the categories, or set '
                          f'{name}_evaluator.classwise=False')  # pycocotools' loadCats takes a text for a list of ids
    metric.cat_ids = LabelledIds(ids[label] for label in classes)
    if 'segm' in metric.metrics:
        maskless = [index for index, annotation in coco.anns.items() if not annotation.get('segmentation')]
        if maskless:
            raise LaunchError(f'every annotation of {name}_evaluator.ann_file must have a segmentation that can be used, '
                              f'because its metric is segm, but {len(maskless)} of {len(coco.anns)} have none (id '
                              f"{first_names(maskless)}): add them, or set {name}_evaluator.metric='bbox'")
