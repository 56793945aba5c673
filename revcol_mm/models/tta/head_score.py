# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Test-time augmentation for classifiers, also for those with several heads."""
from typing import Sequence

import torch
from mmpretrain.models import AverageClsScoreTTA
from mmpretrain.models.heads import MultiLabelClsHead
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample


@MODELS.register_module()
class HeadScoreTTA(AverageClsScoreTTA):
    """Averages the class scores of several views, and the scores of every head (``head_scores``) if the model returns them.

    The predicted label is that of the mean scores. mmpretrain's ``AverageClsScoreTTA`` keeps the label of the first view.
    """

    def _merge_single_sample(self, data_samples: Sequence[DataSample]) -> DataSample:
        merged = super()._merge_single_sample(data_samples)
        head, scores = getattr(self.module, 'head', None), merged.pred_score
        if not isinstance(head, MultiLabelClsHead):
            merged.set_pred_label(scores.argmax())
        elif head.thr is not None:
            merged.set_pred_label(torch.where(scores >= head.thr)[0])
        else:
            merged.set_pred_label(scores.topk(head.topk)[1])
        if 'head_scores' in data_samples[0]:
            merged.set_field(sum(sample.head_scores for sample in data_samples) / len(data_samples), 'head_scores')
        return merged
