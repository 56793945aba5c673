# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What ``import revcol_mm`` needs, registers and says."""
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from revcol_mm import version as versions

ROOT = Path(__file__).resolve().parent.parent
PINNED = {'torch': '2.12.1', 'mmengine': '0.10.7', 'mmcv': '2.1.0',
          'mmdet': '3.3.0', 'mmsegmentation': '1.2.2', 'mmpretrain': '1.2.0'}
ONEDL = {'torch': '2.12.1', 'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6', 'onedl-mmdetection': '3.5.1',
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
        if name.split('.')[0] in ('mmdet', 'mmseg', 'mmpretrain') or name == 'mmcv._ext':
            raise ImportError(f'{name} is blocked')

sys.meta_path.insert(0, Blocker())
import revcol_mm
from mmengine.registry import MODELS
print(MODELS.build(dict(type='RevCol', arch=dict(channels=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_columns=2))).num_columns)
""")
    assert (result.returncode, result.stdout.strip().splitlines()[-1:]) == (0, ['2']), result.stderr


def test_import_says_nothing_with_the_installed_versions():
    result = run_python('import revcol_mm', '-W', 'error::UserWarning:revcol_mm')
    assert (result.returncode, result.stdout) == (0, ''), result.stderr


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
def test_backbone_is_found_from_the_scopes_of_openmmlab(scope):
    registry = pytest.importorskip(f'{scope}.registry').MODELS
    backbone = registry.build(dict(type='RevCol', arch=dict(channels=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_columns=2)))
    assert type(backbone).__module__ == 'revcol_mm.models.revcol'


@pytest.mark.parametrize('requirements', ['pinned.txt', 'onedl.txt'])
def test_pinned_versions_are_known_to_work(requirements):
    known = {name: numbers for provided in versions.KNOWN_VERSIONS.values() for name, numbers in provided.items()}
    lines = (ROOT / 'requirements' / requirements).read_text(encoding='utf-8').splitlines()
    pins = dict(line.split('==') for line in lines if '==' in line)
    checked = {name: number for name, number in pins.items() if name in known}
    assert len(checked) >= 5
    assert {name: number for name, number in checked.items() if number not in known[name]} == {}


@pytest.mark.parametrize('distributions', [
    PINNED,
    ONEDL,
    {'torch': '2.12.1+cu130', 'mmengine': '0.10.7', 'mmcv-lite': '2.1.0'},
], ids=['pinned', 'onedl', 'torch, mmengine and mmcv without operators'])
def test_known_versions_raise_no_warning(installed, distributions):
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
    assert PINNED[name] in str(error.value)  # what is known to work


def test_mmcv_full_is_too_old(installed):
    installed({'torch': '2.12.1', 'mmengine': '0.10.7', 'mmcv-full': '1.7.2'})
    with pytest.raises(ImportError, match='mmcv-full 1.7.2 is installed'):
        versions.check_versions()


@pytest.mark.parametrize('missing', ['torch', 'mmengine', 'mmcv'])
def test_missing_requirement_is_named(installed, missing):
    installed({name: number for name, number in PINNED.items() if name != missing})
    with pytest.raises(ImportError, match=f'needs {missing}, which is not installed'):
        versions.check_versions()


def test_untested_versions_are_named_in_one_warning_with_the_known_ones(installed):
    installed(dict(PINNED, torch='2.99.0', mmdet='3.4.0rc1'))
    with pytest.warns(UserWarning) as caught:
        versions.check_versions()
    message, = (str(warning.message) for warning in caught)
    assert 'torch 2.99.0 (known: torch 2.12.1' in message
    assert 'mmdet 3.4.0rc1 (known: mmdet 3.3.0' in message
    assert 'mmcv' not in message
