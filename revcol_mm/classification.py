# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Everything that needs mmpretrain; a config names this module in ``custom_imports``."""
from .evaluation.head_accuracy import HeadAccuracy
from .models.classifiers.intermediate_supervision import IntermediateSupervisionClassifier
from .models.heads.cls_heads import IntermediateSupervisionHead, RevColClsHead
from .models.tta.head_score import HeadScoreTTA

__all__ = ['HeadAccuracy', 'HeadScoreTTA', 'IntermediateSupervisionClassifier', 'IntermediateSupervisionHead', 'RevColClsHead']
