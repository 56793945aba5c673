# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Overlaps of boxes."""
import torch
from torch import Tensor

from .library import at_least_single

IOU = 0


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Intersection over union, or over the first box's area.

    Args:
        bboxes1 (Tensor): (M, 4), x1, y1, x2, y2.
        bboxes2 (Tensor): (N, 4).
        ious (Tensor): (M, N), or (M, ) if aligned; gets the result.
        mode (int): 0 over the union, 1 over the area of the first box.
        aligned (bool): Whether the boxes are compared pair by pair, rather than each with each; then M = N.
        offset (int): 1 if boxes are in whole pixels with both corners included, else 0.
    """
    bboxes1, bboxes2 = at_least_single(bboxes1), at_least_single(bboxes2)
    first, second = (bboxes1, bboxes2) if aligned else (bboxes1[:, None], bboxes2[None])
    corner, far_corner = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    overlap = (far_corner - corner + offset).clamp(min=0).prod(-1)
    base = _area(first, offset)
    if mode == IOU:
        base = base + _area(second, offset) - overlap
    ious.copy_(overlap / base)


def _area(boxes: Tensor, offset: int) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2] + offset).prod(-1)
