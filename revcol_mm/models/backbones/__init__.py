# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
from .c2f import RevColC2f
from .revcol import RevCol
from .sequence import RevColTransformerEncoder
from .vit import RevColViT

__all__ = ['RevCol', 'RevColC2f', 'RevColTransformerEncoder', 'RevColViT']
