# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The formats of Pascal VOC and YOLO, which a library converts."""
import os
import os.path as osp
from typing import Iterator

from ...checkpoint.safe import first_names
from .names import is_hidden, part_of

VOC, YOLO = 'Pascal VOC (an XML file for each image)', 'YOLO (a text file for each image)'
#: Folders that hold no annotations of boxes, and files of YOLO's folders that are none.
LISTS = ('ImageSets', )
NO_LABELS = ('classes.txt', 'labels.txt', 'obj.names', 'README.txt', 'README.dataset.txt', 'README.roboflow.txt')


def foreign_format(root: str) -> str | None:
    """The format of annotations of boxes that are not COCO's: :data:`VOC`, :data:`YOLO` or None."""
    if next(_folders_with(root, '.xml'), None) is not None:
        return VOC
    return YOLO if next(_folders_with(root, '.txt'), None) is not None else None


def convert(root: str, kind: str) -> str:
    """Says what converts a folder in one of these formats, with the lines of Python to type."""
    ending, call = ('.xml', 'from_pascal_voc') if kind == VOC else ('.txt', 'from_yolo')
    target = osp.normpath(root) + '_coco'
    folders: dict[str, list[str]] = {}
    for labels in _folders_with(root, ending):
        folders.setdefault(_part(root, labels), []).append(labels)
    held = f'{osp.join(root, "")} must hold annotations in COCO format, but holds them in the format of {kind}'
    several = next((labels for labels in folders.values() if len(labels) > 1), None)
    if several:
        return (f'{held}, and in several folders ({first_names(several)}), which would be one set: name one of them with '
                '--data, or bring their files into one')
    lines = ['import supervision as sv']
    for part, (labels, ) in folders.items():
        arguments = [_images_of(root, labels), labels, *([_class_file(root)] if kind == YOLO else [])]
        images = osp.join(target, part).rstrip('/')
        lines += [f'data = sv.DetectionDataset.{call}({", ".join(map(repr, arguments))})',
                  f'data.as_coco({images!r}, {osp.join(images, "_annotations.coco.json")!r})']
    option = '' if len(folders) > 1 else ' --val-fraction 0.2'
    return (f'{held}. The library supervision (pip install supervision) converts a copy; type into Python:\n\n    '
            + '\n    '.join(lines) + f'\n\nand train with --data {target}{option}')


def _folders_with(root: str, ending: str) -> Iterator[str]:
    """Folders in which labels of this kind lie: those that have images in them or beside them."""
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_hidden(name) and name not in LISTS)
        labels = {osp.splitext(name)[0] for name in names if name.endswith(ending) and name not in NO_LABELS}
        images = _images_of(root, place)
        if labels and osp.isdir(images) and any(
                osp.splitext(name)[0] in labels for name in os.listdir(images) if not name.endswith(ending)):
            yield place


def _images_of(root: str, labels: str) -> str:
    """The folder of the images to a folder of labels: …/images for …/labels, JPEGImages for Annotations, or the same one."""
    parts = osp.relpath(labels, root).split(os.sep)
    for old, new in (('labels', 'images'), ('Annotations', 'JPEGImages'), ('annotations', 'images')):
        if old in parts:
            index = len(parts) - 1 - parts[::-1].index(old)
            return osp.normpath(osp.join(root, *parts[:index], new, *parts[index + 1:]))
    return labels


def _part(root: str, labels: str) -> str:
    """'train', 'val' or 'test', as the names of the folders say; '' if they do not."""
    return next(filter(None, map(part_of, reversed(osp.relpath(labels, root).split(os.sep)))), '')


def _class_file(root: str) -> str:
    """The YAML file of a YOLO set; the usual name where there is none."""
    files = sorted(name for name in os.listdir(root) if name.endswith(('.yaml', '.yml')))
    return osp.join(root, files[0] if files else 'data.yaml')
