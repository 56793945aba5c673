# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The checks of the data, for whatever tool runs the config."""
import logging
import weakref
from typing import Sequence

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop

from ..errors import LaunchError
from .run import DataChecks, check_loops
from .schedules import check_accumulation, check_schedulers


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Checks data sets, classes, heads and evaluators before the first iteration, in any tool that uses mmengine's runner.

    Data sets are watched from the moment that the hook is built, which is before they are. The tools of this package do all
    checks without it. For mmdet's, mmseg's and mmpretrain's tools the config names it:
    ``custom_hooks = [dict(type='DataCheckHook')]``. ``docs/data_checks.md`` lists the checks.

    Args:
        check_all (bool): open every image and label map, not only a few of each data set. Default: False.
        classes (Sequence[str] | None): the order of the classes that the model was trained with, for a test. Default: None,
            that of the first data set.
        checks (DataChecks | None): checks that a tool makes. Default: None.

    Raises:
        LaunchError: from :meth:`before_run`, and while the data sets are built, for what cannot be corrected.
    """

    priority = 'VERY_HIGH'

    def __init__(self, check_all: bool = False, classes: Sequence[str] | None = None,
                 checks: DataChecks | None = None) -> None:
        self.done = checks is not None
        self.checks = checks or DataChecks(classes, check_all)
        if not self.done:
            self.checks.watch()
            weakref.finalize(self, self.checks.stop)  # with a run that is built and never started

    def before_run(self, runner) -> None:
        """Checks what the runner has built, before weights are loaded."""
        if self.done:
            return
        self.done = True
        loops = {name: getattr(runner, f'_{name}_loop') for name in ('train', 'val', 'test')}
        with self.checks.stopping_on_errors():
            if hasattr(loops['train'], 'dataloader'):  # the others are not built
                check_accumulation(runner.cfg)
                check_schedulers(runner.cfg, repair=False)
            check_loops(self.checks, runner, loops)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Looks at what a checkpoint says of its classes and, when a training is resumed, of its place in the epoch.

        Warns of class names in another order than the labels.

        Raises:
            LaunchError: a training by epochs would go on in the middle of one, which mmengine would begin again.
        """
        meta = checkpoint.get('meta') or {}
        found = {str(key).lower(): value for key, value in (meta.get('dataset_meta') or {}).items()}.get('classes')
        order = self.checks.order.classes
        if found and order and tuple(found) != order and set(found) == set(order):
            print_log(f'the checkpoint names its classes in the order {tuple(found)}, and the labels of the data follow the '
                      f'order {order}. If the names in the checkpoint are right, test it with tools/test.py of revcol_mm, '
                      'which maps the labels to them', logger='current', level=logging.WARNING)
        if runner._resume and isinstance(runner._train_loop, EpochBasedTrainLoop):
            self._check_place(runner, checkpoint)

    @staticmethod
    def _check_place(runner, checkpoint: dict) -> None:
        info = (checkpoint.get('message_hub') or {}).get('runtime_info') or {}
        iteration, epochs = checkpoint['meta'].get('iter', 0), info.get('max_epochs')
        length = info['max_iters'] // epochs if epochs and info.get('max_iters') else len(runner.train_dataloader)
        mends = any(type(hook).__name__ == 'ExactResumeHook' for hook in runner.hooks)  # which goes on inside of the epoch
        if iteration % length and not mends:
            raise LaunchError(f'a training by epochs must be resumed from a checkpoint at the end of an epoch ({length} '
                              f'iterations), but this one is of iteration {iteration}: resume from one of iteration '
                              f'{iteration // length * length}, or start from its weights with --cfg-options load_from=…; set '
                              'default_hooks.checkpoint.by_epoch=True for the next training')

