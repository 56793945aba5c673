# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""tools/train.py and tools/test.py on small models of all three packages, and what they say when something is missing."""
import argparse
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from safetensors.torch import save_file

from revcol_mm.apis import config, errors, test, train
from tests.common import ROOT, mostly_slow

TRAIN, TEST = str(ROOT / 'tools' / 'train.py'), str(ROOT / 'tools' / 'test.py')

# Every test starts its runs in its own folder, and no run meets the visualizer of another.
pytestmark = pytest.mark.usefixtures('own_surroundings', 'no_visualizer_of_another_run')


def run(*command, variables=(), **kwargs):
    env = dict(os.environ, OMP_NUM_THREADS='1', **dict(variables))
    return subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture(scope='module')
def detector(workshop):
    """What tools/train.py says and leaves behind."""
    result = run(TRAIN, 'detection.py', '--amp', cwd=workshop)
    assert result.returncode == 0, result.stderr[-3000:]
    return result, workshop / 'work_dirs' / 'detection' / 'iter_2.pth'


def test_a_detector_trains_without_a_gpu_although_its_config_asks_for_one(detector):
    result, checkpoint = detector
    assert 'float32 instead of mixed precision' in result.stderr
    assert 'SyncBN becomes BN' in result.stderr
    assert 'Iter(train) [2/2]' in result.stdout + result.stderr
    assert checkpoint.is_file()


def test_test_prints_coco_ap_of_boxes_and_masks(detector, workshop):
    result = run(TEST, 'detection.py', detector[1], cwd=workshop)
    assert result.returncode == 0, result.stderr[-3000:]
    text = result.stdout + result.stderr
    assert 'coco/bbox_mAP: ' in text and 'coco/segm_mAP: ' in text
    assert 'Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all' in text


def test_out_and_show_dir_are_written_where_they_are_said_to_be_and_tta_merges_masks(detector, workshop, tmp_path):
    metrics = test.test([str(workshop / 'detection.py'), str(detector[1]), '--out', 'predictions.pkl', '--show-dir', 'drawn',
                           '--tta', '--work-dir', 'work'])
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(metrics)
    predictions = pickle.loads((tmp_path / 'predictions.pkl').read_bytes())
    assert len(predictions) == 2
    assert all({'bboxes', 'scores', 'labels', 'masks'} <= set(p['pred_instances']) for p in predictions)
    assert len(list((tmp_path / 'drawn').rglob('*.jpg'))) == 2


@pytest.mark.slow
def test_tta_of_the_identity_alone_gives_the_plain_predictions_of_the_detector(detector, workshop, tmp_path):
    config, checkpoint = str(workshop / 'detection.py'), str(detector[1])
    test.test([config, checkpoint, '--out', 'plain.pkl', '--work-dir', 'work'])
    cfg = Config.fromfile(config)
    pack = dict(cfg.test_pipeline[-1], meta_keys=(*cfg.test_pipeline[-1]['meta_keys'], 'flip', 'flip_direction'))
    (tmp_path / 'identity.py').write_text(f'_base_ = {config!r}\ntta_pipeline = ' + repr([
        dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=[
            [dict(type='Resize', scale=(64, 64), keep_ratio=True)], [dict(type='RandomFlip', prob=0.)], [pack]])]) + '\n')
    test.test(['identity.py', checkpoint, '--tta', '--out', 'tta.pkl', '--work-dir', 'work'])
    plain, tta = (pickle.loads(Path(name).read_bytes()) for name in ('plain.pkl', 'tta.pkl'))
    for a, b in zip(plain, tta):
        for key in ('bboxes', 'scores', 'labels'):
            assert torch.equal(a['pred_instances'][key], b['pred_instances'][key])
        assert a['pred_instances']['masks'] == b['pred_instances']['masks']


