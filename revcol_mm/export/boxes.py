# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Boxes, regions and masks of two-stage detectors with mmdet's arithmetic, and with every number a tensor.

Boxes are (x1, y1, x2, y2) in pixels.
"""
from typing import Mapping

import numpy as np
import torch
from torch import Tensor, nn

#: mmdet's default of the coders: no side grows or shrinks by more than this ratio.
WH_RATIO_CLIP = 16 / 1000


def decode(coder, boxes: Tensor, deltas: Tensor, shape: Tensor) -> Tensor:
    """Moves and scales boxes as mmdet's ``DeltaXYWHBBoxCoder`` does (the R-CNN paper, appendix C).

    Args:
        coder (DeltaXYWHBBoxCoder): its ``means``, ``stds`` and ``clip_border``.
        boxes (Tensor): (n, 4).
        deltas (Tensor): (n, 4), x, y, log w, log h.
        shape (Tensor): (2, ), height and width of the image, to which boxes are clipped.

    Returns:
        Tensor: (n, 4).
    """
    deltas = deltas * deltas.new_tensor(coder.stds).view(1, -1) + deltas.new_tensor(coder.means).view(1, -1)
    longest = float(np.abs(np.log(WH_RATIO_CLIP)))
    center, sides = (boxes[:, :2] + boxes[:, 2:]) * 0.5, boxes[:, 2:] - boxes[:, :2]
    center = center + sides * deltas[:, :2]
    half = sides * deltas[:, 2:].clamp(min=-longest, max=longest).exp() * 0.5
    boxes = torch.cat([center - half, center + half], -1)
    return clip(boxes, shape) if coder.clip_border else boxes


def clip(boxes: Tensor, shape: Tensor) -> Tensor:
    """Moves corners into an image of ``shape`` (2, ), height and width."""
    return torch.minimum(boxes.clamp(min=0), shape.flip(0).repeat(2).to(boxes))


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, cfg: Mapping) -> Tensor:
    """NMS within groups, by moving each group to a place of its own.

    Args:
        boxes (Tensor): (n, 4).
        scores (Tensor): (n, ).
        groups (Tensor): (n, ) int64, such as labels.
        cfg (Mapping): ``iou_threshold``, and ``class_agnostic`` for one group of all.

    Returns:
        Tensor: (k, ) int64, the kept boxes by falling score.
    """
    import torchvision
    if not cfg.get('class_agnostic', False):
        largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()  # also where there is no box
        boxes = boxes + (groups.to(boxes) * (largest + 1))[:, None]
    # mmcv compares in single precision, torchvision with a double.
    return torchvision.ops.nms(boxes, scores, float(np.float32(cfg['iou_threshold'])))


def as_rois(boxes: Tensor) -> Tensor:
    """(n, 4) -> (n, 5), with the index of the only image in front."""
    return torch.cat([boxes.new_zeros(boxes.shape[0], 1), boxes], 1)


def roi_features(extractor: nn.Module, features: tuple[Tensor, ...], rois: Tensor) -> Tensor:
    """RoIAlign on the level that fits each region's size, as mmdet's ``SingleRoIExtractor``.

    Args:
        extractor (SingleRoIExtractor): its RoIAlign layers.
        features (tuple[Tensor]): the levels, (1, C, H, W) each.
        rois (Tensor): (n, 5).

    Returns:
        Tensor: (n, C, h, w).
    """
    import torchvision
    layers = extractor.roi_layers
    levels = extractor.map_roi_levels(rois, len(layers))
    indices, found = [], []
    for level, (layer, feature) in enumerate(zip(layers, features)):
        index = (levels == level).nonzero()[:, 0]
        indices.append(index)
        found.append(torchvision.ops.roi_align(feature, rois[index], layer.output_size, layer.spatial_scale,
                                               layer.sampling_ratio, layer.aligned))
    return torch.cat(found)[torch.cat(indices).argsort()]


def paste_masks(masks: Tensor, boxes: Tensor, size: Tensor) -> Tensor:
    """Stretches masks over their boxes, with bilinear interpolation, which is a product with a matrix from each side.

    Args:
        masks (Tensor): (n, h, w), probabilities.
        boxes (Tensor): (n, 4).
        size (Tensor): (2, ) int64, height H and width W of the image.

    Returns:
        Tensor: (n, H, W), 0 away from the box.
    """
    rows = _sampling(boxes[:, 1:2], boxes[:, 3:], size[0], masks.shape[1])
    columns = _sampling(boxes[:, :1], boxes[:, 2:3], size[1], masks.shape[2])
    return rows @ masks @ columns.transpose(1, 2)


def _sampling(start: Tensor, end: Tensor, length: Tensor, bins: int) -> Tensor:
    """Weights (n, length, bins) of a mask's bins in each pixel of a side, for boxes from start to end (n, 1)."""
    pixels = torch.arange(length, device=start.device).to(start.dtype)
    place = (pixels + 0.5 - start) / (end - start) * 2 - 1  # from -1 to 1
    place = torch.where(torch.isinf(place), torch.zeros_like(place), place)  # a box without extent, as in mmdet
    place = ((place + 1) * bins - 1) / 2
    weights = (1 - (place[..., None] - torch.arange(bins, device=start.device)).abs()).clamp(min=0)
    near = (pixels >= start.floor() - 1) & (pixels < end.ceil() + 1)  # mmdet leaves the rest of the image empty
    return weights * near[..., None].to(weights)
