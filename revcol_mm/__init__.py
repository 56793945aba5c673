# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RevCol for OpenMMLab. Importing the package checks the versions around it, registers its classes and allows safe loading."""
from .version import __version__, check_versions

check_versions()  # before the imports below, which fail in less helpful ways when a version is too old

from . import checkpoint, engine, models  # noqa: E402
from .configs import config_path, find_configs_of_forks, get_config  # noqa: E402

checkpoint.enable_safe_loading()
find_configs_of_forks()

__all__ = ['__version__', 'checkpoint', 'config_path', 'engine', 'get_config', 'models']
