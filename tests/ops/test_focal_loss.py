# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Focal losses against their definition, equations 4 and 5 of the paper, in float64 with gradients by autograd."""
import mmcv.ops
import pytest
import torch
from torch.nn.functional import one_hot

CLASSES = 5


def sigmoid_loss(logits, target, gamma, alpha, weight):
    """p_t is p for the class of the row and 1 - p for the others; so is α_t."""
    right = one_hot(target.clamp(min=0), CLASSES + 1)[:, :CLASSES].bool() & (target >= 0)[:, None]
    probability = 1 / (1 + (-logits).exp())
    p_t = torch.where(right, probability, 1 - probability)
    alpha_t = torch.where(right, alpha, 1 - alpha)
    loss = -alpha_t * (1 - p_t) ** gamma * p_t.log()
    return loss if weight is None else loss * weight[target][:, None]


def softmax_loss(logits, target, gamma, alpha, weight):
    probability = (logits.exp() / logits.exp().sum(1, keepdim=True))[torch.arange(len(target)), target.clamp(min=0)]
    loss = -alpha * (1 - probability) ** gamma * probability.log()
    loss = loss if weight is None else loss * weight[target.clamp(min=0)]
    return torch.where(target >= 0, loss, 0)


LOSSES = {'sigmoid': (mmcv.ops.sigmoid_focal_loss, sigmoid_loss), 'softmax': (mmcv.ops.softmax_focal_loss, softmax_loss)}


# mmcv's own Python cannot differentiate the softmax loss without reduction: it multiplies (N, C) by (N, ).
@pytest.mark.parametrize('name, reduction', [('sigmoid', 'none'), ('sigmoid', 'mean'), ('sigmoid', 'sum'), ('softmax', 'mean'),
                                             ('softmax', 'sum')])
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('gamma', [0., 0.5, 2.])
def test_loss_and_gradient_are_those_of_the_definition(name, reduction, weighted, gamma):
    function, definition = LOSSES[name]
    target = torch.tensor([0, 4, 2, 2, 1, 3])
    weight = torch.rand(CLASSES, dtype=torch.float64) if weighted else None
    reduce = dict(none=lambda loss: loss, sum=torch.sum, mean=lambda loss: loss.sum() / len(target))[reduction]
    results = []
    for loss in (lambda logits: function(logits, target, gamma, 0.25, weight, reduction),
                 lambda logits: reduce(definition(logits, target, gamma, 0.25, weight))):
        logits = torch.randn(6, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        output = loss(logits)
        output.backward(torch.linspace(1, 2, output.numel()).view_as(output).to(output))
        results.append((output.detach(), logits.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    logits = torch.randn(4, CLASSES, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4, 2, 2])
    torch.autograd.gradcheck(lambda logits: LOSSES[name][0](logits, target, 2., 0.25, None, 'sum'), logits)


def test_a_row_of_the_background_or_ignored_has_no_right_class():
    logits, target = torch.randn(3, CLASSES, dtype=torch.float64), torch.tensor([CLASSES, -1, 2])
    torch.testing.assert_close(mmcv.ops.sigmoid_focal_loss(logits, target, 2., 0.25, None, 'none'),
                               sigmoid_loss(logits, target, 2., 0.25, None))


def test_a_row_without_a_class_costs_nothing_in_the_softmax_loss():
    logits, target = torch.randn(3, CLASSES, requires_grad=True), torch.tensor([1, -1, 2])
    mmcv.ops.softmax_focal_loss(logits, target, 2., 0.25, None, 'sum').backward()
    assert logits.grad[[0, 2]].abs().min() > 0 and not logits.grad[1].any()


@pytest.mark.parametrize('logit', [-200., -30., 30., 200.])
def test_float32_is_right_where_a_probability_rounds_to_nought_or_one(logit):
    """For the class of the row the loss is α |x| or 0; for the others (1 - α) |x| or 0."""
    logits = torch.full((1, 2), logit, requires_grad=True)
    loss = mmcv.ops.sigmoid_focal_loss(logits, torch.tensor([0]), 2., 0.25, None, 'none')
    torch.testing.assert_close(loss, torch.tensor([[0.25 * max(-logit, 0), 0.75 * max(logit, 0)]]))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25 * (logit < 0), 0.75 * (logit > 0)]]))


@pytest.mark.parametrize('gamma', [0., 0.5, 1., 2.])
def test_a_certain_prediction_has_a_softmax_gradient_of_nought(gamma):
    logits = torch.tensor([[200., 0]], requires_grad=True)
    mmcv.ops.softmax_focal_loss(logits, torch.tensor([0]), gamma, 0.25, None, 'sum').backward()
    assert logits.grad.tolist() == [[0, 0]]


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision_keeps_its_type_and_is_computed_in_float32(name, dtype):
    logits, target = torch.randn(6, CLASSES).to(dtype), torch.tensor([0, 4, 2, 2, 1, 3])
    with torch.autocast('cpu', dtype):
        loss = LOSSES[name][0](logits, target, 2., 0.25, None, 'none')
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), LOSSES[name][1](logits.double(), target, 2., 0.25, None),
                               rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize('name, target, weighted, allowed', [('sigmoid', 6, False, 5), ('sigmoid', 5, True, 4),
                                                             ('softmax', 5, False, 4)])
def test_a_target_beyond_the_classes_is_refused(name, target, weighted, allowed):
    weight = torch.ones(CLASSES) if weighted else None
    with pytest.raises(ValueError, match=f'target must be at most {allowed} for 5 classes.*, but got {target}'):
        LOSSES[name][0](torch.randn(1, CLASSES), torch.tensor([target]), 2., 0.25, weight, 'mean')


def test_no_rows_give_no_loss():
    loss = mmcv.ops.sigmoid_focal_loss(torch.zeros(0, CLASSES), torch.zeros(0, dtype=torch.long), 2., 0.25, None, 'none')
    assert tuple(loss.shape) == (0, CLASSES)
