# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Watches a test and writes its page."""
import contextlib
import math
import os.path as osp
import platform
import tempfile
import time
import warnings
from numbers import Real
from typing import Any, Iterator, Mapping, Sequence

import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from ...checkpoint.files import check_folder, open_whole
from ..checks.common import leaves
from ..errors import LaunchError
from ..pictures import build_visualizer
from .findings import Findings, Judged, draw_confusion, draw_curves, extremes
from .page import heading, page, paragraph, picture, table


class Reporter(Hook):
    """A hook for a test, which knows afterwards what a page needs.

    Use :meth:`watching` around the test, and :meth:`write` after it.

    Args:
        path (str): name of the page.
        cfg (Config): the config.
        checkpoint (str): what is tested, for the page.

    Raises:
        LaunchError: the config is none of a package whose tests can be reported, or several processes would test.
    """

    priority = 'VERY_LOW'

    def __init__(self, path: str, cfg: Config, checkpoint: str) -> None:
        self.scope = cfg.get('default_scope')
        if self.scope not in ('mmdet', 'mmseg', 'mmpretrain'):
            raise LaunchError(f'--report needs a config of mmdet, mmseg or mmpretrain, but the default_scope of {cfg.filename} '
                              f'is {self.scope!r}')
        if cfg.launcher != 'none':
            raise LaunchError(f'--report needs a test in one process, but got --launcher {cfg.launcher}: leave it out')
        if not path.endswith(('.html', '.htm')):
            raise LaunchError(f'--report must be a file that ends in .html, but got {path}')
        check_folder(osp.dirname(path))
        self.path, self.config, self.checkpoint = path, cfg.filename, checkpoint
        self.seconds: list[float] = []
        self.sizes: list[int] = []
        self.started = 0.
        self.collector = None
        self.evaluations: Mapping[str, Any] = {}

    @contextlib.contextmanager
    def watching(self, runner: Any) -> Iterator[None]:
        """A context for the test of a runner, whose loop is built."""
        self.runner = runner
        runner.register_hook(self)
        metainfo = runner.test_loop.dataloader.dataset.metainfo
        classes, self.visualizer = metainfo['classes'], build_visualizer(self.scope, metainfo)
        if self.scope == 'mmdet':
            from .detection import recorded_evaluations
            if any(getattr(metric, 'use_mp_eval', False) for metric in runner.test_evaluator.metrics):
                raise LaunchError('--report needs the evaluation of one process, but test_evaluator.use_mp_eval is True: add '
                                  '--cfg-options test_evaluator.use_mp_eval=False')
            with recorded_evaluations() as self.evaluations:
                yield
            return
        if self.scope == 'mmseg':
            from .segmentation import SegmentationCollector
            ignored = [metric.ignore_index for metric in runner.test_evaluator.metrics if hasattr(metric, 'ignore_index')]
            self.collector = SegmentationCollector(classes, *ignored[:1])
        else:
            from .classification import ClassificationCollector
            self.collector = ClassificationCollector(classes)
        yield

    def before_test_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        _wait()
        self.started = time.perf_counter()

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs: Sequence | None = None) -> None:
        _wait()
        self.seconds.append(time.perf_counter() - self.started)
        self.sizes.append(len(outputs))
        if self.collector is not None:
            self.collector.add(outputs)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Writes the page.

        Args:
            metrics (Mapping): what the test has returned. What is no number is shown as text.

        Raises:
            LaunchError: a detector's test had no CocoMetric of boxes.
            CheckpointError: the page cannot be written.
        """
        findings = self._findings()
        parts = [table('test', [('', ['config', 'checkpoint', 'images', 'speed']),
                                ('value', [str(self.config), self.checkpoint, str(sum(self.sizes)), self._speed()])]),
                 heading('Metrics'), table('metrics', [
                     ('metric', list(metrics)), ('value', [_number(value) for value in metrics.values()])]),
                 heading('Classes'), table('classes', [('class', findings.classes), *findings.table.items()])]
        if findings.curves:
            parts.append(picture(draw_curves(findings.curves), 'Precision against recall of each class'))
        parts += [heading('Confusion'), picture(draw_confusion(findings.confusion, findings.confused),
                                                'Shares of each true class by the class that was predicted'),
                  table('confusion', [('truth', findings.confused), *zip(
                      map(str, findings.confused), findings.confusion.T.tolist())])]
        best, worst = extremes(findings.images)
        for name, images in dict(Worst=worst, Best=best).items():
            parts += [heading(f'{name} images'), paragraph(f'By {findings.judged_by}.'), *map(self._picture, images)]
        with open_whole(self.path, 'w') as file:
            file.write(page(f'Test of {osp.basename(self.checkpoint)}', parts))

    def _findings(self) -> Findings:
        if self.collector is not None:
            return self.collector.findings()
        from .detection import find_of_detection
        if 'bbox' not in self.evaluations:
            raise LaunchError("--report needs a CocoMetric in test_evaluator that evaluates 'bbox', and predictions, but there "
                              'was none')
        paths: dict[int, str] = {}
        for dataset in leaves(self.runner.test_loop.dataloader.dataset):
            paths.update((info['img_id'], info['img_path']) for info in map(dataset.get_data_info, range(len(dataset))))
            labels = dict(dataset.cat2label)
        return find_of_detection(self.evaluations, paths, labels)

    def _speed(self) -> str:
        """Without the first batch, in which memory is allocated and algorithms are chosen."""
        seconds, sizes = self.seconds[1:] or self.seconds, self.sizes[1:] or self.sizes
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'
        return (f'{1000 * sum(seconds) / sum(sizes):.1f} ms per image in batches of {max(sizes)}, without loading ({device}, '
                f'{platform.machine()}, torch {torch.__version__})')

    def _picture(self, image: Judged) -> str:
        caption = f'{image.path}: {image.score:.3f}. ' + ('Truth and prediction' if self.scope == 'mmpretrain' else
                                                         'Left: truth. Right: prediction')
        with tempfile.TemporaryDirectory() as folder:
            file = osp.join(folder, 'picture.jpg')
            with warnings.catch_warnings():
                warnings.filterwarnings('ignore', '.*out of bounds')  # a box at the edge of its image
                image.draw(self.visualizer, file)
            with open(file, 'rb') as content:
                return picture(content.read(), caption, 'jpeg')


def _number(value: Any) -> float | str:
    """A metric as a number, also of a tensor or array without dimensions; nan for COCO's -1, no such objects; or its text."""
    if getattr(value, 'ndim', None) == 0:
        value = value.item()
    if not isinstance(value, Real):
        return str(value)
    return math.nan if value == -1 else float(value)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
