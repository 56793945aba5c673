# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The checks before a run, reached from tools/train.py, tools/test.py, and from a config that names the hook."""
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from revcol_mm.apis import test, train
from revcol_mm.apis.checks import DataChecks
from revcol_mm.apis.checks.images import SampleError
from revcol_mm.apis.errors import LaunchError
from revcol_mm.checkpoint import CheckpointError

CONFIG = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['revcol_mm', 'revcol_mm.classification'], allow_failed_imports=False)
model = dict(type='ImageClassifier', backbone=dict(type='LeNet5'), neck=dict(type='GlobalAveragePooling'), head=dict(
    type='LinearClsHead', num_classes=2, in_channels=120, topk=1, loss=dict(type='CrossEntropyLoss')),
    data_preprocessor=dict(num_classes=2, mean=[0.], std=[255.]))
pipeline = [dict(type='LoadImageFromFile', color_type='grayscale'), dict(type='PackInputs')]
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(type='CustomDataset', data_root='train', pipeline=pipeline),
                        sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(type='CustomDataset', data_root='train', pipeline=pipeline),
                       sampler=dict(type='DefaultSampler', shuffle=False))
test_evaluator = dict(type='Accuracy')
test_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=2)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1), logger=dict(type='LoggerHook'),
                     timer=dict(type='IterTimerHook'), runtime_info=dict(type='RuntimeInfoHook'))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Four images of two classes, of which the first is black and the second white, and the config."""
    monkeypatch.chdir(tmp_path)
    for name, value in (('a', 0), ('b', 255)):
        (tmp_path / 'train' / name).mkdir(parents=True)
        for index in range(2):
            cv2.imwrite(str(tmp_path / 'train' / name / f'{index}.png'), np.full((32, 32), value, np.uint8))
    (tmp_path / 'config.py').write_text(CONFIG)
    return tmp_path


def run(*options: str, arguments: tuple[str, ...] = ()) -> None:
    train.train(['config.py', '--work-dir', 'work', *arguments, *(('--cfg-options', *options) if options else ())])


def build(**settings) -> Runner:
    """mmengine's own runner of the config, as the tools of OpenMMLab build it."""
    from mmpretrain.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    cfg = Config.fromfile('config.py')
    cfg.merge_from_dict(dict(work_dir='work', custom_hooks=[dict(type='DataCheckHook')], **settings))
    cfg.train_dataloader.collate_fn = dict(type='default_collate')
    init_default_scope('mmpretrain')
    return Runner.from_cfg(cfg)


def test_a_dry_run_checks_and_trains_nothing(folder, capsys):
    run(arguments=('--dry-run', ))
    assert 'All checks have passed' in capsys.readouterr().out
    assert not list(folder.rglob('*.pth'))


def test_a_dry_run_loads_a_batch_of_every_loader(folder):
    text = CONFIG.replace("dict(type='LoadImageFromFile', color_type='grayscale')", "dict(type='CenterCrop', crop_size=8)")
    (folder / 'config.py').write_text(text)
    with pytest.raises(LaunchError, match=r'train/a/0.png cannot be used: AssertionError: `img` is not found'):
        run(arguments=('--dry-run', ))


def test_check_data_names_all_broken_files_and_does_not_train(folder, capsys):
    (folder / 'train' / 'b' / '1.png').write_bytes(b'')
    with pytest.raises(LaunchError, match='every image and label map must be usable, but this is not so for 1 '):
        run(arguments=('--check-data', ))
    assert 'train/b/1.png: the file is empty' in capsys.readouterr().out
    assert not list(folder.rglob('*.pth'))


def test_the_names_that_are_stored_and_tested_are_those_of_the_folders():
    run("train_dataloader.dataset.metainfo.classes=('b','a')", 'default_hooks.checkpoint.interval=4')
    meta = torch.load('work/iter_4.pth', weights_only=True)['meta']
    assert meta['dataset_meta']['classes'] == ('a', 'b')


def test_a_test_maps_the_labels_to_the_checkpoint():
    from mmpretrain.registry import MODELS as models
    run('default_hooks.checkpoint.interval=4')
    checkpoint = torch.load('work/iter_4.pth', weights_only=True)
    model = models.build(dict(Config.fromfile('config.py').model, _scope_='mmpretrain'))
    model.load_state_dict(checkpoint['state_dict'])
    with torch.no_grad():  # a head that tells black from white
        black, white = (model.extract_feat(torch.full((1, 1, 32, 32), value))[0][0] for value in (0., 1.))
    weight = torch.stack([black - white, white - black])
    checkpoint['state_dict'].update({'head.fc.weight': weight, 'head.fc.bias': -weight @ (black + white) / 2})
    for order in ((0, 1), (1, 0)):  # as if it had been trained with the classes the other way round
        for name in ('head.fc.weight', 'head.fc.bias'):
            checkpoint['state_dict'][name] = checkpoint['state_dict'][name][list(order)]
        checkpoint['meta']['dataset_meta']['classes'] = tuple('ab'[index] for index in order)
        torch.save(checkpoint, 'ordered.pth')
        assert test.test(['config.py', 'ordered.pth', '--work-dir', 'work'])['accuracy/top1'] == 100


