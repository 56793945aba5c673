# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The picture of a training's losses, learning rate and metrics."""
import json
import logging
import sys
from types import SimpleNamespace

import cv2
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner

from benchmarks.drills import DrillModel
from revcol_mm.engine.hooks.curves import CurvesHook, draw_curves, read_scalars


class Score(BaseMetric):
    default_prefix = 'made_up'

    def process(self, data_batch, data_samples) -> None:
        self.results.append(1)

    def compute_metrics(self, results) -> dict[str, float]:
        return dict(score=0.25 * len(results))


class ValModel(DrillModel):
    def val_step(self, data):
        return [dict()]


def run(folder, name: str, **kwargs) -> Runner:
    images = [dict(inputs=torch.randn(3, 32, 32), label=0) for _ in range(2)]
    loader = dict(dataset=images, batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False))
    return Runner(ValModel(), str(folder), experiment_name=name, train_dataloader=loader, val_dataloader=loader,
                  train_cfg=dict(by_epoch=True, max_epochs=2), val_cfg=dict(), val_evaluator=[Score()],
                  optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3)), custom_hooks=[dict(type='CurvesHook')],
                  log_processor=dict(window_size=1),
                  default_hooks=dict(checkpoint=None, logger=dict(type='LoggerHook', interval=1)), **kwargs)


def test_every_validation_renews_the_picture_of_what_was_logged(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr('revcol_mm.engine.hooks.curves.draw_curves',
                        lambda path, train, val: drawn.append((train, val)) or draw_curves(path, train, val))
    runner = run(tmp_path, 'curves')
    runner.train()
    assert cv2.imread(str(tmp_path / 'curves.png')) is not None
    assert [len(val['made_up/score']) for _, val in drawn] == [1, 2, 2]  # two validations, and the end
    train, val = drawn[-1]
    assert [step for step, _ in train['loss']] == [1, 2, 3, 4] and {value for _, value in train['lr']} == {1e-3}
    assert [value for _, value in train['loss']] == pytest.approx(
        runner.message_hub.get_scalar('train/loss').data[0].tolist(), rel=1e-3)
    assert val['made_up/score'] == [(2, 0.5), (4, 0.5)]


def test_a_resumed_run_replaces_the_iterations_that_it_repeats(tmp_path):
    lines = dict(first=[dict(lr=1, loss=4., step=1), dict(score=0.1, step=0),
                        dict(lr=1, loss=3., step=2), dict(score=0.3, step=0)],
                 second=[dict(lr=1, loss=2., step=2), dict(score=0.2, step=0)])
    for name, entries in lines.items():
        (tmp_path / name).write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    train, val = read_scalars([tmp_path / 'first', tmp_path / 'second'])
    assert train['loss'] == [(1, 4.), (2, 2.)] and val['score'] == [(1, 0.1), (2, 0.2)]


def test_the_validation_with_which_a_resumed_run_begins_belongs_to_its_checkpoint(tmp_path):
    lines = dict(first=[dict(lr=1, loss=4., step=1), dict(score=0.1, step=0),
                        dict(lr=1, loss=3., step=2), dict(score=0.2, step=0), dict(lr=1, loss=9., step=3)],
                 second=[dict(score=0.2, step=0), {'features/column0/level0/std': 1., 'step': 3}, dict(lr=1, loss=2., step=3),
                         dict(score=0.3, step=0)],
                 third=[dict(score=0.3, step=0)], fourth=[dict(score=0.5, step=0), dict(score=0.6, step=0)])
    for name, entries in lines.items():
        (tmp_path / name).write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    train, val = read_scalars([tmp_path / name for name in ('first', 'second', 'third')])
    assert train['loss'] == [(1, 4.), (2, 3.), (3, 2.)] and val['score'] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert not [name for name in val if name.startswith('features/')]
    # Several validations before the first line of the training.
    assert read_scalars([tmp_path / 'first', tmp_path / 'fourth'])[1]['score'] == [(1, 0.1), (2, 0.2), (3, 0.5), (3, 0.6)]


def test_a_line_that_a_killed_run_has_cut_off_is_left_out(tmp_path):
    lines = [json.dumps(dict(lr=1, loss=loss, step=step)) for step, loss in enumerate((4., 3., 2.), 1)]
    (tmp_path / 'first').write_text('\n'.join((lines[0], lines[1][:-9])))
    (tmp_path / 'second').write_text(lines[2] + '\n')
    train, _ = read_scalars([tmp_path / 'first', tmp_path / 'second'])
    assert train['loss'] == [(1, 4.), (3, 2.)]


def test_a_missing_matplotlib_stops_no_training(tmp_path, monkeypatch):
    runner = run(tmp_path, 'no_curves')
    lines = []
    runner.logger.addHandler(type('Lines', (logging.Handler, ), dict(emit=lambda self, record: lines.append(
        record.getMessage())))())
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    runner.train()
    assert runner.iter == 4 and not (tmp_path / 'curves.png').exists()
    assert sum(line.startswith('curves.png is not drawn: ') for line in lines) == 1


def test_no_line_of_the_log_stops_a_training(tmp_path):
    (tmp_path / 'vis_data').mkdir()
    (tmp_path / 'vis_data' / 'scalars.json').write_text(json.dumps(dict(lr=1, loss=4.)))  # of which iteration?
    said = []
    CurvesHook().draw(SimpleNamespace(log_dir=tmp_path, work_dir=tmp_path, _resume=False,
                                      logger=SimpleNamespace(warning=said.append)))
    assert said == ["curves.png is not drawn: KeyError: 'step'"]
