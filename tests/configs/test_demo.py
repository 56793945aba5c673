# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Every head trains on the bundled digits through tools/train.py, and is tested through tools/test.py with pictures drawn."""
import json
import os
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config

from revcol_mm.datasets import make_digits
from tests.common import ROOT

DEMO = ROOT / 'configs' / 'demo'
LOADERS = [f'{split}_dataloader.{option}' for split in ('train', 'val', 'test')
           for option in ('num_workers=0', 'persistent_workers=False', 'batch_size=4')]
ITERATIONS = 3


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Where the tools are run, as from a checkout: a small data set in data/digits."""
    folder = tmp_path_factory.mktemp('demo')
    make_digits(folder / 'data' / 'digits', num_train=8, num_val=4)
    return folder


def run(folder, tool, *arguments):
    done = subprocess.run([sys.executable, ROOT / 'tools' / tool, *arguments], cwd=folder, capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-3000:]


def scores(folder):
    """The metrics that tools/test.py wrote beside its log."""
    found = sorted(path for path in folder.glob('*/*.json') if path.parent.name == path.stem)
    return json.loads(found[-1].read_text().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize('head, metrics', [
    ('cascade_rcnn_revcol_nano', {'coco/bbox_mAP', 'coco/segm_mAP'}),
    ('htc_revcol_nano', {'coco/bbox_mAP', 'coco/segm_mAP'}),
    ('dino_revcol_nano', {'coco/bbox_mAP'}),
    ('mask_rcnn_revcol_vit', {'coco/bbox_mAP', 'coco/segm_mAP'}),
    ('upernet_revcol_nano', {'mIoU'}),
    ('mask2former_revcol_nano', {'mIoU'}),
])
def test_every_head_trains_and_is_tested_on_the_digits(folder, head, metrics):
    config, work_dir = DEMO / f'{head}_digits.py', folder / head
    run(folder, 'train.py', config, '--work-dir', work_dir, '--cfg-options', *LOADERS, f'train_cfg.max_iters={ITERATIONS}',
        'train_cfg.val_interval=1000', f'default_hooks.checkpoint.interval={ITERATIONS}')
    weights = torch.load(work_dir / f'iter_{ITERATIONS}.pth', weights_only=True)['state_dict']
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())

    run(folder, 'test.py', config, work_dir / f'iter_{ITERATIONS}.pth', '--work-dir', work_dir / 'test', '--show-dir',
        work_dir / 'pictures', '--cfg-options', *LOADERS)
    measured = scores(work_dir / 'test')
    assert metrics <= set(measured)
    assert all(0 <= measured[name] <= 100 for name in metrics)
    assert len([path for path in (work_dir / 'pictures').rglob('*') if path.suffix in ('.jpg', '.png')]) == 4


@pytest.mark.slow
def test_a_classifier_with_supervision_trains_and_each_head_is_scored_plain_and_with_tta(folder):
    config, work_dir = DEMO / 'revcol_nano_digits_cls.py', folder / 'cls'  # 85 iterations of 64 crops
    run(folder, 'train.py', config, '--work-dir', work_dir, '--cfg-options', 'train_cfg.max_epochs=1',
        'default_hooks.checkpoint.interval=1', 'param_scheduler=[]', 'val_cfg=None', 'val_dataloader=None',
        'val_evaluator=None')
    for name, options in dict(plain=[], tta=['--tta']).items():
        run(folder, 'test.py', config, work_dir / 'epoch_1.pth', '--work-dir', work_dir / name, *options)
        measured = scores(work_dir / name)
        assert {'accuracy/top5', *(f'accuracy/head{index}_top1' for index in range(4))} <= set(measured)
        assert measured['accuracy/head3_top1'] == pytest.approx(measured['accuracy/top1'])  # the last one is the classifier


def test_the_pretrained_backbone_fits_the_detector():
    """Its names and shapes are the detector's, so that load_from leaves nothing of the backbone at its initialisation."""
    from mmengine.registry import MODELS
    backbones = [Config.fromfile(DEMO / name).model.backbone
                 for name in ('revcol_nano_digits_pretrain.py', 'cascade_rcnn_revcol_nano_digits.py')]
    shapes = [{name: value.shape for name, value in MODELS.build(backbone).state_dict().items()} for backbone in backbones]
    assert shapes[0] == shapes[1]
