# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What an installation carries, and what the set-up script does and refuses."""
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import revcol_mm
from revcol_mm.utils.configs import config_path, get_config
from tests.common import ROOT

SETUP = ROOT / 'tools' / 'setup_env.py'
CONFIG = 'cascade_rcnn_revcol_b'
LINK_TO_PACKAGES = 'packages_of_the_tests.pth'


def run(*command, **kwargs):
    command = [str(part) for part in command]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# What an installation carries


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """A copy of the checkout under git: building in it shows what a build leaves behind, and disturbs nobody."""
    copy = tmp_path_factory.mktemp('checkout') / 'RevCol MM'  # a blank, as in many people's paths
    copy.mkdir()
    for name in ('.gitignore', 'LICENSE', 'MANIFEST.in', 'README.md', 'model-index.yml', 'pyproject.toml', 'setup.py'):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy)
    for name in ('configs', 'revcol_mm', 'tools'):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns('__pycache__', '.mim'))
    run('git', 'init', '-q', cwd=copy)
    run('git', 'add', '-A', cwd=copy)
    return copy


@pytest.fixture(scope='module')
def wheel(checkout, tmp_path_factory):
    return build('build_wheel', checkout, tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='module')
def sdist(checkout, tmp_path_factory):
    return build('build_sdist', checkout, tmp_path_factory.mktemp('sdist'))


def build(hook, checkout, folder):
    """Calls a hook of the build backend, as pip and build do."""
    run(sys.executable, '-c', f'from setuptools import build_meta; build_meta.{hook}({str(folder)!r})', cwd=checkout)
    built, = folder.iterdir()
    return built


def mim_files(checkout):
    """What has to be in ``.mim``, read off the checkout."""
    files = {'model-index.yml'}
    for folder in ('configs', 'tools'):
        files |= {file.relative_to(checkout).as_posix() for file in (checkout / folder).rglob('*')
                  if file.is_file() and '__pycache__' not in file.parts}
    return files


def test_wheel_carries_configs_tools_and_model_index(checkout, wheel):
    prefix = 'revcol_mm/.mim/'
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.removeprefix(prefix) for name in names if name.startswith(prefix)} == mim_files(checkout)
    assert {name.split('/')[0] for name in names} == {'revcol_mm', f'revcol_mm-{revcol_mm.__version__}.dist-info'}


def test_removed_config_is_not_in_the_next_wheel(checkout, wheel, tmp_path):
    config = checkout / 'configs' / 'soon_removed.py'
    config.write_text('')
    try:
        build('build_wheel', checkout, tmp_path)
    finally:
        config.unlink()
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with zipfile.ZipFile(build('build_wheel', checkout, tmp_path)) as archive:
        assert [name for name in archive.namelist() if 'soon_removed' in name] == []


@pytest.mark.parametrize('kind', ['wheel', 'sdist', 'editable'])
def test_configs_are_found_outside_the_checkout(kind, checkout, tmp_path, request):
    source = ['-e', checkout] if kind == 'editable' else [request.getfixturevalue(kind)]
    # A fresh environment that sees the packages of this one, without what their .pth files add (an editable revcol_mm).
    run(sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'venv')
    python = tmp_path / 'venv' / 'bin' / 'python'
    purelib = Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())
    (purelib / LINK_TO_PACKAGES).write_text(sysconfig.get_path('purelib'))
    run(python, '-m', 'pip', 'install', '--no-deps', '--no-build-isolation', '--no-index', *source, cwd=tmp_path)

    (tmp_path / 'mine.py').write_text(f"_base_ = __import__('revcol_mm').config_path('{CONFIG}')\nmax_epochs = 1\n")
    output = run(python, '-c', f"""
from mmengine.config import Config
mine = Config.fromfile('mine.py')  # before anything has imported revcol_mm, as in the tools of mmdet
import revcol_mm
from importlib.metadata import version
print(mine.model.backbone.type, revcol_mm.get_config('{CONFIG}').model.backbone.type, version('revcol_mm'))
print(revcol_mm.config_path('{CONFIG}'))
print(revcol_mm.__file__)
""", cwd=tmp_path).splitlines()[-3:]
    package = (checkout if kind == 'editable' else purelib) / 'revcol_mm'
    assert output[0] == f'RevCol RevCol {revcol_mm.__version__}'
    assert output[1:] == [str(package / '.mim' / 'configs' / f'{CONFIG}.py'), str(package / '__init__.py')]
    mim = package / '.mim'
    assert {name for name in mim_files(checkout) if not (mim / name).is_file()} == set()


def test_builds_leave_only_ignored_files_behind(checkout, wheel, sdist):
    assert run('git', 'status', '--porcelain', '--untracked-files=all', cwd=checkout).count('??') == 0


