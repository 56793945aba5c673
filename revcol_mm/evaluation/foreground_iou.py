# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""IoU without the background."""
from typing import Sequence

from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS

from ..checkpoint.safe import first_names


@METRICS.register_module()
class ForegroundIoUMetric(IoUMetric):
    """IoU and accuracy without the background, which is large and easy, and would raise the mean.

    A background pixel counts as an error if a foreground class was predicted there, and a foreground pixel if the background
    was. ``aAcc`` is the share of foreground pixels with the right label.

    Args:
        background (str | Sequence[str]): name or names of the classes to leave out. Default: 'background'.
        **kwargs: as mmseg's :class:`IoUMetric`.

    Raises:
        ValueError: if the data set has no class of such a name, or no other class; raised when the metric gets the data set's
            ``metainfo``.
    """

    def __init__(self, background: str | Sequence[str] = 'background', **kwargs) -> None:
        super().__init__(**kwargs)
        self.background = (background, ) if isinstance(background, str) else tuple(background)

    @IoUMetric.dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict) -> None:
        classes = tuple((dataset_meta or {}).get('classes') or ())
        if not set(self.background) < set(classes):
            raise ValueError(f'background of ForegroundIoUMetric must be some of the classes ({first_names(classes, 10)}), and '
                             f'not all of them, but got {self.background}: correct the names, or use IoUMetric')
        self._dataset_meta = dataset_meta

    def compute_metrics(self, results: list) -> dict[str, float]:
        meta, classes = self._dataset_meta, self.dataset_meta['classes']
        kept = [index for index, name in enumerate(classes) if name not in self.background]
        self._dataset_meta = dict(meta, classes=tuple(classes[index] for index in kept))
        try:
            return super().compute_metrics([tuple(area[kept] for area in areas) for areas in results])
        finally:
            self._dataset_meta = meta
