# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Models. The backbones need mmengine and mmcv only; heads, classifiers, necks and test-time augmentation need more."""
from .backbones import RevCol, RevColC2f, RevColTransformerEncoder, RevColViT

__all__ = ['RevCol', 'RevColC2f', 'RevColTransformerEncoder', 'RevColViT']
