# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The drift of reversible training, in the log."""
import re

import numpy as np
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from ...reversible import DriftMonitor


@HOOKS.register_module()
class ReversibleDriftHook(Hook):
    """Writes the drift of reversible training into the log.

    After a training iteration, the largest ``drift`` of all modules that train with ``reversible=True`` stands under
    ``train/drift`` in the message hub, and from there in the log, the JSON file and TensorBoard. It is how far the features
    that the backward pass rebuilt were from those of the forward pass, relative to the largest feature
    (see :mod:`revcol_mm.reversible`); 1e-6 is usual in float32. Nothing is written before the first backward pass has
    measured one.

    Args:
        interval (int): iterations between two entries. Default: 1.

    Raises:
        ValueError: if ``interval`` is not a positive integer.
    """

    priority = 'NORMAL'  # before LoggerHook, which reads the message hub

    def __init__(self, interval: int = 1) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval must be a positive integer, but got {interval!r}')
        self.interval = interval

    def before_train(self, runner) -> None:
        log_iter = runner.log_processor.get_log_after_iter

        def get_log_after_iter(*args, **kwargs) -> tuple[dict, str]:
            tag, text = log_iter(*args, **kwargs)
            drift = tag.get('drift', tag.get('train/drift'))
            return tag, text if drift is None else re.sub(r'\bdrift: \S+', f'drift: {drift:.2e}', text)

        runner.log_processor.get_log_after_iter = get_log_after_iter  # mmengine writes four decimals: 0.0000

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        if not self.every_n_train_iters(runner, self.interval):
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        monitors = [getattr(module, 'monitor', None) for module in model.modules() if getattr(module, 'reversible', False)]
        drifts = [monitor.drift for monitor in monitors if isinstance(monitor, DriftMonitor) and monitor.measured]
        if drifts:
            runner.message_hub.update_scalar('train/drift', float(np.max(drifts)))  # nan if one of them is nan
