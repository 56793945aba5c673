# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RoIAlign beyond the reference cases, and RoIPool, which no compiled mmcv has on the CPU, against loops over pixels."""
import math

import mmcv.ops
import pytest
import torch

from revcol_mm.ops import roi

ROIS = torch.tensor([[0, 3.2, 4.1, 19.7, 22.3], [1, 8, 8, 25, 12.5], [1, 0, 0, 31, 31], [0, 10.2, 3, 11, 3.5]])


def align(features, rois, pool_mode='avg', ratio=2, aligned=True):
    return mmcv.ops.roi_align(features, rois, (3, 4), 0.5, ratio, pool_mode, aligned)


@pytest.mark.parametrize('pool_mode', ['avg', 'max'])
@pytest.mark.parametrize('layout', ['channels-last', 'permuted', 'every other row'])
def test_roi_align_of_strided_features_is_that_of_contiguous_ones(pool_mode, layout):
    """Compiled mmcv reads such memory as if it were contiguous."""
    features = torch.randn(2, 5, 16, 16)
    strided = {'channels-last': features.contiguous(memory_format=torch.channels_last),
               'permuted': features.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
               'every other row': torch.stack([features, features], 3).flatten(2, 3)[:, :, ::2]}[layout]
    assert not strided.is_contiguous()
    results = []
    for values in (features, strided):
        values = values.detach().requires_grad_()
        output = align(values, ROIS, pool_mode)
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
        results.append((output.detach(), values.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_roi_align_of_a_plane_is_its_value_at_the_centre_of_each_bin():
    """Bilinear interpolation is exact on a plane, and the mean over a symmetric grid is the value at its centre."""
    y, x = torch.meshgrid(torch.arange(20.), torch.arange(20.), indexing='ij')
    plane = (2 * x - 3 * y + 1)[None, None]
    x1, y1, x2, y2 = 6, 4, 30, 28
    output = align(plane, torch.tensor([[0., x1, y1, x2, y2]]), ratio=0)[0, 0]
    centre_x = (x1 + (x2 - x1) * (torch.arange(4) + 0.5) / 4) * 0.5 - 0.5
    centre_y = (y1 + (y2 - y1) * (torch.arange(3) + 0.5) / 3) * 0.5 - 0.5
    torch.testing.assert_close(output, 2 * centre_x[None] - 3 * centre_y[:, None] + 1)


@pytest.mark.filterwarnings('ignore:RoIAlign gets its regions in bfloat16')
@pytest.mark.parametrize('pool_mode', ['avg', 'max'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32_and_rounded_once(pool_mode, dtype):
    features = torch.randn(2, 5, 16, 16).to(dtype).requires_grad_()
    single = features.detach().float().requires_grad_()
    rois = ROIS.to(dtype)
    output, expected = align(features, rois, pool_mode), align(single, rois.float(), pool_mode)
    torch.testing.assert_close(output, expected.to(dtype), rtol=0, atol=0)
    grad = torch.randn(output.shape).to(dtype)
    output.backward(grad)
    expected.backward(grad.float())
    if pool_mode == 'avg':
        torch.testing.assert_close(features.grad, single.grad.to(dtype), rtol=0, atol=0)
    else:  # mmcv keeps the places of the maxima in the type of the features
        torch.testing.assert_close(features.grad.sum(), grad.sum(), rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings('ignore:RoIAlign gets its regions in bfloat16')
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_under_autocast_roi_align_keeps_the_type_of_the_features(dtype):
    features = torch.randn(2, 5, 16, 16, dtype=dtype)
    with torch.autocast('cpu', dtype):
        output = align(features, ROIS.to(dtype))
    torch.testing.assert_close(output, align(features, ROIS.to(dtype)), rtol=0, atol=0)


def test_regions_in_bfloat16_raise_a_warning_once():
    """mmdet casts regions to the type of the features; 1001 becomes 1000."""
    roi._warn_of_bfloat16.cache_clear()
    inputs = torch.randn(2, 5, 16, 16).bfloat16(), ROIS.bfloat16()
    with pytest.warns(UserWarning, match='multiples of 4 and from 1024 on of 8 pixels') as warned:
        align(*inputs)
        align(*inputs)
    assert len(warned) == 1
    assert torch.tensor([1001., 1030]).bfloat16().tolist() == [1000, 1032]


@pytest.mark.parametrize('pool_mode', ['avg', 'max'])
@pytest.mark.parametrize('ratio', [0, 2])
def test_gradients_of_roi_align_are_those_of_finite_differences(pool_mode, ratio):
    features = torch.randn(2, 2, 16, 16, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda values: align(values, ROIS.double(), pool_mode, ratio), features, fast_mode=True)


def test_a_region_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match=r'x1 <= x2 and y1 <= y2, but got \(x1, y1, x2, y2\) = \(4.0, 0.0, 2.0, 8.0\)'):
        align(torch.zeros(1, 1, 8, 8), torch.tensor([[0., 4, 0, 2, 8]]))


def pool_by_loops(features, rois, bins_y, bins_x, scale):
    """RoIPool as in mmcv's CUDA kernel: bins without rounded corners, every pixel that a bin touches counts."""
    output = torch.zeros(len(rois), features.size(1), bins_y, bins_x, dtype=features.dtype)
    height, width = features.shape[-2:]
    for region, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        if x2 <= x1 or y2 <= y1:
            continue
        for row in range(bins_y):
            for column in range(bins_x):
                top = min(max(math.floor(y1 + row * (y2 - y1) / bins_y), 0), height)
                bottom = min(max(math.ceil(y1 + (row + 1) * (y2 - y1) / bins_y), 0), height)
                left = min(max(math.floor(x1 + column * (x2 - x1) / bins_x), 0), width)
                right = min(max(math.ceil(x1 + (column + 1) * (x2 - x1) / bins_x), 0), width)
                if bottom > top and right > left:
                    output[region, :, row, column] = features[int(image), :, top:bottom, left:right].amax((-2, -1))
    return output


POOLED = torch.tensor([[0., 3, 4, 19, 22], [1, 8, 8, 25, 12], [1, -9, 0, 45, 31], [0, 10, 3, 10, 3], [0, 200, 9, 210, 12],
                       [1, 9, 9, 5, 5]])


def test_roi_pool_is_the_maximum_of_the_pixels_that_a_bin_touches():
    features = torch.randn(2, 5, 16, 16)
    output = mmcv.ops.roi_pool(features.contiguous(memory_format=torch.channels_last), POOLED, (3, 4), 0.5)
    torch.testing.assert_close(output, pool_by_loops(features, POOLED, 3, 4, 0.5), rtol=0, atol=0)


def test_gradients_of_roi_pool_are_those_of_the_loops():
    """Regions off the map and regions that end before they begin give none."""
    features = torch.randn(2, 3, 16, 16)
    grads = []
    for pool in (mmcv.ops.roi_pool, lambda values, rois, size, scale: pool_by_loops(values, rois, *size, scale)):
        values = features.clone().requires_grad_()
        output = pool(values, POOLED, (3, 4), 0.5)
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
        grads.append(values.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('pool', [align, lambda features, rois: align(features, rois, 'max'),
                                  lambda features, rois: mmcv.ops.roi_pool(features, rois, (3, 4), 0.5)],
                         ids=['average', 'maximum', 'RoIPool'])
def test_no_regions_give_no_output_and_no_gradient(pool):
    features = torch.randn(2, 5, 16, 16, requires_grad=True)
    output = pool(features, torch.zeros(0, 5))
    assert tuple(output.shape) == (0, 5, 3, 4)
    output.sum().backward()
    assert not features.grad.any()
