# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Test-time augmentation for classifiers with several heads."""
from typing import Sequence

from mmpretrain.models import AverageClsScoreTTA
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample


@MODELS.register_module()
class HeadScoreTTA(AverageClsScoreTTA):
    """Averages the class scores of several views, and the scores of every head (``head_scores``) if the model returns them."""

    def _merge_single_sample(self, data_samples: Sequence[DataSample]) -> DataSample:
        merged = super()._merge_single_sample(data_samples)
        if 'head_scores' in data_samples[0]:
            merged.set_field(sum(sample.head_scores for sample in data_samples) / len(data_samples), 'head_scores')
        return merged
