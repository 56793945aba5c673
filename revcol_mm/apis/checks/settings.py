# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Settings that OpenMMLab would take without a word and not as they are meant."""
import difflib
import importlib.util
import inspect
import os.path as osp
from typing import Any, Sequence

from mmengine.config import Config
from mmengine.registry import OPTIMIZERS

from ...utils.configs import kind_of
from ..errors import LaunchError
from .common import class_of, say, settings_of_leaves
from .schedules import check_schedulers, count_accumulation

#: Modules that mmengine's visualizer backends import, one of which is enough, by the backend's type.
BACKENDS = dict(
    TensorboardVisBackend=('tensorboard', 'tensorboardX'), WandbVisBackend=('wandb', ), MLflowVisBackend=('mlflow', ),
    ClearMLVisBackend=('clearml', ), NeptuneVisBackend=('neptune', ), DVCLiveVisBackend=('dvclive', ), AimVisBackend=('aim', ))

#: Settings that are lists; all but the hooks may be a single dict.
LISTS = ('custom_hooks', 'param_scheduler', 'val_evaluator', 'test_evaluator')
PLAIN = (str, int, float, bool, list, tuple)


def check_settings(cfg: Config, loaders: Sequence[str]) -> None:
    """All checks of settings for a run.

    Args:
        cfg (Config): the config; changed where a setting can be corrected.
        loaders (Sequence[str]): the data loaders that the run uses, among 'train', 'val' and 'test'.

    Raises:
        LaunchError: for what needs a decision.
    """
    check_kinds(cfg)
    check_backends(cfg)
    check_optimizer(cfg)
    check_reduced_labels(cfg)
    for loader in loaders:
        name = f'{loader}_dataloader'
        if cfg.get(name):
            put_classes_right(cfg[name], name)
    if 'train' in loaders:
        count_accumulation(cfg)
        check_schedulers(cfg)


def check_kinds(cfg: Config) -> None:
    """Lists of settings must be lists of dicts; a text on the command line stays a text, which mmengine would take apart.

    Raises:
        LaunchError: one is something else.
    """
    for key in LISTS:
        value = cfg.get(key)
        listed = isinstance(value, (list, tuple)) or isinstance(value, dict) and key != 'custom_hooks'
        parts = value if isinstance(value, (list, tuple)) else ()
        if value is not None and not (listed and all(hasattr(part, 'get') or not isinstance(part, PLAIN) for part in parts)):
            raise LaunchError(f"{key} must be a list of dicts, such as [dict(type='…')], but is {value!r}: write them into "
                              'a config of your own; on the command line, a list that exists can be changed by numbers, such '
                              f'as {key}.0.type=…')


def check_optimizer(cfg: Config) -> None:
    """The optimizer must be registered; mmengine's error does not name it.

    Raises:
        LaunchError: it is not; the message names the one that was meant.
    """
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
    kind = optimizer.get('type') if hasattr(optimizer, 'get') else None
    if isinstance(kind, str) and OPTIMIZERS.get(kind) is None:
        close = difflib.get_close_matches(kind.rpartition('.')[2], OPTIMIZERS.module_dict, 1)
        raise LaunchError(f'optim_wrapper.optimizer.type must be an optimizer that is registered, but is {kind!r}'
                          + (f': did you mean {close[0]}?' if close else ': import its package with custom_imports'))


def check_reduced_labels(cfg: Config) -> None:
    """Data sets of one type must agree on ``reduce_zero_label``, or the metrics are those of labels that are shifted by one.

    Raises:
        LaunchError: they do not.
    """
    found: dict[str, dict[bool, str]] = {}
    for loader in ('train', 'val', 'test'):
        for dataset in settings_of_leaves((cfg.get(f'{loader}_dataloader') or {}).get('dataset')):
            own = dataset.get('reduce_zero_label', _default(class_of(dataset, cfg.get('default_scope')), 'reduce_zero_label'))
            if own is not None:
                found.setdefault(kind_of(dataset), {}).setdefault(bool(own), f'{loader}_dataloader')
    for kind, loaders in found.items():
        if len(loaders) > 1:
            raise LaunchError(f'reduce_zero_label must be the same for every {kind}, but is True in {loaders[True]} and False '
                              f'in {loaders[False]}: with True, the value 0 of a label map is ignored and 1 is the first '
                              'class; with False, 0 is the first class')


def _default(kind: Any, argument: str) -> Any:
    """The default of an argument of a class, or of the base class that has it."""
    for part in getattr(kind, '__mro__', ()):
        parameter = inspect.signature(part.__init__).parameters.get(argument) if part is not object else None
        if parameter is not None:
            return parameter.default
    return None


def put_classes_right(node: Any, key: str = '') -> None:
    """Makes a single class name a tuple of one, and ``CLASSES`` and ``PALETTE`` of former versions small letters.

    A text that is the name of a file stays: the libraries read class names from it.

    Args:
        node (Any): the settings of data loaders; changed in place.
        key (str): their name in the config. Default: ''.
    """
    if isinstance(node, (list, tuple)):
        for index, part in enumerate(node):
            put_classes_right(part, f'{key}.{index}')
        return
    if not isinstance(node, dict):
        return
    metainfo = node.get('metainfo')
    if isinstance(metainfo, dict):
        for name in [name for name in metainfo if name in ('CLASSES', 'PALETTE')]:
            metainfo.setdefault(name.lower(), metainfo.pop(name))
            say(f'{key}.metainfo.{name} is read as {name.lower()}')
    for holder, place in ((metainfo, f'{key}.metainfo'), (node, key)):
        if isinstance(holder, dict) and isinstance(holder.get('classes'), str) and not osp.isfile(holder['classes']):
            holder['classes'] = (holder['classes'], )
            say(f'{place}.classes is the text {holder["classes"][0]!r}, which is read as one class')
    for name in ('dataset', 'datasets'):
        if name in node:
            put_classes_right(node[name], f'{key}.{name}')


def check_backends(cfg: Config) -> None:
    """The visualizer's backends must be settings, and their packages installed.

    Raises:
        LaunchError: one is not; the message names it.
    """
    visualizer = cfg.get('visualizer')
    visualizer = visualizer if isinstance(visualizer, dict) else {}
    for index, backend in enumerate(visualizer.get('vis_backends') or []):
        if isinstance(backend, str):
            raise LaunchError(f'visualizer.vis_backends[{index}] must be a dict with a type, but is {backend!r}: write '
                              "visualizer.vis_backends=\"[{'type': 'LocalVisBackend'}, {'type': 'TensorboardVisBackend'}]\"")
        modules = BACKENDS.get(kind_of(backend), ())
        if modules and not any(importlib.util.find_spec(module) for module in modules):
            raise LaunchError(f'visualizer.vis_backends[{index}] ({kind_of(backend)}) needs the package {modules[0]}, which is '
                              f'not installed: pip install {modules[0]}, or leave this backend out')
