# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Deformable convolutions beyond the reference cases."""
import mmcv.ops
import pytest
import torch
import torch.nn.functional as F


def deform(*inputs, **kwargs):
    """input, offset, weight"""
    return mmcv.ops.deform_conv2d(*inputs, kwargs.get('stride', 1), kwargs.get('padding', 1))


def modulated(input, offset, weight, mask, bias=None):
    return mmcv.ops.modulated_deform_conv2d(input, offset, mask, weight, bias, 1, 1)


def make(dtype=torch.float32):
    """input, offset, weight and mask"""
    return [torch.randn(2, 4, 6, 7).to(dtype), torch.randn(2, 18, 6, 7).to(dtype), torch.randn(3, 4, 3, 3).to(dtype),
            torch.rand(2, 9, 6, 7).to(dtype)]


@pytest.mark.parametrize('stride', [(1, 1), (2, 1)])
@pytest.mark.parametrize('padding', [(1, 1), (0, 2)])
def test_without_offsets_it_is_a_convolution(stride, padding):
    """Unequal numbers along the two sides, which mmcv hands over in changing order."""
    features, weight = torch.randn(2, 4, 8, 9), torch.randn(3, 4, 3, 2)
    expected = F.conv2d(features, weight, stride=stride, padding=padding)
    offset = torch.zeros(2, 12, *expected.shape[-2:])
    torch.testing.assert_close(deform(features, offset, weight, stride=stride, padding=padding), expected, rtol=1e-5, atol=1e-5)
    output = mmcv.ops.modulated_deform_conv2d(features, offset, torch.ones(2, 6, *expected.shape[-2:]), weight, torch.ones(3),
                                              stride, padding)
    torch.testing.assert_close(output, expected + 1, rtol=1e-5, atol=1e-5)


def test_offsets_are_y_before_x():
    features = torch.arange(25.).view(1, 1, 5, 5)
    offset = torch.tensor([1., 0.])[None, :, None, None].expand(1, 2, 5, 5)
    output = mmcv.ops.deform_conv2d(features, offset, torch.ones(1, 1, 1, 1))
    torch.testing.assert_close(output[0, 0, :4], features[0, 0, 1:])


@pytest.mark.parametrize('count', [3, 4])
def test_gradients_are_those_of_finite_differences(count):
    inputs = [tensor.requires_grad_() for tensor in make(torch.float64)[:count]]
    torch.autograd.gradcheck(deform if count == 3 else modulated, inputs, fast_mode=True)


def test_the_weight_alone_has_the_gradient_that_it_has_beside_the_others():
    inputs = make()[:3]
    grads = []
    for needed in ((True, True, True), (False, False, True)):
        leaves = [tensor.clone().requires_grad_(flag) for tensor, flag in zip(inputs, needed)]
        output = deform(*leaves)
        output.square().sum().backward(retain_graph=True)
        first = leaves[2].grad.clone()
        output.square().sum().backward()  # the buffer between mmcv's two calls must not remember
        torch.testing.assert_close(leaves[2].grad, 2 * first)
        grads.append(first)
    torch.testing.assert_close(*grads)


def test_channels_last_inputs_give_the_same():
    contiguous = make()
    strided = [tensor.contiguous(memory_format=torch.channels_last) for tensor in contiguous]
    torch.testing.assert_close(deform(*strided[:3]), deform(*contiguous[:3]))
    torch.testing.assert_close(modulated(*strided), modulated(*contiguous))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kind', ['DCN', 'DCNv2'])
def test_under_autocast_the_output_has_the_type_of_the_offsets(kind, dtype):
    """mmcv casts input and weight to the type of the offsets, which come out of a convolution."""
    from mmengine.registry import MODELS
    layer = MODELS.build(dict(type=kind, in_channels=4, out_channels=3, kernel_size=3, padding=1))
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)
    features = torch.randn(2, 4, 6, 7, requires_grad=True)
    with torch.autocast('cpu', dtype):
        output = layer(features)
    output.float().square().sum().backward()
    assert (output.dtype, features.grad.dtype, layer.weight.grad.dtype) == (dtype, torch.float32, torch.float32)
    torch.testing.assert_close(output.float(), layer(features), rtol=0.02, atol=0.05)