@pytest.mark.slow
def test_the_tool_of_mmdet_runs_the_same_config(workshop, tmp_path):
    # It has no fallback for machines without a GPU: the config must not ask for mixed precision.
    result = run(Path(mmdet.__file__).parent / '.mim' / 'tools' / 'train.py', workshop / 'detection.py', '--work-dir', tmp_path,
                 '--cfg-options', 'optim_wrapper.type=OptimWrapper', 'train_cfg.max_iters=1',
                 variables=dict(PYTHONPATH=str(ROOT)))  # our tools find the checkout themselves
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_segmentor_trains_and_is_tested_plain_and_with_tta(workshop, tmp_path):
    config = str(workshop / 'segmentation.py')
    train.train([config, '--work-dir', 'work'])
    assert 'mIoU' in test.test([config, 'work/iter_2.pth', '--work-dir', 'work', '--out', 'maps'])
    assert len(list((tmp_path / 'maps').glob('*.png'))) == 2
    assert 'mIoU' in test.test([config, 'work/iter_2.pth', '--work-dir', 'work', '--tta'])


@pytest.mark.slow
def test_a_classifier_killed_in_the_middle_goes_on_to_the_weights_of_an_uninterrupted_run(workshop, tmp_path):
    config = str(workshop / 'classification.py')
    killed = subprocess.Popen([sys.executable, TRAIN, config, '--work-dir', 'killed', '--cfg-options',
                               'train_cfg.max_iters=1000000'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              env=dict(os.environ, OMP_NUM_THREADS='1'))
    last = tmp_path / 'killed' / 'last_checkpoint'
    deadline = time.monotonic() + 300
    while not last.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    time.sleep(1.1)  # mmengine names a run's folder after the second: the next run gets its own
    # The kill may have come between the checkpoint and the file that names it.
    reached = max(int(path.stem.removeprefix('iter_')) for path in last.parent.glob('iter_*.pth'))
    options = ['--cfg-options', f'train_cfg.max_iters={reached + 4}']
    before = set((tmp_path / 'killed').glob('*/vis_data/scalars.json'))
    train.train([config, '--work-dir', 'killed', '--resume', 'auto', *options])
    train.train([config, '--work-dir', 'whole', *options])
    log, = set((tmp_path / 'killed').glob('*/vis_data/scalars.json')) - before
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry['step'] for entry in entries] == list(range(reached + 1, reached + 5))
    resumed, whole = (torch.load(tmp_path / name / f'iter_{reached + 4}.pth', weights_only=True)['state_dict']
                      for name in ('killed', 'whole'))
    for name, value in whole.items():  # the same operations in the same order: equal but for threads, of which there is one
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6, msg=name)
    metrics = test.test([config, f'killed/iter_{reached + 4}.pth', '--work-dir', 'killed', '--out', 'scores.pkl', '--tta'])
    assert {'accuracy/top1', 'accuracy/top5'} <= set(metrics)
    assert len(pickle.loads(Path('scores.pkl').read_bytes())) == len(list((workshop / 'digits/crops/val').rglob('*.jpg')))


def test_configs_of_the_package_are_found_by_name_from_anywhere():
    args = train.parse_train_args(['mask_rcnn_revcol_t'])
    assert config.load_config(args).model.backbone.type == 'RevCol'
    args = train.parse_train_args(['configs/mask_rcnn_revcol_t.py'])
    assert config.load_config(args).work_dir == 'work_dirs/mask_rcnn_revcol_t'


class IdleRunner:
    load_checkpoint = train_loop = val_loop = None
    hooks = ()

    def train(self):
        pass

    def register_hook(self, hook, priority=None):
        pass


def test_amp_resume_auto_scale_lr_and_cfg_options_mean_what_they_mean_in_mmdet(workshop, monkeypatch):
    seen = []

    monkeypatch.setattr(train, 'build_runner', lambda cfg, **_: seen.append(cfg) or IdleRunner())
    train.train([str(workshop / 'detection.py'), '--amp', '--resume', '--auto-scale-lr', '--work-dir', 'w', '--cfg-options',
                  'auto_scale_lr.base_batch_size=32', 'model.test_cfg.rcnn.max_per_img=3'])
    cfg = seen[0]
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper' and cfg.optim_wrapper.loss_scale == 'dynamic'
    assert not cfg.resume and cfg.load_from is None  # nothing to go on from yet
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=32)
    assert cfg.model.test_cfg.rcnn.max_per_img == 3 and cfg.work_dir == 'w'


