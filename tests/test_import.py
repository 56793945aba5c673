# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What ``import revcol_mm`` needs, registers and says."""
import ast
import graphlib
import importlib
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError

import pytest

from revcol_mm import version as versions
from tests.common import ROOT

PINNED = {'torch': '2.14.1', 'mmengine': '0.10.7', 'mmcv': '2.1.0',
          'mmdet': '3.3.0', 'mmsegmentation': '1.2.2', 'mmpretrain': '1.2.0'}
ONEDL = {'torch': '2.14.1', 'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6', 'onedl-mmdetection': '3.5.1',
         'onedl-mmsegmentation': '1.4.2', 'onedl-mmpretrain': '1.3.6'}


@pytest.fixture
def installed(monkeypatch):
    """Makes the version check see the given distributions, and nothing else."""
    def install(distributions):
        def version(name):
            if name not in distributions:
                raise PackageNotFoundError(name)
            return distributions[name]

        monkeypatch.setattr(versions, 'version', version)

    return install


def run_python(code, *options):
    return subprocess.run([sys.executable, *options, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_import_needs_neither_mmdet_mmseg_mmpretrain_nor_compiled_ops():
    result = run_python("""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmdet', 'mmseg', 'mmpretrain', 'timm') or name == 'mmcv._ext':
            raise ImportError(f'{name} is blocked')

sys.meta_path.insert(0, Blocker())
import revcol_mm
from mmengine.registry import MODELS
print(MODELS.build(dict(type='RevCol', arch=dict(channels=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_columns=2))).num_columns,
      revcol_mm.create_model('revcol_tiny', features_only=True).feature_info.channels())
""")
    assert (result.returncode, result.stdout.strip().splitlines()[-1:]) == (0, ['2 [64, 128, 256, 512]']), result.stderr


def test_import_says_nothing_with_the_installed_versions():
    result = run_python('import revcol_mm', '-W', 'error::UserWarning:revcol_mm')
    assert (result.returncode, result.stdout) == (0, ''), result.stderr


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
def test_backbone_is_found_from_the_scopes_of_openmmlab(scope):
    registry = importlib.import_module(f'{scope}.registry').MODELS
    backbone = registry.build(dict(type='RevCol', arch=dict(channels=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_columns=2)))
    assert type(backbone).__module__ == 'revcol_mm.models.backbones.revcol'


@pytest.mark.parametrize('requirements', ['pinned.txt', 'mmcv.txt', 'onedl.txt'])
def test_pinned_versions_are_in_the_tested_range(installed, requirements):
    lines = (ROOT / 'requirements' / requirements).read_text(encoding='utf-8').splitlines()
    pins = dict(line.split('==') for line in lines if '==' in line)
    checked = {name: number for name, number in pins.items() if name == 'torch' or 'mm' in name}
    assert len(checked) >= 5
    installed(dict(mmcv='2.1.0', **checked) if requirements == 'mmcv.txt' else checked)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        versions.check_versions()


@pytest.mark.parametrize('distributions', [
    PINNED,
    ONEDL,
    {'torch': '2.12.1+cu130', 'mmengine': '0.10.7', 'mmcv-lite': '2.1.0'},
    {'torch': '2.13.0', 'mmengine': '0.10.7', 'mmcv-lite': '2.1.0'},
], ids=['pinned', 'onedl', 'torch, mmengine and mmcv without operators', 'between the oldest and the newest torch'])
def test_versions_of_the_tested_range_raise_no_warning(installed, distributions):
    installed(distributions)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        versions.check_versions()


@pytest.mark.parametrize('name, number, needed', [
    ('torch', '2.5.1', 'torch 2.6'),
    ('mmengine', '0.9.1', 'mmengine 0.10'),
    ('mmcv', '1.7.2', 'mmcv 2.0'),
    ('mmdet', '2.28.2', 'mmdet 3.0'),
    ('mmsegmentation', '0.30.0', 'mmseg 1.0'),
    ('mmpretrain', '0.25.0', 'mmpretrain 1.0'),
])
def test_too_old_a_version_is_refused_with_what_is_needed_and_what_is_there(installed, name, number, needed):
    installed(dict(PINNED, **{name: number}))
    with pytest.raises(ImportError) as error:
        versions.check_versions()
    assert f'needs {needed}' in str(error.value)
    assert f'{name} {number} is installed' in str(error.value)
    assert f'tested with: {name} ' in str(error.value)


def test_mmcv_full_is_too_old(installed):
    installed({'torch': '2.12.1', 'mmengine': '0.10.7', 'mmcv-full': '1.7.2'})
    with pytest.raises(ImportError, match='mmcv-full 1.7.2 is installed'):
        versions.check_versions()


@pytest.mark.parametrize('missing', ['torch', 'mmengine', 'mmcv'])
def test_missing_requirement_is_named(installed, missing):
    installed({name: number for name, number in PINNED.items() if name != missing})
    with pytest.raises(ImportError, match=f'needs {missing}, which is not installed'):
        versions.check_versions()


def test_untested_versions_are_named_in_one_warning_with_the_tested_range(installed):
    installed(dict(PINNED, torch='2.99.0', mmdet='3.4.0rc1'))
    with pytest.warns(UserWarning) as caught:
        versions.check_versions()
    message, = (str(warning.message) for warning in caught)
    assert 'torch 2.99.0 (tested: torch 2.12 to 2.15)' in message
    assert 'mmdet 3.4.0rc1 (tested: mmdet 3.3)' in message
    assert 'mmcv' not in message


def imports_of_the_package() -> dict[str, set[str]]:
    """{module: modules of the package that it imports}, at the top of the file or inside of functions.

    An import from another subpackage runs the ``__init__`` of that subpackage too, so it counts as an import of both.
    """
    files = {'.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path
             for path in (ROOT / 'revcol_mm').rglob('*.py') if '.mim' not in path.parts}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        package = module if path.name == '__init__.py' else module.rpartition('.')[0]
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = '.'.join(package.split('.')[:len(package.split('.')) - node.level + 1]) if node.level else ''
                base = '.'.join(filter(None, (base, node.module)))
                names = [f'{base}.{alias.name}' if f'{base}.{alias.name}' in files else base for alias in node.names]
            else:
                continue
            for name in filter(files.__contains__, names):
                parents = ['.'.join(name.split('.')[:size]) for size in range(2, name.count('.') + 1)]
                graph[module] |= {name, *(parent for parent in parents if not f'{module}.'.startswith(f'{parent}.'))}
    return graph


def test_no_module_imports_itself_through_others():
    graph = imports_of_the_package()
    assert 'revcol_mm.reversible.column' in graph['revcol_mm.reversible.autograd']  # the walk sees imports
    assert 'revcol_mm.checkpoint' in graph['revcol_mm.models.backbones.base']
    graph = {module: imported - {'revcol_mm'} for module, imported in graph.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_the_checkpoint_package_knows_no_model_and_the_engine_no_converter():
    below = {'checkpoint': {'checkpoint', 'utils', 'version'}, 'reversible': {'reversible'},
             'models': {'models', 'reversible', 'checkpoint'},
             'engine': {'engine', 'models', 'reversible', 'checkpoint', 'version'}}
    for module, imported in imports_of_the_package().items():
        room = module.split('.')[1] if '.' in module else ''
        assert room not in below or {name.split('.')[1] for name in imported if '.' in name} <= below[room], module


@pytest.mark.slow
def test_the_names_of_version_0_1_can_be_imported_in_a_new_process():
    """Dumped configs of finished runs and users' code hold them."""
    result = run_python("""
import importlib, sys
for name in ('c2f', 'deploy', 'revcol', 'reversible', 'sequence', 'stack', 'vit'):
    importlib.import_module(f'revcol_mm.models.{name}')
for name in ('segmentation', 'datasets.iou', 'detection', 'classification'):
    importlib.import_module(f'revcol_mm.{name}')
from revcol_mm.models.revcol import ConvNeXtBlock, Fusion, LayerNorm2d, RevCol, UpPath
from revcol_mm.models.reversible import (ANCHOR_BUDGET, DRIFT_THRESHOLD, MIN_GAMMA, STREAM_DTYPE, DriftMonitor, ReversibleCall,
    ReversibilityError, ReversibleColumn, contiguous, couple, keep_invertible, place_anchors, run_columns, run_levels, uncouple)
from revcol_mm.models.stack import Column, ColumnStack, Level, TokenFusion
from revcol_mm.models.deploy import InferenceColumn
from revcol_mm.export import export_onnx
from revcol_mm.checkpoint import (Backbone, CheckpointError, ImportReport, PaddingReport, enable_safe_loading, export_official,
    find_backbone, import_checkpoint, load_pretrained, pad_checkpoint, pad_kernel, pad_on_load, publish_checkpoint,
    read_checkpoint, strip_training_state)
import revcol_mm
assert revcol_mm.models.stack.ColumnStack is ColumnStack and revcol_mm.RevCol is RevCol
""")
    assert result.returncode == 0, result.stderr
