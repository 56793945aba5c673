# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""All changes that ``import revcol_mm`` makes to other packages, each with its reason and when it can be removed.

Nothing else in the process changes: no environment variable is set, and :func:`torch.load` works as before.
"""
import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as runner_checkpoint

from . import ops
from .checkpoint import safe
from .version import installed_version


def apply_patches() -> None:
    """Makes all changes. Calling it again changes nothing."""
    ops.install()  # its docstring tells what it changes, and when
    enable_safe_loading()
    find_configs_of_forks()


def enable_safe_loading() -> None:
    """Makes mmengine's loaders refuse checkpoints that hold code, and load those that mmengine writes.

    - The loaders of mmengine for paths, URLs, ``pavi://``, ``s3://`` and ``open-mmlab://`` pass ``weights_only=True``, and
      those for other schemes call them. Reason: mmengine 0.10 passes ``weights_only=False`` for URLs and nothing elsewhere, so
      that the environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD would disable the check; onedl-mmengine 0.10 loads a
      refused file a second time without the check. Remove this when mmengine passes ``weights_only=True`` everywhere.
    - The types that mmengine writes into checkpoints are added to torch's list of safe types: HistoryBuffer, numpy's numbers
      and arrays of numbers, one-cycle schedulers and settings. All of them are data. Reason: without them torch refuses the
      checkpoints of mmengine's own runs. Remove this when mmengine registers the types, or writes plain data.
    - ``.safetensors`` files load wherever mmengine loads a checkpoint. Reason: mmengine cannot read them. Remove this when it
      can.
    """
    torch.serialization.add_safe_globals(safe.safe_globals())
    for loader, prefixes in ((safe.load_from_local, ['']),
                             (safe.load_from_http, ['http://', 'https://']),
                             (safe.load_from_pavi, ['pavi://']),
                             (safe.load_from_ceph, [r'(\S+\:)?s3://', r'(\S+\:)?petrel://']),
                             (safe.load_from_openmmlab, ['open-mmlab://', 'openmmlab://'])):
        setattr(runner_checkpoint, loader.__name__, loader)  # the loaders of other schemes call these functions by name
        CheckpointLoader.register_scheme(prefixes=prefixes, loader=loader, force=True)
    CheckpointLoader.register_scheme(prefixes=r'.*\.safetensors$', loader=safe.load_from_safetensors, force=True)


def find_configs_of_forks() -> None:
    """Makes ``_base_ = 'mmseg::…'`` work with onedl-mmsegmentation.

    Reason: mmengine looks for the configs of a package under the name of the original distribution. Remove this when mmengine
    knows the name of the fork.
    """
    found = installed_version('mmseg')
    if found is not None and found[0] != MODULE2PACKAGE['mmseg']:
        MODULE2PACKAGE['mmseg'] = 'mmseg'  # mmengine falls back to the import package of this name
