# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What the checks share: words for the log, the data sets inside of wrappers, and the names of types."""
import logging
from typing import Any, Iterator, Mapping

from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.registry import DATASETS


def say(text: str) -> None:
    print_log(text, logger='current')


def warn(text: str) -> None:
    print_log(text, logger='current', level=logging.WARNING)


def name_of(dataset: BaseDataset) -> str:
    """The type of a data set and its annotation file or folder, for a message."""
    return f'{type(dataset).__name__} {dataset.ann_file or dataset.data_root or ""}'.rstrip()


def class_of(dataset: Mapping, scope: str | None) -> Any:
    """The class of a data set in a config; None if it is unknown."""
    with DATASETS.switch_scope_and_registry(scope) as registry:
        return registry.get(dataset['type']) if isinstance(dataset.get('type'), str) else dataset.get('type')


def leaves(dataset: Any) -> Iterator[Any]:
    """The data sets inside of wrappers (RepeatDataset, ConcatDataset, ClassBalancedDataset, MultiImageMixDataset, …)."""
    inner = getattr(dataset, 'datasets', None) or [part for part in [getattr(dataset, 'dataset', None)] if part is not None]
    if not inner:
        yield dataset
    for part in inner:
        yield from leaves(part)


def settings_of_leaves(dataset: Any) -> Iterator[dict]:
    """The same for the settings of a data set in a config, or for a list of them."""
    if isinstance(dataset, (list, tuple)):
        for part in dataset:
            yield from settings_of_leaves(part)
    elif isinstance(dataset, dict):
        inner = dataset.get('datasets') or dataset.get('dataset')
        if inner is None:
            yield dataset
        else:
            yield from settings_of_leaves(inner)


def steps_of(pipeline: Any) -> Iterator[Any]:
    """The transforms of a pipeline, with those inside of others such as RandomApply and TestTimeAug."""
    for step in getattr(pipeline, 'transforms', None) or (pipeline if isinstance(pipeline, (list, tuple)) else ()):
        yield step
        for inner in (getattr(step, 'transforms', None), getattr(step, 'subroutines', None)):
            if inner is not None:
                yield from steps_of(inner)
