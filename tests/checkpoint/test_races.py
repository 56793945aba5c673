# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Two processes that write the same output: without force, the second one does not replace the first one's."""
import errno
import os
import runpy
from pathlib import Path

import pytest
import torch

from revcol_mm.checkpoint import CheckpointError, files
from revcol_mm.converters import publish_checkpoint, publishing
from revcol_mm.models import RevCol

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=['links', 'no links'])
def _file_system(request, monkeypatch):
    if request.param == 'no links':
        def refuse(*_):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, 'link', refuse)


@pytest.mark.usefixtures('_file_system')
def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / 'out.pth'
    with pytest.raises(CheckpointError, match=r'has created the output .*out.pth in the meantime: .* replace it with force'):
        with files.write_whole(str(path), replace=False) as file:
            file.write(b'second')
            path.write_bytes(b'first')
    assert path.read_bytes() == b'first' and os.listdir(tmp_path) == ['out.pth']


@pytest.mark.usefixtures('_file_system')
def test_a_file_with_a_new_name_appears(tmp_path):
    with files.write_whole(str(tmp_path / 'out.pth'), replace=False) as file:
        file.write(b'content')
    assert (tmp_path / 'out.pth').read_bytes() == b'content' and os.listdir(tmp_path) == ['out.pth']


def test_a_folder_that_is_read_only_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, 'access', lambda path, mode: path != str(tmp_path))  # root may write everywhere
    files.check_folder(str(tmp_path.parent / 'new'), make=True)
    for folder, make in ((tmp_path, False), (tmp_path / 'a' / 'b', True)):
        with pytest.raises(CheckpointError, match=f'can be written to, but {tmp_path} is read-only'):
            files.check_folder(str(folder), make)


def test_a_folder_is_replaced_after_a_process_was_killed_in_between(tmp_path):
    for name in ('out', 'draft', 'draft.outdated'):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    files.put_in_place(str(tmp_path / 'draft'), str(tmp_path / 'out'))
    assert os.listdir(tmp_path) == ['out'] and os.listdir(tmp_path / 'out') == ['draft']


@pytest.fixture
def checkpoint(tmp_path):
    model = RevCol(dict(channels=(4, 8, 8, 8), depths=(1, 1, 1, 1), num_columns=2))
    torch.save(dict(state_dict={f'backbone.{key}': value for key, value in model.state_dict().items()}), tmp_path / 'in.pth')
    return tmp_path / 'in.pth'


def rival(monkeypatch, module, path):
    """Another process writes ``path`` right after this one has looked whether it exists."""
    def check_output(*arguments):
        files.check_output(*arguments)
        Path(path(arguments[0])).write_bytes(b'first')

    monkeypatch.setitem(module, 'check_output', check_output)


def test_publish_checkpoint_does_not_replace_what_appears_meanwhile(checkpoint, monkeypatch):
    rival(monkeypatch, vars(publishing), lambda path: path)
    with pytest.raises(CheckpointError, match=r'out-\w+\.(pth|json) in the meantime'):
        publish_checkpoint(str(checkpoint), str(checkpoint.parent / 'out.pth'))
    rest = [path for path in checkpoint.parent.iterdir() if path != checkpoint]
    assert len(rest) == 2 and all(path.read_bytes() == b'first' for path in rest)


def test_pad_kernels_does_not_replace_what_appears_meanwhile(checkpoint, monkeypatch):
    tool = runpy.run_path(str(ROOT / 'tools' / 'pad_kernels.py'))
    rival(monkeypatch, tool['main'].__wrapped__.__globals__, lambda path: path)
    with pytest.raises(SystemExit, match=r'error: .*in_k5\.pth in the meantime'):
        tool['main']([str(checkpoint), '--size', '5'])
    assert (checkpoint.parent / 'in_k5.pth').read_bytes() == b'first'
