# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Tests a detector, a segmentor or a classifier: python tools/test.py CONFIG CHECKPOINT (see --help)."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from revcol_mm.apis.errors import plain_errors  # noqa: E402
from revcol_mm.apis.test import test  # noqa: E402

if __name__ == '__main__':
    with plain_errors():
        test()
