# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What the operators share: torchvision's kernels, found at the first use, and the type to compute in."""
import functools
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def torchvision_ops() -> ModuleType:
    """Loads torchvision's kernels; ``import revcol_mm`` does without them.

    Returns:
        ModuleType: ``torch.ops.torchvision``, with everything registered.

    Raises:
        ImportError: If torchvision is missing or was made for another torch.
    """
    try:
        found = version('torchvision')
    except PackageNotFoundError:
        raise ImportError('the operators of mmcv.ops need torchvision, but it is not installed: install the one that belongs '
                          f'to torch {torch.__version__}: {_pip_install()}') from None
    try:
        import torchvision  # noqa: F401 - registers the kernels
        torch.ops.torchvision.nms  # without a loadable library there is none, and nothing has been raised yet
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().partition('\n')[0]
        raise ImportError(f'torchvision {found} does not fit torch {torch.__version__} ({reason}); install the one that '
                          f'belongs to it: {_pip_install()}') from error
    return torch.ops.torchvision


def at_least_single(tensor: Tensor) -> Tensor:
    """Low precision is computed in float32 and rounded once, at the end.

    Args:
        tensor (Tensor): Of any shape and floating type.

    Returns:
        Tensor: The same values, contiguous: float32 if they came as float16 or bfloat16, else of their own type.
    """
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return tensor.contiguous()


def _pip_install() -> str:
    """The command with which pip finds the torchvision that needs the installed torch."""
    return f'pip install --upgrade torchvision "torch=={torch.__version__.partition("+")[0]}"'
