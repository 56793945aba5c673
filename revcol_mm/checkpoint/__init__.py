# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Checkpoints: loaded safely, padded, imported and published."""
from .loading import load_pretrained
from .safe import CheckpointError, enable_safe_loading, read_checkpoint

__all__ = ['CheckpointError', 'enable_safe_loading', 'load_pretrained', 'read_checkpoint']
