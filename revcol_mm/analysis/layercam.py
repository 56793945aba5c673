# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""LayerCAM: where each level of each column speaks for a prediction (figure 8; Jiang et al., TIP 2021).

The weight of an activation is the positive part of the score's gradient at its own position and channel, and a heat map is
the rectified sum over the channels::

    M[i, j] = ReLU( Σ_k ReLU(∂score / ∂A_k[i, j]) · A_k[i, j] )
"""
import importlib
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import record_features

TARGETS = dict(DetInferencer=('box', 'mask'), MMSegInferencer=('pixel', ), ImageClassificationInferencer=())


@dataclass(frozen=True)
class HeatMaps:
    """The heat maps of one image.

    Attributes:
        image: what the network saw, without padding, (H, W, 3) uint8 RGB.
        maps: (levels, columns, H, W), each divided by its largest value; one that is 0 everywhere stays 0.
        label: the class whose score was differentiated.
        score: that score.
        box: the box of the detection, x1, y1, x2, y2 in pixels of ``image``; None without boxes.
    """
    image: np.ndarray
    maps: np.ndarray
    label: int
    score: float
    box: tuple[float, ...] | None = None


def layercam(activation: Tensor, gradient: Tensor, channels: int = 1) -> Tensor:
    """LayerCAM of a layer; ``channels`` is the channels' dimension, over which it sums."""
    return (gradient.clamp_min(0) * activation).sum(channels).clamp_min(0)


def find_class(name: str | None, classes: Sequence[str] | None) -> int | None:
    """The label of a class given by its name or its number; None stays None.

    A number that is also a name is taken for the name, but for the number where names repeat: there, only it tells classes
    apart.

    Raises:
        ValueError: if there is no such class, or if several have this name.
    """
    if name is None:
        return None
    is_number = name.isdecimal() and (not classes or int(name) < len(classes))
    labels = [label for label, known in enumerate(classes or ()) if known == name]
    if labels and not (is_number and len(set(classes)) < len(classes)):
        if len(labels) > 1:
            raise ValueError(f'the class must be one, but got {name!r}, the name of {len(labels)}: give one of their numbers, '
                             f'{", ".join(map(str, labels))}')
        return labels[0]
    if is_number:
        return int(name)
    known = f'one of {", ".join(classes[:10])}{", …" * (len(classes) > 10)}, or a number below {len(classes)}' if classes else \
        'a number, because the names of the classes are not known'
    raise ValueError(f'the class must be {known}, but got {name!r}')


def check_target(inferencer, target: str | None, box: Sequence[float] | None) -> None:
    """Raises ValueError if this kind of model does not have such a target."""
    kind = type(inferencer).__name__
    model = type(inferencer.model).__name__
    if target is not None and target not in TARGETS[kind]:
        allowed = ' or '.join(TARGETS[kind]) or 'left out'
        raise ValueError(f'the target must be {allowed} for {model}, but got {target!r}')
    if box is not None and kind != 'DetInferencer':
        raise ValueError(f'the box must be left out, because {model} predicts no boxes, but got {tuple(box)}')
    if target == 'mask' and not _mask_heads(inferencer.model):
        raise ValueError(f"the target 'mask' needs a detector with mask heads, but the config's {model} has none")


def explain(inferencer, path: str, label: int | None = None, box: Sequence[float] | None = None,
            target: str | None = None) -> HeatMaps:
    """Computes the heat maps of one image, all of them with one forward and one backward pass.

    Args:
        inferencer: from :func:`~.features.build_analysed`.
        path (str): the image.
        label (int | None): the class. Default: None, the predicted one: of a classifier, the one with the highest score; of a
            detector, that of its best box; of a segmentor, the one that it predicts at most pixels.
        box (Sequence[float] | None): of a detector, x1, y1, x2, y2 in pixels of the image file; the detection that overlaps it
            most (IoU) is explained. Default: None, the detection with the highest score.
        target (str | None): the score: 'box' for that of a detection, 'mask' for the mean logit of its mask, inside of it;
            'pixel' for the mean logit of a segmentor at the pixels where it predicts the class (at all pixels, if it predicts
            it nowhere). A classifier has its logit. Default: None, 'box' or 'pixel'.

    Returns:
        HeatMaps: the maps.

    Raises:
        ValueError: if the class does not exist, or nothing of it is predicted.
    """
    model = inferencer.model
    batch, = inferencer.preprocess([path])
    data = batch[1] if type(inferencer).__name__ == 'DetInferencer' else batch  # mmdet's has the image in front
    pixels = data['inputs'][0]  # (3, H, W), BGR
    data = model.data_preprocessor(data, False)
    images, samples = data['inputs'].requires_grad_(), data['data_samples']  # frozen columns have a graph, too
    score_of = dict(DetInferencer=_detector_score, MMSegInferencer=_segmentor_score,
                    ImageClassificationInferencer=_classifier_score)[type(inferencer).__name__]
    with torch.enable_grad(), record_features(model.backbone) as features:
        score, label, found = score_of(model, images, samples, label, box, target)
    keys, tensors = list(features), list(features.values())
    gradients = dict(zip(keys, torch.autograd.grad(score, tensors, allow_unused=True)))  # None: the score does not read it
    columns, levels = model.backbone.num_columns, len(model.backbone.depths)
    maps = np.zeros((levels, columns, *pixels.shape[-2:]), np.float32)
    for (column, level), feature in features.items():
        if gradients[column, level] is not None:
            heat = layercam(feature.detach(), gradients[column, level], 1 if feature.dim() == 4 else 2)
            maps[level, column] = _to_pixels(heat, level, model.backbone, images, pixels)
    if found is not None:
        found = tuple((found * found.new_tensor(samples[0].scale_factor).repeat(2)).tolist())
    return HeatMaps(_to_picture(pixels), maps, label, score.item(), found)


