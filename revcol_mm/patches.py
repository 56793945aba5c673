# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""All changes that ``import revcol_mm`` makes to other packages, each with its reason and when it can be removed.

Nothing else in the process changes: no environment variable is set, and :func:`torch.load` works as before.
"""
import functools
import importlib.metadata
import importlib.util
import pkgutil
from importlib.abc import Loader
from pathlib import Path
from typing import Any, Callable

import mmengine.config.config
import mmengine.utils.package_utils
import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hooks import checkpoint_hook
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as runner_checkpoint
from torch import nn

from . import ops
from .checkpoint import download, files, safe, zoo
from .version import installed_version


def apply_patches() -> None:
    """Makes all changes. Calling it again changes nothing."""
    ops.install()  # its docstring tells what it changes, and when
    enable_safe_loading()
    find_configs_of_forks()
    write_last_checkpoint_whole()
    support_newer_versions()


def enable_safe_loading() -> None:
    """Makes mmengine's loaders refuse checkpoints that hold code, and load those that mmengine writes.

    - The loaders of mmengine for paths, URLs, ``pavi://``, ``s3://`` and ``open-mmlab://`` pass ``weights_only=True``, and
      those for other schemes call them. Reason: mmengine 0.10 passes ``weights_only=False`` for URLs and nothing elsewhere, so
      that the environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD would disable the check; onedl-mmengine 0.10 loads a
      refused file a second time without the check. Remove this when mmengine passes ``weights_only=True`` everywhere.
    - The types that mmengine writes into checkpoints are added to torch's list of safe types: HistoryBuffer, numpy's numbers
      and arrays of numbers, one-cycle schedulers, settings, and the arguments of command lines. All of them are data. Reason:
      without them torch refuses the checkpoints of mmengine's own runs. Remove this when mmengine registers the types, or
      writes plain data.
    - ``.safetensors`` files load wherever mmengine loads a checkpoint. Reason: mmengine cannot read them. Remove this when it
      can.
    - ``zoo:CONFIG_NAME`` names the published weights of a config wherever mmengine loads a checkpoint.
    """
    torch.serialization.add_safe_globals(safe.safe_globals())
    for loader, prefixes in ((safe.load_from_local, ['']),
                             (download.load_from_http, ['http://', 'https://']),
                             (safe.load_from_pavi, ['pavi://']),
                             (safe.load_from_ceph, [r'(\S+\:)?s3://', r'(\S+\:)?petrel://']),
                             (download.load_from_openmmlab, ['open-mmlab://', 'openmmlab://'])):
        setattr(runner_checkpoint, loader.__name__, loader)  # the loaders of other schemes call these functions by name
        CheckpointLoader.register_scheme(prefixes=prefixes, loader=loader, force=True)
    CheckpointLoader.register_scheme(prefixes=zoo.PREFIX, loader=load_from_zoo, force=True)


def load_from_zoo(filename: str, map_location: str | torch.device | None = None) -> Any:
    """Loads the published weights of a config, ``zoo:CONFIG_NAME``, under the current names, which mmengine's own tools need.

    Raises:
        CheckpointError: if there are none, or if they cannot be downloaded.
    """
    from .converters import to_current_names  # models, which need the operators that apply_patches() brings
    address = zoo.find_address(filename)
    return to_current_names(download.load_from_http(address, map_location), address)


def find_configs_of_forks() -> None:
    """Makes ``_base_ = 'mmseg::…'`` work with onedl-mmsegmentation.

    Reason: mmengine looks for the configs of a package under the name of the original distribution. Remove this when mmengine
    knows the name of the fork.
    """
    found = installed_version('mmseg')
    if found is not None and found[0] != MODULE2PACKAGE['mmseg']:
        MODULE2PACKAGE['mmseg'] = 'mmseg'  # mmengine falls back to the import package of this name


def write_last_checkpoint_whole() -> None:
    """Makes mmengine's CheckpointHook write ``last_checkpoint`` under another name first, and then rename it.

    Reason: mmengine empties the old file first. If the run is killed at that moment, or the disk is full, no file names a
    checkpoint. The hook's module opens no other file. Remove it when mmengine writes the file in this way.
    """
    checkpoint_hook.open = files.open_whole


def support_newer_versions() -> None:
    """Mends what breaks with a newer Python or setuptools. Remove each line when mmengine and mmcv no longer need it.

    ================  ======================  ==================================================================================
    package           breaks with             symptom and mend
    ================  ======================  ==================================================================================
    mmengine 0.10.7   setuptools 82 or none   "No module named 'pkg_resources'" wherever a config inherits ``mmdet::…``: its
                                              :func:`is_installed` and :func:`get_installed_path` ask importlib.metadata instead
    mmengine 0.10.7,  Python 3.14             "module 'pkgutil' has no attribute 'find_loader'" when an optimizer or SyncBN is
    mmcv 2.1.0                                built: :func:`find_loader`, as pkgutil had it
    ================  ======================  ==================================================================================
    """
    if 'pkg_resources' in mmengine.utils.package_utils.is_installed.__code__.co_names:
        for module in (mmengine.utils.package_utils, mmengine.utils, mmengine.config.config):
            module.is_installed = is_installed
            module.get_installed_path = get_installed_path
    if not hasattr(pkgutil, 'find_loader'):
        pkgutil.find_loader = find_loader


def is_installed(package: str) -> bool:
    """Says whether a distribution or an import package of this name is installed.

    Args:
        package (str): Such as 'mmsegmentation' or 'mmseg'.

    Returns:
        bool: Whether it is.
    """
    return _find(package) is not None


def get_installed_path(package: str) -> str:
    """Finds the folder of an import package.

    Args:
        package (str): Name of the distribution or of the import package, such as 'mmsegmentation' or 'mmseg'.

    Returns:
        str: Such as '…/site-packages/mmseg'.

    Raises:
        importlib.metadata.PackageNotFoundError: If neither is installed.
    """
    folder = _find(package)
    if folder is None:
        raise importlib.metadata.PackageNotFoundError(package)
    return folder


def mend_sliding_window(head: nn.Module) -> None:
    """Makes mmseg's heads that classify masks (MaskFormer, Mask2Former) work with ``test_cfg.mode='slide'``.

    Reason: mmseg's segmentor sets ``img_shape`` to the window's size, but the heads prefer ``pad_shape``, which stays that of
    the whole image, so that the windows' maps do not fit. Remove this when mmseg sets both. The checks before a run
    call it for a model that needs it.

    Args:
        head (nn.Module): The decode head. Heads of other kinds are left as they are.
    """
    for kind in type(head).__mro__:
        predict = vars(kind).get('predict')
        if kind.__name__ in ('MaskFormerHead', 'Mask2FormerHead') and kind.__module__.startswith('mmseg.') and predict:
            if not hasattr(predict, '__wrapped__'):
                kind.predict = _without_padded_size(predict)


def _without_padded_size(predict: Callable) -> Callable:
    @functools.wraps(predict)
    def predict_window(self, x, batch_img_metas: list[dict], test_cfg) -> torch.Tensor:
        if test_cfg.get('mode') == 'slide':
            batch_img_metas = [{key: value for key, value in meta.items() if key != 'pad_shape'} for meta in batch_img_metas]
        return predict(self, x, batch_img_metas, test_cfg)

    return predict_window


def find_loader(name: str) -> Loader | None:
    """Returns the loader of a module, or None if there is no such module; as pkgutil.find_loader did until Python 3.13.

    Args:
        name (str): Full name, such as 'mmcv._ext'.
    """
    spec = importlib.util.find_spec(name)
    return None if spec is None else spec.loader


def _find(package: str) -> str | None:
    names = [package]
    try:
        names += (importlib.metadata.distribution(package).read_text('top_level.txt') or '').split()
    except importlib.metadata.PackageNotFoundError:
        pass
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            return str(Path(spec.origin).parent)
    return None
