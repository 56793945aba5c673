# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
from .digits import DIGITS, make_digits

__all__ = ['DIGITS', 'make_digits']
