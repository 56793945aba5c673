# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What mmcv calls for tensors on a GPU, called here on the CPU: same code."""
import math

import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

from revcol_mm.ops import deform_attention

SHAPES = torch.tensor([[5, 4], [3, 2], [1, 1]])
STARTS = torch.tensor([0, 20, 26])


def make(batch=2, queries=3, heads=2, channels=4, points=2, dtype=torch.float64):
    """Some samples lie off the maps."""
    value = torch.randn(batch, 27, heads, channels, dtype=dtype)
    places = torch.rand(batch, queries, heads, 3, points, 2, dtype=dtype) * 1.4 - 0.2
    weights = torch.rand(batch, queries, heads, 3, points, dtype=dtype)
    return value, places, weights


def attend(value, places, weights):
    return MultiScaleDeformableAttnFunction.apply(value, SHAPES, STARTS, places, weights, 64)


def by_loops(value, places, weights):
    """Equation 3 of the paper, one sample at a time; a pixel off the map counts as 0."""
    batch, queries, heads, levels, points, _ = places.shape
    output = value.new_zeros(batch, queries, heads, value.size(-1))
    for n, q, m, level, p in torch.cartesian_prod(*map(torch.arange, (batch, queries, heads, levels, points))).tolist():
        height, width = SHAPES[level].tolist()
        x, y = (places[n, q, m, level, p] * torch.tensor([width, height]) - 0.5).tolist()
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                    pixel = value[n, STARTS[level] + row * width + column, m]
                    output[n, q, m] += weights[n, q, m, level, p] * share * pixel
    return output.flatten(2)


def test_attention_is_the_weighted_sum_of_interpolated_samples():
    inputs = make()
    torch.testing.assert_close(attend(*inputs), by_loops(*inputs), rtol=1e-10, atol=1e-12)


def test_gradients_of_values_places_and_weights_are_those_of_finite_differences():
    inputs = [tensor.requires_grad_() for tensor in make(batch=1, queries=2, channels=2)]
    torch.autograd.gradcheck(attend, inputs)


def test_attention_and_gradients_are_those_of_mmcvs_python():
    grads = []
    inputs = make(dtype=torch.float32)
    for function in (attend, lambda value, *rest: multi_scale_deformable_attn_pytorch(value, SHAPES, *rest)):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = function(*leaves)
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
        grads.append([output.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


def test_values_may_have_any_strides():
    value, places, weights = make()
    strided = value.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not strided.is_contiguous()
    torch.testing.assert_close(attend(strided, places, weights), attend(value, places, weights), rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_under_autocast_output_and_gradients_have_the_type_of_their_inputs(dtype):
    """mmcv casts places and weights to the type of the values."""
    value, places, weights = make(dtype=torch.float32)
    value = value.to(dtype).requires_grad_()
    places, weights = places.requires_grad_(), weights.requires_grad_()
    with torch.autocast('cpu', dtype):
        output = attend(value, places, weights)
    output.sum().backward()
    assert [tensor.dtype for tensor in (output, value.grad, places.grad, weights.grad)] == [dtype, dtype] + [torch.float32] * 2
    expected = by_loops(value.detach().double(), places.detach().to(dtype).double(), weights.detach().to(dtype).double())
    torch.testing.assert_close(output.detach().double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_places_in_bfloat16_raise_a_warning_once():
    value, places, weights = (tensor.bfloat16() for tensor in make(dtype=torch.float32))
    deform_attention._warn_of_bfloat16.cache_clear()
    with pytest.warns(UserWarning, match='multiples of 1/256 of the image') as warned:
        attend(value, places, weights)
        attend(value, places, weights)
    assert len(warned) == 1


def test_no_queries_give_no_output():
    assert tuple(attend(*make(queries=0)).shape) == (2, 0, 8)
