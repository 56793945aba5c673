# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Draws docs/images/kernel_padding.png: a depthwise kernel before and after tools/pad_kernels.py."""
from pathlib import Path

import matplotlib
import torch

from revcol_mm.checkpoint import pad_kernel
from revcol_mm.checkpoint.kernels import STD, draw_border

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

kernel = torch.tensor([[0.02, 0.11, 0.03], [0.12, -0.35, 0.10], [0.04, 0.13, 0.02]])[None, None]
padded = pad_kernel(kernel, draw_border(1, 7, STD, torch.Generator().manual_seed(0)))
figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), layout='constrained')
for axis, values, title, scale in (
        (axes[0], kernel, 'before: 3×3', dict(cmap='RdBu', vmin=-0.35, vmax=0.35)),
        (axes[1], padded, 'after: 7×7', dict(cmap='RdBu', vmin=-0.35, vmax=0.35)),
        (axes[2], padded.abs().log10(), 'after, log₁₀ of the magnitude', dict(cmap='viridis', vmin=-9, vmax=0))):
    image = axis.imshow(values[0, 0], **scale)
    axis.set(title=title, xticks=[], yticks=[])
    figure.colorbar(image, ax=axis, shrink=0.8)
figure.savefig(Path(__file__).parent / 'images' / 'kernel_padding.png', dpi=90)
