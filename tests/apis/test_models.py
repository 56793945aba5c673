# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Models by name in Python, and the authors' files in every tool that takes a checkpoint."""
import re
from operator import attrgetter

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

from revcol_mm.apis import LaunchError, init_model, predict, train
from revcol_mm.apis.config import load_named_config
from revcol_mm.apis.runner import build_runner
from revcol_mm.checkpoint import CheckpointError, zoo
from revcol_mm.checkpoint import download as downloads
from revcol_mm.checkpoint.zoo import Entry
from tests.common import ROOT, run_tool

DEMO = ROOT / 'configs' / 'demo'
TASKS = dict(detection='cascade_rcnn_revcol_nano_digits', segmentation='upernet_revcol_nano_digits',
             classification='revcol_nano_digits_cls')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A photo, and random weights of the demos' models as the authors' code would have saved them."""
    folder = tmp_path_factory.mktemp('models')
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(folder / 'photo.png')
    for task, name in TASKS.items():
        cfg = load_named_config(str(DEMO / f'{name}.py'))
        torch.manual_seed(1)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            weights = MODELS.build(cfg.model).state_dict()
        if task == 'classification':
            contents = dict(model={key.partition('.')[2]: value for key, value in weights.items()})
        else:
            classes = tuple('0123456789') + ('background', ) * (task == 'segmentation')
            contents = dict(meta=dict(CLASSES=classes, mmcv_version='1.7.0'), state_dict={
                **weights, 'ema_backbone_stem_0_weight': weights['backbone.stem.0.weight']})
        torch.save(contents, folder / f'{task}.pth')
    return folder


@pytest.fixture
def published(folder, monkeypatch):
    """The demos' configs are those of the model index, and the files above are published."""
    monkeypatch.setattr(zoo, 'config_folder', lambda: DEMO)
    monkeypatch.setattr(zoo, 'read_index', lambda: {
        name: Entry(name, (), task, '', f'https://host/{task}.pth') for task, name in TASKS.items()})
    monkeypatch.setenv(downloads.MIRROR, str(folder))


@pytest.fixture
def lines(monkeypatch):
    """What print_log gets."""
    lines = []
    monkeypatch.setattr('revcol_mm.converters.importing.print_log', lambda message, **_: lines.append(message))
    return lines


@pytest.mark.parametrize('task', TASKS)
def test_a_model_by_name_predicts_what_the_packages_own_inferencer_does(folder, published, lines, task):
    name = f'demo/{TASKS[task]}'
    model = init_model(name, device='cpu')
    line, = lines
    assert re.search(rf"{task}\.pth is a file of the authors' code: its \d+ weights were converted", line)
    assert not model.training and model.dataset_meta['classes'][0] == '0'
    path = str(folder / 'photo.png')
    sample = predict(model, path)
    pixels = np.asarray(Image.open(path))[..., ::-1].copy()  # BGR, as OpenCV reads it
    for other in (*predict(model, [path, pixels]), *model.inferencer.forward(
            [batch[1] if task == 'detection' else batch for batch in model.inferencer.preprocess([path])][0])):
        for field in dict(detection=('pred_instances.bboxes', 'pred_instances.scores', 'pred_instances.masks'),
                          segmentation=('pred_sem_seg.data', ), classification=('pred_score', ))[task]:
            one, two = map(attrgetter(field), (sample, other))
            torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(two), rtol=0, atol=0)


def test_a_model_without_weights_is_random_and_a_path_is_a_path(folder):
    path = str(DEMO / f'{TASKS["classification"]}.py')
    weights = torch.load(folder / 'classification.pth', weights_only=True)['model']
    random, loaded = (init_model(path, checkpoint, 'cpu').backbone.stem[0].weight
                      for checkpoint in (None, str(folder / 'classification.pth')))
    assert torch.equal(loaded, weights['stem.0.weight']) and not torch.equal(random, loaded)


