# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Names of weights in the authors' files and in the current models, and what can be read from them. No model is needed.

The current names are those of mmdet 3, mmseg 1 and mmpretrain 1.
"""
from collections import Counter
from typing import Any, Mapping

from torch import Tensor

from .loading import find_meta
from .safe import CheckpointError, first_names

# Part of the authors' classifiers -> prefix that mmpretrain puts before it. The names of detectors (mmdet 2) and segmentors
# (mmseg 0.x) have not changed.
CLASSIFIER_PARTS = dict(stem='backbone', subnet='backbone', cls='head', cls_blocks='head', decoder_blocks='head')
TASKS = (('detection', {'rpn_head', 'roi_head', 'bbox_head', 'mask_head', 'panoptic_head'}),
         ('segmentation', {'decode_head'}), ('classification', {'head'}))
# (weight whose first dimension is the number of classes, number to subtract from it: 1 for mmdet's background class)
CLASSES = (('head.cls.classifier.1.weight', 0), ('head.cls_blocks.3.classifier.1.weight', 0),
           ('roi_head.bbox_head.0.fc_cls.weight', 1), ('roi_head.bbox_head.fc_cls.weight', 1),
           ('decode_head.conv_seg.weight', 0))
LAST_CLASSIFIER = 'head.cls_blocks.3.'


def current_names(weights: Mapping[str, Tensor], filename: str) -> dict[str, str | None]:
    """Returns {name in the file: name in the current models, or None for a weight that they do not have}.

    Raises:
        CheckpointError: if a weight belongs to no part of the authors' classification code.
    """
    if any(key.startswith('backbone.') for key in weights):
        # mmcv 1's EMA hook keeps its copies as buffers of the model, whose names have '_' instead of '.'.
        averages = {f'ema_{key.replace(".", "_")}' for key in weights}
        return {key: None if key in averages else key for key in weights}
    unknown = [key for key in weights if _root(key) not in CLASSIFIER_PARTS]
    if unknown:
        raise CheckpointError(f"{filename} is of no known kind: the parts of the authors' classifiers are "
                              f'{", ".join(CLASSIFIER_PARTS)}, but the file holds {first_names(unknown)}: give another file')
    return {key: f'{CLASSIFIER_PARTS[_root(key)]}.{key}' for key in weights}


def official_names(weights: Mapping[str, Tensor], filename: str) -> dict[str, str]:
    """Returns {name in the current models: name in the authors' code}, the inverse of :func:`current_names`.

    Raises:
        CheckpointError: if a classifier has weights that the authors' classification code does not have.
    """
    if find_task(weights) not in ('classification', 'backbone'):
        return {key: key for key in weights}
    names = {key: key.partition('.')[2] for key in weights}
    unknown = [key for key, name in names.items() if CLASSIFIER_PARTS.get(_root(name)) != key.split('.')[0]]
    if unknown:
        raise CheckpointError(f"{filename} holds weights that the authors' classification code does not have: "
                              f'{first_names(unknown)}. Remove them, or give a file without them')
    return names


def _root(name: str) -> str:
    root = name.split('.')[0]
    return 'subnet' if root.rstrip('0123456789') == 'subnet' else root


def find_task(weights: Mapping[str, Tensor]) -> str:
    """Returns the ``task`` of :class:`~revcol_mm.converters.ImportReport`, from the current names."""
    roots = {key.split('.')[0] for key in weights}
    return next((task for task, heads in TASKS if roots & heads), 'backbone' if roots == {'backbone'} else 'other')


def find_num_classes(weights: Mapping[str, Tensor]) -> int | None:
    """Returns the number of classes, from the current names; None if the heads do not show it."""
    return next((weights[key].shape[0] - less for key, less in CLASSES if key in weights and weights[key].dim()), None)


def count_dtypes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns the number of weights of each dtype."""
    return dict(Counter(str(value.dtype).replace('torch.', '') for value in weights.values()))


def find_dataset_meta(checkpoint: Any, filename: str) -> dict[str, Any]:
    """Returns classes and palette as ``dataset_meta``, where the current inferencers look; mmdet 2 and mmseg 0.x use capitals.

    Raises:
        CheckpointError: if the checkpoint's 'meta', or 'dataset_meta' in it, is not a dict.
    """
    meta = find_meta(checkpoint, filename)
    if meta.get('dataset_meta') is not None:
        if not isinstance(meta['dataset_meta'], Mapping):
            kind = type(meta['dataset_meta']).__name__
            raise CheckpointError(f"{filename}: 'dataset_meta' of its 'meta' must be a dict, but is of type {kind}: delete it")
        return dict(dataset_meta=meta['dataset_meta'])
    found = {key.lower(): meta[key] for key in ('CLASSES', 'PALETTE') if meta.get(key) is not None}
    return dict(dataset_meta=found) if found else {}
