# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Checkpoints are not lost: what a killed training, a full disk or a damaged file leaves, and where the next one goes on."""
import itertools
import logging
import os
import re
import resource
import shutil
import zipfile

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from benchmarks.drills import CONFIG
from revcol_mm.apis import saving, train
from revcol_mm.apis.runner import build_runner
from revcol_mm.apis.saving import list_checkpoints
from revcol_mm.checkpoint import CheckpointError

QUIET = 'log_level = "ERROR"\n'
RUNS = itertools.count()


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A training of four iterations, with a checkpoint after each, all of them kept."""
    monkeypatch.chdir(tmp_path)
    text = CONFIG + QUIET + """
custom_hooks = []
train_cfg.update(max_iters=4)
default_hooks.update(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1))
"""
    (tmp_path / 'config.py').write_text(text)
    return 'config.py'


def fit(config, *options, resume='auto'):
    name = f'experiment_name=run_{next(RUNS)}'  # mmengine knows runs by their name and the second in which they start
    train.train([config, '--work-dir', 'work', '--resume', resume, '--cfg-options', name, *options])


def iteration(path):
    return torch.load(path, weights_only=True)['meta']['iter']


@METRICS.register_module()
class RisingMetric(BaseMetric):
    """Every validation is better than the one before."""

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        self.score = getattr(self, 'score', 0) + 1
        return dict(score=self.score)


class Snapshots:
    """What is in the folder, and what last_checkpoint says, at the moments when a checkpoint gets its name."""

    def __init__(self, monkeypatch, folder):
        self.entries, put_in_place = [], saving.put_in_place

        def record(draft, path):
            last = folder / 'last_checkpoint'
            named = last.read_text().removeprefix(f'{folder}/') if last.exists() else None
            self.entries.append(({file.name for file in folder.glob('*.pth')}, named))
            put_in_place(draft, path)

        monkeypatch.setattr(saving, 'put_in_place', record)


@pytest.mark.parametrize('runner', ['Runner', 'FlexibleRunner'])
def test_an_old_checkpoint_is_deleted_when_the_new_one_is_in_place(config, tmp_path, monkeypatch, runner):
    snapshots = Snapshots(monkeypatch, tmp_path / 'work')
    fit(config, 'default_hooks.checkpoint.max_keep_ckpts=1', f'runner_type={runner}')
    assert snapshots.entries == [(set(), None), ({'iter_1.pth'}, 'iter_1.pth'), ({'iter_2.pth'}, 'iter_2.pth'),
                                 ({'iter_3.pth'}, 'iter_3.pth')]
    assert [file.name for file in (tmp_path / 'work').glob('*.pth')] == ['iter_4.pth']
    assert (tmp_path / 'work' / 'last_checkpoint').read_text() == str(tmp_path / 'work' / 'iter_4.pth')
    assert not list((tmp_path / 'work').glob('.*'))


VALIDATION = ('val_cfg.type=ValLoop', 'val_dataloader.batch_size=2', 'val_dataloader.dataset.type=DrillImages',
              'val_dataloader.sampler.type=DefaultSampler', 'val_dataloader.sampler.shuffle=False',
              'val_evaluator.type=RisingMetric', 'train_cfg.val_interval=1', 'default_hooks.checkpoint.save_best=score',
              'default_hooks.checkpoint.rule=greater', 'default_hooks.checkpoint.max_keep_ckpts=1')


def test_the_best_checkpoint_so_far_is_deleted_when_the_better_one_is_in_place(config, tmp_path, monkeypatch):
    snapshots = Snapshots(monkeypatch, tmp_path / 'work')
    fit(config, *VALIDATION)
    best = [{name for name in names if name.startswith('best')} for names, _ in snapshots.entries]
    assert best[1:] and all(len(names) >= 1 for names in best[2:])
    assert {file.name for file in (tmp_path / 'work').glob('*.pth')} == {'iter_4.pth', 'best_score_iter_4.pth'}


@pytest.mark.slow
def test_a_file_of_the_same_name_as_an_outdated_one_stays(config, tmp_path):
    """A resumed training can validate at the iteration of the best checkpoint again."""
    fit(config, *VALIDATION)
    (tmp_path / 'work' / 'iter_4.pth').rename(tmp_path / 'work' / 'iter_3.pth')
    contents = torch.load(tmp_path / 'work' / 'iter_3.pth', weights_only=True)
    contents['meta']['iter'] = 3
    contents['message_hub']['runtime_info'].update(best_score=0.0, keep_ckpt_ids=[3])
    torch.save(contents, tmp_path / 'work' / 'iter_3.pth')
    fit(config, *VALIDATION, resume='work/iter_3.pth')
    assert {file.name for file in (tmp_path / 'work').glob('*.pth')} == {'iter_4.pth', 'best_score_iter_4.pth'}


def test_checkpoints_of_one_name_are_not_deleted_by_the_run_that_goes_on_from_them(config, tmp_path):
    options = ['default_hooks.checkpoint.filename_tmpl=latest.pth', 'default_hooks.checkpoint.max_keep_ckpts=1',
               'default_hooks.checkpoint.out_dir=./here']  # a path that is not normalised
    fit(config, *options, 'train_cfg.max_iters=2')
    file = tmp_path / 'here' / 'work' / 'latest.pth'
    contents = torch.load(file, weights_only=True)
    assert contents['message_hub']['runtime_info']['outdated_ckpts'] == []
    contents['message_hub']['runtime_info']['outdated_ckpts'] = [str(file)]
    torch.save(contents, file)
    fit(config, *options, 'default_hooks.checkpoint.interval=9', 'default_hooks.checkpoint.save_last=False',
        'train_cfg.max_iters=3', resume=str(file))
    assert iteration(file) == 2


def test_what_a_killed_run_was_writing_or_could_not_delete_any_more_goes_with_the_next(config, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, '_delete_outdated', lambda runner: None)
    fit(config, 'default_hooks.checkpoint.max_keep_ckpts=1', 'train_cfg.max_iters=2')
    (tmp_path / 'work' / '.iter_3.pth.saving').write_bytes(b'a half')
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert {file.name for file in (tmp_path / 'work').glob('*.pth')} == {'iter_1.pth', 'iter_2.pth'}
    fit(config, 'default_hooks.checkpoint.max_keep_ckpts=1')
    assert [file.name for file in (tmp_path / 'work').glob('*.pth')] == ['iter_4.pth']
    assert not list((tmp_path / 'work').glob('.*'))


def test_a_run_that_goes_on_in_another_folder_deletes_nothing_in_the_first(config, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, '_delete_outdated', lambda runner: None)
    fit(config, 'default_hooks.checkpoint.max_keep_ckpts=1', 'train_cfg.max_iters=2')
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    train.train([config, '--work-dir', 'other', '--resume', 'work/iter_2.pth', '--cfg-options',
                 'default_hooks.checkpoint.max_keep_ckpts=1'])
    assert {file.name for file in (tmp_path / 'work').glob('*.pth')} == {'iter_1.pth', 'iter_2.pth'}


def test_a_run_that_goes_on_in_another_folder_keeps_the_best_of_the_first(config, tmp_path):
    fit(config, *VALIDATION, 'train_cfg.max_iters=2')
    best = {file.name for file in (tmp_path / 'work').glob('best*')}
    contents = torch.load(tmp_path / 'work' / 'iter_2.pth', weights_only=True)
    contents['message_hub']['runtime_info'].update(best_score=0.0)  # every validation of the second run is better
    torch.save(contents, tmp_path / 'work' / 'iter_2.pth')
    train.train([config, '--work-dir', 'other', '--resume', 'work/iter_2.pth', '--cfg-options', *VALIDATION])
    assert best and {file.name for file in (tmp_path / 'work').glob('best*')} == best
    assert [file.name for file in (tmp_path / 'other').glob('best*')] == ['best_score_iter_4.pth']


def test_the_folder_keeps_the_config_as_it_was_given_and_no_call_changes_its_input(config, tmp_path):
    fit(config, 'train_cfg.max_iters=2')
    kept = Config.fromfile('work/config.py')
    assert not kept.get('resume') and kept.get('load_from') is None and kept.train_cfg.max_iters == 2
    before = (tmp_path / 'work' / 'config.py').read_text()
    fit('work/config.py', 'train_cfg.max_iters=3')
    train.train([config, '--work-dir', 'work', '--dry-run'])
    assert (tmp_path / 'work' / 'config.py').read_text() == before


def test_a_refused_write_leaves_both_files_as_they_were_and_says_so_in_one_sentence(config, tmp_path):
    """The system refuses to make a file larger than a limit: as a full disk does, in the middle of the file."""
    fit(config, 'train_cfg.max_iters=1')
    before = {name: (tmp_path / 'work' / name).read_bytes() for name in ('iter_1.pth', 'last_checkpoint')}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before['iter_1.pth']) // 2, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r'^\S+/work/iter_2.pth could not be written: File too large\. The '
                           r'earlier checkpoints did not change\. Make room, and resume with --resume auto$'):
            fit(config, 'default_hooks.checkpoint.max_keep_ckpts=1')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {name: (tmp_path / 'work' / name).read_bytes() for name in before}
    assert not list((tmp_path / 'work').glob('.*')) and not (tmp_path / 'work' / 'iter_2.pth').exists()
    fit(config)
    assert iteration('work/iter_4.pth') == 4


def flip(path, position=None):
    """Changes one bit: of the largest tensor, if there is no position."""
    content = bytearray(path.read_bytes())
    if position is None:
        with zipfile.ZipFile(path) as archive:
            largest = max((record for record in archive.infolist() if '/data/' in record.filename),
                          key=lambda record: record.file_size)
            position = content.find(archive.read(largest))
    content[position] ^= 1
    path.write_bytes(content)


DAMAGES = dict(
    empty=lambda work: (work / 'last_checkpoint').write_text(''),
    dangling=lambda work: (work / 'iter_4.pth').unlink(),
    truncated=lambda work: (work / 'iter_4.pth').write_bytes((work / 'iter_4.pth').read_bytes()[:-1000]),
    nothing_in_it=lambda work: (work / 'iter_4.pth').write_bytes(b''),
    flipped=lambda work: flip(work / 'iter_4.pth'))


@pytest.fixture
def warned(monkeypatch):
    """What the runner's logger warns of."""
    messages, handle = [], logging.Logger.handle
    monkeypatch.setattr(logging.Logger, 'handle', lambda self, record: (
        messages.append(record.getMessage()) if record.levelno == logging.WARNING else None, handle(self, record))[1])
    return messages


