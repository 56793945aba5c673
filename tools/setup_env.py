# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Sets up a virtual environment of this checkout; ``make`` calls it before everything else.

It runs before anything is installed: standard library only, and no syntax that an old interpreter would stumble over before it
can be refused. A set-up that is there already is left alone; one that failed or was killed is made anew.
"""
import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / '.cache' / 'setup_env.log'
PYTHONS = ((3, 11), (3, 12), (3, 13))
# On two busy cores uv put the wheels in place in 46 s, all downloaded, and pip in 175 s: pip installs uv, and takes over where
# uv does not work, as behind an index or a certificate that only pip is told about.
UV = 'uv==0.13.9'


class SetupError(Exception):
    """Something that keeps the set-up from working; the message says what and what to do."""


def check_interpreter(pythons=PYTHONS):
    """Refuses an interpreter that cannot run what is pinned.

    Args:
        pythons (Sequence[tuple[int, int]]): The versions that will do. Defaults to ``PYTHONS``.

    Raises:
        SetupError: If its version is another one, or if it cannot make virtual environments.
    """
    names = ['{}.{}'.format(*numbers) for numbers in pythons]
    version = '{}.{}'.format(*sys.version_info[:2])
    if version not in names or platform.python_implementation() != 'CPython':
        raise SetupError(f'{sys.executable} is {platform.python_implementation()} {version}, but CPython '
                         f'{", ".join(names[:-1])} or {names[-1]} is needed; name one with PYTHON=...')
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise SetupError(f'{sys.executable} cannot make virtual environments ({error}); install its venv module '
                         f'(Debian, Ubuntu: apt install python{version}-venv) or name another with PYTHON=...')


@contextlib.contextmanager
def locked(path, waiting):
    """Holds an exclusive lock on a file or folder; the system gives it back when the process ends, however it ends."""
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT)
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
        changes (str): Environment variables to set.

    Raises:
        SetupError: If the command fails; with the end of its output.
    """
    # What a user has set for other environments must not lead pip or Python out of this one.
    foreign = ('PYTHONPATH', 'PYTHONHOME', 'PIP_USER', 'PIP_TARGET', 'PIP_PREFIX', 'UV_TARGET', 'UV_PREFIX')
    env = {name: value for name, value in os.environ.items() if name not in foreign}
    env.update(changes, PIP_DISABLE_PIP_VERSION_CHECK='1', PIP_NO_INPUT='1')
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


def install_packages(python, requirements):
    """Installs a file of requirements, with uv if it can, with pip otherwise."""
    try:
        run('installing uv', [python, '-m', 'pip', 'install', '--only-binary', ':all:', UV])
        run('installing packages', [python, '-m', 'uv', 'pip', 'install', '--compile-bytecode', '--python', python, '-r',
                                   requirements])
    except SetupError:
        say(f'uv cannot do it, as {LOG} says; pip does, which takes some minutes longer.')
        run('installing packages', [python, '-m', 'pip', 'install', '-r', requirements])


def wheel_folder(source, torch):
    """Names the folder in which a built wheel is kept, after everything it depends on.

    Args:
        source (str): Requirement, such as 'mmcv==2.1.0'.
        torch (str): Version of torch, without a local part.

    Returns:
        Path: ``<cache>/revcol_mm/wheels/mmcv-2.1.0_torch-2.12.1_cp311_cpu_x86_64``.
    """
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    device = 'cuda' if os.environ.get('FORCE_CUDA') == '1' else 'cpu'
    python = 'cp{}{}'.format(*sys.version_info[:2])
    return cache / 'revcol_mm' / 'wheels' / f'{source.replace("==", "-")}_torch-{torch}_{python}_{device}_{platform.machine()}'


