# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What docs/own_data.md and docs/training.md tell a user: settings reach places that exist, and the config does as it says."""
import inspect
import os.path as osp
import re
import shlex

import pytest
from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from revcol_mm import config_path
from revcol_mm.apis import config, test, train
from revcol_mm.models import RevCol
from revcol_mm.utils.flops import count
from tests.common import ROOT, count_config, load_config


def block(file: str, language: str, text: str) -> str:
    """The one code block of the page with this in it."""
    blocks = re.findall(rf'^```{language}\n(.*?)^```$', (ROOT / file).read_text(), re.MULTILINE | re.DOTALL)
    found, = (code for code in blocks if text in code)
    return found


SMALL = block('docs/training.md', 'bash', 'data/small/')
MINE = block('docs/own_data.md', 'python', 'data/mine/')
IN_PLACE_OF_CONVNEXT = block('docs/training.md', 'python', 'mmdet::convnext/')


def parse(script: str):
    """Arguments of the block's command that runs this script, read by the script's own parser."""
    commands = [shlex.split(line) for line in SMALL.replace('\\\n', ' ').splitlines()]
    arguments, = (words[2:] for words in commands if words[1] == f'tools/{script}.py')
    return getattr(dict(train=train, test=test)[script], f'parse_{script}_args')(arguments)


def find(node, path):
    for key in path:
        node = node[int(key)] if isinstance(node, (list, tuple)) else node[key]
    return node


@pytest.fixture
def small(monkeypatch):
    """The configs of the small run, with its settings."""
    monkeypatch.chdir(ROOT)
    return {script: config.load_config(parse(script)) for script in ('train', 'test')}


@pytest.mark.parametrize('script', ['train', 'test'])
def test_settings_of_the_small_run_reach_places_that_are_there(small, script):
    args = parse(script)
    plain = Config.fromfile(ROOT / args.config)
    for name, value in args.cfg_options.items():
        *path, last = name.split('.')
        place = find(plain, path)
        # What a step of a pipeline leaves at its default is not in the config.
        assert last in place or last in inspect.signature(TRANSFORMS.get(f'mmdet.{place.type}')).parameters, name
        assert find(small[script], [*path, last]) == value


def test_settings_of_the_small_run_reach_the_intended_steps(small):
    choice = small['train'].train_dataloader.dataset.pipeline[3]
    assert choice.type == 'RandomChoice' and choice.prob == [1, 0] and len(choice.transforms) == 2
    resize, = choice.transforms[0]
    assert resize.type == 'RandomChoiceResize' and resize.scales == [(256, 256)]
    resize = small['test'].test_dataloader.dataset.pipeline[1]
    assert resize.type == 'Resize' and resize.scale == (256, 256)


def test_the_small_run_trains_without_validation_and_tests_what_it_has_trained(small):
    train, test = small['train'], small['test']
    assert train.val_cfg is train.val_dataloader is train.val_evaluator is train.model.backbone.init_cfg is None
    assert parse('test').checkpoint == f'{train.work_dir}/epoch_{train.train_cfg.max_epochs}.pth'
    dataset = test.test_dataloader.dataset
    assert test.test_evaluator.ann_file == osp.join(dataset.data_root, dataset.ann_file)


def test_the_config_of_ones_own_data_has_two_classes_everywhere_and_at_most_ten_lines(tmp_path):
    (tmp_path / 'mine.py').write_text(MINE)
    cfg, base = Config.fromfile(tmp_path / 'mine.py'), Config.fromfile(config_path('cascade_rcnn_revcol_t'))
    assert len(MINE.splitlines()) <= 10
    numbers = []

    def compare(node, before):
        """Numbers of classes are new, all else of the model is as it was."""
        assert type(node) is type(before)
        if isinstance(node, dict):
            assert node.keys() == before.keys()
            numbers.extend(value for key, value in node.items() if key == 'num_classes')
            node, before = ([value for key, value in part.items() if key != 'num_classes'] for part in (node, before))
        if not isinstance(node, (list, tuple)):
            assert node == before
            return
        for value, other in zip(node, before, strict=True):
            compare(value, other)

    compare(cfg.model, base.model)
    assert numbers == [2] * 4  # three stages of boxes, and the masks
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.metainfo.classes == ('cat', 'dog') and dataset.data_root == 'data/mine/'
        assert dataset.pipeline == base[f'{split}_dataloader'].dataset.pipeline
        if split != 'train':
            assert cfg[f'{split}_evaluator'].ann_file == osp.join(dataset.data_root, dataset.ann_file)


def test_a_config_of_mmdet_with_revcol_in_place_of_convnext_runs(tmp_path):
    (tmp_path / 'mine.py').write_text(IN_PLACE_OF_CONVNEXT)
    cfg, ours = Config.fromfile(tmp_path / 'mine.py'), count_config('mask_rcnn_revcol_t')
    cost = count(cfg, (64, 64))  # neck and heads read the four outputs
    assert cost['backbone'].params == ours['backbone'].params and cost['total'].params == ours['total'].params
    assert cfg.optim_wrapper.constructor == load_config('mask_rcnn_revcol_t').optim_wrapper.constructor
    assert 'clip_grad' not in cfg.optim_wrapper


def test_the_table_of_sizes_has_their_columns_and_widths():
    page = (ROOT / 'docs/training.md').read_text()
    rows = re.findall(r'^\| `(\w+)` \| (\d+) \| ([\d, ]+) \| (?:`|none|see)', page, re.MULTILINE)
    assert {name: (int(columns), tuple(map(int, widths.split(', ')))) for name, columns, widths in rows} == {
        name: (arch['num_columns'], tuple(arch['channels'])) for name, arch in RevCol.ARCHS.items()}
