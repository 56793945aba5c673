# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""mmcv.ops runs on this package's operators in every test here, also where a compiled mmcv is installed."""
import sys
from types import ModuleType

import mmcv.ops  # noqa: F401 - its modules are patched below
import pytest

from revcol_mm.ops import extension


@pytest.fixture(autouse=True)
def stand_in(monkeypatch) -> ModuleType:
    """The module that stands in for mmcv._ext, with which all of mmcv.ops works during the test."""
    module = extension.stand_in()
    for name, user in list(sys.modules.items()):
        if name.startswith('mmcv.ops.') and hasattr(user, 'ext_module'):
            monkeypatch.setattr(user, 'ext_module', module)
    return module
