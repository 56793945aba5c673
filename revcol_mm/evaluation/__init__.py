# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Metrics; need mmpretrain or mmseg, see :mod:`revcol_mm.classification` and :mod:`revcol_mm.segmentation`."""
