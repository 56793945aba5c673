# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A picture of the training so far."""
import json
import math
import os.path as osp
from collections import defaultdict
from pathlib import Path
from typing import Iterable

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ...checkpoint.files import write_whole

#: What is no metric among the values that are written after a validation, and sizes of objects, which would crowd the picture.
NO_METRICS = ('time', 'data_time', 'memory', 'step')
SIZES = ('_s', '_m', '_l')
MOST_NAMES = 12  # in a legend

Curves = dict[str, list[tuple[float, float]]]


@HOOKS.register_module()
class CurvesHook(Hook):
    """Draws ``curves.png`` in the work folder: losses, learning rate and metrics of the training so far.

    The picture is drawn after every validation and at the end of the training, from the file ``vis_data/scalars.json`` that
    mmengine's LocalVisBackend writes. If a training is resumed, the curves begin with those of the earlier runs in the same
    work folder, up to where it goes on. Without matplotlib, or without the file, there is no picture, and the log says so once.

    Args:
        name (str): the file's name in the work folder. Default: 'curves.png'.
    """

    priority = 'VERY_LOW'  # after LoggerHook, which writes the file

    def __init__(self, name: str = 'curves.png') -> None:
        self.name = name
        self.failed = False

    def after_val_epoch(self, runner, metrics: dict[str, float] | None = None) -> None:
        if runner._train_loop is not None and not isinstance(runner._train_loop, dict):  # validation in a training
            self.draw(runner)

    def after_train(self, runner) -> None:
        self.draw(runner)

    def draw(self, runner) -> None:
        """Draws the picture. What goes wrong must not stop a training."""
        if self.failed or not is_main_process():
            return
        try:
            files = [Path(runner.log_dir) / 'vis_data' / 'scalars.json']
            if runner._resume:
                files = sorted(set(Path(runner.work_dir).glob('*/vis_data/scalars.json')) | set(files))
            draw_curves(osp.join(runner.work_dir, self.name), *read_scalars(files))
        except Exception as error:  # such as a line without the iteration, or matplotlib's
            self.failed = True
            runner.logger.warning(f'{self.name} is not drawn: {type(error).__name__}: {error}')


def read_scalars(files: Iterable[Path]) -> tuple[Curves, Curves]:
    """Reads what was logged in a training.

    Args:
        files (Iterable[Path]): scalars.json of the runs, in the order of their time. A later run replaces the entries of
            earlier ones from its first iteration on, and the last validation before it, if it begins with that one. A line that
            is cut off is left out.

    Returns:
        tuple[dict, dict]: the values of the training and of the validations, as (iteration, value) by name. mmengine writes the
        epoch to a validation, which is 0 in a training by iterations; here it is the iteration that was logged before it.
    """
    train, val = [], []
    for file in files:
        here, iteration = ([], []), None
        for line in file.read_text(encoding='utf-8').splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # cut off: the process was killed while it wrote
                continue
            if all(name == 'step' or name.startswith('features/') for name in entry):  # of FeatureStatisticsHook
                continue
            if 'lr' in entry:
                iteration = entry['step']
            here['lr' not in entry].append(dict(entry, step=iteration))
        first = min((entry['step'] for entry in here[0]), default=math.inf)
        train[:] = [entry for entry in train if entry['step'] < first]
        begin = train[-1]['step'] if train else 0
        for entry in here[1]:
            if entry['step'] is None:  # a resumed run begins with the validation of its checkpoint
                first = entry['step'] = begin
        val[:] = [entry for entry in val if entry['step'] < first] + here[1]
        train += here[0]
    curves: tuple[Curves, Curves] = defaultdict(list), defaultdict(list)
    for found, entries in zip(curves, (train, val)):
        for entry in entries:
            for name, value in entry.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    found[name].append((entry['step'], value))
    return tuple(map(dict, curves))


def draw_curves(path: str, train: Curves, val: Curves) -> None:
    """Draws the values of :func:`read_scalars`: losses and learning rate by iterations, metrics by validations.

    Raises:
        ImportError: without matplotlib.
        CheckpointError: the picture cannot be written.
    """
    from matplotlib.figure import Figure  # without a window, whatever the backend
    from matplotlib.ticker import MaxNLocator
    panels = {
        'loss': {name: curve for name, curve in train.items() if 'loss' in name.rpartition('/')[2]},
        'learning rate': {name: train[name] for name in train if name == 'lr'},
        'validation': {name: curve for name, curve in val.items() if name.rpartition('/')[2] not in NO_METRICS
                       and not name.endswith(SIZES)}}
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return
    figure = Figure(figsize=(9, 3 * len(panels)), layout='constrained')
    for axis, (title, curves) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items()):
        for number, (name, curve) in enumerate(curves.items()):
            axis.plot(*zip(*curve), label=name, linewidth=2 if name == 'loss' else 1, marker='.' if len(curve) < 30 else None,
                      linestyle='-' if number < 10 else '--')  # matplotlib repeats its ten colours
        axis.set(ylabel=title, xlabel='iteration')
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if len(curves) <= MOST_NAMES:
            axis.legend(fontsize=7, loc='upper left', bbox_to_anchor=(1, 1))  # beside the curves, not over them
    with write_whole(path) as file:
        figure.savefig(file, format='png', dpi=90)
