# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""One process of a run in test_exact_resume_processes.py: the toy, sharded or not, from the start or resumed.

Usage: resume_processes.py DIRECTORY MAX_ITERS CHECKPOINT|- SETTINGS, where the settings are JSON.
"""
import json
import random
import sys

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from test_exact_resume import Noise, Toy

from revcol_mm.apis.runner import build_runner, leave_process_group


def main(folder: str, end: int, resume: str | None, sharded: bool = False, workers: int = 0, sampler: str = 'InfiniteSampler',
         accumulate: int = 1, launcher: str = 'pytorch') -> None:
    MODELS.register_module(module=Toy)
    DATASETS.register_module(module=Noise)
    cfg = Config(dict(
        model=dict(type='Toy'), work_dir=folder, launcher=launcher, default_scope='mmengine',
        train_cfg=dict(by_epoch=False, max_iters=end), param_scheduler=dict(type='LinearLR', by_epoch=False, end=20),
        train_dataloader=dict(batch_size=2, num_workers=workers, dataset=dict(type='Noise'),
                              sampler=dict(type=sampler, shuffle=True)),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-2), paramwise_cfg=dict(bias_lr_mult=2.0),
                           accumulative_counts=accumulate),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
                           logger=dict(type='LoggerHook', interval=1)),
        log_processor=dict(by_epoch=False), randomness=dict(seed=3)))
    if sharded:
        cfg.runner_type, cfg.strategy = 'FlexibleRunner', dict(type='RevColFSDPStrategy')
    if resume:
        cfg.resume, cfg.load_from = True, resume
    runner = build_runner(cfg)
    if resume:  # no test may pass because the generators begin alike
        torch.manual_seed(99), np.random.seed(98), random.seed(97)
    runner.train()
    del runner
    leave_process_group()


if __name__ == '__main__':
    folder, end, resume, settings = sys.argv[1:]
    main(folder, int(end), None if resume == '-' else resume, **json.loads(settings))