def test_a_head_of_another_size_is_refused_before_training(folder):
    with pytest.raises(LaunchError, match=r'model.head \(LinearClsHead\) is 5: set num_classes=2'):
        run('model.head.num_classes=5')
    assert not list(folder.rglob('*.pth'))


def test_without_exact_resuming_a_training_by_epochs_is_not_resumed_inside_of_an_epoch():
    run('default_hooks.exact_resume=None')
    with pytest.raises(LaunchError, match=r'\(2 iterations\), but this one is of iteration 3: resume from one of iteration 2'):
        run('default_hooks.exact_resume=None', arguments=('--resume', 'work/iter_3.pth'))


def test_a_training_by_epochs_is_resumed_between_two_epochs(folder):
    run()
    (folder / 'work' / 'iter_4.pth').unlink()
    run(arguments=('--resume', 'work/iter_2.pth'))
    assert torch.load('work/iter_4.pth', weights_only=True)['meta']['iter'] == 4


def test_settings_are_put_right_by_the_tool(monkeypatch, folder):
    shutil.copytree(folder / 'train' / 'a', folder / 'one' / 'a')
    seen = []
    monkeypatch.setattr(train, 'build_runner', lambda cfg, **_: seen.append(cfg) or (_ for _ in ()).throw(LaunchError('stop')))
    with pytest.raises(LaunchError, match='stop'):
        run('auto_scale_lr.base_batch_size=16', 'optim_wrapper.accumulative_counts=8', 'train_dataloader.dataset.data_root=one',
            'train_dataloader.dataset.metainfo.classes=a', arguments=('--auto-scale-lr', ))
    assert seen[0].auto_scale_lr.base_batch_size == 2
    assert seen[0].train_dataloader.dataset.metainfo.classes == ('a', )


def test_misspelt_options_are_refused_by_the_tool():
    with pytest.raises(LaunchError, match='did you mean train_dataloader.batch_size'):
        run('train_dataloder.batch_size=1')


def test_a_config_that_names_the_hook_is_checked_in_any_runner():
    with pytest.raises(LaunchError, match='set num_classes=2'):
        build(**{'model.head.num_classes': 5}).train()
    with pytest.raises(LaunchError, match='set auto_scale_lr.base_batch_size to 16/8'):
        build(**{'auto_scale_lr.enable': True, 'auto_scale_lr.base_batch_size': 16,
                 'optim_wrapper.accumulative_counts': 8}).train()


def test_workers_that_start_before_the_hook_name_a_broken_image(folder):
    """A loop by iterations starts them when it is built."""
    for index in range(2, 20):
        shutil.copy('train/a/0.png', f'train/a/{index}.png')
    (folder / 'train/a/10.png').write_bytes(b'')  # the second image, which is not among those that are opened before
    loop = "train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)"
    (folder / 'config.py').write_text(CONFIG.replace('train_cfg = dict(by_epoch=True, max_epochs=2)', loop))
    for start in (build(**{'train_dataloader.num_workers': 1}).train, lambda: run('train_dataloader.num_workers=1')):
        with pytest.raises(SampleError, match='train/a/10.png cannot be used: the file is empty'):
            start()


def test_a_run_that_does_not_start_leaves_nothing_behind():
    original = BaseDataset._serialize_data
    with pytest.raises(LaunchError, match='must have at least one image'):
        build(**{'train_dataloader.dataset.indices': 0}).train()
    assert BaseDataset._serialize_data is original
    with pytest.raises(LaunchError, match='auto_scale_lr.base_batch_size'):
        build(**{'auto_scale_lr.enable': True, 'auto_scale_lr.base_batch_size': 16,
                 'optim_wrapper.accumulative_counts': 8}).train()
    assert BaseDataset._serialize_data is original
    runner = build()
    assert BaseDataset._serialize_data is not original
    DataChecks().watch()  # of the next run
    DataChecks.active.stop()
    assert BaseDataset._serialize_data is original
    del runner


def test_the_hook_of_a_config_and_the_tools_own_do_not_meet(folder):
    (folder / 'config.py').write_text(CONFIG + "custom_hooks = [dict(type='DataCheckHook')]\n")
    run(arguments=('--dry-run', ))


@pytest.mark.parametrize('option, message', [
    ('optim_wrapper.optimizer.momentum=-1', 'ValueError: Invalid momentum value: -1'),
    ('load_from=other.pth', 'none of the weights of other.pth')])
def test_a_dry_run_builds_the_optimizer_and_loads_the_weights(option, message):
    torch.save(dict(state_dict=dict(other=torch.zeros(1))), 'other.pth')
    with pytest.raises((LaunchError, CheckpointError), match=message):
        run(option, arguments=('--dry-run', ))


def test_predictions_are_dumped_after_the_checks(folder):
    run('default_hooks.checkpoint.interval=4')
    (folder / 'train' / 'c').mkdir()
    cv2.imwrite('train/c/0.png', np.zeros((32, 32), np.uint8))
    with pytest.raises(LaunchError, match='the folders in train/ must be classes of the checkpoint'):
        test.test(['config.py', 'work/iter_4.pth', '--work-dir', 'work', '--out', 'predictions.pkl'])
