# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""model-index.yml and the model zoo name every config, with the paper's metrics and our own counts."""
import re
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config

from revcol_mm.flops import count, default_shape

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
METAFILES = [ROOT / path for path in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']]
MODELS = {model['Name']: model for path in METAFILES for model in yaml.safe_load(path.read_text())['Models']}
ZOO = (ROOT / 'docs/model_zoo.md').read_text()
ROWS = {match[1]: match[0] for match in re.finditer(r'^\| \[(\w+)\]\(.*$', ZOO, re.MULTILINE)}
TASKS = {'mmdet': 'Object Detection', 'mmseg': 'Semantic Segmentation', 'mmpretrain': 'Image Classification'}


def test_every_config_is_listed_and_every_listed_config_is_there():
    assert sorted(MODELS) == sorted(ROWS) == CONFIGS
    for name, model in MODELS.items():
        assert model['Config'] == f'configs/{name}.py'
        assert f'(../configs/{name}.py)' in ROWS[name]


def test_every_metafile_is_imported():
    assert sorted(METAFILES) == sorted((ROOT / 'configs').glob('metafile*.yml'))


@pytest.mark.parametrize('name', CONFIGS)
def test_entries_are_complete_and_agree_with_the_config(name):
    model, cfg = MODELS[name], Config.fromfile(ROOT / f'configs/{name}.py', import_custom_modules=False)
    assert model['In Collection'] == 'RevCol'
    assert model['Results'][0]['Task'] == TASKS[cfg.default_scope]
    assert all({'Task', 'Dataset', 'Metrics'} <= set(result) for result in model['Results'])
    assert ('the paper' in model['Metadata']['Metrics From']) == any(result['Metrics'] for result in model['Results'])
    if 'Weights' in model:
        assert re.match(r'https://(github\.com/megvii-research/RevCol/releases/download/checkpoint/|'
                        r'huggingface\.co/LarryTsai/RevCol/resolve/main/revcol_models/)[\w/]+\.pth$', model['Weights'])
    weights = ROWS[name].rstrip('| ').rpartition('|')[2].strip()
    assert weights == (f'[authors]({model["Weights"]})' if 'Weights' in model else '–')
    shown = [str(value) for result in model['Results'] for value in result['Metrics'].values()]
    assert all(f'| {value} |' in ROWS[name] for value in shown)


@pytest.mark.parametrize('name', CONFIGS)
def test_counts_in_the_metafiles_and_the_zoo_are_what_the_counter_says(name):
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    total, metadata = count(cfg)['total'], MODELS[name]['Metadata']
    assert (metadata['Parameters'], metadata['FLOPs']) == (total.params, total.macs)
    assert metadata['FLOPs At'] == '{}x{}'.format(*default_shape(cfg))
    assert f'| {total.params / 1e6:,.1f}M | {total.macs / 1e9:,.1f}G |' in ROWS[name]


def test_the_papers_figures_are_labelled_as_such():
    for line in ZOO.splitlines():
        if line.startswith('| config'):
            titles = [title.strip() for title in line.strip('|').split('|')]
            assert all(title.startswith('paper: ') for title in titles if re.search('AP|mIoU|top-1', title))
