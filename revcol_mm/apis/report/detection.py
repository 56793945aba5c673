# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A detector's test, from the evaluation that pycocotools has made for its metrics."""
import contextlib
import functools
from typing import Any, Iterator, Mapping
from unittest.mock import patch

import mmcv
import numpy as np
import torch
from mmdet.evaluation.metrics import coco_metric
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask

from .findings import Findings, Judged

SCORE, IOU = 0.3, 0.5  # of a prediction that counts as one in confusions, and of one that finds an object
MOST = 100  # predictions of a class in an image, up to which pycocotools' mAP counts, whatever the largest limit is
KINDS = dict(bbox='box', segm='mask')
BACKGROUND = '(none)'
LARGE = 384  # pixels; smaller images are enlarged in pictures, up to this


@contextlib.contextmanager
def recorded_evaluations() -> Iterator[dict[str, Any]]:
    """A context in which the COCOeval objects of mmdet's CocoMetric are kept, by 'bbox' and 'segm', but not of proposals."""
    kept: dict[str, Any] = {}

    class Recorded(coco_metric.COCOeval):
        def summarize(self, *args, **kwargs):
            if self.params.useCats:
                kept[self.params.iouType] = self
            return super().summarize(*args, **kwargs)

    with patch.object(coco_metric, 'COCOeval', Recorded):
        yield kept


def find_of_detection(evaluations: Mapping[str, Any], paths: Mapping[int | str, str], labels: Mapping[int | str, int]
                      ) -> Findings:
    """What pycocotools' evaluation says of every class, and what was confused.

    Args:
        evaluations (Mapping[str, COCOeval]): accumulated, by 'bbox' and 'segm'; at least that of the boxes.
        paths (Mapping[int | str, str]): image files by their ids.
        labels (Mapping[int | str, int]): labels of the model by the ids of their categories.

    Returns:
        Findings: AP over the thresholds of the evaluation, at 0.5 and 0.75 IoU, and curves of boxes at 0.5 IoU. As in the
        metrics, AP counts the 100 best predictions of each class in an image (nan, if the evaluation has no such limit), and
        the others as many as the evaluation allows. Confusions are those of predictions with a score of 0.3 and more, which
        overlap an object by 0.5 IoU, whatever its class.
    """
    boxes = evaluations['bbox']
    ids = np.asarray(boxes.params.catIds).tolist()  # numbers or texts; sorted, as the results are
    names = [category['name'] for category in boxes.cocoGt.loadCats(ids)]
    counted = [annotation for annotation in boxes.cocoGt.dataset['annotations'] if not annotation.get('iscrowd')]
    table: dict[str, list] = {'objects': [sum(one['category_id'] == index for one in counted) for index in ids]}
    for kind, evaluation in evaluations.items():
        precision = evaluation.eval['precision']  # (T, R, K, A, M)
        thresholds = np.round(evaluation.params.iouThrs, 2).tolist()
        limit = np.equal(evaluation.params.maxDets, MOST)
        table[f'{KINDS[kind]} AP'] = [_mean(precision[:, :, k, 0, limit]) for k in range(len(ids))]
        for threshold in (0.5, 0.75):
            if threshold in thresholds:
                part = precision[thresholds.index(threshold)]
                table[f'{KINDS[kind]} AP{threshold * 100:.0f}'] = [_mean(part[:, k, 0, -1]) for k in range(len(ids))]
    at = np.argmin(abs(boxes.params.iouThrs - IOU))
    curves = [(name, (boxes.params.recThrs, boxes.eval['precision'][at, :, k, 0, -1])) for k, name in enumerate(names)
              if boxes.eval['precision'][at, :, k, 0, -1].max() > -1]
    confusion, images = np.zeros((len(ids) + 1, len(ids) + 1), int), []
    for image in boxes.params.imgIds:
        pairs = match(*_objects(boxes, image, ids))
        np.add.at(confusion, tuple(np.array(pairs, int).reshape(-1, 2).T), 1)
        right = sum(truth == found for truth, found in pairs)
        sides = [sum(pair[side] >= 0 for pair in pairs) for side in (0, 1)]
        score = 2 * right / sum(sides) if sum(sides) else 1.
        draw = functools.partial(_draw, evaluations=evaluations, image=image, path=paths[image], labels=labels)
        images.append(Judged(score, paths[image], draw))
    return Findings(table, names, confusion, [*names, BACKGROUND],
                    f'F1 of boxes at {IOU} IoU and a score of {SCORE} and more', images, curves)


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float('nan')


