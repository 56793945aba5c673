# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What a network needs before it is traced: modules and functions that would freeze a size compute it with tensors."""
import copy
from contextlib import contextmanager
from typing import Iterator
from unittest.mock import patch

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import AdaptivePadding
from torch import Tensor, nn


def prepare(model: nn.Module) -> nn.Module:
    """Returns a copy of a network that can be traced: in float32, on the CPU, folded, for inference.

    Args:
        model (nn.Module): a whole model or a backbone. It does not change.

    Returns:
        nn.Module: the copy. Adaptive average pooling and padding in it take their sizes from the graph.
    """
    model = copy.deepcopy(model).cpu().float()
    model.eval()  # whose result is None in some of mmpretrain's backbones
    for module in list(model.modules()):
        if hasattr(module, 'switch_to_deploy'):
            module.switch_to_deploy()
        for name, child in module.named_children():
            if type(child) is nn.AdaptiveAvgPool2d:
                setattr(module, name, AveragePool(child.output_size))
            elif type(child) is AdaptivePadding and child.padding == 'corner':
                setattr(module, name, CornerPadding(child))
    return model


class AveragePool(nn.Module):
    """:class:`torch.nn.AdaptiveAvgPool2d` as two products with averaging matrices, which are built for the size at hand.

    Args:
        output_size (int | tuple[int | None, int | None]): as in torch; None keeps a side as it is.
    """

    def __init__(self, output_size: int | tuple[int | None, int | None]) -> None:
        super().__init__()
        self.output_size = output_size if isinstance(output_size, tuple) else (output_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        shape = torch._shape_as_tensor(x)
        rows, columns = self.output_size
        if rows is not None:
            x = averages(shape[-2], rows).to(x) @ x
        if columns is not None:
            x = x @ averages(shape[-1], columns).to(x).t()
        return x


def averages(length: Tensor, bins: int) -> Tensor:
    """The matrix (bins, length) that averages over equal parts: bin i holds ⌊i·length/bins⌋ to ⌈(i + 1)·length/bins⌉."""
    index, place = torch.arange(bins)[:, None], torch.arange(length)
    start, end = index * length // bins, ((index + 1) * length + bins - 1) // bins
    return ((place >= start) & (place < end)).float() / (end - start).float()


class CornerPadding(nn.Module):
    """mmcv's padding of the right and bottom side, to whole patches.

    Args:
        padding (AdaptivePadding): of the kind 'corner'.
    """

    def __init__(self, padding: AdaptivePadding) -> None:
        super().__init__()
        self.stride = padding.stride
        self.reach = [(kernel - 1) * dilation + 1 for kernel, dilation in zip(padding.kernel_size, padding.dilation)]

    def forward(self, x: Tensor) -> Tensor:
        height, width = torch._shape_as_tensor(x)[-2:]
        rows, columns = (((length + stride - 1) // stride - 1) * stride + reach - length
                         for length, stride, reach in zip((height, width), self.stride, self.reach))
        return pad_corner(x, rows.clamp(min=0), columns.clamp(min=0))


def pad_corner(x: Tensor, rows: Tensor, columns: Tensor, value: float = 0.) -> Tensor:
    """Appends rows at the bottom and columns at the right of (N, C, H, W); their numbers are tensors of one element."""
    return F.pad(x, (0, columns, 0, rows), value=value)


@contextmanager
def linspace_by_range() -> Iterator[None]:
    """Makes :func:`torch.linspace` exportable where its steps are 1, as in all of mmdet's grids.

    ONNX has no such operator, and torch's exporter divides by the number of steps - 1, which is 0/0 on a level of one pixel.
    """
    def linspace(start, end, steps, **kwargs) -> Tensor:
        return torch.arange(steps, **kwargs) + start

    with patch.object(torch, 'linspace', linspace):
        yield
