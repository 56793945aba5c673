# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Constructors of optimizers; :mod:`revcol_mm.engine` imports them."""
