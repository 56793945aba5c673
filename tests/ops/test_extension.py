# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The module that stands in for mmcv._ext, and when it does."""
import ast
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import mmcv.ops
import mmengine.utils.dl_utils
import pytest
import torch

from revcol_mm import ops
from revcol_mm.ops import extension, library

ROOT = Path(__file__).parents[2]
MMCV = Path(mmcv.__file__).parent


def native_calls():
    """Every call of a native function in mmcv's sources: its name, the number of positional arguments, the others' names."""
    for path in sorted((MMCV / 'ops').glob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) \
                    and isinstance(node.func.value, ast.Name) and node.func.value.id == 'ext_module':
                yield node.func.attr, node.args, [keyword.arg for keyword in node.keywords]


def test_every_operator_takes_the_arguments_that_mmcv_passes(stand_in):
    names = {operator.__name__ for operator in extension.OPERATORS}
    called = set()
    for name, positional, named in native_calls():
        # mmcv passes some lists of arguments with * and **: their contents are seen by the tests that call them.
        if name in names and None not in named and not any(isinstance(argument, ast.Starred) for argument in positional):
            inspect.signature(getattr(stand_in, name)).bind(*positional, **dict.fromkeys(named))
            called.add(name)
    assert names - called == {'nms_match'}


def test_what_is_not_there_names_itself_and_says_what_it_needs():
    with pytest.raises(NotImplementedError, match='the operator box_iou_rotated of mmcv.ops needs a compiled mmcv'):
        mmcv.ops.box_iou_rotated(torch.zeros(1, 5), torch.zeros(1, 5))


def test_python_hears_the_truth_about_names_that_no_operator_has(stand_in):
    assert not hasattr(stand_in, '__file__') and not hasattr(stand_in, '__path__') and not hasattr(stand_in, '_repr_html_')
    with pytest.raises(TypeError, match='built-in module'):
        inspect.getfile(stand_in)


def test_operators_keep_their_identity(stand_in):
    assert stand_in.knn_forward is stand_in.knn_forward
    assert pickle.loads(pickle.dumps(stand_in.nms)) is stand_in.nms


