# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
import errno
import logging

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from revcol_mm.apis.errors import LaunchError, asking, build_errors, plain_errors, quiet_log
from revcol_mm.checkpoint import CheckpointError


@pytest.mark.parametrize('error', [
    LaunchError('x'), CheckpointError('x'), FileNotFoundError(errno.ENOENT, 'No such file', 'x'),
    PermissionError(errno.EACCES, 'Permission denied', 'x'), IsADirectoryError(errno.EISDIR, 'Is a directory', 'x'),
    OSError(errno.ENOSPC, 'No space left', 'x'), ModuleNotFoundError('x', name='x')], ids=lambda error: type(error).__name__)
def test_what_the_user_can_remedy_ends_with_one_sentence(error):
    @plain_errors()
    def main():
        raise error

    with pytest.raises(SystemExit, match='^error: .*x'):
        main()


@pytest.mark.parametrize('error', [OSError(errno.EIO, 'Input/output error', 'x'), ValueError('x')],
                         ids=lambda error: type(error).__name__)
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), plain_errors():
        raise error


class Refuses(Hook):
    priority = 'LOWEST'

    def __init__(self, place):
        setattr(self, place, self.refuse)

    def refuse(self, runner, **kwargs):
        raise ValueError('refused')


@pytest.mark.parametrize('place, error, text', [('before_train', LaunchError, 'cannot be built: ValueError: refused'),
                                                ('before_test', LaunchError, 'cannot be built: ValueError: refused'),
                                                ('before_train_epoch', ValueError, '^refused$')])
def test_what_a_hook_refuses_before_the_run_is_one_sentence_and_errors_of_the_run_are_not(place, error, text):
    runner = Runner.__new__(Runner)
    runner._hooks = []
    runner.register_hook(Refuses(place))
    with pytest.raises(error, match=text), build_errors(Config(dict(model=dict(type='Net'))), runner):
        runner.call_hook('before_test' if place == 'before_test' else 'before_train')
        runner.call_hook('before_train_epoch')


@pytest.mark.parametrize('error, sentence', [
    (ValueError('x must be y'), 'x must be y$'), (KeyError('x is not registered'), 'x is not registered$'),
    (KeyError('x'), r'KeyError: x \(.*test_errors.py, line \d+\)$'),
    (RuntimeError('k out of range'), r'RuntimeError: k out of range \(.*test_errors.py, line \d+\)$'),
    (AssertionError(), r'AssertionError: no reason given \(.*test_errors.py, line \d+\)$'),
    (LaunchError('x'), 'x$'), (CheckpointError('x'), 'x$')])
def test_what_a_question_about_a_config_raises_becomes_one_sentence_with_its_place(error, sentence):
    with pytest.raises((LaunchError, CheckpointError), match=f'^{sentence}'), asking():
        raise error


def test_missing_packages_and_files_keep_their_own_sentences():
    for error in (ModuleNotFoundError('x', name='x'), FileNotFoundError('x')):
        with pytest.raises(type(error)), asking():
            raise error


def test_the_place_is_the_call_and_not_inside_of_torch():
    with pytest.raises(LaunchError, match=r'RuntimeError: .* \(.*test_errors.py, line \d+\)$'), asking():
        torch.nn.Linear(2, 2)(torch.zeros(3))


def test_a_logger_that_was_used_in_silence_speaks_afterwards():
    logger = MMLogger.get_instance('used in silence', log_level='INFO')
    with quiet_log():
        assert not logger.isEnabledFor(logging.INFO)
    assert logger.isEnabledFor(logging.INFO)
