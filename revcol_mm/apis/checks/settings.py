# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Settings that OpenMMLab would take without a word and not as they are meant."""
import importlib.util
import os.path as osp
from typing import Any, Sequence

from mmengine.config import Config

from ..errors import LaunchError
from .common import kind_of, say
from .schedules import check_schedulers, count_accumulation

#: Modules that mmengine's visualizer backends import, one of which is enough, by the backend's type.
BACKENDS = dict(
    TensorboardVisBackend=('tensorboard', 'tensorboardX'), WandbVisBackend=('wandb', ), MLflowVisBackend=('mlflow', ),
    ClearMLVisBackend=('clearml', ), NeptuneVisBackend=('neptune', ), DVCLiveVisBackend=('dvclive', ), AimVisBackend=('aim', ))


def check_settings(cfg: Config, loaders: Sequence[str]) -> None:
    """All checks of settings for a run.

    Args:
        cfg (Config): the config; changed where a setting can be put right.
        loaders (Sequence[str]): the data loaders that the run uses, among 'train', 'val' and 'test'.

    Raises:
        LaunchError: for what needs a decision.
    """
    check_backends(cfg)
    for loader in loaders:
        name = f'{loader}_dataloader'
        if cfg.get(name):
            put_classes_right(cfg[name], name)
    if 'train' in loaders:
        count_accumulation(cfg)
        check_schedulers(cfg)


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
    """The packages of the visualizer's backends must be installed.

    Raises:
        LaunchError: one is not; the message names it.
    """
    visualizer = cfg.get('visualizer')
    visualizer = visualizer if isinstance(visualizer, dict) else {}
    for index, backend in enumerate(visualizer.get('vis_backends') or []):
        modules = BACKENDS.get(kind_of(backend), ())
        if modules and not any(importlib.util.find_spec(module) for module in modules):
            raise LaunchError(f'visualizer.vis_backends[{index}] ({kind_of(backend)}) needs the package {modules[0]}, which is '
                              f'not installed: pip install {modules[0]}, or leave this backend out')
