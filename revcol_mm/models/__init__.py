# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Models. The backbones need mmengine and mmcv only; heads, classifiers, necks and test-time augmentation need more."""
from .backbones.c2f import RevColC2f
from .backbones.hrnet_columns import HRNetColumns
from .backbones.revcol import RevCol
from .backbones.revnet import RevNetConvNeXt
from .backbones.sequence import RevColTransformerEncoder
from .backbones.vit import RevColViT

__all__ = ['HRNetColumns', 'RevCol', 'RevColC2f', 'RevColTransformerEncoder', 'RevColViT', 'RevNetConvNeXt']
