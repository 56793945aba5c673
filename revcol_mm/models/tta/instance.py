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

    Boxes are mapped back to the image and merged by NMS per class, as in mmdet's ``DetTTAModel``, which does not support masks.
    The views vote on the mask of each box that NMS keeps: every view gives the mask of its own box of the same class with the
    largest overlap (IoU of at least ``vote_iou``), weighted by the score of that box. A pixel belongs to the object if half of
    the weight or more votes for it. All heads of mmdet (RoI masks, queries, dynamic kernels) return binary masks at the size of
    the image, so voting works with every head. It is close to averaging the views' probabilities if these are near 0 or 1.

    A single view, flipped or not, is mapped back and otherwise not changed: there is no second NMS.

    Args:
        module (dict | nn.Module): the detector.
        tta_cfg (dict | None): ``nms``, a config of :func:`mmcv.ops.batched_nms`, soft-NMS included (default:
            ``dict(type='nms', iou_threshold=0.5)``), and ``max_per_img`` (default: 100). Default: None.
        vote_iou (float): smallest overlap of a box that votes. Default: 0.5.
        data_preprocessor (dict | None): replaces that of the detector. Default: None.
    """

    def __init__(self, module, tta_cfg: dict | None = None, vote_iou: float = 0.5, **kwargs) -> None:
        tta_cfg = dict(dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100), **(tta_cfg or {}))
        super().__init__(tta_cfg=tta_cfg, module=module, **kwargs)
        self.vote_iou = vote_iou

    def test_step(self, data: dict) -> list[DetDataSample]:
        """Returns merged predictions of a batch in which every image has several views.

        The metadata for the detector says that no view is flipped. Otherwise mmdet's cascades would flip the masks back
        themselves (with a negative step, which torch does not support), and they would be flipped a second time here.
        """
        for sample in itertools.chain.from_iterable(data['data_samples']):
            sample.set_metainfo(dict(flip=False, flip_of_view=_is_flipped(sample)))
        return super().test_step(data)

    def _merge_single_sample(self, data_samples: Sequence[DetDataSample]) -> DetDataSample:
        """Merges the views of one image into the data sample of the first view, in the coordinates of the unflipped image."""
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
            # These are the boxes before NMS, with the order of the merged ones; NMS changes scores, not coordinates.
            merged.masks = self._vote(boxes[keep], labels[keep], views)
        return merged

    def _vote(self, boxes: Tensor, labels: Tensor, views: list[InstanceData]) -> Tensor:
        """Returns the masks (K, H, W) that all views vote for, for boxes (K, 4) and labels (K, )."""
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
        weights = weights[:, None, None]
        return (ayes >= 0.5 * weights) & (weights > 0)  # a box without area overlaps nothing, not even itself


def _is_flipped(sample: DetDataSample) -> bool:
    return sample.metainfo.get('flip_of_view', sample.metainfo.get('flip', False))


def _undo_flip(sample: DetDataSample) -> InstanceData:
    """Returns the predictions of a view without its flip. mmdet has undone the scale already."""
    view = sample.pred_instances
    if not _is_flipped(sample):
        return view
    direction = sample.metainfo['flip_direction']
    view = view[:]  # a copy: the view's own data sample stays as it was
    view.bboxes = bbox_flip(view.bboxes, sample.metainfo['ori_shape'], direction)
    if 'masks' in view:
        view.masks = view.masks.flip(_FLIPPED_DIMS[direction])
    return view
