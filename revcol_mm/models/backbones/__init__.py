# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Backbones; need mmengine and mmcv only. :mod:`revcol_mm.models` imports them."""
