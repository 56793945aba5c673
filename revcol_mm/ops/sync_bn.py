# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The steps of mmcv's own synchronised batch normalisation (``norm_cfg=dict(type='MMSyncBN')``), between which mmcv reduces.

mmcv's CPU has none of them. Statistics are float32 whatever the features are. x: features, μ and v: mean and variance, s:
standard deviation, x̂: normalised features, w and b: weight and bias, g: gradient of the output.
"""
from torch import Tensor


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """μ of this process.

    Args:
        input (Tensor): (N, C, S).
        mean (Tensor): (C, ) float32; gets the result.
    """
    mean.copy_(input.float().mean((0, 2)))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """v = mean of (x - μ)², μ being that of all processes.

    Args:
        input (Tensor): (N, C, S).
        mean (Tensor): (C, ) float32.
        var (Tensor): (C, ) float32; gets the result.
    """
    var.copy_((input.float() - mean[:, None]).square().mean((0, 2)))


def sync_bn_forward_output(input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
                           running_mean: Tensor | None, running_var: Tensor | None, norm: Tensor, std: Tensor, output: Tensor,
                           eps: float, momentum: float | Tensor, group_size: int) -> None:
    """s = √(v + ε), x̂ = (x - μ) / s, output = w x̂ + b, and the running statistics.

    Args:
        input (Tensor): (N, C, S).
        mean (Tensor): (C, ) float32.
        var (Tensor): (C, ) float32, over all elements, not one less.
        weight (Tensor or None): (C, ).
        bias (Tensor or None): (C, ).
        running_mean (Tensor or None): (C, ) float32; moves towards the mean by momentum.
        running_var (Tensor or None): (C, ) float32; moves towards the unbiased variance by momentum.
        norm (Tensor): (N, C, S) float32; gets x̂.
        std (Tensor): (C, ) float32; gets s.
        output (Tensor): (N, C, S); gets the result.
        eps (float): ε.
        momentum (float or Tensor): Share of the new statistics.
        group_size (int): Number of processes; all are taken to have as many elements as this one.
    """
    std.copy_((var + eps).sqrt())
    norm.copy_((input.float() - mean[:, None]) / std[:, None])
    output.copy_(norm if weight is None else norm * weight[:, None] + bias[:, None])
    if running_mean is not None:
        count = input.size(0) * input.size(2) * group_size
        unbiased = var * count / (count - 1) if count > 1 else var
        running_mean.copy_(momentum * mean + (1 - momentum) * running_mean)
        running_var.copy_(momentum * unbiased + (1 - momentum) * running_var)


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Sums of g x̂ and of g.

    Args:
        grad_output (Tensor): (N, C, S).
        norm (Tensor): (N, C, S) float32.
        grad_weight (Tensor): (C, ) gets the first.
        grad_bias (Tensor): (C, ) gets the second.
    """
    grads = grad_output.float()
    grad_weight.copy_((grads * norm).sum((0, 2)))
    grad_bias.copy_(grads.sum((0, 2)))


def sync_bn_backward_data(grad_output: Tensor, weight: Tensor, grad_weight: Tensor, grad_bias: Tensor, norm: Tensor,
                          std: Tensor, grad_input: Tensor) -> None:
    """w (g - (Σ g x̂ · x̂ + Σ g) / n) / s, n being the elements of a channel in this process, over which mmcv has averaged.

    Args:
        grad_output (Tensor): (N, C, S).
        weight (Tensor): (C, ).
        grad_weight (Tensor): (C, ) Σ g x̂, averaged over the processes.
        grad_bias (Tensor): (C, ) Σ g, averaged over the processes.
        norm (Tensor): (N, C, S) float32.
        std (Tensor): (C, ) float32.
        grad_input (Tensor): (N, C, S); gets the result.
    """
    count = grad_output.size(0) * grad_output.size(2)
    shared = (grad_weight[:, None] * norm + grad_bias[:, None]) / count
    grad_input.copy_(weight[:, None] * (grad_output.float() - shared) / std[:, None])
