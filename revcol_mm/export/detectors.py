# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""mmdet's detectors from the image to boxes and masks: R-CNN with one or several stages, and DINO.

The networks' own ``forward`` stays. What lies between is mmdet's arithmetic in operators that ONNX has, with free sizes.
"""
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Iterator, Mapping, Sequence
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..utils.configs import kind_of
from .boxes import as_rois, batched_nms, clip, decode, paste_masks, roi_features
from .network import ExportedNet, bgr, refuse, shape_of

BOX_HEADS = ('ConvFCBBoxHead', 'Shared2FCBBoxHead', 'Shared4Conv1FCBBoxHead')
#: Within these, in pixels and in score, two detections of one label are the same.
SAME_BOX, SAME_SCORE = 0.1, 1e-3


class ExportedDetector(ExportedNet):
    """Base of the detectors."""

    task = 'detection'
    #: ``unmatched`` is a share of the detections: near-ties of scores and of overlaps cause it.
    limits = dict(boxes=SAME_BOX, scores=SAME_SCORE, unmatched=0.05, masks=0.01)

    @staticmethod
    def predict(model: nn.Module, images: Tensor, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        from mmdet.structures import DetDataSample
        height, width = images.shape[-2:]
        info = dict(img_shape=(height, width), ori_shape=size, scale_factor=(width / size[1], height / size[0]))
        data = dict(inputs=bgr(images), data_samples=[DetDataSample(metainfo=info) for _ in images])
        with _pasted_values() as values:
            found = [sample.pred_instances.cpu() for sample in model.test_step(data)]
        return [dict(boxes=instances.bboxes, scores=instances.scores, labels=instances.labels,
                     **(dict(masks=instances.masks, values=_whole(values, instances.masks)) if 'masks' in instances else {}))
                for instances in found]

    def compare(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
        """Matches detections with the nearest one of their label.

        Returns:
            dict[str, float]: ``boxes`` (pixels) and ``scores``, the largest differences of matched detections; ``unmatched``,
            the share of the others; ``masks``, how far the value of a pixel that differs is from the threshold.
        """
        ours, theirs = match_detections(found, expected)
        total = len(found['scores']) + len(expected['scores'])
        result = dict(boxes=_largest(found['boxes'][ours] - expected['boxes'][theirs]),
                      scores=_largest(found['scores'][ours] - expected['scores'][theirs]),
                      unmatched=1 - 2 * len(ours) / total if total else 0.)
        if 'masks' in self.outputs:
            values = expected['values'][theirs]
            wrong = found['masks'][ours] != expected['masks'][theirs]
            result['masks'] = _largest(values[wrong] - self.model.roi_head.test_cfg.mask_thr_binary)
        return result


def match_detections(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
    """Pairs of detections with one label and nearly one box and score, the nearest first: their indices on both sides."""
    distance = torch.maximum(
        (found['boxes'][:, None] - expected['boxes']).abs().amax(-1) / SAME_BOX,
        (found['scores'][:, None] - expected['scores']).abs() / SAME_SCORE)
    distance[found['labels'][:, None] != expected['labels']] = torch.inf
    pairs: dict[int, int] = {}
    for index in distance.flatten().argsort().tolist() if distance.numel() else ():
        ours, theirs = divmod(index, distance.size(1))
        if not distance[ours, theirs] <= 1:
            break
        if ours not in pairs and theirs not in pairs.values():
            pairs[ours] = theirs
    return list(pairs), list(pairs.values())


@contextmanager
def _pasted_values() -> Iterator[list[tuple[Tensor, tuple[slice, ...]]]]:
    """Records the masks that mmdet pastes before it compares them with the threshold, and where."""
    from mmdet.models.roi_heads.mask_heads import fcn_mask_head
    paste, values = fcn_mask_head._do_paste_mask, []

    def record(*args, **kwargs):
        values.append(paste(*args, **kwargs))
        return values[-1]

    with patch.object(fcn_mask_head, '_do_paste_mask', record):
        yield values


def _whole(parts: Sequence[tuple[Tensor, tuple[slice, ...]]], masks: Tensor) -> Tensor:
    """The recorded values in the whole image, (n, H, W)."""
    values, first = torch.zeros(masks.shape), 0
    for part, place in parts:
        values[(slice(first, first + len(part)), *place)] = part.cpu()
        first += len(part)
    return values


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.


class ExportedTwoStage(ExportedDetector):
    """Faster, Mask and Cascade (Mask) R-CNN, for one image at a time.

    Args:
        model (TwoStageDetector): the detector.

    Raises:
        ValueError: if one of its parts computes something else than mmdet's standard one.
    """

    batch = 1
    axes = dict(images={2: 'height', 3: 'width'}, boxes={0: 'detections'}, scores={0: 'detections'}, labels={0: 'detections'},
                masks={0: 'detections', 1: 'original_height', 2: 'original_width'})

    def __init__(self, model: nn.Module) -> None:
        _check_two_stage(model)
        super().__init__(model)
        self.outputs = ('boxes', 'scores', 'labels', *(('masks', ) if model.roi_head.with_mask else ()))
        head = model.roi_head
        several = type(head).__name__ == 'CascadeRoIHead'
        self.box_stages = list(zip(head.bbox_roi_extractor, head.bbox_head)) if several else [
            (head.bbox_roi_extractor, head.bbox_head)]
        if head.with_mask:
            self.mask_stages = list(zip(head.mask_roi_extractor, head.mask_head)) if several else [
                (head.mask_roi_extractor, head.mask_head)]

    def split(self, found: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        return [dict(zip(self.outputs, found))]

    def forward(self, images: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Predicts.

        Args:
            images (Tensor): uint8 RGB, (1, 3, H, W), resized.
            size (Tensor): (2, ) int64, height and width of the original image.

        Returns:
            tuple[Tensor]: boxes (n, 4) in the original image, scores (n, ), labels (n, ) int64, by falling score; and of an
            instance segmentor masks (n, \\*size) bool.
        """
        shape = shape_of(images)
        features = self.model.extract_feat(self.preprocessing(images))
        proposals = self.propose(features, shape)
        # mmdet rescales boxes after the mask heads, and without these before NMS.
        factor = (shape.double() / size.double()).flip(0).repeat(2)
        if not self.model.roi_head.with_mask:
            return self.detect(features, proposals, shape, (1 / factor).float())
        boxes, scores, labels = self.detect(features, proposals, shape)
        masks = self.segment(features, boxes, labels)
        boxes = boxes / factor.float()
        threshold = self.model.roi_head.test_cfg.mask_thr_binary
        return boxes, scores, labels, paste_masks(masks, boxes, size) >= threshold

    def propose(self, features: tuple[Tensor, ...], shape: Tensor) -> Tensor:
        """Regions (n, 4) of the first stage: the best of every level, after NMS within each level."""
        head = self.model.rpn_head
        cfg = head.test_cfg
        scores, deltas = head(features)
        anchors = head.prior_generator.grid_priors([score.shape[-2:] for score in scores], device=scores[0].device)
        kept: list[tuple[Tensor, ...]] = []
        for level, (score, delta, anchor) in enumerate(zip(scores, deltas, anchors)):
            score = score[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
            score = score.sigmoid() if head.use_sigmoid_cls else score.softmax(-1)[:, :-1]
            delta = delta[0].permute(1, 2, 0).reshape(-1, 4)
            score, order = score[:, 0].sort(descending=True)
            if cfg.get('nms_pre', -1) > 0:
                score, order = score[:cfg.nms_pre], order[:cfg.nms_pre]
            kept.append((score, delta[order], anchor[order], torch.full_like(order, level)))
        scores, deltas, anchors, levels = map(torch.cat, zip(*kept))
        boxes = decode(head.bbox_coder, anchors, deltas, shape)
        if cfg.get('min_bbox_size', -1) >= 0:
            large = ((boxes[:, 2:] - boxes[:, :2]) > cfg.min_bbox_size).all(1).nonzero()[:, 0]
            boxes, scores, levels = boxes[large], scores[large], levels[large]
        return boxes[batched_nms(boxes, scores, levels, cfg.nms)[:cfg.max_per_img]]

    @contextmanager
    def without_threshold(self, model: nn.Module) -> Iterator[None]:
        with patch.dict(self.model.roi_head.test_cfg, score_thr=0.), patch.dict(model.roi_head.test_cfg, score_thr=0.):
            yield

    def detect(self, features: tuple[Tensor, ...], boxes: Tensor, shape: Tensor,
               factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, multiplied by ``factor`` (4, ), scores and labels of the box heads; scores are the stages' mean."""
        cfg = self.model.roi_head.test_cfg
        scores = []
        for stage, (extractor, head) in enumerate(self.box_stages):
            score, delta = head(roi_features(extractor, features, as_rois(boxes)))
            scores.append(score)
            if stage + 1 < len(self.box_stages):
                if not head.reg_class_agnostic:
                    label = score[:, :-1].argmax(1)
                    delta = delta.gather(1, label[:, None] * 4 + torch.arange(4, device=label.device))
                boxes = decode(head.bbox_coder, boxes, delta, shape)
        score = (sum(scores) / float(len(scores)) if len(scores) > 1 else score).softmax(-1)[:, :-1]
        classes = head.num_classes
        if not head.reg_class_agnostic:
            boxes = boxes.repeat_interleave(classes, dim=0)
        boxes = decode(head.bbox_coder, boxes, delta.reshape(-1, 4), shape)
        if factor is not None:
            boxes = boxes * factor
        score = score.reshape(-1)
        above = (score > cfg.score_thr).nonzero()[:, 0]
        labels = above % classes
        boxes = boxes[above // classes if head.reg_class_agnostic else above]
        kept = batched_nms(boxes, score[above], labels, cfg.nms)
        if cfg.max_per_img > 0:
            kept = kept[:cfg.max_per_img]
        return boxes[kept], score[above][kept], labels[kept]

    def segment(self, features: tuple[Tensor, ...], boxes: Tensor, labels: Tensor) -> Tensor:
        """Masks (n, h, w) of the boxes' labels, as probabilities; with several stages their mean."""
        found = []
        for extractor, head in self.mask_stages:
            masks = head(roi_features(extractor, features, as_rois(boxes)))
            if head.class_agnostic:
                found.append(masks[:, 0].sigmoid())
            else:
                place = torch.arange(boxes.shape[0], device=boxes.device) * masks.shape[1] + labels
                found.append(masks.flatten(0, 1)[place].sigmoid())
        return torch.stack(found).mean(0) if len(found) > 1 else found[0]


def _check_two_stage(model: nn.Module) -> None:
    head, rpn = model.roi_head, model.rpn_head
    refuse(rpn, 'model.rpn_head', ('RPNHead', ))
    refuse(rpn.prior_generator, 'model.rpn_head.anchor_generator', ('AnchorGenerator', ))
    refuse(head, 'model.roi_head', ('StandardRoIHead', 'CascadeRoIHead'))
    if head.with_shared_head:
        raise ValueError('model.roi_head must have no shared_head to be exported to ONNX, but has a '
                         f'{type(head.shared_head).__name__}')
    several = type(head).__name__ == 'CascadeRoIHead'
    box_heads = list(head.bbox_head) if several else [head.bbox_head]
    mask_heads = (list(head.mask_head) if several else [head.mask_head]) if head.with_mask else []
    extractors = [*(head.bbox_roi_extractor if several else [head.bbox_roi_extractor])]
    if mask_heads:
        extractors += head.mask_roi_extractor if several else [head.mask_roi_extractor]
    for box_head in box_heads:
        refuse(box_head, 'model.roi_head.bbox_head', BOX_HEADS)
        if box_head.custom_activation or box_head.custom_cls_channels or not (box_head.with_cls and box_head.with_reg):
            raise ValueError('model.roi_head.bbox_head must predict softmax scores and boxes to be exported to ONNX, but its '
                             f'loss is {type(box_head.loss_cls).__name__}')
    for mask_head in mask_heads:
        refuse(mask_head, 'model.roi_head.mask_head', ('FCNMaskHead', ))
    for part in (rpn, *box_heads):
        refuse(part.bbox_coder, 'bbox_coder', ('DeltaXYWHBBoxCoder', ))
        if part.bbox_coder.add_ctr_clamp:
            raise ValueError('bbox_coder.add_ctr_clamp must be False for an export to ONNX, but got True')
    for extractor in extractors:
        refuse(extractor, 'roi_extractor', ('SingleRoIExtractor', ))
        for layer in extractor.roi_layers:
            refuse(layer, 'roi_layer', ('RoIAlign', ))
            if layer.pool_mode != 'avg':
                raise ValueError(f"pool_mode of roi_layer must be 'avg' for an export to ONNX, but got {layer.pool_mode!r}")
    for name, cfg in (('rpn', rpn.test_cfg), ('rcnn', head.test_cfg)):
        check_nms(cfg.nms, f'model.test_cfg.{name}.nms')
    if mask_heads and head.test_cfg.mask_thr_binary < 0:
        raise ValueError('model.test_cfg.rcnn.mask_thr_binary must be a threshold of at least 0 for an export to ONNX, but got '
                         f'{head.test_cfg.mask_thr_binary}')


def check_nms(cfg: Mapping[str, Any], name: str) -> None:
    """Raises ValueError unless the setting is plain NMS, the only kind that ONNX has."""
    kind = kind_of(cfg) if 'type' in cfg else 'nms'
    if kind != 'nms':
        raise ValueError(f"{name}.type must be 'nms' for an export to ONNX, which has no other, but got {kind!r}: "
                         f'--cfg-options {name}.type=nms makes it plain NMS, whose results differ a little')
    unknown = set(cfg) - {'type', 'iou_threshold', 'split_thr', 'class_agnostic'}
    if unknown or 'iou_threshold' not in cfg:
        raise ValueError(f'{name} must have type and iou_threshold, and optionally class_agnostic, for an export to ONNX, but '
                         f'got {dict(cfg)}')


class ExportedDINO(ExportedDetector):
    """DINO, for batches of images of one size.

    Args:
        model (DINO): the detector.

    Raises:
        ValueError: if its head is another, or if it pads images.
    """

    outputs = ('boxes', 'scores', 'labels')
    axes = dict(ExportedNet.axes, boxes={0: 'batch'}, scores={0: 'batch'}, labels={0: 'batch'})

    def __init__(self, model: nn.Module) -> None:
        refuse(model.bbox_head, 'model.bbox_head', ('DINOHead', ))
        if not model.bbox_head.loss_cls.use_sigmoid:
            raise ValueError('model.bbox_head.loss_cls.use_sigmoid must be True for an export to ONNX, but got False')
        super().__init__(model)
        if self.preprocessing.pads:
            raise ValueError('model.data_preprocessor.pad_size_divisor must be 1 for an export of DINO to ONNX, which has no '
                             f'padding masks, but got {self.preprocessing.divisor}')

    def forward(self, images: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Predicts.

        Args:
            images (Tensor): uint8 RGB, (N, 3, H, W), resized.
            size (Tensor): (2, ) int64, height and width of the original images.

        Returns:
            tuple[Tensor]: boxes (N, k, 4) in the original image, scores (N, k), labels (N, k) int64, by falling score, with
            k = ``test_cfg.max_per_img``.
        """
        from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
        head, shape = self.model.bbox_head, shape_of(images)
        features = self.model.extract_feat(self.preprocessing(images))
        unpadded = SimpleNamespace(batch_input_shape=(0, 0), img_shape=(0, 0))  # equal, so that mmdet masks nothing
        scores, boxes = head(**self.model.forward_transformer(features, [unpadded]))
        scores, boxes = scores[-1], boxes[-1]
        best = head.test_cfg.get('max_per_img', self.model.num_queries)
        scores, index = scores.sigmoid().flatten(1).topk(best)
        labels, query = index % head.num_classes, index // head.num_classes
        boxes = bbox_cxcywh_to_xyxy(boxes.gather(1, query[..., None].expand(-1, -1, 4)))
        boxes = clip(boxes * shape.flip(0).repeat(2).to(boxes), shape)
        factor = (shape.double() / size.double()).flip(0).repeat(2)
        return boxes / factor.float(), scores, labels
