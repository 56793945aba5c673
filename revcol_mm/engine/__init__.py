# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What training needs besides the model: the optimizer constructor with layer-wise decay, the drift hook, and sharding."""
from .fsdp import RevColFSDPStrategy, column_network_wrap_policy
from .hooks import ReversibleDriftHook
from .optim import LayerDecayOptimWrapperConstructor

__all__ = ['LayerDecayOptimWrapperConstructor', 'RevColFSDPStrategy', 'ReversibleDriftHook', 'column_network_wrap_policy']
