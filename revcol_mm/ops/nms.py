# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Non-maximum suppression: NMS on torchvision's kernel; soft-NMS (Bodla et al., 2017) and nms_match in NumPy, on the CPU.

Boxes are (x1, y1, x2, y2); with ``offset`` 1 they are in whole pixels, both corners included, so that sides are x2 - x1 + 1.
"""
import numpy as np
import torch
from torch import Tensor

from .library import at_least_single, torchvision_ops

NAIVE, LINEAR, GAUSSIAN = range(3)
SCORE, AREA = 4, 5  # rows of the tables below


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy NMS: drops every box whose IoU with a kept one of higher score is above the threshold.

    Boxes of equal scores are taken in the order in which mmcv takes them, which is that of torch's sort. An untrained RPN has
    many, and with another order a training with the same seed would go another way.

    Args:
        boxes (Tensor): (N, 4).
        scores (Tensor): (N, ).
        iou_threshold (float): Between 0 and 1.
        offset (int): 0 or 1, see above.

    Returns:
        Tensor: (K, ) int64, the kept boxes by falling score.
    """
    boxes = at_least_single(boxes)
    if offset:
        # The far corner moves instead of every side.
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], 1)
    if boxes.dtype == torch.float32:
        # mmcv compares in single precision, torchvision with a double, for which the float32 nearest to 0.6 is above 0.6.
        iou_threshold = float(np.float32(iou_threshold))
    order = scores.sort(0, descending=True).indices  # not the stable sort, which torchvision's kernel uses
    ranks = torch.arange(len(order), 0, -1, dtype=boxes.dtype, device=boxes.device)
    return order[torchvision_ops().nms(boxes[order], ranks, iou_threshold)]


def softnms(boxes: Tensor, scores: Tensor, dets: Tensor, iou_threshold: float, sigma: float, min_score: float, method: int,
            offset: int) -> Tensor:
    """Soft-NMS: takes the box of the highest score, lowers the scores of the others by their IoU with it, and starts again.

    Equal scores are taken in the order in which mmcv's loop meets them, which swaps boxes within its arrays; hence the swaps.

    Args:
        boxes (Tensor): (N, 4), on the CPU.
        scores (Tensor): (N, ), on the CPU.
        dets (Tensor): (N, 5); gets the boxes and lowered scores of the result in its first K rows.
        iou_threshold (float): Naive and linear lower scores from this IoU on.
        sigma (float): Width of the Gaussian, which lowers by exp(-IoU² / sigma).
        min_score (float): Boxes whose score falls below are dropped.
        method (int): 0 naive (to 0), 1 linear (by 1 - IoU), 2 Gaussian.
        offset (int): 0 or 1, see above.

    Returns:
        Tensor: (K, ) int64, the kept boxes in the order in which they were taken.
    """
    table = _table(boxes, scores, offset)
    indices = np.arange(len(boxes))
    iou_threshold, sigma, min_score = map(table.dtype.type, (iou_threshold, sigma, min_score))
    first, end = 0, len(boxes)
    while first < end:
        best = first + int(table[SCORE, first:end].argmax())
        taken = table[:, best].copy()
        table[:, best] = table[:, first]
        table[:, first] = taken
        indices[first], indices[best] = indices[best], indices[first]
        first += 1
        rest = table[:, first:end]
        iou = _iou(taken, rest, offset)
        if method == GAUSSIAN:
            rest[SCORE] *= np.exp(iou * iou / -sigma)
        else:
            rest[SCORE] *= np.where(iou >= iou_threshold, 0 if method == NAIVE else 1 - iou, 1)
        dropped = rest[SCORE] < min_score
        count = dropped.size - int(np.count_nonzero(dropped))
        if count < dropped.size:
            # A dropped box gives its place to the last one that stays.
            gaps = np.flatnonzero(dropped[:count])
            fillers = count + np.flatnonzero(~dropped[count:])[::-1]
            rest[:, gaps] = rest[:, fillers]
            indices[first + gaps] = indices[first + fillers]
            end = first + count
    dets[:end] = torch.from_numpy(table[:AREA, :end].T).to(dets.dtype)
    return torch.from_numpy(indices[:end])


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """NMS that says which box each dropped one was dropped for.

    Args:
        dets (Tensor): (N, 5) boxes and scores, on the CPU.
        iou_threshold (float): A box is dropped from this IoU on.

    Returns:
        list[list[int]]: For every kept box, by falling score: its index, followed by those of the boxes dropped for it.
    """
    order = dets[:, 4].detach().sort(descending=True, stable=True).indices
    table = _table(dets[order, :4], dets[order, 4], 0)
    iou_threshold = table.dtype.type(iou_threshold)
    rest = order.numpy()
    groups = []
    while rest.size:
        matched = _iou(table[:, 0], table[:, 1:], 0) >= iou_threshold
        groups.append([int(rest[0]), *rest[1:][matched].tolist()])
        table, rest = table[:, 1:], rest[1:]
        if len(groups[-1]) > 1:
            unmatched = np.flatnonzero(~matched)
            table, rest = table.take(unmatched, 1), rest[unmatched]
    return groups


def _table(boxes: Tensor, scores: Tensor, offset: int) -> np.ndarray:
    """(N, 4) and (N, ) -> rows x1, y1, x2, y2, score and area, (6, N)."""
    boxes, scores = at_least_single(boxes.detach()).numpy(), at_least_single(scores.detach()).numpy()
    table = np.empty((6, len(boxes)), boxes.dtype)
    table[:SCORE] = boxes.T
    table[SCORE] = scores
    table[AREA] = (table[2] - table[0] + offset) * (table[3] - table[1] + offset)
    return table


def _iou(box: np.ndarray, others: np.ndarray, offset: int) -> np.ndarray:
    """IoU of one column of a table with many, (N, ). Boxes without area overlap nothing, where mmcv divides 0 by 0."""
    sides = np.minimum(box[2:4, None], others[2:4])
    sides -= np.maximum(box[:2, None], others[:2])
    if offset:
        sides += offset
    np.maximum(sides, 0, out=sides)
    overlap = sides[0] * sides[1]
    union = others[AREA] + box[AREA]
    union -= overlap
    return overlap / np.maximum(union, np.finfo(union.dtype).tiny)
