# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What the tools run: training, testing, inference, and the checks before them."""
from .checks import DataCheckHook
from .config import load_config
from .errors import LaunchError

__all__ = ['DataCheckHook', 'LaunchError', 'load_config']
