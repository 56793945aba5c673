# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RoIAlign (He et al., 2017), averages on torchvision's kernels and maxima in torch, and RoIPool (Girshick, 2015) in torch.

Features may have any strides, channels-last among them; mmcv's compiled RoIAlign reads every memory as if it were contiguous.
Regions are (R, 5): the image's index within the batch, then x1, y1, x2, y2 in pixels of the image.
"""
import functools
import warnings
from typing import Iterator

import torch
from torch import Tensor

from .library import at_least_single, torchvision_ops

MAX = 0
LOWEST = -10000.  # what mmcv's RoIAlign starts its maxima from, and gives where a bin holds no sample
SAMPLES_AT_ONCE = 2 ** 24  # elements gathered at a time by the maxima: 64 MB in float32


def roi_align_forward(input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, aligned_height: int,
                      aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool) -> None:
    """RoIAlign: every bin of a region is the mean, or the maximum, of values interpolated on a grid inside it.

    Args:
        input (Tensor): (N, C, H, W) features.
        rois (Tensor): (R, 5), see above.
        output (Tensor): (R, C, aligned_height, aligned_width); gets the result.
        argmax_y (Tensor): As output; gets the row that each maximum was sampled at, in pixels of the features. Empty for means.
        argmax_x (Tensor): The same for columns.
        aligned_height (int): Bins of a region from top to bottom.
        aligned_width (int): Bins of a region from left to right.
        spatial_scale (float): Pixels of the features per pixel of the image.
        sampling_ratio (int): Samples of a bin along each side; 0 or less: one per pixel of the features.
        pool_mode (int): 0 maximum, 1 mean.
        aligned (bool): Whether pixel centres lie at halves, which is right; False is what mmdet did before version 2.

    Raises:
        ValueError: On the CPU, if aligned and a region ends before it begins.

    Warns:
        UserWarning: Once, if regions come in bfloat16, as they do from mmdet under autocast; compiled mmcv refuses the type.
    """
    _check_regions(rois, aligned)
    features = at_least_single(input)
    rois = rois.to(features.dtype).contiguous()
    if pool_mode != MAX:
        output.copy_(torchvision_ops().roi_align(features, rois, spatial_scale, aligned_height, aligned_width, sampling_ratio,
                                                 aligned))
        return
    images = rois[:, 0].long()
    for chosen, rows, columns in _sampling_grids(rois, aligned_height, aligned_width, spatial_scale, sampling_ratio, aligned):
        if not rows.size(-1) * columns.size(-1):
            output[chosen], argmax_y[chosen], argmax_x[chosen] = LOWEST, -1, -1
            continue
        for part in _parts(rows, columns, features):
            region, y, x = chosen[part], rows[part], columns[part]
            values = sum(weight[:, None] * _gather(features, images[region], row, column)
                         for row, column, weight in _corners(*_grid(y, x), features.shape[-2:]))
            maxima, winners = _first_maximum(values)
            output[region] = maxima.to(output.dtype)
            argmax_y[region] = _positions(y, winners // x.size(-1), 2).to(argmax_y.dtype)
            argmax_x[region] = _positions(x, winners % x.size(-1), 3).to(argmax_x.dtype)


def roi_align_backward(grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor,
                       aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int,
                       aligned: bool) -> None:
    """Gradient of RoIAlign for the features.

    Args:
        grad_output (Tensor): (R, C, aligned_height, aligned_width).
        rois (Tensor): As in forward.
        argmax_y (Tensor): As forward has filled it.
        argmax_x (Tensor): As forward has filled it.
        grad_input (Tensor): (N, C, H, W); gets the result.
        aligned_height (int): As in forward.
        aligned_width (int): As in forward.
        spatial_scale (float): As in forward.
        sampling_ratio (int): As in forward.
        pool_mode (int): As in forward.
        aligned (bool): As in forward.
    """
    grads = at_least_single(grad_output)
    rois = rois.to(grads.dtype).contiguous()
    if pool_mode != MAX:
        grad_input.copy_(torchvision_ops()._roi_align_backward(grads, rois, spatial_scale, aligned_height, aligned_width,
                                                               *grad_input.shape, sampling_ratio, aligned))
        return
    height, width = grad_input.shape[-2:]
    result = grads.new_zeros(grad_input.shape)
    planes = _planes(rois, grad_input) * (height * width)
    grads = torch.where(argmax_y == -1, 0, grads)  # bins without samples
    for row, column, weight in _corners(argmax_y.to(grads.dtype), argmax_x.to(grads.dtype), (height, width)):
        result.view(-1).index_add_(0, (planes + row * width + column).flatten(), (grads * weight).flatten())
    grad_input.copy_(result)


def roi_pool_forward(input: Tensor, rois: Tensor, output: Tensor, argmax: Tensor, pooled_height: int, pooled_width: int,
                     spatial_scale: float) -> None:
    """RoIPool as in mmcv: every bin is the maximum of the pixels that it touches; corners are not rounded before.

    Args:
        input (Tensor): (N, C, H, W) features.
        rois (Tensor): (R, 5), whole pixels with both corners included.
        output (Tensor): (R, C, pooled_height, pooled_width); gets the result, 0 where a bin touches no pixel.
        argmax (Tensor): As output, int32; gets the place y·W + x of each maximum, or -1.
        pooled_height (int): Bins of a region from top to bottom.
        pooled_width (int): Bins of a region from left to right.
        spatial_scale (float): Pixels of the features per pixel of the image.
    """
    features = at_least_single(input)
    height, width = features.shape[-2:]
    rois = rois.to(features.dtype)
    images = rois[:, 0].long()
    start, end = rois[:, 1:3] * spatial_scale, (rois[:, 3:] + 1) * spatial_scale
    valid = (end > start).all(1)
    top, bottom = _pixel_bins(start[:, 1], end[:, 1], pooled_height, height)
    left, right = _pixel_bins(start[:, 0], end[:, 0], pooled_width, width)
    output.zero_()
    argmax.fill_(-1)
    # Regions whose largest bins have the same size go together.
    sizes = torch.stack([(bottom - top).amax(1), (right - left).amax(1)], 1) * valid[:, None]
    for (bin_height, bin_width), chosen in _groups(sizes):
        if not bin_height * bin_width:
            continue
        rows = top[chosen][..., None] + torch.arange(bin_height, device=rois.device)
        columns = left[chosen][..., None] + torch.arange(bin_width, device=rois.device)
        for part in _parts(rows, columns, features):
            region, y, x = chosen[part], rows[part], columns[part]
            inside = torch.stack(_grid(y < bottom[region][..., None], x < right[region][..., None])).all(0)
            values = _gather(features, images[region], *_grid(y.clamp(max=height - 1), x.clamp(max=width - 1)))
            maxima, winners = _first_maximum(values.masked_fill(~inside[:, None], -torch.inf))
            places = _positions(y, winners // bin_width, 2) * width + _positions(x, winners % bin_width, 3)
            filled = inside.any(-1)[:, None]
            output[region] = torch.where(filled, maxima, 0).to(output.dtype)
            argmax[region] = torch.where(filled, places, -1).to(argmax.dtype)


def roi_pool_backward(grad_output: Tensor, rois: Tensor, argmax: Tensor, grad_input: Tensor, pooled_height: int,
                      pooled_width: int, spatial_scale: float) -> None:
    """Gradient of RoIPool for the features.

    Args:
        grad_output (Tensor): (R, C, pooled_height, pooled_width).
        rois (Tensor): As in forward.
        argmax (Tensor): As forward has filled it.
        grad_input (Tensor): (N, C, H, W); gets the result.
        pooled_height (int): As in forward.
        pooled_width (int): As in forward.
        spatial_scale (float): As in forward.
    """
    grads = at_least_single(grad_output)
    result = grads.new_zeros(grad_input.shape)
    places = _planes(rois, grad_input) * grad_input[0, 0].numel() + argmax.clamp(min=0)
    result.view(-1).index_add_(0, places.flatten(), torch.where(argmax >= 0, grads, 0).flatten())
    grad_input.copy_(result)


def _check_regions(rois: Tensor, aligned: bool) -> None:
    if rois.dtype == torch.bfloat16:
        _warn_of_bfloat16()
    # On a GPU the check would wait for everything before it.
    if aligned and rois.device.type == 'cpu' and rois.numel() and bool((rois[:, 3:] < rois[:, 1:3]).any()):
        bad = rois[(rois[:, 3:] < rois[:, 1:3]).any(1)][0]
        raise ValueError(f'rois must have x1 <= x2 and y1 <= y2, but got (x1, y1, x2, y2) = {tuple(bad[1:].tolist())}')


@functools.cache
def _warn_of_bfloat16() -> None:
    warnings.warn('RoIAlign gets its regions in bfloat16, in which coordinates from 512 on are multiples of 4 and from 1024 on '
                  'of 8 pixels: boxes and masks will be worse; train in float32, or in float16 with '
                  "optim_wrapper.dtype='float16'", stacklevel=3)


def _groups(sizes: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """The distinct rows of an (R, 2) integer tensor, each with the indices of the regions that have it."""
    values, inverse = sizes.unique(dim=0, return_inverse=True)
    for index, (first, second) in enumerate(values.tolist()):
        yield (first, second), (inverse == index).nonzero()[:, 0]


def _sampling_grids(rois: Tensor, bins_y: int, bins_x: int, scale: float, ratio: int,
                    aligned: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Regions with equal grids: their indices, and the samples' rows (R, bins_y, gy) and columns (R, bins_x, gx)."""
    start, end = rois[:, 1:3] * scale - 0.5 * aligned, rois[:, 3:] * scale - 0.5 * aligned
    size = end - start
    if not aligned:
        size = size.clamp(min=1)
    bins = size / size.new_tensor([bins_x, bins_y])
    counts = torch.full_like(bins, ratio, dtype=torch.long) if ratio > 0 else bins.ceil().long().clamp(min=0)
    for (count_x, count_y), chosen in _groups(counts):
        sides = []
        for axis, number, count in ((1, bins_y, count_y), (0, bins_x, count_x)):
            step = bins[chosen, axis][:, None, None]
            samples = torch.arange(count, device=rois.device, dtype=rois.dtype) + 0.5
            edges = start[chosen, axis][:, None, None] + torch.arange(number, device=rois.device)[:, None] * step
            sides.append(edges + samples * step / max(count, 1))
        yield chosen, *sides


