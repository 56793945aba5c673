# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Needs mmsegmentation; a config names it in ``custom_imports``."""
from typing import Sequence

from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS


@METRICS.register_module()
class ForegroundIoUMetric(IoUMetric):
    """IoU, accuracy and so on over the classes that matter: a large background, nearly always right, would flatter the mean.

    Pixels of the left-out classes still count where a digit was predicted on them, or they on a digit. ``aAcc`` is the share of
    the foreground's pixels that were labelled right.

    Args:
        background (Sequence[str]): names of the classes to leave out of the table and of the means. Default: ('background', ).
        **kwargs: as mmseg's :class:`IoUMetric`.
    """

    def __init__(self, background: Sequence[str] = ('background', ), **kwargs) -> None:
        super().__init__(**kwargs)
        self.background = tuple(background)

    def compute_metrics(self, results: list) -> dict[str, float]:
        meta, classes = self._dataset_meta, self.dataset_meta['classes']
        kept = [index for index, name in enumerate(classes) if name not in self.background]
        self.dataset_meta = dict(meta, classes=tuple(classes[index] for index in kept))
        try:
            return super().compute_metrics([tuple(area[kept] for area in areas) for areas in results])
        finally:
            self.dataset_meta = meta
