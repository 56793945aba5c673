# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Classifiers; need mmpretrain, see :mod:`revcol_mm.classification`."""
