# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The models of the demos, trained for a short time: their files have the metrics of their checkpoints, in 8 bits nearly so."""
from pathlib import Path

import pytest

from revcol_mm.apis import test, train
from revcol_mm.datasets import make_digits
from tests.common import CONFIGS, load_tool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('own_surroundings', 'no_visualizer_of_another_run')]

DEMO = CONFIGS / 'demo'
LOADERS = [f'{split}_dataloader.{option}' for split in ('train', 'val', 'test')
           for option in ('num_workers=0', 'persistent_workers=False')] + ['randomness.seed=0']


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory) -> Path:
    """A folder with the digits, and the backbone that the demos start from."""
    folder = tmp_path_factory.mktemp('trained')
    make_digits(folder / 'data' / 'digits', num_train=400, num_val=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.train([str(DEMO / 'revcol_nano_digits_pretrain.py'), '--work-dir', 'pretrain', '--cfg-options', *LOADERS,
                     'train_cfg.max_epochs=2'])
    return folder


@pytest.mark.parametrize('name, iterations, metric, least, lost', [
    ('cascade_rcnn_revcol_nano_digits', 100, 'coco/bbox_mAP', 0.1, 0.1),
    ('upernet_revcol_nano_digits', 300, 'mIoU', 5, 5),
    ('revcol_nano_digits_pretrain', None, 'accuracy/top1', 60, 5),
])
def test_a_file_has_the_metrics_of_its_checkpoint(pretrained, monkeypatch, name, iterations, metric, least, lost):
    monkeypatch.chdir(pretrained)
    config, work, options = str(DEMO / f'{name}.py'), pretrained / name, ['--cfg-options', *LOADERS]
    if iterations is None:
        work = pretrained / 'pretrain'
    else:
        train.train([config, '--work-dir', str(work), *options, f'train_cfg.max_iters={iterations}',
                     f'load_from={(pretrained / "pretrain" / "last_checkpoint").read_text()}',
                     f'train_cfg.val_interval={iterations + 1}', f'default_hooks.checkpoint.interval={iterations}'])
    checkpoint, file, small = (work / 'last_checkpoint').read_text(), f'{name}.onnx', f'{name}_int8.onnx'
    load_tool('export_onnx').main([config, checkpoint, '--out', file])
    load_tool('quantize_onnx').main([file, config, '--out', small, '--images', '32'])
    expected, found, quantized = (test.test([config, path, '--work-dir', str(work / 'test'), *options])
                                  for path in (checkpoint, file, small))
    print({key: (value, found[key], quantized[key]) for key, value in expected.items()})
    assert expected[metric] > least
    # Metrics are rounded: AP to 0.001, the others to 0.01 %.
    assert found == {key: pytest.approx(value, abs=0.0015 if key.startswith('coco/') else 0.015, nan_ok=True)
                     for key, value in expected.items()}
    assert quantized[metric] == pytest.approx(expected[metric], abs=lost)
