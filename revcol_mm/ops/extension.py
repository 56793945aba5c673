# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The module that stands in for ``mmcv._ext``, mmcv's compiled operators, and the decision whether it is needed."""
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Callable

import torch

from . import boxes, deform_attention, deform_conv, focal_loss, info, nms, roi, sync_bn

EXTENSION = 'mmcv._ext'
OPERATORS = (
    boxes.bbox_overlaps,
    deform_attention.ms_deform_attn_forward, deform_attention.ms_deform_attn_backward,
    deform_conv.deform_conv_forward, deform_conv.deform_conv_backward_input, deform_conv.deform_conv_backward_parameters,
    deform_conv.modulated_deform_conv_forward, deform_conv.modulated_deform_conv_backward,
    focal_loss.sigmoid_focal_loss_forward, focal_loss.sigmoid_focal_loss_backward,
    focal_loss.softmax_focal_loss_forward, focal_loss.softmax_focal_loss_backward,
    info.get_compiler_version, info.get_compiling_cuda_version,
    nms.nms, nms.softnms, nms.nms_match,
    roi.roi_align_forward, roi.roi_align_backward, roi.roi_pool_forward, roi.roi_pool_backward,
    sync_bn.sync_bn_forward_mean, sync_bn.sync_bn_forward_var, sync_bn.sync_bn_forward_output,
    sync_bn.sync_bn_backward_param, sync_bn.sync_bn_backward_data,
)
OWNERS = ('mmcv', 'mmcv-lite', 'mmcv-full', 'onedl-mmcv')  # distributions that own the folder mmcv/


class _Extension(ModuleType):
    """Has the operators above, and for every other name that mmcv looks up a function that refuses to run."""

    def __getattr__(self, name: str) -> Callable:
        # Python, inspect and IPython ask modules for names with underscores and must hear the truth; no operator has one.
        if name.startswith('_'):
            raise AttributeError(f'module {self.__name__!r} has no attribute {name!r}')
        return _refusal(name)


class _Loader(importlib.abc.Loader):
    """mmengine takes the operators for available if the module's spec has a loader; there is nothing left to load."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return stand_in()

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Lets ``mmcv.ops`` be imported where mmcv has no compiled operators that work; does nothing where it has.

    Importing revcol_mm calls it, before anything imports mmcv.ops. It does not import torchvision and writes no file.
    Calling it again changes nothing.

    It changes: ``sys.modules['mmcv._ext']`` becomes the module of this package's operators. Modules of ``mmcv.ops`` that were
    imported before, without success, get it as their ``ext_module``, and mmcv's transformer module gets the class
    ``MultiScaleDeformableAttention``. Reason: PyPI has the compiled mmcv as source only. Remove it when there are wheels of
    mmcv for the tested versions of torch, or when mmcv runs without compiled operators.

    Warns:
        UserWarning: If several distributions own the folder mmcv/, or if mmcv's compiled operators do not work, in which case
            those of this package are used.
    """
    if backend() == 'torchvision':
        return
    _check_owners()
    if EXTENSION in sys.modules or _compiled_is_there():
        reason = _why_compiled_fails()
        if reason is None:
            return
        warnings.warn(
            f"mmcv's compiled operators do not work beside torch {torch.__version__} ({reason}); probably they were built for "
            "another torch. revcol_mm's operators, on torchvision, are used instead. To keep these and lose the warning: "
            'pip uninstall -y mmcv && pip install mmcv-lite. To have compiled ones, build mmcv again beside this torch: '
            'pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation mmcv', stacklevel=2)
    sys.modules[EXTENSION] = stand_in()
    _mend_what_was_imported_before()


def backend() -> str:
    """Says whose operators ``mmcv.ops`` runs.

    Returns:
        str: 'mmcv' for compiled ones, 'torchvision' for those of this package.
    """
    return 'torchvision' if isinstance(sys.modules.get(EXTENSION), _Extension) else 'mmcv'


def describe() -> str:
    """The same in a sentence, for logs.

    Returns:
        str: Such as "operators of mmcv.ops: revcol_mm's, on torchvision 0.29.1".
    """
    if backend() == 'mmcv':
        return 'operators of mmcv.ops: compiled, of mmcv itself'
    try:
        return f"operators of mmcv.ops: revcol_mm's, on torchvision {version('torchvision')}"
    except PackageNotFoundError:
        return "operators of mmcv.ops: revcol_mm's, without torchvision, which most of them need"


@functools.cache
def stand_in() -> ModuleType:
    """The module that :func:`install` puts in place of ``mmcv._ext``; the same one at every call.

    Returns:
        ModuleType: With all operators of this package.
    """
    module = _Extension(EXTENSION, 'Stands in for the compiled operators of mmcv; made by revcol_mm.ops.')
    module.__spec__ = importlib.machinery.ModuleSpec(EXTENSION, _Loader(), origin=__name__)
    module.__loader__ = module.__spec__.loader
    module.__package__ = 'mmcv'
    for operator in OPERATORS:
        setattr(module, operator.__name__, operator)
    return module


@functools.cache
def _refusal(name: str) -> Callable:
    def refuse(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f'the operator {name} of mmcv.ops needs a compiled mmcv (revcol_mm brings the more common '
                                  'operators on torchvision, but not this one); docs/operators.md says how to get one')
    refuse.__name__ = refuse.__qualname__ = name
    return refuse


def _compiled_is_there() -> bool:
    """Whether mmcv's folder holds a compiled extension; mmcv is not imported for it."""
    mmcv = importlib.util.find_spec('mmcv')
    places = mmcv.submodule_search_locations if mmcv else None
    return bool(places) and importlib.machinery.PathFinder.find_spec(EXTENSION, places) is not None


def _check_owners() -> None:
    found = {}
    for name in OWNERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if len(found) > 1:
        names = ' and '.join(f'{name} {number}' for name, number in found.items())
        warnings.warn(f'{names} are installed side by side and own the same folder mmcv/, where the later has overwritten '
                      f'files of the earlier; to repair it: pip uninstall -y {" ".join(found)}, then pip install the one that '
                      'you want', stacklevel=3)


def _why_compiled_fails() -> str | None:
    """Loads mmcv's compiled operators and calls one; a library built for another torch may load and misread every tensor."""
    try:
        extension = importlib.import_module(EXTENSION)
        kept = extension.nms(torch.tensor([[0., 0, 1, 1]]), torch.ones(1), iou_threshold=0.5, offset=0).tolist()
        return None if kept == [0] else f'nms of one box keeps {kept}'
    except Exception as error:  # whatever a library of another torch may raise
        return str(error).strip().partition('\n')[0]


def _mend_what_was_imported_before() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith('mmcv.ops.') and hasattr(module, 'ext_module'):
            module.ext_module = stand_in()
    transformer = sys.modules.get('mmcv.cnn.bricks.transformer')
    if transformer is not None and not hasattr(transformer, 'MultiScaleDeformableAttention'):
        # mmcv.cnn went on without this class of mmcv.ops; mmdet and mmseg look for it there.
        transformer.MultiScaleDeformableAttention = importlib.import_module('mmcv.ops').MultiScaleDeformableAttention
