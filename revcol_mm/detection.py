# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Everything that needs mmdet; a config names this module in ``custom_imports``."""
from .models.necks.simple_fpn import SimpleFPN
from .models.tta.instance import InstanceTTAModel

__all__ = ['InstanceTTAModel', 'SimpleFPN']
