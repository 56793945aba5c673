# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RevCol in mmpretrain: pre-training with intermediate supervision, and fine-tuning."""
from .classifier import IntermediateSupervisionClassifier
from .heads import IntermediateSupervisionHead, RevColClsHead
from .metrics import HeadAccuracy
from .tta import HeadScoreTTA

__all__ = ['HeadAccuracy', 'HeadScoreTTA', 'IntermediateSupervisionClassifier', 'IntermediateSupervisionHead', 'RevColClsHead']
