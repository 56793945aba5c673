# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Deformable convolution (Dai et al., 2017) and modulated deformable convolution (Zhu et al., 2019) on torchvision's kernels.

Names and order of the arguments are mmcv's, which differ between the two; torchvision gives all gradients in one call.
"""
import torch
from torch import Tensor

from .library import at_least_single, torchvision_ops


def deform_conv_forward(input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, kW: int,
                        kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int, group: int,
                        deformable_group: int, im2col_step: int) -> None:
    """Deformable convolution.

    Args:
        input (Tensor): (N, C, H, W).
        weight (Tensor): (C', C / group, kH, kW).
        offset (Tensor): (N, deformable_group·kH·kW·2, H', W'), y before x.
        output (Tensor): (N, C', H', W'); gets the result.
        columns (Tensor): A buffer of mmcv's kernel, not used here; backward keeps something there.
        ones (Tensor): A buffer of mmcv's kernel, not used here.
        kW (int): Width of the kernel; weight says it too.
        kH (int): Height of the kernel; weight says it too.
        dW (int): Stride along the width.
        dH (int): Stride along the height.
        padW (int): Padding along the width.
        padH (int): Padding along the height.
        dilationW (int): Dilation along the width.
        dilationH (int): Dilation along the height.
        group (int): Groups of channels.
        deformable_group (int): Groups of channels with offsets of their own.
        im2col_step (int): Images per call of mmcv's kernel; of no meaning here.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(_forward(input, weight, offset, None, None, geometry))


def deform_conv_backward_input(input: Tensor, offset: Tensor, gradOutput: Tensor, gradInput: Tensor, gradOffset: Tensor,
                               weight: Tensor, columns: Tensor, kW: int, kH: int, dW: int, dH: int, padW: int, padH: int,
                               dilationW: int, dilationH: int, group: int, deformable_group: int, im2col_step: int) -> None:
    """Gradients of the deformable convolution for input and offsets.

    Args:
        input (Tensor): As in forward.
        offset (Tensor): As in forward.
        gradOutput (Tensor): (N, C', H', W').
        gradInput (Tensor): As input; gets its gradient.
        gradOffset (Tensor): As offset; gets its gradient.
        weight (Tensor): As in forward.
        columns (Tensor): Gets the gradient of weight, which comes along, for deform_conv_backward_parameters.
        kW (int): As in forward, like all that follow.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _backward(gradOutput, input, weight, offset, None, None, geometry)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])
    columns.resize_(grads[1].shape).copy_(grads[1])


def deform_conv_backward_parameters(input: Tensor, offset: Tensor, gradOutput: Tensor, gradWeight: Tensor, columns: Tensor,
                                    ones: Tensor, kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int,
                                    dilationH: int, group: int, deformable_group: int, scale: float, im2col_step: int) -> None:
    """Gradient of the deformable convolution for its weight.

    Args:
        input (Tensor): As in forward.
        offset (Tensor): As in forward.
        gradOutput (Tensor): (N, C', H', W').
        gradWeight (Tensor): (C', C / group, kH, kW); the gradient is added to it.
        columns (Tensor): The gradient that deform_conv_backward_input has left, or empty where it was not called.
        ones (Tensor): A buffer of mmcv's kernel, not used here.
        kW (int): As in forward, like all that follow.
        scale (float): Factor of the gradient.
    """
    if columns.numel():
        grad = columns.clone()
        columns.resize_(0)
    else:
        # torchvision needs the weight for the other gradients; for the weight's own, only its shape counts.
        geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
        grad = _backward(gradOutput, input, torch.zeros_like(gradWeight), offset, None, None, geometry)[1]
    gradWeight.add_(grad.to(gradWeight.dtype), alpha=scale)


def modulated_deform_conv_forward(input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor,
                                  output: Tensor, columns: Tensor, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int,
                                  pad_h: int, pad_w: int, dilation_h: int, dilation_w: int, group: int, deformable_group: int,
                                  with_bias: bool) -> None:
    """Modulated deformable convolution.

    Args:
        input (Tensor): (N, C, H, W).
        weight (Tensor): (C', C / group, kernel_h, kernel_w).
        bias (Tensor): (C', ), or empty if not with_bias.
        ones (Tensor): A buffer of mmcv's kernel, not used here.
        offset (Tensor): (N, deformable_group·kernel_h·kernel_w·2, H', W'), y before x.
        mask (Tensor): (N, deformable_group·kernel_h·kernel_w, H', W').
        output (Tensor): (N, C', H', W'); gets the result.
        columns (Tensor): A buffer of mmcv's kernel, not used here.
        kernel_h (int): Height of the kernel; weight says it too.
        kernel_w (int): Width of the kernel; weight says it too.
        stride_h (int): Stride along the height.
        stride_w (int): Stride along the width.
        pad_h (int): Padding along the height.
        pad_w (int): Padding along the width.
        dilation_h (int): Dilation along the height.
        dilation_w (int): Dilation along the width.
        group (int): Groups of channels.
        deformable_group (int): Groups of channels with offsets and masks of their own.
        with_bias (bool): Whether bias is added.
    """
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    output.copy_(_forward(input, weight, offset, mask, bias if with_bias else None, geometry))


def modulated_deform_conv_backward(input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor,
                                   columns: Tensor, grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor,
                                   grad_offset: Tensor, grad_mask: Tensor, grad_output: Tensor, kernel_h: int, kernel_w: int,
                                   stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int,
                                   group: int, deformable_group: int, with_bias: bool) -> None:
    """Gradients of the modulated deformable convolution.

    Args:
        input (Tensor): As in forward, like all that are not named here.
        grad_input (Tensor): As input; gets its gradient.
        grad_weight (Tensor): As weight; gets its gradient.
        grad_bias (Tensor): As bias; gets its gradient if with_bias.
        grad_offset (Tensor): As offset; gets its gradient.
        grad_mask (Tensor): As mask; gets its gradient.
        grad_output (Tensor): (N, C', H', W').
    """
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    grads = _backward(grad_output, input, weight, offset, mask, bias if with_bias else None, geometry)
    targets = [grad_input, grad_weight, grad_offset, grad_mask] + [grad_bias] * with_bias
    for target, grad in zip(targets, grads):
        target.copy_(grad)


def _operands(input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    """What torchvision's functions take, in its order; it wants a mask and a bias in any case."""
    input = at_least_single(input)
    mask = input.new_zeros(input.size(0), 1) if mask is None else mask
    bias = input.new_zeros(weight.size(0)) if bias is None else bias
    return [input] + [at_least_single(tensor).to(input.dtype) for tensor in (weight, offset, mask, bias)]


def _forward(input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None,
             geometry: tuple[int, ...]) -> Tensor:
    return torchvision_ops().deform_conv2d(*_operands(input, weight, offset, mask, bias), *geometry, mask is not None)


def _backward(grad_output: Tensor, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None,
              geometry: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Gradients of input, weight, offset, mask and bias."""
    operands = _operands(input, weight, offset, mask, bias)
    return torchvision_ops()._deform_conv2d_backward(at_least_single(grad_output), *operands, *geometry, mask is not None)
