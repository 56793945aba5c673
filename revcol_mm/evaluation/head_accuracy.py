# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Accuracy of every head of intermediate supervision."""
from typing import Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmpretrain.registry import METRICS


@METRICS.register_module()
class HeadAccuracy(BaseMetric):
    """Top-1 accuracy, in percent, of every classifier of an ``IntermediateSupervisionHead(score_every_head=True)``.

    The heads count from 0, on column COL/4, to 3, on the last column.

    Args:
        collect_device (str): device on which the results of several processes are gathered. Default: 'cpu'.
        prefix (str | None): prefix of the metrics' names. Default: None, 'accuracy'.

    Raises:
        ValueError: if the predictions have no ``head_scores``.
    """

    default_prefix = 'accuracy'

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            if 'head_scores' not in sample:
                raise ValueError('HeadAccuracy needs predictions with head_scores, but they have none: use a model with '
                                 'head=dict(type="IntermediateSupervisionHead", score_every_head=True)')
            self.results.append((sample['head_scores'].argmax(1) == sample['gt_label']).cpu())  # (heads, )

    def compute_metrics(self, results: list[torch.Tensor]) -> dict[str, float]:
        accuracy = 100 * torch.stack(results).double().mean(0)
        return {f'head{index}_top1': value for index, value in enumerate(accuracy.tolist())}
