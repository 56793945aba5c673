# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Reversible training: the equations and the column, the autograd nodes, and the check of each backward pass."""
from .autograd import ANCHOR_BUDGET, STREAM_DTYPE, ReversibleCall, contiguous, place_anchors, run_reversibly
from .column import MIN_GAMMA, ReversibleColumn, couple, keep_invertible, run_levels, uncouple
from .drift import DRIFT_THRESHOLD, DriftMonitor, ReversibilityError

__all__ = ['ANCHOR_BUDGET', 'DRIFT_THRESHOLD', 'MIN_GAMMA', 'STREAM_DTYPE', 'DriftMonitor', 'ReversibilityError',
           'ReversibleCall', 'ReversibleColumn', 'contiguous', 'couple', 'keep_invertible', 'place_anchors', 'run_levels',
           'run_reversibly', 'uncouple']
