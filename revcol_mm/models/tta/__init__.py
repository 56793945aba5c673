# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Test-time augmentation; needs mmdet, mmseg or mmpretrain: see :mod:`revcol_mm.detection` and its neighbours."""
