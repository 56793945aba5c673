# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
import errno

import pytest

from revcol_mm.apis.errors import LaunchError, plain_errors
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
