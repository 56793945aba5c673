# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Necks; need mmdet, see :mod:`revcol_mm.detection`."""
