# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""model-index.yml and the model zoo name every config, with the paper's metrics and our own counts."""
import re

import pytest
import yaml
from mmengine.config import Config

from revcol_mm.utils.flops import Cost, default_shape
from revcol_mm.version import installed_version
from tests.common import ROOT, count_config, mostly_slow

CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
METAFILES = [ROOT / path for path in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']]
MODELS = {model['Name']: model for path in METAFILES for model in yaml.safe_load(path.read_text())['Models']}
ZOO = (ROOT / 'docs/model_zoo.md').read_text()
ROWS = {match[1]: match[0] for match in re.finditer(r'^\| \[(\w+)\]\(.*$', ZOO, re.MULTILINE)}
TASKS = {'mmdet': 'Object Detection', 'mmseg': 'Semantic Segmentation', 'mmpretrain': 'Image Classification'}

#: The figures in the tables of the paper: top-1, box and mask AP, or mIoU at one and at several scales.
PAPER = dict(
    revcol_t_in1k=[82.2], revcol_s_in1k=[83.5], revcol_b_in1k=[84.1], revcol_b_in1k_224_ft=[85.6], revcol_l_in1k_224_ft=[86.6],
    revcol_b_in1k_384_ft=[86.7], revcol_l_in1k_384_ft=[87.6], revcol_xl_in1k_384_ft=[88.2], revcol_h_in1k_640_ft=[90.0],
    revcol_t_in1k_no_supervision=[81.4], revcol_s_in1k_no_supervision=[83.0], revcol_b_in1k_no_supervision=[83.2],
    revcol_vit_s_in1k=[80.6], revcol_vit_b_in1k=[82.7],
    revcol_4g5_col1_in1k=[81.9], revcol_4g5_col8_in1k=[82.3], revcol_4g5_col12_in1k=[82.2], revcol_4g5_col20_in1k=[81.0],
    hrnet_columns_in1k=[78.8], revnet_convnext_in1k=[81.6],
    cascade_rcnn_revcol_t=[50.6, 43.8], cascade_rcnn_revcol_s=[52.6, 45.5], cascade_rcnn_revcol_b=[53.0, 45.9],
    cascade_rcnn_revcol_b_in22k=[55.0, 47.5], cascade_rcnn_revcol_l_in22k=[55.9, 48.4],
    cascade_rcnn_revcol_t_1x=[48.8, 42.2], cascade_rcnn_revcol_s_1x=[51.1, 43.8], cascade_rcnn_revcol_b_1x=[51.6, 44.2],
    cascade_rcnn_revcol_t_k5_1x=[49.5, 42.6], cascade_rcnn_revcol_t_k7_1x=[49.3, 42.4],
    cascade_rcnn_revcol_t_k11_1x=[49.9, 42.7], htc_revcol_h=[61.1, 53.0], dino_revcol_h=[63.8],
    upernet_revcol_t=[47.4, 47.6], upernet_revcol_s=[47.9, 49.0], upernet_revcol_b=[49.0, 50.1],
    upernet_revcol_b_in22k=[52.7, 53.3], upernet_revcol_l_in22k=[53.4, 53.7], upernet_revcol_h=[57.8, 58.0],
    mask2former_revcol_h=[60.4, 61.0])
#: Of which the authors published the result.
WEIGHTS = {
    *(f'cascade_rcnn_revcol_{size}' for size in ('t', 's', 'b', 'b_in22k', 'l_in22k')),
    *(f'upernet_revcol_{size}' for size in ('t', 's', 'b', 'b_in22k', 'l_in22k')),
    *(f'revcol_{size}' for size in ('t_in1k', 's_in1k', 'b_in1k', 'b_in22k', 'l_in22k', 'b_in1k_224_ft', 'b_in1k_384_ft',
                                    'l_in1k_224_ft', 'l_in1k_384_ft', 'h_in1k_640_ft'))}


def test_metrics_are_the_papers_and_published_weights_are_linked():
    assert {name: shown for name, model in MODELS.items()
            if (shown := [value for result in model['Results'] for value in result['Metrics'].values()])} == PAPER
    assert {name for name, model in MODELS.items() if 'Weights' in model} == WEIGHTS


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


@pytest.mark.parametrize('name', mostly_slow(CONFIGS, ['revcol_t_in1k', 'mask_rcnn_revcol_t']))
def test_counts_in_the_metafiles_and_the_zoo_are_what_the_counter_says(name):
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    total, metadata = count_config(name)['total'], MODELS[name]['Metadata']
    # The decoder's ref_point_head reads 1024 channels in onedl-mmdetection, 512 in mmdet: for 900 queries in six layers.
    wider = 512 * 256 if name.startswith('dino') and installed_version('mmdet')[0].startswith('onedl') else 0
    total = Cost(total.params - wider, total.macs - wider * 900 * 6)
    assert (metadata['Parameters'], metadata['FLOPs']) == (total.params, total.macs)
    assert metadata['FLOPs At'] == '{}x{}'.format(*default_shape(cfg))
    assert f'| {total.params / 1e6:,.1f}M | {total.macs / 1e9:,.1f}G |' in ROWS[name]


def test_the_papers_figures_are_labelled_as_such():
    heads = [line for line in ZOO.splitlines() if line.startswith('| config')]
    assert len(heads) == 3
    for line in heads:
        titles = [title.strip() for title in line.strip('|').split('|')]
        assert all(title.startswith('paper: ') for title in titles if re.search('AP|mIoU|top-1', title))
