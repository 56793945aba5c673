# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The launch scripts with two CPU processes: DDP, distributed testing, and sharded training."""
import os
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from benchmarks.drills import free_port
from revcol_mm.apis import errors, test, train
from tests.common import ROOT, build_optimizer, load_config, narrow, parameter_groups

pytestmark = pytest.mark.usefixtures('own_surroundings')

SHARDED = ('runner_type=FlexibleRunner', 'strategy.type=RevColFSDPStrategy')


def launch_two(script, *arguments, cwd):
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHON=sys.executable, PORT=str(free_port()))
    result = subprocess.run([str(ROOT / 'tools' / script), *map(str, arguments)], cwd=cwd, env=env, capture_output=True,
                            text=True, timeout=400)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout + result.stderr


@pytest.mark.slow
def test_two_cpu_processes_train_and_test_a_detector(workshop, tmp_path):
    config = workshop / 'detection.py'
    text = launch_two('dist_train.sh', config, 2, '--work-dir', 'work', '--auto-scale-lr', cwd=tmp_path)
    assert 'Iter(train) [2/2]' in text
    assert 'current batch size is 4' in text  # 2 images in each of 2 processes
    text = launch_two('dist_test.sh', config, 'work/iter_2.pth', 2, '--work-dir', 'work', cwd=tmp_path)
    assert 'coco/segm_mAP: ' in text


@pytest.mark.slow
def test_sharded_training_saves_one_file_that_resumes_and_tests(workshop, tmp_path):
    config = workshop / 'detection.py'
    launch_two('dist_train.sh', config, 2, '--work-dir', 'work', '--cfg-options', *SHARDED, cwd=tmp_path)
    text = launch_two('dist_train.sh', config, 2, '--work-dir', 'work', '--resume', 'auto', '--cfg-options', *SHARDED,
                      'train_cfg.max_iters=4', cwd=tmp_path)
    assert 'Iter(train) [3/4]' in text and 'Iter(train) [2/4]' not in text
    checkpoint = torch.load(tmp_path / 'work' / 'iter_4.pth', weights_only=True)

    # The shards of a matrix have one dimension, yet it is decayed: the same groups as without sharding.
    cfg = Config.fromfile(str(config))
    cfg.model.neck.norm_cfg.type = 'BN'
    model = MODELS.build(cfg.model)
    plain = parameter_groups(build_optimizer(model, dict(lr=1e-3), layer_decay_rate=0.9))
    sharded = {name: group for group in checkpoint['optimizer']['param_groups'] for name in group['params']}
    assert sharded.keys() == plain.keys()
    for name, group in sharded.items():
        assert group['weight_decay'] == plain[name]['weight_decay'], name
        assert group['lr'] == pytest.approx(plain[name]['lr']), name
    model.load_state_dict(checkpoint['state_dict'])
    metrics = test.test([str(config), str(tmp_path / 'work' / 'iter_4.pth'), '--work-dir', str(tmp_path / 'test')])
    assert 'coco/bbox_mAP' in metrics


@pytest.mark.slow
def test_sharded_gradients_are_clipped_by_the_norm_of_all(workshop, tmp_path):
    launch_two('dist_train.sh', workshop / 'detection.py', 2, '--work-dir', 'work', '--cfg-options', *SHARDED,
               'optim_wrapper.optimizer.type=SGD', 'optim_wrapper.optimizer.lr=1.0', 'optim_wrapper.optimizer.weight_decay=0.0',
               'optim_wrapper.paramwise_cfg.layer_decay_rate=1.0', 'optim_wrapper.clip_grad.max_norm=0.1',
               'default_hooks.checkpoint.interval=1', cwd=tmp_path)
    before, after = (torch.load(tmp_path / 'work' / f'iter_{step}.pth', weights_only=True)['state_dict'] for step in (1, 2))
    steps = [(after[key] - before[key]).double().square().sum() for key in before if 'running' not in key and 'num_' not in key]
    assert torch.stack(steps).sum().sqrt().item() == pytest.approx(0.1, rel=1e-3)  # lr · max_norm


@pytest.mark.slow
def test_sharded_training_leaves_out_weights_of_another_shape(workshop, tmp_path):
    cfg = Config.fromfile(str(workshop / 'detection.py'))
    cfg.model.neck.norm_cfg.type = 'BN'
    cfg.model.roi_head.bbox_head.num_classes = 3  # as after training on other classes
    weights = MODELS.build(cfg.model).state_dict()
    torch.save(dict(state_dict=weights), tmp_path / 'other.pth')
    text = launch_two('dist_train.sh', workshop / 'detection.py', 2, '--work-dir', 'work', '--cfg-options', *SHARDED,
                      'load_from=other.pth', 'optim_wrapper.optimizer.lr=0.0', cwd=tmp_path)
    assert 'other shapes: roi_head.bbox_head.fc_cls.weight, roi_head.bbox_head.fc_cls.bias' in text
    trained = torch.load(tmp_path / 'work' / 'iter_2.pth', weights_only=True)['state_dict']
    torch.testing.assert_close(trained['backbone.stem.0.weight'], weights['backbone.stem.0.weight'], rtol=0, atol=0)
    assert trained['roi_head.bbox_head.fc_cls.weight'].shape[0] == 11


@pytest.mark.slow
def test_a_narrow_copy_of_revcol_h_trains_sharded(workshop, tmp_path):
    cfg, digits = narrow(load_config('upernet_revcol_h')), Config.fromfile(str(workshop / 'segmentation.py'))
    cfg.model.backbone.init_cfg = None
    cfg.model.decode_head.num_classes = cfg.model.auxiliary_head.num_classes = 11  # of the digits
    cfg.model.data_preprocessor = dict(cfg.model.data_preprocessor, size=(64, 64))
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader', 'train_cfg', 'default_hooks', 'env_cfg'):
        cfg[key] = digits[key]
    cfg.dump(tmp_path / 'narrow_revcol_h.py')
    text = launch_two('dist_train.sh', 'narrow_revcol_h.py', 2, '--work-dir', 'work', '--cfg-options', *SHARDED, cwd=tmp_path)
    assert 'Iter(train) [2/2]' in text
    backbone = {key for key in torch.load(tmp_path / 'work' / 'iter_2.pth', weights_only=True)['state_dict'] if 'subnet' in key}
    assert 'backbone.subnet1.level0.fusion.up2.channel_reschedule.0.weight' in backbone  # Huge's extra path
    assert not any('_fsdp' in key or '_flat' in key for key in backbone)


def test_the_scripts_say_how_to_call_them():
    for script in ('dist_train.sh', 'dist_test.sh', 'slurm_train.sh'):
        result = subprocess.run([str(ROOT / 'tools' / script)], capture_output=True, text=True)
        assert result.returncode == 1 and f'tools/{script}' in result.stderr


def test_a_missing_launcher_environment_is_named(workshop, monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(errors.LaunchError, match='--launcher pytorch needs .*: RANK, WORLD_SIZE, MASTER_ADDR.*torchrun'):
        train.train([str(workshop / 'detection.py'), '--launcher', 'pytorch'])
