# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Former place of :class:`ForegroundIoUMetric`, which the configs of earlier runs name."""
from ..evaluation.foreground_iou import ForegroundIoUMetric

__all__ = ['ForegroundIoUMetric']
