# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Errors that the user of a tool can remedy, and how they end a program."""
import contextlib
import errno
import logging
import sys
import traceback
import warnings
from typing import Iterator

from mmengine.config import Config
from mmengine.hooks import Hook

from ..checkpoint import CheckpointError

#: Import name and PyPI name of the packages that a config's ``default_scope`` can name.
PACKAGES = dict(mmdet='mmdet', mmseg='mmsegmentation', mmpretrain='mmpretrain')


class LaunchError(RuntimeError):
    """A run that cannot start or go on for a reason that its user can remedy; the message says how."""


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the program with one sentence and exit status 1 for errors that the user can remedy. Others keep their traceback.

    It is a context, and a decorator for the ``main`` of a tool.
    """
    try:
        yield
    except (LaunchError, CheckpointError, FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError,
            PermissionError) as error:
        sys.exit(f'error: {error}')
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f'error: the disk is full ({error}). Make room, and run the command again')
    except ModuleNotFoundError as error:
        package = (error.name or '').partition('.')[0]
        sys.exit(f'error: {error}: pip install {PACKAGES.get(package, package)}')


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """A context for tools that only ask something about a config: without log and warnings, which matter for training.

    Raises:
        LaunchError: for settings that are refused, with the reason.
    """
    with warnings.catch_warnings(), quiet_log():
        warnings.simplefilter('ignore')
        try:
            yield
        except (ValueError, KeyError, TypeError) as error:  # KeyError: a type that no registry knows
            raise LaunchError(error.args[0] if error.args else type(error).__name__) from error


@contextlib.contextmanager
def quiet_log() -> Iterator[None]:
    """A context in which nothing below an error is logged."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Begun(Hook):
    """Tells whether the run has begun. A runner builds most of its parts in the call that starts the run.

    It is the last hook that is called, because other hooks refuse settings before the run begins.
    """

    value = False

    def before_train(self, runner) -> None:
        self.value = True

    before_test = before_train


@contextlib.contextmanager
def build_errors(cfg: Config, runner=None) -> Iterator[None]:
    """A context in which the config's model, or all parts of a run, are built.

    Args:
        cfg (Config): the config.
        runner (Runner, optional): a runner that runs in this context. It builds further parts before the run begins; errors
            of the run itself are not changed. Default: None.

    Raises:
        LaunchError: if the config has no model, or settings that a part refuses, an unknown ``type`` for example. The message
            names the place in the code.
    """
    if not cfg.get('model'):
        raise LaunchError(f'{cfg.filename} must define a model, but has none')
    begun = _Begun()
    if runner is not None:
        runner.register_hook(begun, priority='LOWEST')
    try:
        yield
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        if begun.value:
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = error.args[0] if error.args else 'no reason given'
        raise LaunchError(f'{cfg.filename} cannot be built: {type(error).__name__}: {reason} ({where.filename}, line '
                          f'{where.lineno})') from error
