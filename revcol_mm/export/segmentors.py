# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""mmseg's segmentors from the image to the label map."""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .network import TOLERANCE, ExportedNet, bgr, refuse, relative_difference, shape_of


class ExportedSegmentor(ExportedNet):
    """An encoder-decoder, for batches of images of one size.

    With ``test_cfg.mode='slide'`` it is the network of one window, without the original size: the runner adds windows up.

    Args:
        model (EncoderDecoder): the segmentor.
        logits (bool): whether to return the logits at the original size, too. Default: False.

    Raises:
        ValueError: for another decode head, or windows that are padded.
    """

    task = 'segmentation'
    limits = dict(labels=TOLERANCE, logits=TOLERANCE)

    def __init__(self, model: nn.Module, logits: bool = False) -> None:
        refuse(model.decode_head, 'model.decode_head', ('UPerHead', 'Mask2FormerHead'))
        super().__init__(model)
        self.slides = model.test_cfg.get('mode', 'whole') == 'slide'
        if self.slides and self.preprocessing.pads:
            raise ValueError('model.data_preprocessor.test_cfg must be None for an export with sliding windows to ONNX, but '
                             f'got {dict(model.data_preprocessor.test_cfg)}')
        self.takes_size = not self.slides
        self.outputs = ('logits', ) if self.slides else ('labels', 'logits') if logits else ('labels', )
        sides = ('height', 'width') if self.slides else ('original_height', 'original_width')
        self.axes = dict(ExportedNet.axes, labels={0: 'batch', 1: sides[0], 2: sides[1]},
                         logits={0: 'batch', 2: sides[0], 3: sides[1]})

    @property
    def settings(self) -> dict[str, Any]:
        cfg = self.model.test_cfg
        windows = dict(crop_size=list(cfg.crop_size), stride=list(cfg.stride)) if self.slides else {}
        head = self.model.decode_head
        binary = dict(threshold=head.threshold) if self.model.out_channels == 1 else {}
        return dict(mode='slide' if self.slides else 'whole', align_corners=bool(self.model.align_corners), **windows, **binary)

    def forward(self, images: Tensor, size: Tensor | None = None) -> tuple[Tensor, ...] | Tensor:
        """Predicts.

        Args:
            images (Tensor): uint8 RGB, (N, 3, H, W), resized; a window of it where the model slides.
            size (Tensor | None): (2, ) int64, height and width of the original images. None where the model slides.

        Returns:
            tuple[Tensor] | Tensor: labels (N, \\*size) int64, and logits (N, classes, \\*size) if wanted; where the model
            slides logits (N, classes, H, W).
        """
        x = self.preprocessing(images)
        logits = self.model.encode_decode(x, [dict(img_shape=tuple(x.shape[-2:]), pad_shape=tuple(x.shape[-2:]))])
        if self.slides:
            return logits
        if self.preprocessing.pads:
            height, width = shape_of(images)
            logits = logits[:, :, :height, :width]
        logits = F.interpolate(logits, size=(size[0], size[1]), mode='bilinear', align_corners=self.model.align_corners)
        if logits.shape[1] == 1:
            logits = logits.sigmoid()
            labels = (logits[:, 0] > self.model.decode_head.threshold).long()
        else:
            labels = logits.argmax(1)
        return (labels, logits) if 'logits' in self.outputs else labels

    @staticmethod
    def predict(model: nn.Module, images: Tensor, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        from mmseg.structures import SegDataSample
        shape = tuple(images.shape[-2:])
        if model.test_cfg.get('mode', 'whole') == 'slide':
            x = model.data_preprocessor(dict(inputs=bgr(images)))['inputs']
            return [dict(logits=logits.cpu()) for logits in model.encode_decode(x, [dict(img_shape=shape, ori_shape=shape)])]
        info = dict(img_shape=shape, ori_shape=size)
        data = dict(inputs=bgr(images), data_samples=[SegDataSample(metainfo=dict(info)) for _ in images])
        return [dict(labels=sample.pred_sem_seg.data[0].long().cpu(), logits=sample.seg_logits.data.cpu())
                for sample in model.test_step(data)]

    def compare(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
        """Compares label maps and logits.

        Returns:
            dict[str, float]: ``labels``, how far the best class is above the one found, where these differ, relative to the
            largest logit; ``logits``, their largest difference, relative to the largest.
        """
        logits, result = expected['logits'], {}
        if 'labels' in self.outputs:
            result['labels'] = label_margin(found['labels'], logits, getattr(self.model.decode_head, 'threshold', None))
        if 'logits' in self.outputs:
            result['logits'] = relative_difference(found['logits'], logits)
        return result


def label_margin(labels: Tensor, logits: Tensor, threshold: float | None = None) -> float:
    """How far a label map is from the best classes: the largest distance of the found class to the best, in the logits.

    Args:
        labels (Tensor): (H, W).
        logits (Tensor): (classes, H, W), or probabilities (1, H, W) of a single class.
        threshold (float | None): of a single class. Default: None.

    Returns:
        float: relative to the largest value. 0 if every pixel has its best class; infinite for another size or no class.
    """
    if labels.shape != logits.shape[-2:] or labels.min() < 0 or labels.max() >= max(len(logits), 2):
        return float('inf')
    if len(logits) == 1:
        wrong = labels != (logits[0] > threshold)
        return (logits[0][wrong] - threshold).abs().max().item() if wrong.any() else 0.
    margin = logits.max(0).values - logits.gather(0, labels[None])[0]
    return (margin.max() / logits.abs().max().clamp_min(1e-30)).nan_to_num(nan=torch.inf).item()
