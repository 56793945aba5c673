# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What needs mmdet: test-time augmentation that merges masks, and a neck for maps of one resolution."""
from .simple_fpn import SimpleFPN
from .tta import InstanceTTAModel

__all__ = ['InstanceTTAModel', 'SimpleFPN']
