# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Layers that the backbones, heads and necks share."""
import functools

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from ..reversible.autograd import runs_twice

#: Number of values that a block computes at once in inference on a CPU, so that its 4C channels stay in the cache.
CHUNK = 300_000


def infers_on_cpu(x: Tensor) -> bool:
    """Whether this is inference on a CPU, without a graph, a trace or a compiler, where the cache decides the speed."""
    return x.device.type == 'cpu' and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and (
        not torch.jit.is_tracing()) and not runs_twice()


@functools.cache
def keep_freed_memory() -> None:
    """Makes glibc keep up to 62 MiB of freed memory, so that a block does not get its memory from the system every time.

    glibc keeps twice the size of the largest block that was ever freed, up to 32 MiB. This one is never touched. Without it a
    tenth of RevCol-B's time on a CPU went into page faults; ConvNeXt's blocks are larger, and so have the same effect.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W). It needs no copy when the input is channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W), channels-last in memory


def linear_norm(in_channels: int, out_channels: int) -> nn.Sequential:
    """Returns Linear and LayerNorm for features whose last dimension is the channels."""
    return nn.Sequential(nn.Linear(in_channels, out_channels), nn.LayerNorm(out_channels, eps=1e-6))


def patch_norm(in_channels: int, out_channels: int, size: int) -> nn.Sequential:
    """Returns a convolution of patches of size × size that do not overlap, and LayerNorm over the channels."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, size, stride=size), LayerNorm2d(out_channels, eps=1e-6))


class Classifier(nn.Module):
    """Global average pool, LayerNorm, Linear: (N, C, H, W) -> (N, num_classes)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.LayerNorm(in_channels, eps=1e-6), nn.Linear(in_channels, num_classes))

    def pool(self, x: Tensor) -> Tensor:
        return self.classifier[0](x.mean((-2, -1)))  # (N, C, H, W) -> (N, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier[1](self.pool(x))


class ConvNeXtBlock(nn.Module):
    """Depthwise k×k convolution, LayerNorm, Linear C→4C, GELU, Linear 4C→C, LayerScale, DropPath, residual.

    Args:
        channels (int): C.
        kernel_size (int): k, odd. Default: 3.
        drop_path_rate (float): probability that the branch is dropped. Default: 0.
        layer_scale_init_value (float): initial value of LayerScale, the parameter ``gamma``. Default: 1e-6.
        expansion (int): number of channels between the two Linear layers, as a multiple of C. Default: 4.
    """

    def __init__(self, channels: int, kernel_size: int = 3, drop_path_rate: float = 0.,
                 layer_scale_init_value: float = 1e-6, expansion: int = 4) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, expansion * channels)
        self.pwconv2 = nn.Linear(expansion * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels, ), float(layer_scale_init_value)))
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.dwconv(x).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        if infers_on_cpu(x) and branch.is_contiguous() and not self.training and x.dtype == self.dwconv.weight.dtype:
            return self._infer(x.permute(0, 2, 3, 1), branch).permute(0, 3, 1, 2)
        return x + self.drop_path(self._mix(branch).permute(0, 3, 1, 2))  # (N, H, W, C) -> (N, C, H, W)

    def _mix(self, x: Tensor) -> Tensor:
        """What follows the convolution, for each pixel by itself; the last dimension is the channels."""
        x = self.pwconv2(F.gelu(self.pwconv1(self.norm(x))))
        return x if self.gamma is None else self.gamma * x

    def _infer(self, x: Tensor, branch: Tensor) -> Tensor:
        """x + :meth:`_mix` of the branch, (N, H, W, C), in parts that stay in the cache, with few passes over the memory."""
        keep_freed_memory()
        out = torch.empty_like(branch, dtype=x.dtype)
        rows = max(1, CHUNK // x.shape[-1])
        for part, pixels, target in zip(*(tensor.reshape(-1, x.shape[-1]).split(rows) for tensor in (x, branch, out))):
            hidden = self.pwconv1(self.norm(pixels))
            mixed = self.pwconv2(F.gelu(hidden, out=hidden))
            if self.gamma is None:
                torch.add(part, mixed, out=target)
            else:
                torch.addcmul(part, mixed, self.gamma, out=target)
        return out

    def fold(self) -> None:
        """Multiplies LayerScale into the Linear before it, and the norm's weight and bias into the Linear after it."""
        _fold_layer_scale(self.pwconv2, self.gamma)
        _fold_affine(self.norm, self.pwconv1)
        self.gamma, self.drop_path = None, nn.Identity()


@torch.no_grad()
def _fold_layer_scale(linear: nn.Linear, gamma: Tensor) -> None:
    """γ ∘ (W·h + b) = (diag(γ)·W)·h + γ ∘ b, computed in float64, so that it is rounded once."""
    gamma = gamma.double()
    linear.weight.copy_(gamma[:, None] * linear.weight.double())
    linear.bias.copy_(gamma * linear.bias.double())


@torch.no_grad()
def _fold_affine(norm: nn.LayerNorm, linear: nn.Linear) -> None:
    """W·(w ∘ n + c) + b = (W·diag(w))·n + (W·c + b), rounded once. Afterwards the norm has no weight w and no bias c."""
    weight = linear.weight.double()
    linear.bias.copy_(linear.bias.double() + weight @ norm.bias.double())
    linear.weight.copy_(weight * norm.weight.double())
    norm.elementwise_affine, norm.weight, norm.bias = False, None, None


def init_weights(module: nn.Module) -> None:
    """Initialises a convolution or Linear: its weight truncated normal (std 0.02), its bias 0. For ``nn.Module.apply``."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def check_positive_int(name: str, value: int) -> None:
    """Raises ValueError if the argument ``name`` is not a positive integer."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f'{name} must be a positive integer, but got {value!r}')
