# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Training on a folder of one's own without writing a config: ``tools/train.py CONFIG --data FOLDER``.

===============  ===================================================================================
file             what it does
===============  ===================================================================================
:mod:`layouts`   finds images, annotations and classes in a folder
:mod:`names`     what the names of files and folders say
:mod:`foreign`   recognises the formats of VOC and YOLO, and names what converts them
:mod:`splits`    takes a part of the data for validation
:mod:`settings`  writes what was found into a config
:mod:`samples`   draws training samples as the model will see them
===============  ===================================================================================

docs/own_data.md describes the layouts for users.
"""
import os
import os.path as osp
import time
from pathlib import Path
from typing import Any, Mapping, Sequence

from mmengine.config import Config

from ...checkpoint.files import open_whole
from ..errors import LaunchError
from ..lock import lock_work_dir, rank_of
from .layouts import find_data
from .samples import draw_samples
from .settings import fill_config
from .splits import split_data

__all__ = ['draw_samples', 'own_data_folder', 'use_own_data']

PATIENCE = 20.  # seconds that a process waits for that of rank 0; if this one is refused, the others are ended before


def own_data_folder(cfg: Config) -> str:
    """The folder in the work folder for what is made of the user's data: the lists of a split, and pictures."""
    return osp.join(cfg.work_dir, 'own_data')


def use_own_data(cfg: Config, root: str, val_fraction: float | None = None, options: Mapping[str, Any] | None = None
                 ) -> Sequence[str]:
    """Makes a config train on a folder, and tells what was chosen.

    Args:
        cfg (Config): the config; changed in place. Its packages are registered.
        root (str): the folder, which is only read.
        val_fraction (float | None): share of the data that is taken for validation, between 0 and 1, where the folder has no
            part for it. The lists of both parts are written into the work folder. Default: None.
        options (Mapping | None): the settings of the command line that ``cfg`` has already, because a learning rate among
            them stays as it is. Default: None.

    Returns:
        Sequence[str]: lines for the user.

    Raises:
        LaunchError: the folder does not have what the config needs, or something in it is wrong.
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise LaunchError(f'--val-fraction must be between 0 and 1, but got {val_fraction}')
    data = find_data(root, cfg, split=val_fraction is not None)
    lists: dict[str, str] = {}
    if val_fraction is not None:
        data, lists = split_data(data, val_fraction, own_data_folder(cfg))
    lines = fill_config(cfg, data, options)
    if lists:
        with lock_work_dir(cfg.work_dir, cfg.launcher):
            _write(lists, rank_of(cfg.launcher) == 0)
    return lines


def _write(lists: dict[str, str], first: bool) -> None:
    """The process of rank 0 writes them, if it has got the lock. The others wait for it, and write them on another disk."""
    for path, text in lists.items():
        until = time.monotonic() + PATIENCE
        while not first and time.monotonic() < until and not _is_written(path, text):
            time.sleep(0.1)
        if not _is_written(path, text):
            os.makedirs(osp.dirname(path), exist_ok=True)
            with open_whole(path, 'w') as file:
                file.write(text)


def _is_written(path: str, text: str) -> bool:
    return osp.isfile(path) and Path(path).read_text(encoding='utf-8') == text
