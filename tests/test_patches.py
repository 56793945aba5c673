# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Mends of mmengine: what it asked pkg_resources and pkgutil for is answered without them."""
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import mmengine.utils
import pytest

from revcol_mm import patches

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_configs_of_openmmlab_are_found_without_pkg_resources_and_pkgutils_find_loader():
    done = subprocess.run([sys.executable, '-c', """
import pkgutil, sys
sys.modules['pkg_resources'] = None  # as with setuptools 82
del pkgutil.find_loader  # as in Python 3.14
import revcol_mm
from mmengine.utils.dl_utils import mmcv_full_available
print(revcol_mm.get_config('cascade_rcnn_revcol_t').model.type, mmcv_full_available())
"""], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ['CascadeRCNN', 'True'], done.stderr


@pytest.mark.parametrize('name, module', [('mmengine', 'mmengine'), ('opencv-python', 'cv2')])
def test_distributions_and_import_packages_are_found(name, module):
    folder = Path(__import__(module).__file__).parent
    assert mmengine.utils.is_installed(name)
    assert patches.get_installed_path(name) == str(folder)


def test_what_is_not_installed_is_not_found():
    assert not patches.is_installed('no_such_package')
    with pytest.raises(PackageNotFoundError, match='no_such_package'):
        patches.get_installed_path('no_such_package')
