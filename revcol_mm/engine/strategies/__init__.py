# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
from .fsdp import RevColFSDPStrategy, column_network_wrap_policy

__all__ = ['RevColFSDPStrategy', 'column_network_wrap_policy']