@pytest.mark.parametrize('damage', DAMAGES)
def test_resume_auto_goes_on_from_the_one_before(config, tmp_path, damage, warned):
    fit(config)
    DAMAGES[damage](tmp_path / 'work')
    reached = 4 if damage == 'empty' else 3
    fit(config, 'train_cfg.max_iters=5')
    damaged = 'work/last_checkpoint' if damage == 'empty' else 'work/iter_4.pth'
    message, = [text for text in warned if 'is resumed from' in text]
    assert damaged in message and re.search(rf'the training is resumed from \S*work/iter_{reached}.pth:', message)
    assert iteration('work/iter_5.pth') == 5


def test_a_damaged_file_that_is_named_is_an_error(config, tmp_path):
    fit(config)
    flip(tmp_path / 'work' / 'iter_4.pth')
    for argument in ('--resume', '--cfg-options'):
        with pytest.raises(CheckpointError, match='work/iter_4.pth is damaged: .*checksum'):
            value = 'work/iter_4.pth' if argument == '--resume' else 'load_from=work/iter_4.pth'
            train.train([config, '--work-dir', 'again', argument, value])


@pytest.mark.slow
def test_no_flipped_byte_passes_unless_it_changes_nothing(config, tmp_path):
    fit(config, 'train_cfg.max_iters=1')
    path = tmp_path / 'work' / 'iter_1.pth'
    content, whole = path.read_bytes(), torch.load(path, weights_only=True)
    noticed = 0
    with zipfile.ZipFile(path) as archive:
        names = archive.start_dir  # each file's name and place once more: a damage to those is of another kind
    positions = torch.randint(names, (20, )).tolist() + torch.randint(names, len(content), (20, )).tolist()
    for position in positions:
        flip(path, position)
        try:
            saving.check_checkpoint(str(path), '--resume', resume=True)
            after = torch.load(path, weights_only=True)
            for key, value in whole['state_dict'].items():
                assert torch.equal(after['state_dict'][key], value), position
        except CheckpointError:
            noticed += 1
        path.write_bytes(content)
    assert noticed > 10  # the others hit what nobody reads, such as the space between two tensors


