# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The operators of ``mmcv.ops`` without mmcv's build: torchvision's prebuilt kernels and torch, on the CPU and on GPUs.

mmcv's Python files look their native functions up in the module ``mmcv._ext``, which has to be compiled and which mmcv-lite
lacks. :func:`install` puts a Python module of that name in its place. The other modules hold the functions, one family each,
under the names and with the signatures that mmcv calls. A compiled ``mmcv._ext`` that works is left alone. docs/operators.md
says what is there and what is not.
"""
from .extension import backend, describe, install

__all__ = ['backend', 'describe', 'install']
