# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What the tools run: training, testing, inference, and the checks before them. In Python: models by name."""
from .checks import DataCheckHook
from .config import load_config
from .errors import LaunchError
from .models import init_model, predict

__all__ = ['DataCheckHook', 'LaunchError', 'init_model', 'load_config', 'predict']