def test_if_none_can_be_read_the_training_does_not_start_anew(config, tmp_path):
    fit(config, 'train_cfg.max_iters=2')
    for name in ('iter_1.pth', 'iter_2.pth'):
        flip(tmp_path / 'work' / name)
    with pytest.raises(CheckpointError, match='none of the checkpoints in .*work can be read: .*work/iter_2.pth is damaged.*; '
                       '.*work/iter_1.pth is damaged.*--work-dir'):
        fit(config)


def listed(folder='work'):
    return os.path.basename(saving.list_checkpoints(Config(dict(work_dir=folder)))[0])


def test_a_file_that_is_newer_than_last_checkpoint_is_the_newest(config, tmp_path):
    fit(config)
    (tmp_path / 'work' / 'last_checkpoint').write_text('work/iter_3.pth')
    assert listed() == 'iter_3.pth'
    os.utime(tmp_path / 'work' / 'last_checkpoint', (0, os.path.getmtime(tmp_path / 'work' / 'iter_4.pth') - 1))
    assert listed() == 'iter_4.pth'


def test_a_checkpoint_of_a_longer_training_in_the_folder_before_is_not_the_newest(config, tmp_path):
    fit(config)
    os.utime(tmp_path / 'work' / 'iter_4.pth', (0, 0))
    (tmp_path / 'work' / 'last_checkpoint').write_text('work/iter_2.pth')
    assert listed() == 'iter_2.pth'


