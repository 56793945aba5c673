# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What ``mmcv.utils.collect_env`` prints about the compiled operators, of which there are none here."""
from importlib.metadata import PackageNotFoundError, version

from .library import torchvision_ops


def get_compiler_version() -> str:
    """Names what runs instead of something compiled."""
    try:
        return f"none: revcol_mm's operators, on torchvision {version('torchvision')}"
    except PackageNotFoundError:
        return "none: revcol_mm's operators, whose torchvision is missing"


def get_compiling_cuda_version() -> str:
    """CUDA that torchvision's kernels were compiled with, such as 13.0."""
    try:
        number = torchvision_ops()._cuda_version()
    except ImportError:
        number = -1
    return f'{number // 1000}.{number // 10 % 100}' if number > 0 else 'not available'
