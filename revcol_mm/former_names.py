# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Old names of modules and functions that moved after version 0.1. Configs of finished runs and users' code import them.

An old name is the same object as the new one. New code should use the new names.
"""
import sys

from . import checkpoint, converters, models, patches, reversible
from .models import backbones

#: Former module of ``revcol_mm.models`` -> module that now has its contents.
MODULES = dict(c2f=backbones.c2f, deploy=backbones.deploy, revcol=backbones.revcol, reversible=reversible,
               sequence=backbones.sequence, stack=backbones.base, vit=backbones.vit)
#: Former names in ``revcol_mm.checkpoint``.
CHECKPOINT = dict(enable_safe_loading=patches.enable_safe_loading,
                  **{name: getattr(converters, name) for name in converters.__all__})


def keep_former_names() -> None:
    """Makes the former names importable."""
    for name, module in MODULES.items():
        sys.modules[f'{models.__name__}.{name}'] = module
        setattr(models, name, module)
    for name, value in CHECKPOINT.items():
        setattr(checkpoint, name, value)
    checkpoint.__all__ = sorted({*checkpoint.__all__, *CHECKPOINT})
    reversible.run_columns = reversible.run_reversibly
