# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A classifier's test, from its scores."""
import functools
from typing import Any, Sequence

import mmcv
import numpy as np

from ..errors import LaunchError
from .findings import Findings, Judged


class ClassificationCollector:
    """Keeps the scores of every image.

    Args:
        classes (Sequence[str]): names in the order of the labels.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes
        self.samples: list[Any] = []

    def add(self, samples: Sequence[Any]) -> None:
        """Adds predictions of the model, with their truth.

        Raises:
            LaunchError: for an image with several labels, or without one.
        """
        for sample in samples:
            if len(sample.gt_label) != 1:
                raise LaunchError(f'--report needs one label for each image, but {sample.img_path} has {len(sample.gt_label)}: '
                                  'leave --report out')
        self.samples += [sample.cpu() for sample in samples]

    def findings(self) -> Findings:
        """Accuracy of each class, precision against recall of its scores, and which class was predicted for which."""
        count = len(self.classes)
        scores = np.stack([sample.pred_score.numpy() for sample in self.samples])  # (N, classes)
        truth = np.array([int(sample.gt_label[0]) for sample in self.samples])
        found = scores.argmax(1)
        confusion = np.bincount(count * truth + found, minlength=count * count).reshape(count, count)
        images = confusion.sum(1)
        top1 = np.divide(confusion.diagonal(), images, out=np.full(count, np.nan), where=images > 0)
        curves = [(name, recall_and_precision(scores[:, label], truth == label)) for label, name in enumerate(self.classes)
                  if (truth == label).any()]
        judged = [Judged(float(scores[index, label]), sample.img_path, functools.partial(_draw, sample=sample))
                  for index, (label, sample) in enumerate(zip(truth, self.samples))]
        return Findings({'images': images.tolist(), 'top-1': top1.tolist()}, self.classes, confusion, self.classes,
                        'score of the true class', judged, curves)


def recall_and_precision(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision at every threshold, from the highest score on.

    Args:
        scores (np.ndarray): (N, ).
        positive (np.ndarray): (N, ), bool, with at least one True.
    """
    order = np.argsort(-scores, kind='stable')
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores are one threshold
    hits = positive[order].cumsum()[last]
    return hits / positive.sum(), hits / (np.flatnonzero(last) + 1)


def _draw(visualizer: Any, picture: str, sample: Any) -> None:
    visualizer.visualize_cls(mmcv.imread(sample.img_path, channel_order='rgb'), sample, resize=224, out_file=picture)