def test_config_is_named_with_or_without_suffix():
    assert config_path(CONFIG) == config_path(f'{CONFIG}.py')
    assert get_config(CONFIG).model.backbone.type == 'RevCol'


def test_unknown_config_is_refused_with_those_there_are():
    with pytest.raises(FileNotFoundError, match=f"no config 'cascade_rcnn_revcol_z'; .*{CONFIG}"):
        config_path('cascade_rcnn_revcol_z')


# The set-up script


@pytest.fixture
def setup_env(monkeypatch, tmp_path):
    """The set-up script as a module, its log and its cache in a folder of the test."""
    spec = importlib.util.spec_from_file_location('setup_env', SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'LOG', tmp_path / 'setup_env.log')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return module


def script(folder, name, body):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/sh\n{body}\n')
    path.chmod(0o755)
    return path


def refusal(*command, **env):
    result = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=60,
                            env=dict(os.environ, **env))
    assert result.returncode != 0
    assert 'Traceback' not in result.stderr
    return result.stderr


@pytest.mark.parametrize('version', [(3, 10), (3, 13), (3, 8)])
def test_python_of_another_version_is_refused(setup_env, monkeypatch, version):
    monkeypatch.setattr(sys, 'version_info', (*version, 1))
    with pytest.raises(setup_env.SetupError, match=r'{}\.{}, but CPython 3\.11 or 3\.12 is needed'.format(*version)):
        setup_env.check_interpreter()


def test_python_without_ensurepip_is_refused(tmp_path):
    (tmp_path / 'ensurepip.py').write_text("raise ImportError('No module named ensurepip')")
    message = refusal(sys.executable, SETUP, '--check', PYTHONPATH=str(tmp_path))
    assert message.startswith('error: ') and 'cannot make virtual environments' in message and '-venv' in message


def test_shim_that_runs_nothing_is_refused(tmp_path):
    shim = script(tmp_path, 'python3.12', 'echo "python3.12: command not found" >&2; exit 127')
    assert f'error: PYTHON={shim} does not run' in refusal('make', 'python', f'PYTHON={shim}')


def test_make_passes_over_shims_that_run_nothing(tmp_path):
    script(tmp_path, 'python3.12', 'exit 127')
    script(tmp_path, 'python3.11', f'exec "{sys.executable}" "$@"')
    env = dict(os.environ, PATH=f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    for name in ('PYTHON', 'MAKEFLAGS', 'MAKEOVERRIDES', 'MFLAGS'):  # of a `make test PYTHON=…`
        env.pop(name, None)
    assert 'python3.11 -c' in run('make', '-n', 'python', cwd=ROOT, env=env)


@pytest.mark.parametrize('compiler', ['/bin/false', '/nowhere/c++'])
def test_missing_compiler_is_refused_before_anything_is_installed(tmp_path, compiler):
    venv = tmp_path / 'venv'
    message = refusal(sys.executable, SETUP, '--venv', venv, CXX=compiler, XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path))
    assert message.startswith('error: mmcv has to be built') and compiler in message and 'g++' in message
    assert not venv.exists()


def test_missing_headers_are_refused(setup_env, monkeypatch, tmp_path):
    script(tmp_path, 'c++', 'cat >/dev/null')
    monkeypatch.setenv('CXX', str(tmp_path / 'c++'))
    monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
    with pytest.raises(setup_env.SetupError, match=r'no headers \(.*Python\.h is missing\).*-dev'):
        setup_env.check_compiler()


def test_kept_wheel_needs_no_compiler(setup_env, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env, 'find_cuda', lambda: ([], None, None))
    monkeypatch.setenv('CXX', '/bin/false')
    pins = setup_env.read_requirements('openmmlab')
    setup_env.wheel_folder(f'mmcv=={pins["mmcv"]}', pins['torch'], 'cpu').mkdir(parents=True)

    class Reached(Exception):
        pass

    def reached(what, command, **changes):
        raise Reached(what)

    monkeypatch.setattr(setup_env, 'run', reached)
    with pytest.raises(Reached, match='making the virtual environment'):
        setup_env.set_up(tmp_path / 'venv', 'openmmlab')


def test_wheel_is_kept_under_everything_it_depends_on(setup_env, tmp_path):
    folder = setup_env.wheel_folder('mmcv==2.1.0', '2.12.1', 'cpu')
    assert folder.parent == tmp_path / 'cache' / 'revcol_mm' / 'wheels'
    assert folder.name == f'mmcv-2.1.0_torch-2.12.1_cp{sys.version_info[0]}{sys.version_info[1]}_cpu_{platform.machine()}'
    others = [setup_env.wheel_folder(*key) for key in [('onedl-mmcv==2.3.6', '2.12.1', 'cpu'), ('mmcv==2.1.0', '2.13.0', 'cpu'),
                                                       ('mmcv==2.1.0', '2.12.1', 'cu130-sm90')]]
    assert len({folder, *others}) == 4


