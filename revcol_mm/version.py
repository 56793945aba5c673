# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The version of this package, and the versions of its surroundings that it accepts. Needs the standard library only."""
import re
import warnings
from importlib.metadata import PackageNotFoundError, version

__version__ = '0.2.0.dev0'

# Import package -> the distributions that provide it -> the oldest and the newest release series (major, minor) that the tests
# were run with; docs/installation.md says how. None: a distribution that is always too old; it is
# listed so that the error says so, and not that the package is missing.
TESTED_VERSIONS: dict[str, dict[str, tuple[tuple[int, int], tuple[int, int]] | None]] = {
    'torch': {'torch': ((2, 12), (2, 15))},
    'mmengine': {'mmengine': ((0, 10), (0, 10)), 'onedl-mmengine': ((0, 10), (0, 10)), 'mmengine-lite': ((0, 10), (0, 10))},
    'mmcv': {'mmcv': ((2, 1), (2, 1)), 'mmcv-lite': ((2, 1), (2, 1)), 'onedl-mmcv': ((2, 3), (2, 3)), 'mmcv-full': None},
    'mmdet': {'mmdet': ((3, 3), (3, 3)), 'onedl-mmdetection': ((3, 5), (3, 5))},
    'mmseg': {'mmsegmentation': ((1, 2), (1, 2)), 'onedl-mmsegmentation': ((1, 4), (1, 4))},
    'mmpretrain': {'mmpretrain': ((1, 2), (1, 2)), 'onedl-mmpretrain': ((1, 3), (1, 3))},
}
REQUIRED = ('torch', 'mmengine', 'mmcv')
# torch 2.6 is the first whose safe loading takes stand-ins by name, which mmengine's checkpoints need.
MINIMUM_VERSIONS = dict(torch=(2, 6), mmengine=(0, 10), mmcv=(2, 0), mmdet=(3, 0), mmseg=(1, 0), mmpretrain=(1, 0))


def installed_version(package: str) -> tuple[str, str] | None:
    """Looks up what provides an import package, without importing it.

    Args:
        package (str): One of the keys of ``TESTED_VERSIONS``.

    Returns:
        tuple[str, str] or None: Name and version of the distribution, the version without a local part such as ``+cu130``;
        None if there is none.
    """
    for distribution in TESTED_VERSIONS[package]:
        try:
            return distribution, version(distribution).partition('+')[0]
        except PackageNotFoundError:
            continue
    return None


def check_versions() -> None:
    """Compares the installed versions with the needed and with the tested ones.

    Raises:
        ImportError: If torch, mmengine or mmcv is missing, or if one of the packages is too old to work.

    Warns:
        UserWarning: Once, if versions are installed that lie outside the range which the test suite has been run with.
    """
    untested = []
    for package, tested in TESTED_VERSIONS.items():
        found = installed_version(package)
        if found is None:
            if package in REQUIRED:
                raise ImportError(f'revcol_mm needs {package}, which is not installed; tested with: {_describe(tested)}')
            continue
        distribution, number = found
        series = tuple(int(part) for part in re.findall(r'\d+', number)[:2])
        minimum = MINIMUM_VERSIONS[package]
        if series < minimum:
            raise ImportError(f'revcol_mm needs {package} {_join(minimum)} or newer, but {distribution} {number} '
                              f'is installed; tested with: {_describe(tested)}')
        oldest, newest = tested[distribution]
        if not oldest <= series <= newest:
            untested.append(f'{distribution} {number} (tested: {_describe({distribution: (oldest, newest)})})')
    if untested:
        warnings.warn(f'revcol_mm has not been tested with {", ".join(untested)}', stacklevel=2)


def _join(series: tuple[int, int]) -> str:
    return '.'.join(map(str, series))


def _describe(tested: dict[str, tuple[tuple[int, int], tuple[int, int]] | None]) -> str:
    """Returns the tested versions as text: 'torch 2.12 to 2.15', 'mmcv 2.1, mmcv-lite 2.1, onedl-mmcv 2.3'."""
    return ', '.join(f'{name} {" to ".join(dict.fromkeys(map(_join, series)))}' for name, series in tested.items() if series)
