# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
from .revcol import RevCol

__all__ = ['RevCol']
