# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A feature pyramid from feature maps of one resolution (ViTDet, https://arxiv.org/abs/2203.16527, section 3)."""
import math
from typing import Sequence

import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..layers import LayerNorm2d


@MODELS.register_module()
class SimpleFPN(BaseModule):
    """ViTDet's simple feature pyramid: every scale is made separately from a single-resolution map, without a top-down path.

    Transposed convolutions double the size, and max-pooling halves it. Then a 1×1 and a 3×3 convolution to ``out_channels``
    follow, each with LayerNorm.

    Args:
        in_channels (int): C of the backbone.
        out_channels (int): channels of the pyramid. Default: 256.
        scale_factors (Sequence[float]): size of each output divided by that of the input, powers of 2. Default: (4, 2, 1,
            0.5), which gives strides 4, 8, 16 and 32 with patches of 16 pixels.
        num_outs (int): number of outputs. Outputs after those of ``scale_factors`` are made from the last one, each with half
            the size of the one before. Default: 5.

    Raises:
        ValueError: if a scale factor is not a power of 2, if there are fewer outputs than scale factors, or, in forward, if the
            number of maps is another.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, scale_factors: Sequence[float] = (4, 2, 1, 0.5),
                 num_outs: int = 5) -> None:
        super().__init__()
        if any(factor <= 0 or not math.log2(factor).is_integer() for factor in scale_factors):
            raise ValueError(f'scale_factors must be powers of 2, but got {scale_factors!r}')
        if num_outs < len(scale_factors):
            raise ValueError(f'num_outs must be at least the number of scale_factors, {len(scale_factors)}, but got {num_outs}')
        self.num_outs = num_outs
        self.scales = nn.ModuleList(self._scale(in_channels, out_channels, int(math.log2(factor))) for factor in scale_factors)

    @staticmethod
    def _scale(channels: int, out_channels: int, steps: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for step in range(steps):
            if step:
                layers += [LayerNorm2d(channels, eps=1e-6), nn.GELU()]
            layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
            channels //= 2
        if steps < 0:
            layers.append(nn.MaxPool2d(2 ** -steps))
        return nn.Sequential(
            *layers, nn.Conv2d(channels, out_channels, 1, bias=False), LayerNorm2d(out_channels, eps=1e-6),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), LayerNorm2d(out_channels, eps=1e-6))

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Returns the pyramid.

        Args:
            inputs (Sequence[Tensor]): maps (N, C, H, W): a single one for all scales, as in ViTDet, or one for each scale, such
                as the levels of :class:`~revcol_mm.models.RevColViT`, where level 0 makes the largest output.

        Returns:
            tuple[Tensor]: ``num_outs`` maps (N, out_channels, H·factor, W·factor), contiguous.
        """
        if len(inputs) not in (1, len(self.scales)):
            raise ValueError(f'SimpleFPN needs 1 map, or {len(self.scales)}, one for each scale, but got {len(inputs)} maps')
        inputs = list(inputs) * (len(self.scales) // len(inputs))
        # mmcv's RoIAlign reads every layout as if it were contiguous.
        outs = [scale(x).contiguous() for scale, x in zip(self.scales, inputs)]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)