def _corners(y: Tensor, x: Tensor, shape: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The four pixels around every sample: rows, columns and weights in bilinear interpolation, 0 for samples off the map."""
    sides = []
    for position, size in zip((y, x), shape):
        inside = (position >= -1) & (position <= size)
        position = position.clamp(0, size - 1)
        low = position.long()
        fraction = position - low
        sides.append(((low, (1 - fraction) * inside), ((low + 1).clamp(max=size - 1), fraction * inside)))
    for row, row_weight in sides[0]:
        for column, column_weight in sides[1]:
            yield row, column, row_weight * column_weight


def _grid(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (R, bins_y, gy) and columns (R, bins_x, gx) -> both for every sample of a bin, (R, bins_y, bins_x, gy·gx)."""
    y, x = torch.broadcast_tensors(y[:, :, None, :, None], x[:, None, :, None, :])
    return y.flatten(-2), x.flatten(-2)


def _gather(features: Tensor, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels (R, bins_y, bins_x, S) of images (R, ) -> their values (R, C, bins_y, bins_x, S)."""
    return features[images[:, None, None, None], :, rows, columns].movedim(-1, 1)


def _first_maximum(values: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima over the last dimension and where each is met first, which torch.max leaves open."""
    maxima = values.amax(-1)
    places = torch.arange(values.size(-1), device=values.device)
    winners = torch.where(values == maxima[..., None], places, values.size(-1)).amin(-1)
    return maxima, winners.clamp(max=values.size(-1) - 1)  # NaN equals nothing


def _positions(side: Tensor, winners: Tensor, dim: int) -> Tensor:
    """Looks winners (R, C, bins_y, bins_x) up in positions (R, bins, g) along one side, which is dim 2 or 3 of the winners."""
    table = side[:, None, :, None] if dim == 2 else side[:, None, None]
    return table.expand(*winners.shape, side.size(-1)).gather(-1, winners[..., None])[..., 0]


def _parts(rows: Tensor, columns: Tensor, features: Tensor) -> Iterator[slice]:
    """Slices of a group of regions that gather a bounded number of elements each."""
    samples = rows[0].numel() * columns[0].numel() * features.size(1)
    step = max(SAMPLES_AT_ONCE // samples, 1)
    return (slice(first, first + step) for first in range(0, rows.size(0), step))


def _planes(rois: Tensor, maps: Tensor) -> Tensor:
    """The index n·C + c of the plane that each channel of a region was pooled from, (R, C, 1, 1)."""
    channels = maps.size(1)
    return (rois[:, :1].long() * channels + torch.arange(channels, device=rois.device))[..., None, None]


def _pixel_bins(start: Tensor, end: Tensor, number: int, size: int) -> tuple[Tensor, Tensor]:
    """First pixel and the one behind the last of every bin, (R, number) each, within the map."""
    step = ((end - start) / number)[:, None]
    edges = torch.arange(number + 1, device=start.device)
    first = (edges[:-1] * step + start[:, None]).floor().long().clamp(0, size)
    behind = (edges[1:] * step + start[:, None]).ceil().long().clamp(0, size)
    return first, behind