def test_bad_input_is_named_in_one_sentence(folder, published):
    path = str(DEMO / f'{TASKS["classification"]}.py')
    for arguments, kind, sentence in (
            (('revcol_q', ), LaunchError, 'there is no config revcol_q'),
            ((path, 'zoo:revcol_q'), CheckpointError, "there is no 'revcol_q'"),
            ((path, str(folder / 'detection.pth')), CheckpointError, 'detection.pth does not fit the config'),
            ((path, 'none.pth'), LaunchError, 'there is no checkpoint none.pth'),
            ((path, 'zoo', 'cuda:99'), LaunchError, "device 'cuda:99' cannot be used")):
        with pytest.raises(kind, match=sentence) as error:
            init_model(*arguments)
        assert '\n' not in str(error.value)
    model = init_model(path, device='cpu')
    with pytest.raises(ValueError, match='none.jpg: it cannot be read as an image'):
        predict(model, 'none.jpg')
    for image, got in ((np.zeros((8, 9, 3)), r'float64 \(8, 9, 3\)'), (np.zeros((8, 9), np.uint8), r'uint8 \(8, 9\)'),
                       (np.zeros((8, 9, 4), np.uint8), r'uint8 \(8, 9, 4\)'), (torch.zeros(8, 9, 3), 'Tensor')):
        with pytest.raises(ValueError, match=rf'an image must be an array \(H, W, 3\) of uint8, BGR, but got {got}$'):
            predict(model, [image])
    with pytest.raises(TypeError, match='must come from revcol_mm.apis.init_model, but got a Linear'):
        predict(torch.nn.Linear(1, 1), 'photo.jpg')


@pytest.mark.parametrize('task', [pytest.param('detection', marks=pytest.mark.slow), 'classification'])
def test_infer_takes_zoo(folder, published, tmp_path, task):
    config = str(DEMO / f'{TASKS[task]}.py')
    for number, checkpoint in enumerate(('zoo', f'zoo:{TASKS[task]}')):
        result = run_tool('infer', config, checkpoint, str(folder / 'photo.png'), '--out', str(tmp_path / str(number)),
                          '--device', 'cpu', '--no-pictures')
        assert result.returncode == 0, result.stderr
    one, two = ((tmp_path / number / 'predictions.json').read_text() for number in '01')
    assert one == two and len(one) > 100
    mine = tmp_path / 'mine.py'
    mine.write_text(f'_base_ = {config!r}')
    result = run_tool('infer', str(mine), 'zoo', str(folder / 'photo.png'), '--out', str(tmp_path / '2'))
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert 'mine.py is not one of them: name the config' in result.stderr


@pytest.mark.parametrize('runner_type', ['Runner', 'FlexibleRunner'])
def test_load_from_takes_a_classifier_of_the_authors(folder, published, lines, tmp_path, runner_type):
    """Into a detector only its backbone goes."""
    cfg = load_named_config(str(DEMO / f'{TASKS["classification"]}.py'))
    cfg.work_dir, cfg.runner_type, cfg.load_from = str(tmp_path), runner_type, str(folder / 'classification.pth')
    cfg.train_dataloader = cfg.val_dataloader = cfg.test_dataloader = None
    for key in ('train_cfg', 'val_cfg', 'test_cfg', 'val_evaluator', 'test_evaluator', 'optim_wrapper', 'param_scheduler'):
        cfg[key] = None
    runner = build_runner(cfg)
    if runner_type == 'FlexibleRunner':
        runner.strategy.prepare(runner.model)
        runner.model = runner.strategy.model
    runner.load_or_resume()
    weights = torch.load(folder / 'classification.pth', weights_only=True)['model']
    assert all(torch.equal(value, weights[key.partition('.')[2]]) for key, value in runner.model.state_dict().items())
    assert len(lines) == 1


def test_a_training_is_not_resumed_from_published_weights(published, tmp_path):
    config = str(DEMO / f'{TASKS["classification"]}.py')
    with pytest.raises(LaunchError, match='zoo names published weights, .*no training state.* --cfg-options load_from=zoo$'):
        train.train([config, '--resume', 'zoo', '--work-dir', str(tmp_path)])
