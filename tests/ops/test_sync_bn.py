# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""mmcv's own synchronised batch normalisation (MMSyncBN) in one process is batch normalisation."""
import pytest
import torch
from mmcv.ops.sync_bn import SyncBatchNormFunction
from torch import nn


def normalise(features, norm):
    """What mmcv.ops.SyncBatchNorm, which wants a process group, calls while it trains."""
    return SyncBatchNormFunction.apply(features, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.momentum,
                                       norm.eps, None, 1, 'default')


def results(function, features):
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1., 2, 0.5, -1]))
        norm.bias.copy_(torch.tensor([0., 1, -1, 3]))
    features = features.detach().requires_grad_()
    output = function(features, norm)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype))
    return dict(output=output.detach(), grad=features.grad, weight=norm.weight.grad, bias=norm.bias.grad,
                mean=norm.running_mean, var=norm.running_var)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_outputs_gradients_and_running_statistics_are_those_of_batch_norm(layout):
    features = (torch.randn(3, 4, 5, 2) * 2 + 1).contiguous(memory_format=layout)
    torch.testing.assert_close(results(normalise, features), results(lambda values, norm: norm(values), features),
                               rtol=1e-5, atol=1e-5)


def test_float16_keeps_its_type_and_is_computed_in_float32():
    features = (torch.randn(3, 4, 5, 2) * 2 + 1).half()
    low, single = results(normalise, features), results(normalise, features.float())
    assert (low['output'].dtype, low['grad'].dtype, low['weight'].dtype) == (torch.float16, torch.float16, torch.float32)
    torch.testing.assert_close(low['output'], single['output'].half(), rtol=0, atol=0)
    torch.testing.assert_close(low['var'], single['var'], rtol=0, atol=0)
