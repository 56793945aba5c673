# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Checkpoint files and state dicts: safe loading, writing, names and kernels. Nothing here imports a model."""
from .kernels import pad_kernel, pad_on_load
from .loading import load_pretrained
from .safe import CheckpointError, read_checkpoint

__all__ = ['CheckpointError', 'load_pretrained', 'pad_kernel', 'pad_on_load', 'read_checkpoint']
