# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Sets up the virtual environment of this checkout; ``make`` calls it before everything else.

It runs under any Python 3, before anything is installed: standard library only, and no syntax that an old interpreter would
stumble over before it can be refused. mmcv has no wheel on PyPI: it is built once per machine and kept in
``${XDG_CACHE_HOME:-~/.cache}/revcol_mm/wheels``, in a folder named after everything the wheel depends on.
"""
import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINNED = ROOT / 'requirements' / 'pinned.txt'
ONEDL = ROOT / 'requirements' / 'onedl.txt'
LOG = ROOT / '.cache' / 'setup_env.log'
PYTHONS = ((3, 11), (3, 12))
OPENMMLAB = ('mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain')
BUILD_PACKAGES = ('setuptools', 'wheel', 'ninja', 'torch', 'numpy')


class SetupError(Exception):
    """Something that keeps the set-up from working; the message says what and what to do."""


def check_interpreter():
    """Refuses an interpreter that cannot run what is pinned.

    Raises:
        SetupError: If its version is not supported, or if it cannot make virtual environments.
    """
    version = '{}.{}'.format(*sys.version_info[:2])
    if sys.version_info[:2] not in PYTHONS or platform.python_implementation() != 'CPython':
        raise SetupError(f'{sys.executable} is {platform.python_implementation()} {version}, but CPython 3.11 or 3.12 is '
                         'needed; name one with PYTHON=...')
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise SetupError(f'{sys.executable} cannot make virtual environments ({error}); install its venv module '
                         f'(Debian, Ubuntu: apt install python{version}-venv) or name another with PYTHON=...')


def check_compiler():
    """Refuses a machine on which mmcv cannot be built.

    Raises:
        SetupError: If there is no C++17 compiler, or if Python's headers are missing.
    """
    compiler = os.environ.get('CXX', 'c++')
    try:
        command = [*compiler.split(), '-std=c++17', '-fsyntax-only', '-x', 'c++', '-']
        result = subprocess.run(command, input=b'#include <vector>\n', stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        works = result.returncode == 0
    except OSError:
        works = False
    if not works:
        raise SetupError(f'mmcv has to be built, but {compiler!r} compiles no C++17; install a C++ compiler '
                         '(Debian, Ubuntu: apt install g++) or name one with CXX=...')
    header = Path(sysconfig.get_path('include'), 'Python.h')
    if not header.is_file():
        raise SetupError(f'mmcv has to be built, but {sys.executable} has no headers ({header} is missing); install them '
                         '(Debian, Ubuntu: apt install python{}.{}-dev)'.format(*sys.version_info[:2])
                         + ' or name another interpreter with PYTHON=...')


def read_requirements(family):
    """Reads the pinned requirements.

    Args:
        family (str): 'openmmlab' as pinned, or 'onedl', the forks, in place of the packages of OpenMMLab.

    Returns:
        dict[str, str]: Versions by name.
    """
    def read(path):
        lines = (line.partition('#')[0].strip() for line in path.read_text(encoding='utf-8').splitlines())
        return dict(line.split('==') for line in lines if line)

    requirements = read(PINNED)
    if family == 'onedl':
        requirements = {name: version for name, version in requirements.items() if name not in OPENMMLAB}
        requirements.update(read(ONEDL))
    return requirements


def find_cuda():
    """Looks for what mmcv's CUDA operators need.

    Returns:
        tuple[list[str], str or None, str or None]: Compute capabilities of the GPUs ('9.0'), path of nvcc, version of nvcc
        ('13.0').
    """
    def output(*command):
        try:
            result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                    timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return ''
        return result.stdout.decode(errors='replace') if result.returncode == 0 else ''

    capabilities = output('nvidia-smi', '--query-gpu=compute_cap', '--format=csv,noheader').split()
    capabilities = sorted({capability for capability in capabilities if re.fullmatch(r'\d+\.\d+', capability)})
    homes = [os.environ[name] for name in ('CUDA_HOME', 'CUDA_PATH') if os.environ.get(name)]
    places = [os.path.join(home, 'bin', 'nvcc') for home in homes] or [shutil.which('nvcc'), '/usr/local/cuda/bin/nvcc']
    for nvcc in filter(None, places):
        version = re.search(r'release (\d+\.\d+)', output(nvcc, '--version'))
        if version:
            return capabilities, nvcc, version.group(1)
    return capabilities, None, None


def choose_device(torch_cuda, capabilities, nvcc_version):
    """Decides what mmcv is built for.

    Args:
        torch_cuda (str or None): ``torch.version.cuda``.
        capabilities (list[str]): Compute capabilities of the GPUs.
        nvcc_version (str or None): Version of nvcc.

    Returns:
        tuple[str, str]: Name of the device in the cache ('cpu', 'cu130-sm90'), and the sentence that says why.
    """
    if not capabilities:
        return 'cpu', 'mmcv is for the CPU: no GPU was found.'
    if not torch_cuda:
        return 'cpu', 'mmcv is for the CPU: the installed torch has no CUDA.'
    if not nvcc_version:
        return 'cpu', f'mmcv is for the CPU: there is a GPU, but no nvcc; for the GPU it takes that of CUDA {torch_cuda}.'
    if nvcc_version.split('.')[0] != torch_cuda.split('.')[0]:
        return 'cpu', (f'mmcv is for the CPU: nvcc is of CUDA {nvcc_version}, torch of {torch_cuda}; '
                       'set CUDA_HOME to a toolkit of the same major version.')
    device = '-sm'.join(['cu' + torch_cuda, *capabilities]).replace('.', '')
    return device, f'mmcv is for CUDA {torch_cuda} and GPUs of capability {", ".join(capabilities)}.'


def wheel_folder(mmcv, torch_version, device):
    """Names the folder in which the built wheel is kept, after everything it depends on.

    Args:
        mmcv (str): Requirement, such as 'mmcv==2.1.0'.
        torch_version (str): Version of torch, without a local part.
        device (str): As :func:`choose_device` returns it.

    Returns:
        Path: ``<cache>/revcol_mm/wheels/mmcv-2.1.0_torch-2.12.1_cp311_cpu_x86_64``.
    """
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    python = 'cp{}{}'.format(*sys.version_info[:2])
    key = f'{mmcv.replace("==", "-")}_torch-{torch_version}_{python}_{device}_{platform.machine()}'
    return cache / 'revcol_mm' / 'wheels' / key


@contextlib.contextmanager
def locked(path, waiting):
    """Holds an exclusive lock on a file or folder; the system gives it back when the process ends, however it ends."""
    descriptor = os.open(path, os.O_RDONLY | (0 if os.path.isdir(path) else os.O_CREAT))
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(waiting)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def say(sentence):
    print(f'[setup] {sentence}', flush=True)


def run(what, command, **changes):
    """Runs a command with its output in the log.

    Args:
        what (str): The step, for the error message.
        command (list[str]): The command.
        changes (str or None): Environment variables to set, or to remove (None).

    Raises:
        SetupError: If the command fails; with the end of its output.
    """
    env = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK='1', PIP_NO_INPUT='1')
    # What a user has set for other environments must not lead pip or Python out of this one.
    changes.update(dict.fromkeys(('PYTHONPATH', 'PYTHONHOME', 'PIP_USER', 'PIP_TARGET', 'PIP_PREFIX')))
    for name, value in changes.items():
        if value is None:
            env.pop(name, None)
        else:
            env[name] = value
    with open(LOG, 'ab') as log:
        log.write('\n$ {}\n'.format(' '.join(map(str, command))).encode())
        log.flush()
        start = log.tell()
        command = [str(part) for part in command]
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env).returncode
    if status:
        with open(LOG, 'rb') as log:
            log.seek(start)
            lines = log.read().decode(errors='replace').splitlines()
        raise SetupError(f'{what} failed (exit status {status}); the whole output is in {LOG}, its end is:\n'
                         + '\n'.join(lines[-15:]))


def build_mmcv(python, mmcv, folder, cuda):
    """Builds mmcv's wheel and keeps it.

    It is built beside its final place and moved there when it is complete and loads, under a lock of the caller: another
    set-up, or one that was killed, never leaves half a wheel.

    Args:
        python (Path): Python of the virtual environment; torch and the build tools are installed there.
        mmcv (str): Requirement.
        folder (Path): Where the wheel is kept.
        cuda (tuple or None): Compute capabilities and path of nvcc; None builds for the CPU.
    """
    building = folder.with_name(f'.{folder.name}.building')
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    cores = len(os.sched_getaffinity(0))
    minutes = max(2, (80 if cuda else 20) // cores)
    say(f'Building {mmcv} on {cores} cores: about {minutes} minutes, once for this machine; the wheel is kept in {folder}')
    if cuda:
        capabilities, nvcc = cuda
        settings = dict(FORCE_CUDA='1', CUDA_HOME=str(Path(nvcc).parent.parent), TORCH_CUDA_ARCH_LIST=';'.join(capabilities))
    else:
        # mmcv asks torch for a GPU and would build for it: hide what is there.
        settings = dict(FORCE_CUDA='0', CUDA_HOME=None, CUDA_PATH=None, CUDA_VISIBLE_DEVICES='')
    try:
        name = mmcv.partition('==')[0]
        command = [python, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--no-cache-dir', '--no-binary', name]
        run(f'building {mmcv}', [*command, '-w', building, mmcv], MMCV_WITH_OPS='1', MAX_JOBS=str(cores), **settings)
        install_mmcv(python, building)
        os.rename(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def install_mmcv(python, folder):
    """Installs the wheel in ``folder`` and loads its compiled operators with the torch of the environment."""
    wheel, = folder.glob('*.whl')
    run('installing mmcv', [python, '-m', 'pip', 'install', '--no-deps', '--force-reinstall', wheel])
    load = ('import importlib.machinery as m, importlib.util as u, pathlib, sysconfig, torch; '
            'path, = pathlib.Path(sysconfig.get_path("platlib"), "mmcv").glob("_ext*.so"); '
            'loader = m.ExtensionFileLoader("_ext", str(path)); u.module_from_spec(u.spec_from_loader("_ext", loader))')
    try:
        run('loading mmcv', [python, '-c', load])
    except SetupError as error:
        raise SetupError(f'the operators in {wheel} do not load with the installed torch; remove {folder} to have mmcv built '
                         f'again. {error}')


def set_up(venv, family):
    """Brings the virtual environment into the pinned state; does nothing when it is there already.

    Args:
        venv (Path): The virtual environment.
        family (str): As in :func:`read_requirements`.
    """
    requirements = read_requirements(family)
    mmcv_name = 'onedl-mmcv' if family == 'onedl' else 'mmcv'
    mmcv = f'{mmcv_name}=={requirements[mmcv_name]}'
    capabilities, nvcc, nvcc_version = find_cuda()
    # pyproject.toml and setup.py decide what the editable install does; its entry points to this folder.
    state = [requirements, sys.version, sys.base_prefix, str(ROOT), capabilities, nvcc_version,
             *((ROOT / name).read_text(encoding='utf-8') for name in ('tools/setup_env.py', 'pyproject.toml', 'setup.py'))]
    stamp, digest = venv / 'revcol_mm_setup', hashlib.sha256(json.dumps(state).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return
    say(f'Setting up {venv} with {sys.executable} ({platform.python_version()}); the output of each step is in {LOG}')
    known = wheel_folder(mmcv, requirements['torch'], 'cu*' if capabilities and nvcc else 'cpu')
    if not any(known.parent.glob(known.name)):
        check_compiler()

    LOG.parent.mkdir(exist_ok=True)
    LOG.write_bytes(b'')
    # A virtual environment made from the one that is to be replaced would lose its interpreter on the way.
    interpreter = getattr(sys, '_base_executable', sys.executable)
    run('making the virtual environment', [interpreter, '-m', 'venv', '--clear', venv])
    python = venv / 'bin' / 'python'

    def install(names):
        pins = [f'{name}=={requirements[name]}' for name in names]
        run('installing packages', [python, '-m', 'pip', 'install', *pins])

    say('Installing torch and the build tools: 1 to 5 minutes, 5 GB.')
    install(BUILD_PACKAGES)
    torch_version = runpy.run_path(str(next(venv.glob('lib/python*/site-packages/torch/version.py'))))
    device, reason = choose_device(torch_version['cuda'], capabilities, nvcc_version)
    say(reason)
    folder = wheel_folder(mmcv, requirements['torch'], device)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f'.{folder.name}.lock'), 'Waiting for another set-up that is building mmcv.'):
        if folder.is_dir():
            say(f'Installing mmcv from the wheel kept in {folder}: seconds.')
            install_mmcv(python, folder)
        else:
            build_mmcv(python, mmcv, folder, None if device == 'cpu' else (capabilities, nvcc))
    say('Installing mmdet, mmsegmentation, mmpretrain and the test tools: about a minute.')
    # The build packages once more, so that nothing that is installed here replaces them.
    install([name for name in requirements if name != mmcv_name])
    say('Installing revcol_mm from this folder, and importing everything once: seconds.')
    run('installing revcol_mm', [python, '-m', 'pip', 'install', '--no-deps', '--no-build-isolation', '-e', ROOT])
    run('importing the installed packages', [python, '-c', 'import mmcv.ops, mmdet, mmseg, mmpretrain, revcol_mm'])
    # By replacement, so that the stamp is there either whole or not at all.
    unfinished = stamp.with_suffix('.tmp')
    unfinished.write_text(digest)
    os.replace(unfinished, stamp)
    say(f'{venv} is ready.')


def main():
    parser = argparse.ArgumentParser(description='Sets up the virtual environment of this checkout.')
    parser.add_argument('--venv', type=Path, default=ROOT / '.venv', help='the virtual environment (default: .venv)')
    parser.add_argument('--family', choices=('openmmlab', 'onedl'), default='openmmlab', help='packages of OpenMMLab or forks')
    parser.add_argument('--check', action='store_true', help='only say whether this interpreter will do')
    args = parser.parse_args()
    start = time.time()
    try:
        check_interpreter()
        if not args.check:
            with locked(ROOT, 'Waiting for another set-up of this checkout.'):
                set_up(Path(os.path.abspath(args.venv)), args.family)
    except SetupError as error:
        sys.exit(f'error: {error}')
    except OSError as error:
        sys.exit(f'error: the set-up could not go on: {error}')
    except KeyboardInterrupt:
        sys.exit('error: interrupted; the next run starts the set-up again')
    if time.time() - start > 20:
        say(f'That took {(time.time() - start) / 60:.1f} minutes; the next run starts in seconds.')


if __name__ == '__main__':
    main()
