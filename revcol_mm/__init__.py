# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RevCol for OpenMMLab.

Importing the package checks the versions around it, registers its backbones, hooks, optimizers and strategies, and changes what
:mod:`revcol_mm.patches` lists.
"""
from .version import __version__, check_versions

check_versions()  # before the imports below, which fail with less helpful messages when a version is too old

from .patches import apply_patches  # noqa: E402

apply_patches()  # before the imports below, some of which import mmcv.ops

from . import apis, checkpoint, converters, engine, models, ops  # noqa: E402
from .former_names import keep_former_names  # noqa: E402
from .models import RevCol  # noqa: E402
from .plain import create_model, list_models  # noqa: E402
from .utils.configs import config_path, get_config  # noqa: E402

keep_former_names()

__all__ = ['RevCol', '__version__', 'apis', 'checkpoint', 'config_path', 'converters', 'create_model', 'engine', 'get_config',
           'list_models', 'models', 'ops']
