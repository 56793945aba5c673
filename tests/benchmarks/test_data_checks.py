# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The benchmark of the checks of the data, on a small file."""
import re

import pytest

from benchmarks import data_checks


@pytest.mark.slow
def test_the_checks_are_timed_and_the_file_is_parsed_once(capfd):
    assert 0 < data_checks.main(['--images', '200', '--annotations', '1000', '--runs', '1']) < 2
    assert re.search('of which the checks take [0-9.]+ s; files parsed: 1\n', capfd.readouterr().out)
