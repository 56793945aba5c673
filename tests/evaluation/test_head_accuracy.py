# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The accuracy of each head of a classifier with intermediate supervision."""
import pytest
import torch
from mmpretrain.registry import METRICS

import revcol_mm.classification  # noqa: F401


def test_head_accuracy_counts_each_head():
    metric = METRICS.build(dict(type='HeadAccuracy'))
    eye = torch.eye(3)
    for label, picks in ((0, (0, 0, 1, 2)), (2, (2, 0, 1, 2))):
        metric.process({}, [dict(head_scores=eye[list(picks)], gt_label=torch.tensor([label]))])
    assert metric.evaluate(2) == {'accuracy/head0_top1': 100., 'accuracy/head1_top1': 50., 'accuracy/head2_top1': 0.,
                                  'accuracy/head3_top1': 50.}


def test_head_accuracy_asks_for_the_scores_it_needs():
    metric = METRICS.build(dict(type='HeadAccuracy'))
    with pytest.raises(ValueError, match='score_every_head=True'):
        metric.process({}, [dict(pred_score=torch.zeros(3), gt_label=torch.tensor([0]))])
