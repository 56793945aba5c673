# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What training needs besides the model: the optimizer constructor with layer-wise decay, and the drift hook."""
from .hooks import ReversibleDriftHook
from .optim import LayerDecayOptimWrapperConstructor

__all__ = ['LayerDecayOptimWrapperConstructor', 'ReversibleDriftHook']
