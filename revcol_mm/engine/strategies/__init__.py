# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Strategies for training on several devices; :mod:`revcol_mm.engine` imports them."""
