# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Packaging: everything static is in pyproject.toml, this file adds ``revcol_mm/.mim``.

OpenMMLab packages carry their configs, tools and model index in a folder ``.mim`` inside the package, where mmengine and mim
look for them. In a wheel these are copies; an editable install gets links to the checkout, so that an edited config is used.
"""
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM_CONTENTS = ('configs', 'tools', 'model-index.yml')


class build_py_with_mim(build_py):
    """``build_py`` that also fills ``revcol_mm/.mim``."""

    def run(self):
        package = (ROOT if self.editable_mode else Path(self.build_lib).resolve()) / 'revcol_mm'
        mim = package / '.mim'
        # What was deleted since the last build, a module or a config, must not live on.
        shutil.rmtree(mim if package == ROOT / 'revcol_mm' else package, ignore_errors=True)
        super().run()
        mim.mkdir(parents=True)
        for name in MIM_CONTENTS:
            source, target = ROOT / name, mim / name
            if self.editable_mode:
                target.symlink_to(Path('..', '..', name), target_is_directory=source.is_dir())
            elif source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy2(source, target)


setup(cmdclass={'build_py': build_py_with_mim})
