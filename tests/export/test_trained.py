# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Models that a short training on the digits has made: the metrics of a file are those of the model."""
from pathlib import Path
from typing import Callable

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from revcol_mm.apis import train
from revcol_mm.apis.inference import load_weights
from revcol_mm.datasets import make_digits
from revcol_mm.export import export_model
from tests.common import ROOT
from tests.export.demo import SIZES, run_file


def config_of(name: str) -> str:
    return str(ROOT / 'configs' / 'demo' / f'{name}.py')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with digits, and the backbone from which the demos start."""
    folder = tmp_path_factory.mktemp('trained')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_digits('data/digits', num_train=200, num_val=30)
        train.train([config_of('revcol_nano_digits_pretrain'), '--work-dir', 'pretrain', '--cfg-options',
                     *lasting('epochs', 1)])
    return folder


def lasting(unit: str, number: int) -> list[str]:
    """Settings of a training of so many iterations or epochs."""
    return [f'train_cfg.max_{unit}={number}', f'train_cfg.val_interval={number}',
            f'default_hooks.checkpoint.interval={number}']


def evaluate(cfg: Config, predict: Callable[[dict], list]) -> dict[str, float]:
    """Metrics of the config's test. ``predict`` gets and returns what the model's ``test_step`` does, one image at a time."""
    loader = Runner.build_dataloader(dict(cfg.test_dataloader, batch_size=1, num_workers=0, persistent_workers=False))
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    for data in loader:
        evaluator.process(data_samples=predict(data), data_batch=data)
    return evaluator.evaluate(len(loader.dataset))


def predict_with(path: Path, data: dict) -> list:
    """The data sample of one image with the outputs of a file."""
    sample, images = data['data_samples'][0], data['inputs'][0][None].flip(1)
    size = {} if path.stem == 'pretrain' else dict(size=torch.tensor(sample.ori_shape))
    found = run_file(path, images=images, **size)
    if 'boxes' in found:
        sample.pred_instances = InstanceData(bboxes=found.pop('boxes'), **found)
    else:
        sample.set_pred_score(found['scores'][0]).set_pred_label(found['scores'][0].argmax())
    return [sample]


@pytest.mark.slow
@pytest.mark.parametrize('name, work_dir, metric', [
    ('revcol_nano_digits_pretrain', 'pretrain', 'accuracy/top1'),
    ('cascade_rcnn_revcol_nano_digits', 'cascade', 'coco/segm_mAP'),
])
def test_metrics_of_a_file_are_those_of_the_model(name, work_dir, metric, folder, monkeypatch):
    """After a short training it finds something, but not all, so that some scores are near one another."""
    monkeypatch.chdir(folder)
    if work_dir != 'pretrain':
        start = (folder / 'pretrain' / 'last_checkpoint').read_text()
        train.train([config_of(name), '--work-dir', work_dir, '--cfg-options', f'load_from={start}', *lasting('iters', 90)])

    cfg = Config.fromfile(config_of(name))
    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.no_grad():
        model = MODELS.build(cfg.model).eval()
        load_weights(model, (folder / work_dir / 'last_checkpoint').read_text())
        deviations = export_model(model, str(folder / f'{work_dir}.onnx'), SIZES)
        expected = evaluate(cfg, model.test_step)
        found = evaluate(cfg, lambda data: predict_with(folder / f'{work_dir}.onnx', data))
    assert expected[metric] > 0
    assert found.keys() == expected.keys()
    scale = 1 if work_dir == 'cascade' else 100  # the classifier's are percentages
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=0.001 * scale), key
    assert list(deviations) == SIZES
    for deviation in deviations.values():
        assert deviation.get('boxes', 0) <= 0.01 and deviation.get('unmatched', 0) == 0
        assert deviation['scores'] <= 1e-4
