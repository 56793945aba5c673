# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Focal loss (Lin et al., 2017, eq. 5): FL(p) = -α (1 - p)^γ log p, of independent classes (sigmoid) or one of many (softmax).

mmcv's CPU has neither. Logarithms are those of the logits, where mmcv's kernels take the logarithm of a rounded probability,
which they bound at 1.2e-38: the two differ where a float32 probability rounds to 0 or 1.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .library import at_least_single


def sigmoid_focal_loss_forward(input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float,
                               alpha: float) -> None:
    """Focal loss of independent classes, element by element.

    Args:
        input (Tensor): (N, C) logits.
        target (Tensor): (N, ) int64, the class of each row; C or less than 0: none.
        weight (Tensor): (C, ) factors of the rows by their class, or empty.
        output (Tensor): (N, C); gets the loss.
        gamma (float): γ.
        alpha (float): α of the right class; 1 - α for the others.

    Raises:
        ValueError: If a target is above C, or has no weight.
    """
    positive, logits, row_weights = _prepare(input, target, weight, background=True)
    probability, other = logits.sigmoid(), (-logits).sigmoid()  # 1 - p as p of -x, which does not cancel
    right = alpha * other.pow(gamma) * F.logsigmoid(logits)
    wrong = (1 - alpha) * probability.pow(gamma) * F.logsigmoid(-logits)
    output.copy_(-torch.where(positive, right, wrong) * row_weights)


def sigmoid_focal_loss_backward(input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float,
                                alpha: float) -> None:
    """Derivative of the loss by the logits, element by element.

    Args:
        input (Tensor): As in forward.
        target (Tensor): As in forward.
        weight (Tensor): As in forward.
        grad_input (Tensor): (N, C); gets the derivative.
        gamma (float): As in forward.
        alpha (float): As in forward.
    """
    positive, logits, row_weights = _prepare(input, target, weight, background=True)
    # d log p / dx = 1 - p and d p / dx = p (1 - p)
    probability, other = logits.sigmoid(), (-logits).sigmoid()
    right = alpha * other.pow(gamma) * (other - gamma * probability * F.logsigmoid(logits))
    wrong = (1 - alpha) * probability.pow(gamma) * (gamma * other * F.logsigmoid(-logits) - probability)
    grad_input.copy_(-torch.where(positive, right, wrong) * row_weights)


def softmax_focal_loss_forward(input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float,
                               alpha: float) -> None:
    """Focal loss of one class among many, row by row.

    Args:
        input (Tensor): (N, C) probabilities, the softmax that mmcv has taken.
        target (Tensor): (N, ) int64, the class of each row; less than 0: none, which costs nothing.
        weight (Tensor): (C, ) factors of the rows by their class, or empty.
        output (Tensor): (N, ); gets the loss.
        gamma (float): γ.
        alpha (float): α, of every class.

    Raises:
        ValueError: If a target is C or above.
    """
    _, probabilities, row_weights = _prepare(input, target, weight, background=False)
    probability, log_probability = _of_target(probabilities, target)
    loss = -alpha * (1 - probability).pow(gamma) * log_probability
    output.copy_(torch.where(target >= 0, loss * row_weights[:, 0], 0))


def softmax_focal_loss_backward(input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float,
                                alpha: float) -> None:
    """Derivative of the loss by the logits.

    Args:
        input (Tensor): As in forward.
        target (Tensor): As in forward.
        weight (Tensor): As in forward.
        buff (Tensor): (N, ); gets the derivative by log p of the row's class.
        grad_input (Tensor): (N, C); gets the derivative by the logits.
        gamma (float): As in forward.
        alpha (float): As in forward.
    """
    positive, probabilities, row_weights = _prepare(input, target, weight, background=False)
    probability, log_probability = _of_target(probabilities, target)
    other = 1 - probability
    # At p = 1 the second term is 0 for every γ, but 0 to the power of γ - 1 times 0 would say NaN for γ below 1.
    slope = torch.where(other > 0, gamma * other.pow(gamma - 1) * probability * log_probability, 0)
    factor = torch.where(target >= 0, alpha * (slope - other.pow(gamma)) * row_weights[:, 0], 0)
    buff.copy_(factor)
    # d log p_t / dx_c = [t = c] - p_c
    grad_input.copy_(factor[:, None] * (positive.to(probabilities.dtype) - probabilities))


def _prepare(values: Tensor, target: Tensor, weight: Tensor, background: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the targets; returns where the classes are, (N, C), the values to compute with, and factors, (N or 1, 1)."""
    classes = values.size(1)
    highest = int(target.max()) if target.numel() else -1
    allowed = classes if background and not weight.numel() else classes - 1
    if highest > allowed:
        raise ValueError(f'target must be at most {allowed} for {classes} classes'
                         f'{" with weights" if background and weight.numel() else ""}, but got {highest}: check num_classes')
    positive = target[:, None] == torch.arange(classes, device=target.device)
    values = at_least_single(values)
    factors = weight.to(values.dtype)[target.clamp(min=0)][:, None] if weight.numel() else values.new_ones(1, 1)
    return positive, values, factors


def _of_target(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of each row's class and its logarithm; rows without a class give those of class 0."""
    probability = probabilities.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return probability, probability.clamp(min=torch.finfo(probability.dtype).tiny).log()
