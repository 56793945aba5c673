# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Test-time augmentation for segmentors, also for those with a single channel."""
from typing import Sequence

from mmengine.registry import MODELS
from mmseg.models.segmentors import SegTTAModel
from mmseg.structures import SegDataSample


@MODELS.register_module()
class SegmentorTTAModel(SegTTAModel):
    """Averages the class probabilities of several views, as mmseg's ``SegTTAModel``, but with one channel, too.

    The ``seg_logits`` of a segmentor with ``out_channels=1`` are probabilities already. mmseg takes their sigmoid again, which
    is never below 0.5, so that every pixel would become the foreground.
    """

    def merge_preds(self, data_samples_list: Sequence[Sequence[SegDataSample]]) -> list[SegDataSample]:
        if self.module.out_channels == 1:
            for samples in data_samples_list:
                for sample in samples:
                    sample.seg_logits.data = sample.seg_logits.data.logit()
        return super().merge_preds(data_samples_list)
