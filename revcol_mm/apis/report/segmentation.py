# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A segmentor's test, from its predictions."""
import functools
from typing import Any, Sequence

import mmcv
import numpy as np
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from .findings import SHOWN, Findings, Judged, extremes


class SegmentationCollector:
    """Counts pixels by true and predicted class, and keeps the maps of the best and the worst images.

    Args:
        classes (Sequence[str]): names in the order of the labels.
        ignored (int): value of pixels that do not count. Default: 255.
    """

    def __init__(self, classes: Sequence[str], ignored: int = 255) -> None:
        self.classes, self.ignored = classes, ignored
        self.confusion = np.zeros((len(classes), len(classes)), np.int64)
        self.images: list[Judged] = []

    def add(self, samples: Sequence[Any]) -> None:
        """Adds predictions of the model, with their truth."""
        count = len(self.classes)
        for sample in samples:
            truth, found = (sample.get(key).data.squeeze(0).cpu().numpy().astype(np.int64)
                            for key in ('gt_sem_seg', 'pred_sem_seg'))
            kept = truth != self.ignored
            confusion = np.bincount(count * truth[kept] + found[kept], minlength=count * count).reshape(count, count)
            self.confusion += confusion
            maps = truth.astype(np.uint8), found.astype(np.uint8)
            self.images.append(Judged(float(np.nanmean(_iou(confusion))) if kept.any() else 1., sample.img_path,
                                      functools.partial(_draw, path=sample.img_path, maps=maps)))
        if len(self.images) > 8 * SHOWN:  # not the maps of all images
            best, worst = extremes(self.images)
            self.images = best + worst

    def findings(self) -> Findings:
        """IoU and accuracy of each class, as mmseg's IoUMetric counts them, over the pixels of all images."""
        pixels = self.confusion.sum(1)
        accuracy = np.divide(self.confusion.diagonal(), pixels, out=np.full(len(pixels), np.nan), where=pixels > 0)
        table = {'pixels': pixels.tolist(), 'IoU': _iou(self.confusion).tolist(), 'accuracy': accuracy.tolist()}
        return Findings(table, self.classes, self.confusion, self.classes, 'mean IoU of the classes in it', self.images)


def _iou(confusion: np.ndarray) -> np.ndarray:
    """IoU of each class, (classes, ); nan for one that is neither there nor predicted."""
    both = confusion.diagonal()
    either = confusion.sum(0) + confusion.sum(1) - both
    return np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)


def _draw(visualizer: Any, picture: str, path: str, maps: tuple[np.ndarray, np.ndarray]) -> None:
    sample = SegDataSample()
    for key, values in zip(('gt_sem_seg', 'pred_sem_seg'), maps):
        sample.set_data({key: PixelData(data=torch.from_numpy(values)[None].long())})
    visualizer.add_datasample('', mmcv.imread(path, channel_order='rgb'), sample, out_file=picture)
