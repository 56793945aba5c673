# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Checkpoints: loaded safely, padded, imported and published."""
from .backbone import Backbone, find_backbone
from .importing import ImportReport, export_official, import_checkpoint
from .kernels import pad_kernel, pad_on_load
from .loading import load_pretrained
from .padding import PaddingReport, pad_checkpoint
from .publishing import publish_checkpoint, strip_training_state
from .safe import CheckpointError, enable_safe_loading, read_checkpoint

__all__ = ['Backbone', 'CheckpointError', 'ImportReport', 'PaddingReport', 'enable_safe_loading', 'export_official',
           'find_backbone', 'import_checkpoint', 'load_pretrained', 'pad_checkpoint', 'pad_kernel', 'pad_on_load',
           'publish_checkpoint', 'read_checkpoint', 'strip_training_state']