def test_a_folder_that_was_moved_is_found(config, tmp_path):
    fit(config, 'train_cfg.max_iters=2')
    (tmp_path / 'work').rename(tmp_path / 'moved')
    assert listed('moved') == 'iter_2.pth' and 'moved' in saving.list_checkpoints(Config(dict(work_dir='moved')))[0]


def test_a_copied_folder_does_not_go_on_from_the_original(config, tmp_path):
    fit(config, 'train_cfg.max_iters=2')
    shutil.copytree(tmp_path / 'work', tmp_path / 'copied')
    assert saving.list_checkpoints(Config(dict(work_dir='copied')))[0] == 'copied/iter_2.pth'


def test_the_folder_of_the_checkpoint_hook_is_searched(config, tmp_path):
    options = ['default_hooks.checkpoint.out_dir=elsewhere', 'default_hooks.checkpoint.filename_tmpl=step{}.ckpt']
    fit(config, *options)
    (tmp_path / 'work' / 'last_checkpoint').unlink()
    fit(config, *options, 'train_cfg.max_iters=5')
    assert iteration('elsewhere/work/step5.ckpt') == 5


def test_the_folder_of_the_checkpoint_hook_may_hold_those_of_another_run(config, tmp_path):
    options = {'default_hooks.checkpoint.out_dir': 'elsewhere', 'launcher': 'none'}
    fit(config, 'default_hooks.checkpoint.out_dir=elsewhere')
    cfg = Config.fromfile(config)
    cfg.merge_from_dict({**options, 'work_dir': 'other/work'})
    assert list_checkpoints(cfg) == []
    cfg.work_dir = 'work'
    assert iteration(list_checkpoints(cfg)[0]) == 4


def test_a_machine_that_does_not_see_the_checkpoint_is_told_what_to_do(config, monkeypatch):
    fit(config)
    monkeypatch.setattr('revcol_mm.apis.saving.all_gather_object', lambda seen: [seen, False])
    with pytest.raises(CheckpointError, match='all processes must see the checkpoint .*iter_4.pth, but some do not'):
        fit(config, 'train_cfg.max_iters=5')


def test_resume_in_the_config_falls_back_too(config, tmp_path):
    fit(config)
    flip(tmp_path / 'work' / 'iter_4.pth')
    cfg = Config.fromfile(config)
    cfg.merge_from_dict({'work_dir': 'work', 'resume': True, 'launcher': 'none', 'train_cfg.max_iters': 5})
    runner = build_runner(cfg, loads_whole_model=True)
    runner.load_or_resume = lambda load=runner.load_or_resume: (load(), reached.append(runner.iter))
    reached = []
    runner.train()
    assert reached == [3]