def build(python, source, folder):
    """Builds a wheel and keeps it: once per machine.

    It is built beside its final place and moved there when it is complete and loads, under a lock of the caller: another
    set-up, or one that was killed, never leaves half a wheel.

    Args:
        python (Path): Python of the virtual environment; torch and the build tools are installed there.
        source (str): Requirement, such as 'mmcv==2.1.0'.
        folder (Path): Where the wheel is kept.

    Raises:
        SetupError: If there is no C++ compiler, if the build fails, or if the result does not load.
    """
    compiler = os.environ.get('CXX') or 'c++'
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise SetupError(f'{source} has to be built, but there is no {compiler!r}; install a C++ compiler '
                         '(Debian, Ubuntu: apt install g++) or name one with CXX=...')
    building = folder.with_name(f'.{folder.name}.building')
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    say(f'Building {source}: about 10 minutes on two cores, once for this machine; the wheel is kept in {folder}')
    # mmcv asks torch for a GPU and would build for it: hide what is there, unless it is asked for.
    changes = {} if os.environ.get('FORCE_CUDA') == '1' else dict(FORCE_CUDA='0', CUDA_VISIBLE_DEVICES='')
    try:
        command = [python, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--no-cache-dir', '-w', building, source]
        run(f'building {source}', command, MMCV_WITH_OPS='1', MAX_JOBS=str(len(os.sched_getaffinity(0))), **changes)
        install_wheel(python, building)
        shutil.rmtree(folder, ignore_errors=True)  # one without a wheel
        os.rename(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def install_wheel(python, folder):
    """Installs the wheel of mmcv in ``folder`` and loads its compiled operators with the torch of the environment."""
    wheel, = folder.glob('*.whl')
    run(f'installing {wheel}', [python, '-m', 'pip', 'install', '--no-deps', '--force-reinstall', wheel])
    try:
        run('loading mmcv', [python, '-c', 'import torch, mmcv._ext'])
    except SetupError as error:
        raise SetupError(f'the operators in {wheel} do not load with the installed torch; remove {folder} to have mmcv built '
                         f'again. {error}')


def set_up(venv, requirements, source):
    """Brings the virtual environment into the pinned state; does nothing when it is there already.

    Args:
        venv (Path): The virtual environment.
        requirements (Path): A file of requirements.
        source (str or None): Requirement that is built and installed on top, such as 'mmcv==2.1.0'.
    """
    # pyproject.toml and setup.py decide what the editable install does; its entry points to this folder.
    files = [requirements, *(ROOT / 'requirements' / name for name in ('base.txt', 'docs.txt')), Path(__file__),
             ROOT / 'pyproject.toml', ROOT / 'setup.py']
    state = [str(requirements), str(source), sys.version, sys.base_prefix, str(ROOT), os.environ.get('FORCE_CUDA', ''),
             *(file.read_text(encoding='utf-8') for file in files)]
    stamp, digest = venv / 'revcol_mm_setup', hashlib.sha256('\0'.join(state).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return
    start = time.time()
    say(f'Setting up {venv} with {sys.executable} ({platform.python_version()}): torch is 3 GB to download and 5 on the disk, '
        f'the rest 1. The output of each step is in {LOG}')
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_bytes(b'')
    # A virtual environment made from the one that is to be replaced would lose its interpreter on the way.
    interpreter = getattr(sys, '_base_executable', sys.executable)
    run('making the virtual environment', [interpreter, '-m', 'venv', '--clear', venv])
    python = venv / 'bin' / 'python'
    install_packages(python, requirements)
    if source:
        torch, = venv.glob('lib/python*/site-packages/torch-*.dist-info')
        folder = wheel_folder(source, torch.name[len('torch-'):-len('.dist-info')].partition('+')[0])
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f'.{folder.name}.lock'), f'Waiting for another set-up that is building {source}.'):
            if any(folder.glob('*.whl')):
                say(f'Installing {source} from the wheel kept in {folder}')
                install_wheel(python, folder)
            else:
                build(python, source, folder)
    run('installing revcol_mm', [python, '-m', 'pip', 'install', '--no-deps', '--no-build-isolation', '-e', ROOT])
    run('importing the installed packages', [python, '-c', 'import revcol_mm, mmdet, mmseg, mmpretrain'])
    # By replacement, so that the stamp is there either whole or not at all.
    unfinished = stamp.with_suffix('.tmp')
    unfinished.write_text(digest)
    os.replace(unfinished, stamp)
    seconds = time.time() - start
    say(f'{venv} is ready, in {seconds // 60:.0f} min {seconds % 60:.0f} s; the next run starts at once.')


def main():
    parser = argparse.ArgumentParser(description='Sets up a virtual environment of this checkout.')
    parser.add_argument('--venv', type=Path, default=ROOT / '.venv', help='the virtual environment (default: .venv)')
    parser.add_argument('--requirements', type=Path, default=ROOT / 'requirements' / 'pinned.txt', help='what is installed')
    parser.add_argument('--build', metavar='REQUIREMENT', help='what is built from source on top: mmcv==VERSION')
    parser.add_argument('--check', action='store_true', help='only say whether this interpreter will do')
    args = parser.parse_args()
    try:
        check_interpreter(PYTHONS[:2] if args.build else PYTHONS)  # mmcv's setup.py does not run under Python 3.13
        if not args.check:
            with locked(ROOT, 'Waiting for another set-up of this checkout.'):
                set_up(Path(os.path.abspath(args.venv)), args.requirements.resolve(), args.build)
    except SetupError as error:
        sys.exit(f'error: {error}')
    except OSError as error:
        sys.exit(f'error: the set-up could not go on: {error}')
    except KeyboardInterrupt:
        sys.exit('error: interrupted; the next run starts the set-up again')


if __name__ == '__main__':
    main()