def _classifier_score(model: nn.Module, images: Tensor, samples: list, label: int | None, box, target):
    logits, = model(images, samples, mode='tensor')
    label = _check_label(logits.argmax().item() if label is None else label, len(logits))
    return logits[label], label, None


def _segmentor_score(model: nn.Module, images: Tensor, samples: list, label: int | None, box, target):
    logits, = model.encode_decode(images, [sample.metainfo for sample in samples])  # the whole image, without windows
    height, width = samples[0].metainfo['img_shape'][:2]
    logits = logits[:, :height, :width]  # without padding
    predicted = logits.argmax(0)
    if len(logits) == 1:  # the foreground's; the other class is where it is low
        predicted = (logits[0].sigmoid() > model.decode_head.threshold).long()
        logits = torch.cat([-logits, logits])
    label = _check_label(predicted.flatten().mode().values.item() if label is None else label, len(logits))
    inside = predicted == label
    return (logits[label][inside] if inside.any() else logits[label]).mean(), label, None


def _detector_score(model: nn.Module, images: Tensor, samples: list, label: int | None, box, target):
    from mmdet.structures.bbox import bbox_overlaps
    masks: list[Tensor] = []  # of each stage, (detections, classes, H, W)
    handles = [head.register_forward_hook(lambda module, args, output: masks.append(
        output if isinstance(output, Tensor) else output[0])) for head in _mask_heads(model)] if target == 'mask' else []
    try:
        with _differentiable_soft_nms():
            instances = model.predict(images, samples, rescale=True)[0].pred_instances
    finally:
        for handle in handles:
            handle.remove()
    order = instances.scores.detach().clone()
    if box is not None:
        order = bbox_overlaps(order.new_tensor([box]), instances.bboxes.detach())[0]
    if label is not None:
        order[instances.labels != label] = 0
    if not len(order) or order.max() <= 0:
        raise ValueError('no box' + (f' of class {label}' if label is not None else '') + ' is predicted'
                         + (f' that overlaps {tuple(box)}' if box is not None else ''))
    best = order.argmax().item()
    label = instances.labels[best].item()
    score = instances.scores[best]
    if target == 'mask':
        logits = torch.stack([mask[best, label if mask.shape[1] > 1 else 0] for mask in masks]).mean(0)
        inside = logits > 0
        score = (logits[inside] if inside.any() else logits).mean()
    return score, label, instances.bboxes[best].detach()


@contextmanager
def _differentiable_soft_nms() -> Iterator[None]:
    """Gives mmcv's soft-NMS, which has no backward pass, that of its product: a score times a constant for its overlaps."""
    nms = importlib.import_module('mmcv.ops.nms')  # mmcv.ops.nms itself is the function
    original = nms.SoftNMSop

    def apply(boxes: Tensor, scores: Tensor, *args) -> tuple[Tensor, Tensor]:
        dets, kept = original.apply(boxes.detach(), scores.detach(), *args)
        dets, score = dets[:len(kept)], scores[kept]
        return torch.cat([dets[:, :4], (score * (dets[:, 4] / score.detach()))[:, None]], 1), kept

    nms.SoftNMSop = SimpleNamespace(apply=apply)
    try:
        yield
    finally:
        nms.SoftNMSop = original


def _mask_heads(model: nn.Module) -> list[nn.Module]:
    from mmdet.models.roi_heads import HybridTaskCascadeRoIHead
    from mmdet.models.roi_heads.mask_heads import DynamicMaskHead, FCNMaskHead
    heads = [module for module in model.modules() if isinstance(module, FCNMaskHead)
             and not isinstance(module, DynamicMaskHead)]  # whose masks are of proposals, not of detections
    return heads[-1:] if isinstance(getattr(model, 'roi_head', None), HybridTaskCascadeRoIHead) else heads


def _check_label(label: int, number: int) -> int:
    if label >= number:
        raise ValueError(f'the class must be a number below {number}, but got {label}')
    return label


def _to_pixels(heat: Tensor, level: int, backbone: nn.Module, images: Tensor, pixels: Tensor) -> np.ndarray:
    """Lays a map over the pixels that its positions stand for, cuts the padding off, and divides by the largest value.

    The pixels that a strided convolution drops at the right and bottom edge have the value 0.
    """
    size = images.shape[-2:]
    stride = 4 * 2**level
    if heat.dim() == 2:  # tokens of patches
        stride = backbone.patch_size
        heat = heat.view(1, *(-(-length // stride) for length in size))
    heat = F.interpolate(heat[None], scale_factor=stride, mode='bilinear', align_corners=False)[0, 0]
    heat = F.pad(heat, [0, max(size[1] - heat.shape[1], 0), 0, max(size[0] - heat.shape[0], 0)])
    heat = heat[:pixels.shape[-2], :pixels.shape[-1]]
    return (heat / heat.max().clamp_min(torch.finfo(heat.dtype).tiny)).cpu().numpy()


def _to_picture(pixels: Tensor) -> np.ndarray:
    """The three channels as colours, or the first of another number of them as grey."""
    pixels = pixels.flip(0) if len(pixels) == 3 else pixels[:1].expand(3, -1, -1)
    pixels = pixels.permute(1, 2, 0).cpu()
    if pixels.dtype != torch.uint8:  # 16 bits, or a pipeline that normalises by itself
        pixels = pixels.float() - pixels.float().min()
        pixels = (255 * pixels / pixels.max().clamp_min(1e-6)).to(torch.uint8)
    return pixels.numpy()
