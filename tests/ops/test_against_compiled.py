# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Against what compiled mmcv 2.1.0 computed on the CPU, called through the public functions of mmcv.ops."""
from pathlib import Path

import mmcv.ops
import pytest
import torch

DEVICES = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
CASES = torch.load(Path(__file__).parents[1] / 'data' / 'mmcv_ops.pt', weights_only=True)['cases']


def call(op, inputs, kwargs):
    """The outputs of one function of mmcv.ops, gradients of its inputs among them where the case has one of the output."""
    if op in ('nms', 'soft_nms', 'batched_nms'):
        return dict(zip(('dets', 'inds'), getattr(mmcv.ops, op)(*inputs.values(), **kwargs)))
    if op == 'nms_match':
        return dict(groups=mmcv.ops.nms_match(**inputs, **kwargs))
    inputs, grad = dict(inputs), inputs.get('grad')
    inputs.pop('grad', None)
    leaves = {name: tensor.clone().requires_grad_(name != 'rois') for name, tensor in inputs.items()}
    output = getattr(mmcv.ops, op)(*leaves.values(), *kwargs.values())
    if grad is None:
        return dict(output=output)
    output.backward(grad)
    return dict(output=output, **{f'grad_{name}': leaf.grad for name, leaf in leaves.items() if leaf.requires_grad})


@pytest.mark.parametrize('case', CASES, ids=[f'{case["op"]}-{index}' for index, case in enumerate(CASES)])
@pytest.mark.parametrize('device', DEVICES)
def test_indices_are_equal_and_values_within_a_millionth_of_the_largest(case, device):
    inputs = {name: tensor.to(device) for name, tensor in case['inputs'].items()}
    outputs = call(case['op'], inputs, case['kwargs'])
    assert outputs.keys() == case['outputs'].keys()
    for name, expected in case['outputs'].items():
        if name == 'inds' or name == 'groups':
            torch.testing.assert_close(outputs[name], expected, rtol=0, atol=0, check_device=False)
        else:
            largest = float(expected.abs().max()) if expected.numel() else 0
            torch.testing.assert_close(outputs[name].detach().cpu(), expected, rtol=0, atol=1e-6 * largest)
