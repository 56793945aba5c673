# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What the tests of the checks share."""

import pytest

from revcol_mm.apis.checks.run import DataChecks


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The lines of the log."""
    lines = []
    monkeypatch.setattr('revcol_mm.apis.checks.common.print_log', lambda text, **_: lines.append(text))
    return lines


@pytest.fixture
def checks():
    checks = DataChecks()
    checks.watch()
    yield checks
    checks.stop()
