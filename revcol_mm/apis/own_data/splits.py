# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Dividing data that have no part for validation."""
import hashlib
import json
import os.path as osp
from dataclasses import replace
from typing import Collection, Sequence

from ..errors import LaunchError
from .layouts import OwnData


def _draw(name: str) -> bytes:
    """A random number that belongs to the name: a file more or less moves at most one other to the other part."""
    return hashlib.sha256(name.encode('utf-8', 'surrogateescape')).digest()


def split_data(data: OwnData, fraction: float, folder: str) -> tuple[OwnData, dict[str, str]]:
    """Takes a part of the training data for validation.

    Args:
        data (OwnData): without a part for validation.
        fraction (float): share of the images, of every class in classification; at least one, and not all.
        folder (str): where the lists of the two parts will be.

    Returns:
        tuple[OwnData, dict]: the data with both parts, and the text of every list by its file name.

    Raises:
        LaunchError: there are fewer than two images, or in classification fewer than two of a class.
    """
    whole = data.train
    groups: dict[str, list[str]] = {}
    for name in whole.samples:
        groups.setdefault(name.split('/')[0] if data.scope == 'mmpretrain' else '', []).append(name)
    chosen: set[str] = set()
    for group, names in groups.items():
        if len(names) < 2:
            where = osp.join(whole.images, group)
            raise LaunchError(f'--val-fraction needs at least two images to divide, but {where} has {len(names)}')
        count = min(max(round(fraction * len(names)), 1), len(names) - 1)
        chosen.update(sorted(names, key=_draw)[:count])
    parts, lists = [], {}
    for name, kept in (('train', [sample for sample in whole.samples if sample not in chosen]),
                       ('val', [sample for sample in whole.samples if sample in chosen])):
        path = osp.join(folder, name + ('.json' if data.scope == 'mmdet' else '.txt'))
        lists[path] = _LISTS[data.scope](data, kept)
        parts.append(replace(whole, samples=tuple(kept), listing=path))
    note = f'divided into {len(parts[0].samples)} images for training and {len(parts[1].samples)} for validation'
    return replace(data, train=parts[0], val=parts[1], notes=(*data.notes, f'{note}: the lists are in {folder}')), lists


def _coco(data: OwnData, kept: Sequence[str]) -> str:
    content, names = data.train.content, set(kept)
    images = [image for image in content['images'] if str(image['file_name']) in names]
    ids = {image['id'] for image in images}
    annotations = [annotation for annotation in content.get('annotations') or [] if annotation.get('image_id') in ids]
    return json.dumps(dict(content, images=images, annotations=annotations))


def _names(data: OwnData, kept: Collection[str]) -> str:
    return ''.join(f'{name}\n' for name in kept)


def _labels(data: OwnData, kept: Collection[str]) -> str:
    labels = {name: label for label, name in enumerate(data.classes)}
    return ''.join(f'{name} {labels[name.split("/")[0]]}\n' for name in kept)


_LISTS = dict(mmdet=_coco, mmseg=_names, mmpretrain=_labels)
