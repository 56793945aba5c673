# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Names of version 0.1 that moved. They stay importable, because configs of finished runs and users' code hold them.

Every entry is the same object under its old name. New code uses the new places.
"""
import sys

from . import checkpoint, converters, models, patches, reversible
from .models import backbones

#: Former module of ``revcol_mm.models`` -> module that holds its contents.
MODULES = dict(c2f=backbones.c2f, deploy=backbones.deploy, revcol=backbones.revcol, reversible=reversible,
               sequence=backbones.sequence, stack=backbones.base, vit=backbones.vit)
#: Names that ``revcol_mm.checkpoint`` had.
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
