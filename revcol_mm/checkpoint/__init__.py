# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Checkpoints: loaded safely, padded, imported and published."""
from .backbone import Backbone, find_backbone
from .kernels import pad_kernel, pad_on_load
from .loading import load_pretrained
from .padding import PaddingReport, pad_checkpoint
from .safe import CheckpointError, enable_safe_loading, read_checkpoint

__all__ = ['Backbone', 'CheckpointError', 'PaddingReport', 'enable_safe_loading', 'find_backbone', 'load_pretrained',
           'pad_checkpoint', 'pad_kernel', 'pad_on_load', 'read_checkpoint']
