# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The text log shows the size of the drift."""
import logging
import re

import pytest
import torch
from mmengine.runner import Runner

from benchmarks.drills import DrillModel


@pytest.mark.parametrize('hierarchy', [False, True])
def test_the_text_log_shows_a_small_drift(tmp_path, caplog, hierarchy):
    images = [dict(inputs=torch.randn(3, 32, 32), label=0) for _ in range(2)]
    runner = Runner(DrillModel(), str(tmp_path), experiment_name=f'drift_{hierarchy}', train_dataloader=dict(
        dataset=images, batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False)),
        log_processor=dict(by_epoch=False, log_with_hierarchy=hierarchy),
        train_cfg=dict(by_epoch=False, max_iters=2), optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3)),
        custom_hooks=[dict(type='ReversibleDriftHook')],
        default_hooks=dict(checkpoint=None, logger=dict(type='LoggerHook', interval=1)))
    lines = []
    runner.logger.addHandler(type('Lines', (logging.Handler, ), dict(emit=lambda self, record: lines.append(
        record.getMessage())))())
    runner.train()
    shown = [float(found[1]) for line in lines if (found := re.search(r'drift: (\S+)', line))]
    kept = runner.message_hub.get_scalar('train/drift').data[0]
    assert len(shown) == 2 and 0 < max(kept) < 5e-5  # four decimals would be 0.0000
    assert shown == pytest.approx(kept.tolist(), rel=1e-2)
