# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Multi-scale deformable attention (Zhu et al., 2021, eq. 3) on grid_sample, one level of the pyramid after the other.

mmcv calls these functions for tensors on a GPU; on the CPU its own Python runs, which keeps the samples of all levels at once.
"""
import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import at_least_single


def ms_deform_attn_forward(value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor,
                           sampling_locations: Tensor, attention_weights: Tensor, im2col_step: int) -> Tensor:
    """Samples every level at the given places and adds the samples up with the given weights.

    Args:
        value (Tensor): (N, S, M, D): the pixels of all levels behind one another, in M heads.
        value_spatial_shapes (Tensor): (L, 2) int64, height and width of each level.
        value_level_start_index (Tensor): (L, ) int64, where each level begins in S.
        sampling_locations (Tensor): (N, Q, M, L, P, 2), x and y of P samples; 0 and 1 are the outer edges of a level.
        attention_weights (Tensor): (N, Q, M, L, P).
        im2col_step (int): Images per call of mmcv's kernel; of no meaning here.

    Returns:
        Tensor: (N, Q, M·D), of value's type.

    Warns:
        UserWarning: once, if places come in bfloat16, as they do from mmcv under autocast; compiled mmcv refuses the type.
    """
    if sampling_locations.dtype == torch.bfloat16:
        _warn_of_bfloat16()
    batch, queries, heads = sampling_locations.shape[:3]
    levels = _levels(value_spatial_shapes, value_level_start_index)
    values, places, weights = map(at_least_single, (value, sampling_locations, attention_weights))
    result = values.new_zeros(batch * heads, value.size(-1), queries)
    for level, (height, width, start) in enumerate(levels):
        pixels = values[:, start:start + height * width]
        result += _attend(pixels, places[:, :, :, level], weights[:, :, :, level], height, width)
    # (N·M, D, Q) -> (N, Q, M·D)
    return result.view(batch, heads * value.size(-1), queries).transpose(1, 2).to(value.dtype).contiguous()


@functools.cache
def _warn_of_bfloat16() -> None:
    warnings.warn('deformable attention gets its places in bfloat16, as multiples of 1/256 of the image, which are more than a '
                  'pixel apart in levels of more than 256 pixels: train in float32, or in float16 with '
                  "optim_wrapper.dtype='float16'", stacklevel=3)


def ms_deform_attn_backward(value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor,
                            sampling_locations: Tensor, attention_weights: Tensor, grad_output: Tensor, grad_value: Tensor,
                            grad_sampling_loc: Tensor, grad_attn_weight: Tensor, im2col_step: int) -> None:
    """Gradients of the attention; each level is computed once more, so that one level at a time is in memory.

    Args:
        value (Tensor): As in forward.
        value_spatial_shapes (Tensor): As in forward.
        value_level_start_index (Tensor): As in forward.
        sampling_locations (Tensor): As in forward.
        attention_weights (Tensor): As in forward.
        grad_output (Tensor): (N, Q, M·D).
        grad_value (Tensor): As value; gets its gradient.
        grad_sampling_loc (Tensor): As sampling_locations; gets their gradient.
        grad_attn_weight (Tensor): As attention_weights; gets their gradient.
        im2col_step (int): As in forward.
    """
    levels = _levels(value_spatial_shapes, value_level_start_index)
    values, places, weights, grads = map(at_least_single, (value, sampling_locations, attention_weights, grad_output))
    # (N, Q, M·D) -> (N·M, D, Q)
    grads = grads.transpose(1, 2).reshape(-1, value.size(-1), grads.size(1))
    for level, (height, width, start) in enumerate(levels):
        pixels = slice(start, start + height * width)
        inputs = [tensor.detach().requires_grad_() for tensor in
                  (values[:, pixels], places[:, :, :, level], weights[:, :, :, level])]
        with torch.enable_grad():
            result = _attend(*inputs, height, width)
        for target, grad in zip((grad_value[:, pixels], grad_sampling_loc[:, :, :, level], grad_attn_weight[:, :, :, level]),
                                torch.autograd.grad(result, inputs, grads)):
            target.copy_(grad)


def _levels(shapes: Tensor, starts: Tensor) -> list[tuple[int, int, int]]:
    """Height, width and first pixel of every level as integers: on a GPU one wait for all of them."""
    return torch.cat([shapes, starts[:, None]], 1).tolist()


def _attend(pixels: Tensor, places: Tensor, weights: Tensor, height: int, width: int) -> Tensor:
    """One level: pixels (N, H·W, M, D), places (N, Q, M, P, 2), weights (N, Q, M, P) -> (N·M, D, Q)."""
    # (N, H·W, M, D) -> (N·M, D, H, W)
    maps = pixels.permute(0, 2, 3, 1).reshape(-1, pixels.size(-1), height, width)
    # (N, Q, M, P, 2) -> (N·M, Q, P, 2), from 0 … 1 to grid_sample's -1 … 1
    grid = 2 * places.transpose(1, 2).flatten(0, 1) - 1
    samples = F.grid_sample(maps, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
    return (samples * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
