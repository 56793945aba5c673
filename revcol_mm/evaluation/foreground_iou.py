# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""IoU without the background."""
from typing import Sequence

from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS


@METRICS.register_module()
class ForegroundIoUMetric(IoUMetric):
    """IoU and accuracy without the background, which is large and easy, and would raise the mean.

    Background pixels still count where a foreground class was predicted on them, or the background on a foreground class.
    ``aAcc`` is the share of foreground pixels with the right label.

    Args:
        background (Sequence[str]): names of the classes to leave out. Default: ('background', ).
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
