# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
import gzip
import json
import os
import random
import shutil
import sysconfig
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope

import revcol_mm  # noqa: F401 - mmengine's checkpoints load, whichever test runs alone

from .common import DATA

LEFT_OUT = 'left out for want of a compiler'

# Every run draws the same cases: a rare case that fails must not depend on the day.
hypothesis.settings.register_profile('repeatable', derandomize=True)
hypothesis.settings.load_profile('repeatable')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what torch.compile translates to C++, where it cannot be compiled."""
    header = Path(sysconfig.get_path('include'), 'Python.h')
    if shutil.which(os.environ.get('CXX') or 'g++') and header.is_file():  # as torch looks for it
        return
    left_out = [item for item in items if item.get_closest_marker('compiler')]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    if hasattr(config, 'workeroutput'):
        config.workeroutput[LEFT_OUT] = len(left_out)
    else:
        config.stash[LEFT_OUT] = len(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """pytest-xdist: what its workers have left out, all of them the same, is not in its summary by itself."""
    node.config.stash[LEFT_OUT] = getattr(node, 'workeroutput', {}).get(LEFT_OUT, 0)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    number = config.stash.get(LEFT_OUT, 0)
    if number:
        terminalreporter.write_line(f'{number} tests deselected: they need a C++ compiler and the headers of Python')


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # from which mmengine draws the seed of a run that names none
    random.seed(0)


@pytest.fixture(scope='session', autouse=True)
def _unformatted_configs() -> Iterator[None]:
    """Every run has its config's text formatted three times, up to a second each. What runs as a process still does."""
    def keep(text: str, **kwargs) -> tuple[str, bool]:
        return text, True

    with mock.patch('mmengine.config.config.FormatCode', keep, create=True), \
            mock.patch('yapf.yapflib.yapf_api.FormatCode', keep):  # the fork of mmengine imports it when it needs it
        yield


@contextmanager
def _own_default_scope() -> Iterator[None]:
    scopes = dict(DefaultScope._instance_dict)
    try:
        yield
    finally:
        DefaultScope._instance_dict.clear()
        DefaultScope._instance_dict.update(scopes)


@pytest.fixture(scope='module', autouse=True)
def _default_scope_of_a_module() -> Iterator[None]:
    """mmengine's default scope outlives what set it: no file meets the one that another file's fixtures or imports left."""
    with _own_default_scope():
        DefaultScope._instance_dict.clear()
        yield


@pytest.fixture(autouse=True)
def _default_scope() -> Iterator[None]:
    """No test meets the default scope of another."""
    with _own_default_scope():
        yield


@pytest.fixture(scope='session')
def official_shapes() -> dict:
    """Names and shapes of the released checkpoints, by size."""
    return json.loads(gzip.decompress((DATA / 'official_state_dict_shapes.json.gz').read_bytes()))


@pytest.fixture(params=['revcol_small_reference', 'revcol_huge_small_reference'])
def reference(request) -> dict:
    """Inputs, features, loss and gradients of an independent implementation on a small net."""
    return torch.load(DATA / f'{request.param}.pt', weights_only=True)
