# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Test-time augmentation for instance segmentation."""
import itertools
from typing import Sequence

import torch
from mmcv.ops import batched_nms
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_flip, bbox_overlaps
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor

_FLIPPED_DIMS = dict(horizontal=(-1, ), vertical=(-2, ), diagonal=(-2, -1))


@MODELS.register_module()
class InstanceTTAModel(DetTTAModel):
    """Merges the boxes and the masks that a detector finds in several views of an image.

    Boxes are mapped back to the image and merged by NMS per class, as mmdet's ``DetTTAModel`` does, which refuses masks. The
    mask of a box that stays is the vote of the views: every view casts the mask of its own box of the same class that overlaps
    most (IoU of at least ``vote_iou``), weighted by that box's score, and a pixel belongs to the object if half of the
    weight says so. Why a vote: mmdet's heads hand out binary masks at the size of the image, whatever their kind (RoI masks,
    queries, dynamic kernels), so this serves them all, and it is what averaging the views' probabilities comes to when these
    are near 0 or 1.

    A single view, flipped or not, is returned as the detector gave it, mapped back: no second NMS touches its scores.

    Args:
        module (dict | nn.Module): the detector.
        tta_cfg (dict, optional): ``nms``, any that :func:`mmcv.ops.batched_nms` knows, soft-NMS too (default
            ``dict(type='nms', iou_threshold=0.5)``), and ``max_per_img`` (default 100).
        vote_iou (float): least overlap of a box that votes. Default: 0.5.
        data_preprocessor (dict, optional): replaces the detector's.
    """

    def __init__(self, module, tta_cfg: dict | None = None, vote_iou: float = 0.5, **kwargs) -> None:
        tta_cfg = dict(dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100), **(tta_cfg or {}))
        super().__init__(tta_cfg=tta_cfg, module=module, **kwargs)
        self.vote_iou = vote_iou

    def test_step(self, data: dict) -> list[DetDataSample]:
        """Merged predictions of a batch whose every item comes in several views.

        The detector is not told which views are flipped: mmdet's cascades would flip their masks back by themselves, with a
        negative step, which torch does not know, and a second time here.
        """
        for sample in itertools.chain.from_iterable(data['data_samples']):
            sample.set_metainfo(dict(flip=False, flip_of_view=_is_flipped(sample)))
        return super().test_step(data)

    def _merge_single_sample(self, data_samples: Sequence[DetDataSample]) -> DetDataSample:
        """Merges the views of one image into the first one's data sample, with boxes and masks of the image as it is."""
        views = [_undo_flip(sample) for sample in data_samples]
        merged = data_samples[0]
        merged.pred_instances = views[0] if len(views) == 1 else self._merge_views(views)
        return merged

    def _merge_views(self, views: list[InstanceData]) -> InstanceData:
        boxes, scores, labels = (torch.cat([view[key] for view in views]) for key in ('bboxes', 'scores', 'labels'))
        if not len(boxes):
            return views[0]
        dets, keep = batched_nms(boxes.float(), scores.float(), labels, self.tta_cfg['nms'])
        order = dets[:, -1].argsort(descending=True, stable=True)[:self.tta_cfg['max_per_img']]
        dets, keep = dets[order], keep[order]
        merged = InstanceData(bboxes=dets[:, :-1], scores=dets[:, -1], labels=labels[keep])
        if 'masks' in views[0]:
            # The box before soft-NMS is the one that belongs to the mask: NMS changes scores, never coordinates.
            merged.masks = self._vote(boxes[keep], labels[keep], views)
        return merged

    def _vote(self, boxes: Tensor, labels: Tensor, views: list[InstanceData]) -> Tensor:
        """Masks (K, H, W) for boxes (K, 4) and labels (K, ), from all views."""
        size = views[0].masks.shape[-2:]
        weights = boxes.new_zeros(len(boxes))
        ayes = boxes.new_zeros((len(boxes), *size), dtype=torch.float32)
        for view in views:
            if not len(view.bboxes):
                continue
            overlaps = bbox_overlaps(boxes, view.bboxes.to(boxes.dtype))  # (K, boxes of the view)
            overlaps = overlaps.masked_fill(labels[:, None] != view.labels[None], -1)
            overlap, voter = overlaps.max(dim=1)
            for index in (overlap >= self.vote_iou).nonzero()[:, 0].tolist():
                weight = view.scores[voter[index]]
                weights[index] += weight
                ayes[index] += weight * view.masks[voter[index]]
        return ayes >= 0.5 * weights[:, None, None]


def _is_flipped(sample: DetDataSample) -> bool:
    return sample.metainfo.get('flip_of_view', sample.metainfo.get('flip', False))


def _undo_flip(sample: DetDataSample) -> InstanceData:
    """Predictions of a view, mapped back to the image: mmdet has undone the scale, not the flip."""
    view = sample.pred_instances
    if not _is_flipped(sample):
        return view
    direction = sample.metainfo['flip_direction']
    view = view[:]  # a copy: the view's own data sample stays as it was
    view.bboxes = bbox_flip(view.bboxes, sample.metainfo['ori_shape'], direction)
    if 'masks' in view:
        view.masks = view.masks.flip(_FLIPPED_DIMS[direction])
    return view
