# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What needs mmdet: test-time augmentation that merges masks."""
from .tta import InstanceTTAModel

__all__ = ['InstanceTTAModel']
