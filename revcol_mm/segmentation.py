# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Everything that needs mmsegmentation; a config names this module in ``custom_imports``."""
from .evaluation.foreground_iou import ForegroundIoUMetric
from .models.tta.segmentor import SegmentorTTAModel

__all__ = ['ForegroundIoUMetric', 'SegmentorTTAModel']
