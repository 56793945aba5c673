# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""tools/test.py with an exported file in place of a checkpoint."""
import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import save_checkpoint

from revcol_mm.apis import test
from revcol_mm.apis.errors import LaunchError
from tests.common import load_tool, mostly_slow

pytestmark = pytest.mark.usefixtures('own_surroundings', 'no_visualizer_of_another_run')


def exported(workshop: Path, name: str) -> list[str]:
    """The config, a checkpoint with random weights, and the file that is made of it."""
    config, checkpoint, file = (str(workshop / f'{name}{end}') for end in ('.py', '_random.pth', '.onnx'))
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    classes = (*'0123456789', *(['background'] if name == 'segmentation' else []))
    save_checkpoint(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=classes))), checkpoint)
    load_tool('export_onnx').main([config, checkpoint, '--out', file, '--check', '64', '64', '--force'])
    return [config, checkpoint, file]


@pytest.mark.parametrize('name', mostly_slow(['detection', 'segmentation', 'classification'], ['classification']))
def test_a_file_has_the_metrics_of_its_checkpoint(workshop, name):
    config, checkpoint, file = exported(workshop, name)
    expected, found = (test.test([config, path, '--work-dir', 'work']) for path in (checkpoint, file))
    assert found.keys() == expected.keys() and len(found) > 1
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-3, nan_ok=True), key


def test_the_metric_of_every_head_is_left_out_because_a_file_has_the_last_head_only(workshop, capsys):
    config, _, file = exported(workshop, 'classification')
    cfg = Config.fromfile(config)
    cfg.test_evaluator = [dict(type='Accuracy', topk=(1, )), dict(type='HeadAccuracy')]
    cfg.custom_hooks = [dict(type='EMAHook')]  # as for ImageNet: it copies the model
    cfg.dump('every_head.py')
    metrics = test.test(['every_head.py', file, '--work-dir', 'work'])
    assert set(metrics) == {'accuracy/top1'}
    assert 'HeadAccuracy is left out' in capsys.readouterr().out
    cfg.test_evaluator = dict(type='HeadAccuracy')
    cfg.dump('only_heads.py')
    with pytest.raises(LaunchError, match='must have another metric than HeadAccuracy for an ONNX file, .*, but has none: add'):
        test.test(['only_heads.py', file, '--work-dir', 'work'])


def test_a_file_of_another_task_and_augmentation_are_refused(workshop):
    _, _, file = exported(workshop, 'classification')
    with pytest.raises(LaunchError, match=re.escape(f'{file} must be a model of detection')):
        test.test([str(workshop / 'detection.py'), file, '--work-dir', 'work'])
    with pytest.raises(LaunchError, match='--tta needs a checkpoint'):
        test.test([str(workshop / 'classification.py'), file, '--work-dir', 'work', '--tta'])
    with pytest.raises(LaunchError, match='there is no file missing.onnx'):
        test.test([str(workshop / 'classification.py'), 'missing.onnx', '--work-dir', 'work'])