def _objects(evaluation: Any, image: int, ids: list[int]) -> tuple[list, list, list, list, list]:
    """Boxes (x, y, w, h) and classes of the objects, whether they are crowds, and boxes and classes of the predictions."""
    truths = [one for one in evaluation.cocoGt.imgToAnns.get(image, []) if one['category_id'] in ids]
    found = sorted((one for one in evaluation.cocoDt.imgToAnns.get(image, []) if one['score'] >= SCORE),
                   key=lambda one: -one['score'])
    return ([one['bbox'] for one in truths], [ids.index(one['category_id']) for one in truths],
            [bool(one.get('iscrowd')) for one in truths],
            [one['bbox'] for one in found], [ids.index(one['category_id']) for one in found])


def match(truths: list, classes: list[int], crowds: list[bool], found: list, predicted: list[int]) -> list[tuple[int, int]]:
    """Pairs objects with predictions of any class: the predictions in their order, each with the free object it overlaps most.

    Args:
        truths, found (list): boxes (x, y, width, height); the predictions with the highest score first.
        classes, predicted (list[int]): their classes.
        crowds (list[bool]): objects that are none of their own; a prediction in one of them does not count.

    Returns:
        list[tuple[int, int]]: true and predicted class. The largest class and one more stands for "none": it is -1 here, so
        that it is the last row or column of a matrix.
    """
    pairs, free = [], [not crowd for crowd in crowds]
    overlaps = np.zeros((len(found), len(truths)))
    if truths and found:
        overlaps = coco_mask.iou(np.array(found, float), np.array(truths, float), [int(crowd) for crowd in crowds])
    for row, label in zip(overlaps, predicted):
        best = max((index for index, is_free in enumerate(free) if is_free), key=lambda index: row[index], default=None)
        if best is not None and row[best] >= IOU:
            free[best] = False
            pairs.append((classes[best], label))
        elif not any(crowd and overlap >= IOU for crowd, overlap in zip(crowds, row)):
            pairs.append((-1, label))
    return pairs + [(label, -1) for label, is_free in zip(classes, free) if is_free]


def _draw(visualizer: Any, picture: str, evaluations: Mapping[str, Any], image: int, path: str,
          labels: Mapping[int, int]) -> None:
    boxes = evaluations['bbox']
    masked = evaluations.get('segm')
    sample = DetDataSample()
    truths = [one for one in boxes.cocoGt.imgToAnns.get(image, []) if one['category_id'] in labels]
    sample.gt_instances = _instances(truths, labels)
    sample.pred_instances = _instances((masked or boxes).cocoDt.imgToAnns.get(image, []), labels)
    if masked:
        for part, annotations, coco in ((sample.gt_instances, truths, boxes.cocoGt),
                                        (sample.pred_instances, masked.cocoDt.imgToAnns.get(image, []), masked.cocoDt)):
            if annotations:
                part.masks = np.stack([coco.annToMask(one) for one in annotations]).astype(bool)
    pixels = mmcv.imread(path, channel_order='rgb')
    scale = max(1, LARGE // max(pixels.shape[:2]))  # names and scores have a fixed size, and would cover a small image
    for part in (sample.gt_instances, sample.pred_instances):
        part.bboxes = part.bboxes * scale
        if 'masks' in part:
            part.masks = part.masks.repeat(scale, 1).repeat(scale, 2)
    visualizer.add_datasample('', mmcv.imrescale(pixels, scale), sample, pred_score_thr=SCORE, out_file=picture)


def _instances(annotations: list[dict], labels: Mapping[int, int]) -> InstanceData:
    corners = [(x, y, x + width, y + height) for x, y, width, height in (one['bbox'] for one in annotations)]
    instances = InstanceData(bboxes=torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
                             labels=torch.tensor([labels[one['category_id']] for one in annotations], dtype=torch.long))
    if annotations and 'score' in annotations[0] or not annotations:
        instances.scores = torch.tensor([one['score'] for one in annotations], dtype=torch.float32)
    return instances
