# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The config of a run: the command line's settings, the config's packages, and the arguments that every tool shares."""
import argparse
import ast
import contextlib
import importlib.util
import os
import os.path as osp
import re
from typing import Any, Sequence

from mmengine.config import Config, DictAction
from mmengine.config.utils import ConfigParsingError
from mmengine.device import get_device
from mmengine.utils import import_modules_from_strings

from ..utils.configs import config_path
from .checks.options import check_options
from .errors import PACKAGES, LaunchError

#: What the tools say of their argument CHECKPOINT.
CHECKPOINT = ("weights of the whole model: a file or a URL, also of the authors' release; zoo for the public weights of this "
              'config; zoo:NAME for those of the config NAME')


class _Settings(DictAction):
    """mmengine's action, which removes blanks from values, for settings that may be paths and names with blanks.

    Lists, tuples and dicts may be written as in Python. A setting that is not KEY=VALUE gets an error message.
    """

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        with contextlib.suppress(SyntaxError, ValueError):
            found = ast.literal_eval(val.strip())
            if isinstance(found, (list, tuple, dict)) and val.strip()[0] in '[({':
                return found
        quoted = re.fullmatch(r"""(['"])([^,\[(]*)\1""", val.strip())
        val = quoted[2] if quoted else val
        single = not re.search(r"""^[(\['"]|,|['"]$""", val.strip())  # no list, no tuple, no quotes around it
        return DictAction._parse_int_float_bool(val.strip()) if single else DictAction._parse_iterable(val)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list[str],
                 option_string: str | None = None) -> None:
        wrong = [value for value in values if '=' not in value]
        if wrong:
            parser.error(f'argument {option_string}: every setting must be KEY=VALUE, but got {" ".join(wrong)}')
        super().__call__(parser, namespace, values, option_string)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--cfg-options`` and the defaults of what else :func:`load_config` reads, for every tool that takes a config."""
    parser.set_defaults(launcher='none', work_dir=None, local_rank=0)
    parser.add_argument('--cfg-options', nargs='+', action=_Settings, metavar='KEY=VALUE',
                        help='settings that replace those of the config, e.g. train_dataloader.batch_size=4 '
                             'key="[a,b]" key="[(a,b),(c,d)]"')


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``tools/train.py`` and ``tools/test.py`` share."""
    parser.add_argument('--work-dir', help='folder of logs, checkpoints and metrics; default: work_dirs/<name of the config>')
    add_config_options(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by torch.distributed.launch')


def load_named_config(name: str) -> Config:
    """Reads a config by its path, or by its name in this package, as :func:`load_config` does."""
    return load_config(argparse.Namespace(config=name, cfg_options=None, launcher='none', work_dir=None, local_rank=0))


def load_config(args: argparse.Namespace) -> Config:
    """Reads the config, applies the settings of the command line, and imports the packages that it needs.

    Raises:
        LaunchError: if the config or a package that it needs is missing, or if the config cannot be read.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if not osp.isfile(args.config):  # one of the package's own, configs/x.py or x, also outside of the checkout
        try:
            args.config = config_path(args.config.removeprefix('configs/'))
        except FileNotFoundError as error:
            raise LaunchError(f'there is no config {args.config} (looked from {os.getcwd()}), and {error}') from error
    try:
        cfg = Config.fromfile(args.config)
        if args.cfg_options is not None:
            _register_packages(cfg, args.config)  # so that the arguments of their classes are known
            check_options(cfg, args.cfg_options)
            try:
                cfg.merge_from_dict(args.cfg_options)
            except (TypeError, KeyError, IndexError) as error:
                raise LaunchError(f'--cfg-options do not fit {args.config}: {error}') from error
            import_modules_from_strings(**(cfg.get('custom_imports') or dict(imports=[])))  # the options may name further ones
    except ImportError as error:
        raise LaunchError(_name_missing_package(error, args.config)) from error
    except FileNotFoundError as error:
        raise LaunchError(f'{args.config} inherits from a file that does not exist: {error}') from error
    except (ConfigParsingError, SyntaxError, TypeError, KeyError, AttributeError, NameError, ValueError,
            OSError) as error:  # OSError: no .py file
        raise LaunchError(f'{args.config} is not a valid config: {type(error).__name__}: {error}') from error

    _register_packages(cfg, args.config)
    if cfg.get('default_scope') == 'mmpretrain':
        _set_mmpretrain_dataloaders(cfg)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', osp.splitext(osp.basename(args.config))[0])
    return cfg


def check_present(cfg: Config, path: str, keys: Sequence[str]) -> None:
    """Raises LaunchError if the config, whose file is ``path``, lacks one of the settings that a run needs."""
    missing = [key for key in keys if not cfg.get(key)]
    if missing:
        raise LaunchError(f'{path} must have {", ".join(keys[:-1])} and {keys[-1]}, but has no {" and no ".join(missing)}')


def _name_missing_package(error: ImportError, config: str) -> str:
    """Names the package to install. mmengine replaces the exception that holds the name of the missing module."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            package = cause.name.partition('.')[0]
            if package == 'revcol_mm' and importlib.util.find_spec('revcol_mm') is not None:
                break
            return f'{config} needs the package {package}, which is not installed: pip install {PACKAGES.get(package, package)}'
        cause = cause.__cause__ or cause.__context__
    for package, pip_name in PACKAGES.items():
        if importlib.util.find_spec(package) is None and package in str(error):
            return f'{config} needs {package}, which is not installed: pip install {pip_name}'
    return f'{config} names a module that cannot be imported: {error}'


def _register_packages(cfg: Config, path: str) -> None:
    """Registers all modules of mmdet, mmseg or mmpretrain, whichever the config names as its default scope.

    Raises:
        LaunchError: it is not installed.
    """
    scope = cfg.get('default_scope')
    if scope not in PACKAGES:
        return
    if importlib.util.find_spec(scope) is None:
        raise LaunchError(f'{path} needs {scope}, which is not installed: pip install {PACKAGES[scope]}')
    utils = importlib.import_module(f'{scope}.utils')
    utils.register_all_modules(init_default_scope=False)
    if scope == 'mmdet':
        utils.setup_cache_size_limit_of_dynamo()


def _set_mmpretrain_dataloaders(cfg: Config) -> None:
    """Adds to every data loader what the tools of mmpretrain add, because its configs rely on it."""
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(key)
        if loader:
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('pin_memory', get_device() != 'cpu')
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)
