# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The version of this package, and the versions of its surroundings that it accepts. Needs the standard library only."""
import re
import warnings
from importlib.metadata import PackageNotFoundError, version

__version__ = '0.1.0'

# Import package -> the distributions that provide it -> versions known to work; docs/installation.md says how far the tests
# were run with each. One without versions is listed so that it is recognised as too old.
KNOWN_VERSIONS = {
    'torch': {'torch': ('2.12.1', )},
    'mmengine': {'mmengine': ('0.10.7', ), 'onedl-mmengine': ('0.10.12', ), 'mmengine-lite': ('0.10.7', )},
    'mmcv': {'mmcv': ('2.1.0', ), 'onedl-mmcv': ('2.3.6', ), 'mmcv-lite': ('2.1.0', ), 'mmcv-full': ()},
    'mmdet': {'mmdet': ('3.3.0', ), 'onedl-mmdetection': ('3.5.1', )},
    'mmseg': {'mmsegmentation': ('1.2.2', ), 'onedl-mmsegmentation': ('1.4.2', )},
    'mmpretrain': {'mmpretrain': ('1.2.0', ), 'onedl-mmpretrain': ('1.3.6', )},
}
REQUIRED = ('torch', 'mmengine', 'mmcv')
# torch 2.6 is the first whose safe loading takes stand-ins by name, which mmengine's checkpoints need.
MINIMUM_VERSIONS = {
    'torch': (2, 6),
    'mmengine': (0, 10),
    'mmcv': (2, 0),
    'mmdet': (3, 0),
    'mmseg': (1, 0),
    'mmpretrain': (1, 0),
}


def installed_version(package: str) -> tuple[str, str] | None:
    """Looks up what provides an import package, without importing it.

    Args:
        package (str): One of the keys of ``KNOWN_VERSIONS``.

    Returns:
        tuple[str, str] or None: Name and version of the distribution, the version without a local part such as ``+cu130``;
        None if there is none.
    """
    for distribution in KNOWN_VERSIONS[package]:
        try:
            return distribution, version(distribution).partition('+')[0]
        except PackageNotFoundError:
            continue
    return None


def check_versions() -> None:
    """Compares the installed versions with the needed and with the known ones.

    Raises:
        ImportError: If torch, mmengine or mmcv is missing, or if one of the packages is too old to work.

    Warns:
        UserWarning: Once, if versions are installed which the test suite has not been run with.
    """
    untested = []
    for package, known in KNOWN_VERSIONS.items():
        found = installed_version(package)
        if found is None:
            if package in REQUIRED:
                raise ImportError(f'revcol_mm needs {package}, which is not installed; known to work: {_describe(known)}')
            continue
        distribution, number = found
        minimum = MINIMUM_VERSIONS[package]
        if tuple(int(part) for part in re.findall(r'\d+', number)[:len(minimum)]) < minimum:
            raise ImportError(f'revcol_mm needs {package} {".".join(map(str, minimum))} or newer, but {distribution} {number} '
                              f'is installed; known to work: {_describe(known)}')
        if number not in known[distribution]:
            untested.append(f'{distribution} {number} (known: {_describe(known)})')
    if untested:
        warnings.warn(f'revcol_mm has not been tested with {", ".join(untested)}', stacklevel=2)


def _describe(known: dict[str, tuple[str, ...]]) -> str:
    return ', '.join(f'{distribution} {number}' for distribution, numbers in known.items() for number in numbers)