@pytest.mark.parametrize('torch_cuda, capabilities, nvcc, device, reason', [
    ('13.0', ['9.0'], '13.2', 'cu130-sm90', 'for CUDA 13.0 and GPUs of capability 9.0'),
    ('13.0', ['8.0', '9.0'], '13.0', 'cu130-sm80-sm90', '8.0, 9.0'),
    ('13.0', [], '13.0', 'cpu', 'no GPU was found'),
    ('13.0', ['9.0'], None, 'cpu', 'no nvcc'),
    ('13.0', ['9.0'], '12.8', 'cpu', 'nvcc is of CUDA 12.8, torch of 13.0'),
    (None, ['9.0'], '13.0', 'cpu', 'torch has no CUDA'),
])
def test_mmcv_is_built_for_cuda_only_with_a_gpu_and_a_matching_nvcc(setup_env, torch_cuda, capabilities, nvcc, device, reason):
    chosen, sentence = setup_env.choose_device(torch_cuda, capabilities, nvcc)
    assert chosen == device
    assert reason in sentence


def test_gpu_and_nvcc_are_found(setup_env, monkeypatch, tmp_path):
    script(tmp_path / 'smi', 'nvidia-smi', 'printf "9.0\\n8.0\\n9.0\\n"')
    nvcc = script(tmp_path / 'bin', 'nvcc', 'echo "Cuda compilation tools, release 13.0, V13.0.88"')
    monkeypatch.setenv('PATH', f'{tmp_path / "smi"}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.setenv('CUDA_HOME', str(tmp_path))
    assert setup_env.find_cuda() == (['8.0', '9.0'], str(nvcc), '13.0')


def test_driver_without_gpu_counts_as_none(setup_env, monkeypatch, tmp_path):
    script(tmp_path, 'nvidia-smi', 'echo "No devices were found"; exit 6')
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    assert setup_env.find_cuda()[0] == []


@pytest.mark.parametrize('cuda', [None, (['9.0'], '/opt/cuda/bin/nvcc')], ids=['cpu', 'cuda'])
def test_build_sees_the_gpu_only_if_it_is_for_it(setup_env, monkeypatch, cuda):
    commands = []

    def fake(what, command, **changes):
        commands.append(changes)
        if 'wheel' in command:
            (command[command.index('-w') + 1] / 'mmcv-2.1.0-any.whl').write_bytes(b'')

    monkeypatch.setattr(setup_env, 'run', fake)
    folder = setup_env.wheel_folder('mmcv==2.1.0', '2.12.1', 'any')
    setup_env.build_mmcv('python', 'mmcv==2.1.0', folder, cuda)
    settings = commands[0]
    assert settings['MMCV_WITH_OPS'] == '1'
    if cuda:
        assert (settings['FORCE_CUDA'], settings['CUDA_HOME'], settings['TORCH_CUDA_ARCH_LIST']) == ('1', '/opt/cuda', '9.0')
    else:
        assert (settings['FORCE_CUDA'], settings['CUDA_HOME'], settings['CUDA_VISIBLE_DEVICES']) == ('0', None, '')
    assert [path.name for path in folder.parent.rglob('*.whl')] == ['mmcv-2.1.0-any.whl']


@pytest.mark.parametrize('step', ['building mmcv==2.1.0', 'loading mmcv'])
def test_failed_build_keeps_nothing(setup_env, monkeypatch, step):
    def fake(what, command, **changes):
        if 'wheel' in command:
            (command[command.index('-w') + 1] / 'mmcv-2.1.0-any.whl').write_bytes(b'half a wheel')
        if what == step:
            raise setup_env.SetupError('undefined symbol')

    monkeypatch.setattr(setup_env, 'run', fake)
    folder = setup_env.wheel_folder('mmcv==2.1.0', '2.12.1', 'cpu')
    with pytest.raises(setup_env.SetupError, match='undefined symbol'):
        setup_env.build_mmcv('python', 'mmcv==2.1.0', folder, None)
    assert list(folder.parent.iterdir()) == []


def test_failed_step_names_the_log_and_shows_its_end(setup_env):
    with pytest.raises(setup_env.SetupError) as error:
        setup_env.run('the third step', [sys.executable, '-c', 'print("deep trouble"); raise SystemExit(3)'])
    message = str(error.value)
    assert message.startswith('the third step failed (exit status 3)')
    assert str(setup_env.LOG) in message and message.endswith('deep trouble')


def test_forks_replace_the_packages_of_openmmlab(setup_env):
    plain, forks = setup_env.read_requirements('openmmlab'), setup_env.read_requirements('onedl')
    assert set(plain) - set(forks) == {'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain'}
    assert all(name.startswith('onedl-') for name in set(forks) - set(plain))
