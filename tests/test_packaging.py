# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What an installation carries, and what the set-up script does and refuses."""
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
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
    kwargs.setdefault('env', {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'})  # the checkout's
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


def test_removed_config_or_module_is_not_in_the_next_wheel(checkout, wheel, tmp_path):
    removed = [checkout / folder / 'soon_removed.py' for folder in ('configs', 'revcol_mm')]
    for file in removed:
        file.write_text('')
    try:
        build('build_wheel', checkout, tmp_path)
    finally:
        for file in removed:
            file.unlink()
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with zipfile.ZipFile(build('build_wheel', checkout, tmp_path)) as archive:
        assert [name for name in archive.namelist() if 'soon_removed' in name] == []


@pytest.mark.slow
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


@pytest.mark.parametrize('name, sentence', [
    ('cascade_rcn_revcol_b', f"no config 'cascade_rcn_revcol_b'; did you mean {CONFIG} or "),
    ('dino_revcol_nano_digits', r'; did you mean demo/dino_revcol_nano_digits\?$'),
    ('quite another', f'; its configs are .*{CONFIG}, ')])
def test_unknown_config_is_refused_with_similar_names_or_with_all(name, sentence):
    with pytest.raises(FileNotFoundError, match=sentence) as error:
        config_path(name)
    assert '_base_' not in str(error.value)  # no models


# The extras and the requirements


def names(requirements):
    return {re.match(r'[\w-]+', requirement).group() for requirement in requirements}


def test_each_extra_names_one_mmcv_and_beside_it_the_same_packages():
    extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
    assert names(extras['openmmlab']) - names(extras['mmcv']) == {'mmcv-lite'}
    assert names(extras['mmcv']) - names(extras['openmmlab']) == {'mmcv'}


def pins(name):
    """Versions by name in a file of requirements and in those that it includes."""
    found = {}
    for line in (ROOT / 'requirements' / name).read_text().splitlines():
        if line.startswith('-r '):
            found.update(pins(line.removeprefix('-r ')))
        elif '==' in line:
            found.update([line.split('==')])
    return found


def test_nothing_but_the_forks_is_built():
    """pip builds what --no-binary names, and nothing else."""
    built = {path.name: re.findall(r'^--no-binary (\S+)$', path.read_text(), re.MULTILINE)
             for path in (ROOT / 'requirements').glob('*.txt')}
    assert '--only-binary :all:' in (ROOT / 'requirements' / 'base.txt').read_text().splitlines()
    assert built.pop('onedl.txt') == ['onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation', 'onedl-mmpretrain']
    assert not any(built.values())


@pytest.mark.parametrize('name, mmcv', [('pinned.txt', {'mmcv-lite'}), ('mmcv.txt', set()), ('onedl.txt', {'onedl-mmcv'})])
def test_each_environment_has_one_mmcv(name, mmcv):
    assert names(pins(name)) & {'mmcv', 'mmcv-lite', 'onedl-mmcv'} == mmcv


# The set-up script


@pytest.fixture
def setup_env(monkeypatch, tmp_path):
    """The set-up script as a module, its log and its cache in a folder of the test."""
    spec = importlib.util.spec_from_file_location('setup_env', SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'LOG', tmp_path / 'setup_env.log')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.delenv('FORCE_CUDA', raising=False)
    return module


@pytest.fixture
def commands(setup_env, monkeypatch):
    """The set-up's commands, as (what, command, changes of the environment), which are noted and not run."""
    noted = []
    monkeypatch.setattr(setup_env, 'run', lambda what, command, **changes: noted.append((what, command, changes)))
    return noted


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


@pytest.mark.parametrize('version', [(3, 10), (3, 14), (3, 8)])
def test_python_of_another_version_is_refused(setup_env, monkeypatch, version):
    monkeypatch.setattr(sys, 'version_info', (*version, 1))
    with pytest.raises(setup_env.SetupError, match=r'{}\.{}, but CPython 3\.11, 3\.12 or 3\.13 is needed'.format(*version)):
        setup_env.check_interpreter()


def test_python_without_ensurepip_is_refused(tmp_path):
    (tmp_path / 'ensurepip.py').write_text("raise ImportError('No module named ensurepip')")
    message = refusal(sys.executable, SETUP, '--check', PYTHONPATH=str(tmp_path))
    assert message.startswith('error: ') and 'cannot make virtual environments' in message and '-venv' in message


def test_shim_that_runs_nothing_is_refused(tmp_path):
    shim = script(tmp_path, 'python3.12', 'echo "python3.12: command not found" >&2; exit 127')
    assert f'error: PYTHON={shim} does not run' in refusal('make', 'python', f'PYTHON={shim}')


def test_make_passes_over_shims_that_run_nothing(tmp_path):
    for name in ('python3.12', 'python3.13'):
        script(tmp_path, name, 'exit 127')
    script(tmp_path, 'python3.11', f'exec "{sys.executable}" "$@"')
    env = dict(os.environ, PATH=f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    for name in ('PYTHON', 'MAKEFLAGS', 'MAKEOVERRIDES', 'MFLAGS'):  # of a `make test PYTHON=…`
        env.pop(name, None)
    assert 'python3.11 -c' in run('make', '-n', 'python', cwd=ROOT, env=env)


def test_environment_is_made_once_and_again_when_the_requirements_change(setup_env, commands, tmp_path):
    venv, requirements = tmp_path / 'venv', tmp_path / 'pinned.txt'
    venv.mkdir()

    def steps():
        commands.clear()
        setup_env.set_up(venv, requirements, None)
        return [what for what, _, _ in commands]

    requirements.write_text('numpy==1')
    assert steps() == ['making the virtual environment', 'installing uv', 'installing packages', 'installing revcol_mm',
                       'importing the installed packages']
    assert steps() == []
    requirements.write_text('numpy==2')
    assert steps()[0] == 'making the virtual environment'


@pytest.mark.parametrize('step', ['making the virtual environment', 'installing packages', 'importing the installed packages'])
def test_failed_set_up_never_looks_complete(setup_env, monkeypatch, tmp_path, step):
    venv, done = tmp_path / 'venv', []
    venv.mkdir()

    def fail(what, command, **changes):
        done.append(what)
        if what == step:
            raise setup_env.SetupError('No space left on device')

    monkeypatch.setattr(setup_env, 'run', fail)
    for _ in range(2):  # the second run starts at the beginning again
        with pytest.raises(setup_env.SetupError, match='No space left on device'):
            setup_env.set_up(venv, ROOT / 'requirements' / 'pinned.txt', None)
    assert done.count('making the virtual environment') == 2


@pytest.mark.parametrize('broken', ['installing uv', 'installing packages'])
def test_pip_installs_what_uv_cannot(setup_env, monkeypatch, broken, capsys):
    installers = []

    def run(what, command, **changes):
        if what == broken and (what == 'installing uv' or 'uv' in command):
            raise setup_env.SetupError('invalid peer certificate')
        if what == 'installing packages':
            installers.append(command[2])

    monkeypatch.setattr(setup_env, 'run', run)
    setup_env.install_packages('python', 'pinned.txt')
    assert installers == ['pip']
    assert 'pip' in capsys.readouterr().out


def test_failed_step_names_the_log_and_shows_its_end(setup_env):
    with pytest.raises(setup_env.SetupError) as error:
        setup_env.run('the third step', [sys.executable, '-c', 'print("deep trouble"); raise SystemExit(3)'])
    message = str(error.value)
    assert message.startswith('the third step failed (exit status 3)')
    assert str(setup_env.LOG) in message and message.endswith('deep trouble')


# The compiled mmcv of `make test-mmcv`


def test_missing_compiler_is_refused_before_anything_is_built(setup_env, commands, monkeypatch):
    monkeypatch.setenv('CXX', '/nowhere/c++ -v')
    folder = setup_env.wheel_folder('mmcv==2.1.0', '2.12.1')
    with pytest.raises(setup_env.SetupError, match='mmcv==2.1.0 has to be built, .*/nowhere/c.. -v.*apt install g'):
        setup_env.build('python', 'mmcv==2.1.0', folder)
    assert not commands and not folder.exists()


def test_wheel_is_kept_under_everything_it_depends_on(setup_env, monkeypatch, tmp_path):
    folder = setup_env.wheel_folder('mmcv==2.1.0', '2.12.1')
    assert folder.parent == tmp_path / 'cache' / 'revcol_mm' / 'wheels'
    assert folder.name == f'mmcv-2.1.0_torch-2.12.1_cp{sys.version_info[0]}{sys.version_info[1]}_cpu_{platform.machine()}'
    others = [setup_env.wheel_folder('mmcv==2.2.0', '2.12.1'), setup_env.wheel_folder('mmcv==2.1.0', '2.13.0')]
    monkeypatch.setenv('FORCE_CUDA', '1')
    others.append(setup_env.wheel_folder('mmcv==2.1.0', '2.12.1'))
    assert len({folder, *others}) == 4


def test_a_folder_without_its_wheel_is_filled_again(setup_env, monkeypatch, tmp_path):
    def fake(what, command, **changes):
        if 'wheel' in command:
            (command[command.index('-w') + 1] / 'mmcv-2.1.0-any.whl').touch()

    monkeypatch.setattr(setup_env, 'run', fake)
    monkeypatch.setenv('CXX', sys.executable)
    (tmp_path / 'venv' / 'lib' / 'python3' / 'site-packages' / 'torch-2.12.1+cpu.dist-info').mkdir(parents=True)
    folder = setup_env.wheel_folder('mmcv==2.1.0', '2.12.1')
    folder.mkdir(parents=True)
    (folder / 'notes.txt').touch()
    setup_env.set_up(tmp_path / 'venv', ROOT / 'requirements' / 'mmcv.txt', 'mmcv==2.1.0')
    assert os.listdir(folder) == ['mmcv-2.1.0-any.whl']


@pytest.mark.parametrize('cuda', [False, True])
def test_mmcv_is_built_for_cuda_only_when_that_is_asked_for(setup_env, monkeypatch, cuda):
    changed = []

    def fake(what, command, **changes):
        changed.append(changes)
        if 'wheel' in command:
            (command[command.index('-w') + 1] / 'mmcv-2.1.0-any.whl').write_bytes(b'')

    monkeypatch.setattr(setup_env, 'run', fake)
    monkeypatch.setenv('CXX', sys.executable)  # something that is there
    if cuda:
        monkeypatch.setenv('FORCE_CUDA', '1')
    folder = setup_env.wheel_folder('mmcv==2.1.0', '2.12.1')
    setup_env.build('python', 'mmcv==2.1.0', folder)
    assert changed[0]['MMCV_WITH_OPS'] == '1'
    assert (changed[0].get('FORCE_CUDA'), changed[0].get('CUDA_VISIBLE_DEVICES')) == ((None, None) if cuda else ('0', ''))
    assert [path.name for path in folder.parent.rglob('*.whl')] == ['mmcv-2.1.0-any.whl']


@pytest.mark.parametrize('step', ['building mmcv==2.1.0', 'loading mmcv'])
def test_failed_build_keeps_nothing(setup_env, monkeypatch, step):
    def fake(what, command, **changes):
        if 'wheel' in command:
            (command[command.index('-w') + 1] / 'mmcv-2.1.0-any.whl').write_bytes(b'half a wheel')
        if what == step:
            raise setup_env.SetupError('undefined symbol')

    monkeypatch.setattr(setup_env, 'run', fake)
    monkeypatch.setenv('CXX', sys.executable)
    folder = setup_env.wheel_folder('mmcv==2.1.0', '2.12.1')
    with pytest.raises(setup_env.SetupError, match='undefined symbol'):
        setup_env.build('python', 'mmcv==2.1.0', folder)
    assert list(folder.parent.iterdir()) == []
