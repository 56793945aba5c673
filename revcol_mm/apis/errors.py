# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Errors that the user of a tool can remedy, and how they end a program."""
import contextlib
import errno
import logging
import os
import sys
import traceback
import warnings
from typing import Iterator

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger

from ..checkpoint import CheckpointError
from ..utils.configs import MODEL_ERRORS

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
    """A context for tools that only read a config and print an answer: errors become one sentence, logs are off.

    Raises:
        LaunchError: for settings that are refused, with the reason, and the place in the code where the reason does not tell.
    """
    with warnings.catch_warnings(), quiet_log():
        warnings.simplefilter('ignore')
        try:
            yield
        except (LaunchError, CheckpointError, ModuleNotFoundError):
            raise
        except MODEL_ERRORS as error:
            reason = str(error.args[0]) if error.args else ''
            told = isinstance(error, (ValueError, KeyError, TypeError)) and ' ' in reason  # KeyError: a type no registry knows
            raise LaunchError(reason if told else _with_place(error)) from error


def _with_place(error: Exception) -> str:
    """The kind of an error, its reason, and the last place in the code that is not torch's own or called by torch."""
    frames = traceback.extract_tb(error.__traceback__)
    where = next((frame for frame in reversed(frames)
                  if f'{os.sep}torch{os.sep}' not in frame.filename and '__torch_' not in frame.name), frames[-1])
    reason = error.args[0] if error.args else 'no reason given'
    return f'{type(error).__name__}: {reason} ({where.filename}, line {where.lineno})'


@contextlib.contextmanager
def quiet_log() -> Iterator[None]:
    """A context in which nothing below an error is logged."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        for logger in MMLogger._instance_dict.values():  # which logging does not know: they remember what was disabled
            logger._cache.clear()


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
        raise LaunchError(f'{cfg.filename} cannot be built: {_with_place(error)}') from error
