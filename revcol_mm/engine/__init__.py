# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What training needs besides the model: the optimizer constructor with layer-wise decay, the hooks, and sharding."""
from .hooks.curves import CurvesHook
from .hooks.drift import ReversibleDriftHook
from .hooks.exact_resume import ExactResumeHook
from .hooks.feature_statistics import FeatureStatisticsHook
from .optimizers.layer_decay import LayerDecayOptimWrapperConstructor
from .strategies.fsdp import RevColFSDPStrategy, column_network_wrap_policy

__all__ = ['CurvesHook', 'ExactResumeHook', 'FeatureStatisticsHook', 'LayerDecayOptimWrapperConstructor',
           'RevColFSDPStrategy', 'ReversibleDriftHook', 'column_network_wrap_policy']
