# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The entries of annotation files in COCO's format: what mmdet reads of them, ids, and invalid boxes and polygons."""
import math
from itertools import chain
from operator import itemgetter
from typing import Any, Mapping, Sequence

from ...checkpoint.safe import first_names
from ..errors import LaunchError
from .common import say, warn

#: What mmdet reads of every entry, by the part of the file.
KEYS = dict(categories=('id', 'name'), images=('id', 'file_name', 'height', 'width'),
            annotations=('id', 'image_id', 'category_id', 'bbox', 'area'))


def check_annotations(content: Mapping[str, list], path: str, index: Any = None) -> None:
    """Checks the entries of a file, and puts right in memory what has one correction.

    It adds a missing ``iscrowd`` of 0, leaves out parts of masks that are no polygons, and numbers annotations anew where their
    ids are no use.

    Args:
        content (Mapping[str, list]): the parsed file, with ``images``, ``annotations`` and ``categories``.
        path (str): its name, for messages.
        index (COCO | None): the API that has read the file, so that it has every id. Default: None.

    Raises:
        LaunchError: entries lack what mmdet reads, several images have one id, or boxes are not four finite numbers.
    """
    if not content.get('categories'):
        raise LaunchError(f'{path} must have categories, a list of classes with id and name, but has none')
    images, annotations = content.get('images', []), content.get('annotations', [])
    keys = KEYS if index is None else dict(KEYS, annotations=('bbox', 'area'))
    columns = {part: _columns(content.get(part, []), part, names, path) for part, names in keys.items()}
    ids = set(columns['images']['id'])
    if len(ids) < len(images):
        raise LaunchError(f'every image in {path} must have an id of its own, but {len(images)} images have {len(ids)} ids: '
                          'number them anew, and their annotations with them')
    for part, values in (('images', ids), ('categories', set(columns['categories']['id']))):
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) not in (0, len(values)):  # COCOeval sorts them together, as texts
            raise LaunchError(f'the ids of all {part} in {path} must be numbers, or all texts, but {len(texts)} of '
                              f'{len(values)} are texts ({first_names(texts)}): write numbers, in the annotations, too')
    _check_boxes(annotations, columns['annotations']['bbox'], path)
    _leave_out_parts(annotations, path)
    crowdless = [annotation for annotation in annotations if 'iscrowd' not in annotation]
    for annotation in crowdless:
        annotation['iscrowd'] = 0
    if crowdless:
        say(f'{path}: {len(crowdless)} of {len(annotations)} annotations have no iscrowd, which is taken as 0')
    if index is None:
        return
    ignored = [annotation['id'] for annotation in annotations if annotation.get('ignore') and not annotation['iscrowd']]
    if ignored:
        warn(f'{path}: {len(ignored)} of {len(annotations)} annotations have ignore=1 (id {first_names(ignored)}), as '
             'difficult objects of VOC: mmdet trains without them, but COCOeval counts them as objects that must be found. '
             'With iscrowd=1 both ignore them')
    no_numbers = [] if set(map(type, index.anns)) <= {int, float} else [
        key for key in index.anns if not isinstance(key, (int, float))]
    if len(index.anns) < len(annotations) or 0 in index.anns or no_numbers:
        # COCOeval writes the ids into an array of numbers, and takes the id 0 for "no match". mmdet reads one annotation in
        # place of all that share an id.
        reason = (f'only {len(index.anns)} different ids' if len(index.anns) < len(annotations) else
                  'one with the id 0' if not no_numbers else f'ids that are no numbers ({first_names(no_numbers, 2)})')
        for number, annotation in enumerate(annotations, 1):
            annotation['id'] = number
        index.anns = {annotation['id']: annotation for annotation in annotations}  # the other indexes hold the same objects
        say(f'{path}: the {len(annotations)} annotations have {reason}, so they are numbered anew, from 1')
    for key, used, known, what in (('image_id', index.imgToAnns, ids, 'image'),
                                   ('category_id', index.catToImgs, set(columns['categories']['id']), 'category')):
        unknown = {value for value in used if value not in known}
        if unknown & set(map(str, known)) or known & set(map(str, unknown)):
            raise LaunchError(f'every {key} in {path} must be a number if the id of its {what} is one, but one of both is a '
                              f'text ({key} {first_names(sorted(unknown), 2)}): write numbers for both')
        if unknown:
            lost = [annotation['id'] for annotation in annotations if annotation[key] in unknown]
            warn(f'{path}: {len(lost)} of {len(annotations)} annotations are left out, because their {key} names no {what} of '
                 f'the file (id {first_names(lost)})')