def test_a_value_of_cfg_options_keeps_its_blanks_unless_it_is_a_list():
    parser = argparse.ArgumentParser()
    config.add_config_options(parser)
    values = {'path': '/my runs/bob (2).pth', 'number': ' 4 ', 'nothing': 'None', 'list': '[1, 2]', 'bare': 'a, b',
              'tuple': '[(1, 2), (3, 4)]', 'quoted': '"[a, b]"', 'names': "('traffic light','stop sign')",
              'text': "'traffic light'", 'dicts': "[{'type': 'LocalVisBackend'}]", 'one': '(3)', 'digits': "'4'",
              'numbers': '480,512'}
    options = parser.parse_args(['--cfg-options', *(f'{key}={value}' for key, value in values.items())]).cfg_options
    assert options == {'path': '/my runs/bob (2).pth', 'number': 4, 'nothing': None, 'list': [1, 2], 'bare': ['a', 'b'],
                       'tuple': [(1, 2), (3, 4)], 'quoted': ['a', 'b'], 'names': ('traffic light', 'stop sign'),
                       'text': 'traffic light', 'dicts': [dict(type='LocalVisBackend')], 'one': (3, ), 'digits': 4,
                       'numbers': [480, 512]}


def test_a_test_leaves_out_the_hook_that_would_build_the_training_data(workshop, tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    def build(cfg, **_):
        assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook'] and 'stopping' not in cfg.default_hooks
        assert cfg.default_hooks.logger.type == 'LoggerHook'
        raise Enough

    monkeypatch.setattr(test, 'build_runner', build)
    torch.save(dict(state_dict={}), tmp_path / 'empty.pth')
    hook = "{'type': 'EarlyStoppingHook', 'monitor': 'coco/bbox_mAP'}"
    with pytest.raises(Enough):
        test.test([str(workshop / 'detection.py'), 'empty.pth', '--cfg-options', f'default_hooks.stopping={hook}',
                   f"custom_hooks=[{hook}, {{'type': 'EMAHook'}}]"])


def test_the_makefile_names_checkpoints_in_folders_with_blanks():
    substituted = re.findall(r'.*\$\$\(cat .*', (ROOT / 'Makefile').read_text())
    assert substituted and all(re.search(r' "(load_from=)?\$\$\(cat [^)]+\)"( |$)', line) for line in substituted)


def test_resume_auto_starts_from_load_from_first_and_goes_on_from_the_runs_own_checkpoint_later(workshop, tmp_path, monkeypatch,
                                                                                             capsys):
    seen = []

    monkeypatch.setattr(train, 'build_runner', lambda cfg, **_: seen.append(cfg) or IdleRunner())
    torch.save(dict(state_dict={}), tmp_path / 'start.pth')
    arguments = [str(workshop / 'detection.py'), '--resume', 'auto', '--work-dir', 'w', '--cfg-options', 'load_from=start.pth']
    train.train(arguments)
    assert not seen[0].resume and seen[0].load_from == 'start.pth'
    assert 'starts from the weights of start.pth' in capsys.readouterr().out
    (tmp_path / 'w').mkdir(exist_ok=True)
    torch.save(dict(state_dict={}, meta={}, optimizer={}, message_hub={}), tmp_path / 'w' / 'iter_2.pth')
    (tmp_path / 'w' / 'last_checkpoint').write_text('w/iter_2.pth')
    train.train(arguments)
    assert seen[1].resume is True and seen[1].load_from is None  # the runner finds it


def test_a_tool_ends_with_one_sentence_and_status_1(workshop):
    result = run(TRAIN, workshop / 'nothing.py')
    assert result.returncode == 1 and result.stdout == ''
    assert 'Traceback' not in result.stderr and result.stderr.strip().splitlines()[-1].startswith('error: there is no config')


def test_a_missing_data_set_names_the_place_and_how_to_change_it(workshop):
    for option, found in (('train_dataloader.dataset.data_root=/nowhere/', '/nowhere/annotations/instances_train.json'),
                          ('val_dataloader.dataset.data_prefix.img=none', 'digits/none'),
                          ('val_evaluator.ann_file=/nowhere/x.json', '/nowhere/x.json')):
        with pytest.raises(errors.LaunchError, match='--cfg-options') as error:
            train.train([str(workshop / 'detection.py'), '--cfg-options', option])
        assert found in str(error.value)
    with pytest.raises(errors.LaunchError, match=r'data/coco.*train2017.*ln -s'):
        train.train(['mask_rcnn_revcol_t'])


def test_classes_that_the_annotations_do_not_have_and_broken_annotations_are_named(workshop, tmp_path):
    config, key = str(workshop / 'detection.py'), 'train_dataloader.dataset'
    allowed = r'metainfo.classes of CocoDataset .* must be categories of .*, which has 0.*, but got zero, one'
    with pytest.raises(errors.LaunchError, match=allowed):
        train.train([config, '--cfg-options', f"{key}.metainfo.classes=('zero','one')"])
    (tmp_path / 'names.txt').write_text('0\n1\nten\n')  # mmengine reads a file of class names
    with pytest.raises(errors.LaunchError, match='must be categories of .*, but got ten'):
        train.train([config, '--cfg-options', f'{key}.metainfo.classes=names.txt'])
    for text in ('{"images": [', '[]', '{"categories": 3}'):
        (tmp_path / 'x.json').write_text(text)
        with pytest.raises(errors.LaunchError, match='x.json must be an annotation file in COCO format'):
            train.train([config, '--cfg-options', f'{key}.ann_file={tmp_path / "x.json"}'])


def test_a_missing_damaged_or_foreign_checkpoint_is_named(workshop, tmp_path):
    config = str(workshop / 'detection.py')
    with pytest.raises(errors.LaunchError, match='there is no checkpoint none.pth'):
        test.test([config, 'none.pth'])
    with pytest.raises(errors.LaunchError, match='there is no checkpoint none.pth.*--resume'):
        train.train([config, '--resume', 'none.pth'])
    (tmp_path / 'damaged.pth').write_bytes(b'no checkpoint')
    with pytest.raises(errors.CheckpointError, match='damaged.pth'):
        test.test([config, 'damaged.pth'])
    torch.save(dict(model=dict(weight=torch.zeros(1))), tmp_path / 'released.pth')
    with pytest.raises(errors.LaunchError, match=r'released.pth.*holds model.*init_cfg'):  # mmengine would load nothing of it
        test.test([config, 'released.pth'])


def test_missing_pretrained_weights_are_named_with_the_way_to_them(workshop, detector):
    config, key = str(workshop / 'detection.py'), 'model.backbone.init_cfg'
    for path, remedy in (('checkpoints/net_k7.pth', 'python tools/pad_kernels.py checkpoints/net.pth --size 7'),
                         ('checkpoints/net.pth', 'Put the weights there that the first lines of .*detection.py and docs/')):
        options = ['--work-dir', 'w', '--cfg-options', f'{key}.type=Pretrained', f'{key}.checkpoint={path}']
        with pytest.raises(errors.LaunchError, match=f'no checkpoint {path} .*{key}.checkpoint names.*{remedy}') as error:
            train.train([config, *options])
        assert f'--cfg-options {key}.checkpoint=' in str(error.value) and f'--cfg-options {key}=None' in str(error.value)
    with pytest.raises(errors.LaunchError, match='no checkpoint none.pth .*load_from names.*--cfg-options load_from=None'):
        train.train([config, '--cfg-options', 'load_from=none.pth'])
    for runner in ('Runner', 'FlexibleRunner'):  # a test needs the whole model's weights alone
        assert 'coco/bbox_mAP' in test.test([config, str(detector[1]), *options, f'runner_type={runner}'])


@pytest.mark.parametrize('arguments', [(), ('--tta', ), ('--cfg-options', 'runner_type=FlexibleRunner')])
def test_a_checkpoint_of_another_model_is_not_tested(workshop, detector, tmp_path, arguments):
    contents = torch.load(detector[1], weights_only=True)
    weights = contents['state_dict']
    weights['roi_head.bbox_head.other.weight'] = weights.pop('roi_head.bbox_head.fc_cls.weight')
    weights['roi_head.bbox_head.fc_reg.bias'] = torch.zeros(8)
    torch.save(contents, tmp_path / 'other.pth')
    with pytest.raises(errors.CheckpointError, match='other.pth does not fit') as error:
        test.test([str(workshop / 'detection.py'), 'other.pth', '--work-dir', 'w', *arguments])
    message = str(error.value)
    assert all(f'roi_head.bbox_head.{name}' in message for name in ('other.weight', 'fc_cls.weight', 'fc_reg.bias'))
    assert '\n' not in message


@pytest.mark.parametrize('option, found', mostly_slow([
    ('model.backbone.kernel_size=5', r'dwconv\.weight.*tools/pad_kernels\.py'),
    ('model.roi_head.bbox_head.fc_out_channels=8', 'have another shape: .*roi_head.bbox_head.shared_fcs'),
    ('model.backbone.arch.num_columns=2', 'subnet2')], ['model.backbone.kernel_size=5']))
def test_a_training_of_another_model_is_not_resumed(workshop, detector, option, found):
    arguments = [str(workshop / 'detection.py'), '--work-dir', 'w', '--resume', str(detector[1]), '--cfg-options', option]
    for runner in ('Runner', 'FlexibleRunner'):
        with pytest.raises(errors.CheckpointError, match=f'iter_2.pth does not fit.*{found}'):
            train.train([*arguments, f'runner_type={runner}'])


@pytest.mark.slow
def test_what_holds_weights_only_or_is_cut_off_is_not_resumed(workshop, detector, tmp_path):
    config = str(workshop / 'detection.py')
    contents = torch.load(detector[1], weights_only=True)
    torch.save(dict(state_dict=contents['state_dict'], meta=contents['meta']), tmp_path / 'published.pth')
    with pytest.raises(errors.LaunchError, match='published.pth has no message_hub.*load_from=published.pth'):
        train.train([config, '--resume', 'published.pth'])
    del contents['optimizer']  # CheckpointHook(save_optimizer=False)
    torch.save(contents, tmp_path / 'smaller.pth')
    with pytest.warns(UserWarning, match='no optimizer state'):
        train.train([config, '--resume', 'smaller.pth', '--work-dir', 'smaller'])
    (tmp_path / 'w').mkdir()
    (tmp_path / 'w' / 'iter_1.pth').write_bytes(detector[1].read_bytes()[:5000])
    (tmp_path / 'w' / 'last_checkpoint').write_text('w/iter_1.pth')
    with pytest.raises(errors.CheckpointError, match='iter_1.pth'):
        train.train([config, '--resume', 'auto', '--work-dir', 'w'])


@pytest.mark.slow
def test_weights_of_which_nothing_or_only_other_kernels_fit_start_no_training(workshop, detector, tmp_path):
    config = str(workshop / 'detection.py')
    weights = torch.load(detector[1], weights_only=True)['state_dict']
    torch.save({key.removeprefix('backbone.'): value for key, value in weights.items() if key.startswith('backbone.')},
               tmp_path / 'backbone.pth')
    arguments = [config, '--work-dir', 'w', '--cfg-options']
    with pytest.raises(errors.CheckpointError, match="none of the weights of backbone.pth.*init_cfg=dict\\(type='Pretrained'"):
        train.train([*arguments, 'load_from=backbone.pth'])
    larger = [f'load_from={detector[1]}', 'model.backbone.kernel_size=5', 'train_cfg.max_iters=1']
    with pytest.raises(errors.CheckpointError, match='kernels of 3×3, but the model has 5×5: pad them, .*/pad_kernels.py'):
        train.train([*arguments, *larger])
    train.train([*arguments, *larger, 'model.backbone.pad_pretrained=True'])
    save_file(weights, tmp_path / 'weights.safetensors')
    train.train([*arguments, 'load_from=weights.safetensors', *larger[1:], 'model.backbone.kernel_size=3'])
    train.train([*arguments, larger[0], 'train_cfg.max_iters=1', 'model.roi_head.bbox_head.fc_out_channels=8'])


def test_a_config_without_a_test_is_named():
    with pytest.raises(errors.LaunchError, match='revcol_b_in22k.* no test_dataloader and no test_evaluator'):
        test.test(['revcol_b_in22k', 'x.pth'])


@pytest.mark.parametrize('options', [(), ('--amp', ), ('--dry-run', )])
def test_a_config_without_a_training_is_named(tmp_path, options):
    (tmp_path / 'model.py').write_text('model = dict()\ntrain_cfg = dict(max_epochs=1)\n')
    with pytest.raises(errors.LaunchError, match='model.py must have train_dataloader, train_cfg and optim_wrapper, but has no '
                                                 'train_dataloader and no optim_wrapper'):
        train.train(['model.py', *options])


def test_upernet_on_single_images_is_refused_with_the_remedy(workshop):
    with pytest.raises(errors.LaunchError, match='raise train_dataloader.batch_size'):
        train.train([str(workshop / 'segmentation.py'), '--work-dir', 'w', '--cfg-options', 'train_dataloader.batch_size=1'])


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    (tmp_path / 'imports.py').write_text("custom_imports = dict(imports=['not_there'], allow_failed_imports=False)\n")
    with pytest.raises(errors.LaunchError, match='not_there'):
        train.train(['imports.py'])
    (tmp_path / 'scope.py').write_text("default_scope = 'mmseg'\n")
    find = config.importlib.util.find_spec
    monkeypatch.setattr(config.importlib.util, 'find_spec', lambda name: None if name == 'mmseg' else find(name))
    with pytest.raises(errors.LaunchError, match='pip install mmsegmentation'):
        train.train(['scope.py'])


def test_a_config_in_pure_python_without_its_base_is_named(tmp_path):
    (tmp_path / 'pure.py').write_text('from mmengine.config import read_base\nwith read_base():\n    from .gone import *\n')
    with pytest.raises(errors.LaunchError, match='pure.py is not a valid config: ConfigParsingError: .*gone.py not found'):
        config.load_named_config('pure.py')


def test_other_mistakes_are_named(workshop, tmp_path, capsys):
    (tmp_path / 'broken.py').write_text('model = dict(\n')
    with pytest.raises(errors.LaunchError, match='broken.py is not a valid config'):
        train.train(['broken.py'])
    (tmp_path / 'notes.txt').write_text('model = dict()\n')
    with pytest.raises(errors.LaunchError, match='notes.txt is not a valid config'):
        train.train(['notes.txt'])
    with pytest.raises(errors.LaunchError, match='--auto-scale-lr'):
        train.train([str(workshop / 'classification.py'), '--auto-scale-lr'])
    detection = str(workshop / 'detection.py')
    for option, found in (('model.backbone.kernel_size=4', 'kernel_size must be an odd .*, but got 4'),
                          ('model.backbone.depth=1', 'depth'),
                          ('visualizer.type=Foo', 'Foo'), ('train_dataloader.batch_size=0', 'batch_size=0'),
                          ('optim_wrapper.optimizer.lr=-1', 'Invalid learning rate: -1')):
        with pytest.raises(errors.LaunchError, match=f'detection.py cannot be built: .*{found}'):
            train.train([detection, '--work-dir', 'w', '--cfg-options', option])
    with pytest.raises(SystemExit) as usage:
        train.train([detection, '--cfg-options', 'train_cfg.max_iters'])
    assert usage.value.code == 2
    assert '--cfg-options: every setting must be KEY=VALUE, but got train_cfg.max_iters' in capsys.readouterr().err
    with pytest.raises(errors.LaunchError, match='EMAHook.*custom_hooks='):
        averaged = tmp_path / 'averaged.py'
        averaged.write_text(f"_base_ = {detection!r}\ncustom_hooks = [dict(type='EMAHook')]\n")
        train.train([str(averaged), '--cfg-options', 'runner_type=FlexibleRunner', 'strategy.type=RevColFSDPStrategy'])
    for launcher, name in dict(slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK', pytorch='WORLD_SIZE').items():
        with pytest.raises(errors.LaunchError, match=f'--launcher {launcher} needs .*{name}'):
            train.train([detection, '--launcher', launcher])
    torch.save(dict(state_dict={}), tmp_path / 'empty.pth')
    with pytest.raises(errors.LaunchError, match=r'--out must .*\.pkl.*, but got predictions.json'):
        test.test([str(workshop / 'detection.py'), 'empty.pth', '--out', 'predictions.json'])
    with pytest.raises(errors.CheckpointError, match='the output folder empty.pth/a cannot be made: .*empty.pth is a file'):
        test.test([str(workshop / 'detection.py'), 'empty.pth', '--out', 'empty.pth/a/predictions.pkl'])


def test_predictions_are_written_whole_or_not_at_all(tmp_path):
    for scope in ('mmdet', 'mmseg'):
        path = tmp_path / f'{scope}.pkl'
        metric = test._dumping(scope, str(path))
        metric.compute_metrics([1])
        with pytest.raises(AttributeError):
            metric.compute_metrics([2, lambda: None])  # which no file can hold
        assert pickle.loads(path.read_bytes()) == [1] and metric.collect_device == 'cpu'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['mmdet.pkl', 'mmseg.pkl']
