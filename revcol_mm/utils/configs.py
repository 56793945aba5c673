# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Finds the configs by name, in a checkout and in an installed package, builds their models without memory, and reads settings.

mmengine resolves ``pkg::path`` for a fixed list of packages only. :func:`config_path` takes the place of ``revcol_mm::``.
"""
import copy
import difflib
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

#: What a model raises that is built or run with settings that do not go together.
MODEL_ERRORS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
_PACKAGE = Path(__file__).resolve().parent.parent


def config_folder() -> Path:
    """Returns the folder with the configs: inside the installed package, or in the checkout it is imported from."""
    installed = _PACKAGE / '.mim' / 'configs'
    return installed if installed.is_dir() else _PACKAGE.parent / 'configs'


def config_path(name: str) -> str:
    """Returns the path of one of the package's configs.

    Your own config inherits from it as follows, in every tool, without an import before::

        _base_ = __import__('revcol_mm').config_path('cascade_rcnn_revcol_b')

    Args:
        name (str): Path below ``configs``, with or without ``.py``, such as ``'cascade_rcnn_revcol_b'``.

    Returns:
        str: The absolute path.

    Raises:
        FileNotFoundError: If there is no such config; the message lists those with similar names, or all.
    """
    folder = config_folder()
    path = folder / (name if name.endswith('.py') else f'{name}.py')
    if not path.is_file():
        there = sorted(file.relative_to(folder).with_suffix('').as_posix() for file in folder.rglob('*.py')
                       if file.parent.name != '_base_')
        wanted = Path(name).name.removesuffix('.py')
        close = [known for known in there if Path(known).name == wanted] or difflib.get_close_matches(wanted, there)
        raise FileNotFoundError(f'revcol_mm has no config {name!r}; '
                                + (f'did you mean {" or ".join(close)}?' if close else f'its configs are {", ".join(there)}'))
    return str(path)


def get_config(name: str) -> Config:
    """Reads one of the package's configs.

    Args:
        name (str): As in :func:`config_path`.

    Returns:
        Config: The config, its bases resolved.

    Raises:
        FileNotFoundError: If there is no such config.
    """
    return Config.fromfile(config_path(name))


def build_on_meta(cfg: Config) -> nn.Module:
    """Builds the model of a config in eval mode, on the meta device: shapes without storage.

    The config stays as it is, although mmdet writes into the settings that it builds. Swin, ConvNeXt and others read values of
    tensors while they are built, which meta tensors do not have. Such a model is built on the CPU first.
    """
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        try:
            with torch.device('meta'):
                model = MODELS.build(copy.deepcopy(cfg.model))
        except RuntimeError as error:
            if 'meta' not in str(error):
                raise
            model = MODELS.build(copy.deepcopy(cfg.model))
    return model.to('meta').eval()  # torch.Tensor(…), which old code uses, ignores the device


def kind_of(settings: Any) -> str:
    """The name of a type in a config, without its scope: 'mmdet.CocoDataset' and the class itself are 'CocoDataset'.

    Configs in pure Python have classes and functions as types.
    """
    kind = settings.get('type') if hasattr(settings, 'get') else None
    return getattr(kind, '__name__', None) or str(kind).rpartition('.')[2]


def as_list(settings: Any) -> list:
    """The parts of settings that a config gives alone or as a list, such as evaluators: always a list."""
    return list(settings) if isinstance(settings, (list, tuple)) else [settings]


def replace_sync_bn(node: Any) -> bool:
    """Makes SyncBN, which runs on GPUs only, BN wherever it stands in settings; whether there was any."""
    found = isinstance(node, dict) and kind_of(node) in ('SyncBN', 'MMSyncBN', 'naiveSyncBN', 'SyncBatchNorm')
    if found:
        node['type'] = 'BN'
    parts = node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ()
    return any([replace_sync_bn(part) for part in parts]) or found