def _columns(entries: list[dict], part: str, keys: Sequence[str], path: str) -> dict[str, list]:
    """The values of some keys.

    A file may have a million entries: one list per key is fast; an object per entry would start Python's garbage collection.
    """
    if not isinstance(entries, list) or not set(map(type, entries)) <= {dict}:
        raise LaunchError(f'{path} must be an annotation file in COCO format, but is not: its {part} must be a list of objects')
    try:
        return {key: list(map(itemgetter(key), entries)) for key in keys}
    except KeyError as error:
        key = error.args[0]
        lacking = [entry.get('id') for entry in entries if key not in entry]
        raise LaunchError(f'every entry of {part} in {path} must have {key}, but {len(lacking)} of {len(entries)} have none '
                          f'(id {first_names(lacking)}): add {key} to them') from error


def _check_boxes(annotations: list[dict], boxes: Sequence, path: str) -> None:
    """mmdet drops a box with NaN without a word, and keeps an infinite one."""
    try:
        if set(map(len, boxes)) <= {4} and math.isfinite(sum(chain.from_iterable(boxes))):
            return
    except (TypeError, OverflowError):
        pass
    wrong = [annotation for annotation in annotations if not _is_box(annotation['bbox'])]
    if wrong:
        named = [f'id {annotation["id"]} in image {annotation["image_id"]}: {annotation["bbox"]}' for annotation in wrong[:4]]
        raise LaunchError(f'every bbox in {path} must be four finite numbers (x, y, width, height), but this is not so for '
                          f'{len(wrong)} of {len(annotations)} ({"; ".join(named)}{"; …" * (len(wrong) > 4)}): correct or '
                          'remove them')


def _is_box(box) -> bool:
    try:
        x, y, width, height = box
        return math.isfinite(x + y + width + height)
    except (TypeError, ValueError, OverflowError):
        return False


def _leave_out_parts(annotations: list[dict], path: str) -> None:
    """mmdet's training leaves out polygons with too few points; pycocotools fails on them, or reads a box."""
    masks = [mask for annotation in annotations if isinstance(mask := annotation.get('segmentation'), list)]
    parts = list(chain.from_iterable(masks))
    if (set(map(type, parts)) <= {list} and all(length >= 6 and length % 2 == 0 for length in set(map(len, parts)))
            and set(map(type, map(itemgetter(0), parts))) <= {int, float}):
        return
    changed = []
    for annotation in annotations:
        mask = annotation.get('segmentation')
        if isinstance(mask, list) and not all(map(_is_polygon, mask)):
            annotation['segmentation'] = list(filter(_is_polygon, mask))
            changed.append(annotation)
    empty = [annotation['id'] for annotation in changed if not annotation['segmentation']]
    say(f'{path}: {len(changed)} of {len(annotations)} annotations (id {first_names([one["id"] for one in changed])}) have '
        'parts of a segmentation that are no polygons of at least three points, [[x1, y1, x2, y2, x3, y3, …]]: these parts are '
        'left out' + (f', and {len(empty)} annotations have no other (id {first_names(empty)})' if empty else ''))


def _is_polygon(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 and type(part[0]) in (int, float)
