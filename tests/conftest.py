# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
import gzip
import json
from typing import Iterator

import pytest
import torch
from mmengine.registry import DefaultScope

import revcol_mm  # noqa: F401 - mmengine's checkpoints load, whichever test runs alone

from .common import DATA


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _default_scope() -> Iterator[None]:
    """mmengine's default scope outlives the runner that set it: no test meets the one of another."""
    scopes = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(scopes)


@pytest.fixture(scope='session')
def official_shapes() -> dict:
    """Names and shapes of the released checkpoints, by size."""
    return json.loads(gzip.decompress((DATA / 'official_state_dict_shapes.json.gz').read_bytes()))


@pytest.fixture(params=['revcol_small_reference', 'revcol_huge_small_reference'])
def reference(request) -> dict:
    """Inputs, features, loss and gradients of an independent implementation on a small net."""
    return torch.load(DATA / f'{request.param}.pt', weights_only=True)