def test_mmengine_takes_the_operators_for_available(stand_in, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmcv._ext', stand_in)
    assert mmengine.utils.dl_utils.mmcv_full_available()


def test_mmcvs_report_of_the_environment_names_torchvision():
    assert 'torchvision' in mmcv.ops.get_compiler_version()
    assert mmcv.ops.get_compiling_cuda_version() == (torch.version.cuda or 'not available')


def without(monkeypatch, module, *names):
    """Makes a module's importlib.metadata.version miss these distributions."""
    version = module.version

    def find(name):
        if name in names:
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(module, 'version', find)
    library.torchvision_ops.cache_clear()


def test_without_torchvision_an_operator_says_which_one_to_install(monkeypatch):
    without(monkeypatch, library, 'torchvision')
    monkeypatch.setattr(torch, '__version__', '2.14.1+cpu')
    with pytest.raises(ImportError, match=r'need torchvision, but it is not installed: install the one that belongs to '
                                          r'torch 2\.14\.1\+cpu: pip install --upgrade torchvision "torch==2\.14\.1"$'):
        mmcv.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


@pytest.mark.parametrize('error', [RuntimeError('operator torchvision::nms does not exist'), OSError('undefined symbol: _ZN')])
def test_a_torchvision_of_another_torch_says_so(monkeypatch, error):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == 'torchvision':
                raise error

    library.torchvision_ops.cache_clear()
    monkeypatch.delitem(sys.modules, 'torchvision', raising=False)
    monkeypatch.setattr(sys, 'meta_path', [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match=rf'torchvision \S+ does not fit torch \S+ \({error}\); install the one that '
                                          r'belongs to it: pip install --upgrade torchvision "torch==[\d.]+"$'):
        mmcv.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


def test_two_owners_of_mmcvs_folder_are_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(extension, 'version', lambda name: '2.1.0')
    monkeypatch.setattr(extension, 'OWNERS', ('mmcv', 'mmcv-lite'))
    with pytest.warns(UserWarning, match='mmcv 2.1.0 and mmcv-lite 2.1.0 are installed side by side and own the same folder.*'
                                         'pip uninstall -y mmcv mmcv-lite, then pip install'):
        extension._check_owners()


def test_the_log_line_says_whose_operators_run(monkeypatch, stand_in):
    monkeypatch.setitem(sys.modules, 'mmcv._ext', stand_in)
    assert ops.backend() == 'torchvision' and "revcol_mm's, on torchvision" in ops.describe()
    monkeypatch.setitem(sys.modules, 'mmcv._ext', torch)
    assert ops.backend() == 'mmcv' and 'compiled' in ops.describe()


@pytest.fixture
def run_with(tmp_path):
    """Runs code where mmcv is the installed one, but for the compiled extension: none, or a file of our own."""
    folder = tmp_path / 'mmcv'
    folder.mkdir()
    for path in MMCV.iterdir():
        if not path.name.startswith('_ext') and path.name != '__pycache__':
            (folder / path.name).symlink_to(path)

    def run(code, **files):
        for name, text in files.items():
            (folder / f'_ext.{name}').write_text(textwrap.dedent(text))
        before = sorted(path.name for path in folder.iterdir())
        env = dict(os.environ, PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}', OMP_NUM_THREADS='1',
                   PYTHONDONTWRITEBYTECODE='1')
        done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=tmp_path, env=env, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        assert sorted(path.name for path in folder.iterdir()) == before
        return done

    return run


def test_without_a_compiled_extension_the_stand_in_is_installed_once(run_with):
    """Neither torchvision nor mmdet is imported for it, and nothing is written."""
    run_with("""
        import sys
        import revcol_mm
        extension = sys.modules['mmcv._ext']
        revcol_mm.ops.install()
        assert sys.modules['mmcv._ext'] is extension
        assert revcol_mm.ops.backend() == 'torchvision'
        assert not {'torchvision', 'mmdet', 'mmseg', 'mmpretrain'} & set(sys.modules)
        import torch, mmcv.ops
        assert mmcv.ops.nms(torch.tensor([[0., 0, 2, 2]] * 2), torch.ones(2), 0.5)[1].tolist() == [0]
    """)


@pytest.mark.slow
def test_mmcv_and_mmpretrain_may_be_imported_before(run_with):
    """mmcv.cnn then goes on without deformable attention, which mmdet and mmseg look for in it."""
    run_with("""
        import mmpretrain.models
        try:
            import mmdet.apis
        except ModuleNotFoundError as error:
            assert error.name == 'mmcv._ext'
        import revcol_mm
        import mmdet.apis
        from mmcv.cnn.bricks.transformer import MultiScaleDeformableAttention
        assert MultiScaleDeformableAttention.__module__ == 'mmcv.ops.multi_scale_deform_attn'
    """)


@pytest.mark.slow
def test_mmdets_own_test_tool_runs_with_one_line_before_it(run_with):
    """As in docs/operators.md; without it, mmdet.evaluation asks for mmcv.ops before the config imports revcol_mm."""
    line = next(line for line in (ROOT / 'docs' / 'operators.md').read_text(encoding='utf-8').splitlines() if 'runpy' in line)
    code = line.partition('"')[2].partition('"')[0]
    assert 'import revcol_mm' in code
    done = run_with(f"""
        import importlib.util, sys
        from pathlib import Path
        tools = Path(importlib.util.find_spec('mmdet').origin).parent / '.mim' / 'tools'
        sys.argv = ['-c', str(tools / 'test.py'), '--help']
        try:
            exec({code!r})
        except SystemExit as end:
            assert not end.code
    """)
    assert 'test config file path' in done.stdout


def test_a_compiled_extension_that_does_not_load_is_named_with_both_ways_out(run_with):
    suffix = EXTENSION_SUFFIXES[0]
    done = run_with("""
        import revcol_mm, mmcv.ops
        assert revcol_mm.ops.backend() == 'torchvision'
    """, **{suffix.removeprefix('.'): 'not a library'})
    warning = next(line for line in done.stderr.splitlines() if "mmcv's compiled operators do not work" in line)
    assert 'pip install mmcv-lite' in warning and '--no-build-isolation mmcv' in warning


@pytest.mark.slow
def test_a_compiled_extension_that_loads_but_misreads_tensors_is_replaced_though_mmcv_ops_was_imported_before(run_with):
    """mmcv built for torch 2.12 loads beside torch 2.14, and takes tensors on the CPU for tensors on a GPU."""
    done = run_with("""
        import mmcv.ops
        import revcol_mm, torch
        assert revcol_mm.ops.backend() == 'torchvision'
        assert mmcv.ops.nms(torch.tensor([[0., 0, 2, 2]] * 2), torch.ones(2), 0.5)[1].tolist() == [0]
    """, py="""
        def nms(*args, **kwargs):
            raise RuntimeError('nms_impl: implementation for device cuda:0 not found.')

        def __getattr__(name):
            if name.startswith('_'):
                raise AttributeError(name)
            return nms
    """)
    assert 'do not work beside torch' in done.stderr and 'device cuda:0 not found' in done.stderr


@pytest.mark.slow
def test_a_compiled_extension_that_loads_is_used(run_with):
    run_with("""
        import sys
        import revcol_mm
        assert revcol_mm.ops.backend() == 'mmcv'
        assert sys.modules['mmcv._ext'].mine
    """, py="""
        import torch

        mine = True

        def nms(boxes, scores, iou_threshold, offset):
            return torch.zeros(1, dtype=torch.long)

        def __getattr__(name):
            if name.startswith('_'):
                raise AttributeError(name)
            return nms
    """)
