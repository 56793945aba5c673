# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The check of every reversible backward pass: the rebuilt features must be those of the forward pass."""
import math
import warnings
from typing import Sequence

import torch
from torch import Tensor

#: Largest drift, relative to the largest feature of the level, that passes, by the features' dtype. One input of F that is
#: rounded the other way differs by 2^-24 in float32; within the anchors' budget that may grow to 2^-12 = 2.4e-4, and to more
#: where F amplifies. The largest drift of a hundred random networks was 1.6e-5. Drifts just below 1e-3, forced by a larger
#: budget, came with gradient errors of 2e-4 to 3e-4, which no training notices; where rebuilding fails the drift is 0.1 to
#: 1000.
DRIFT_THRESHOLD = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class ReversibilityError(RuntimeError):
    """The features that a backward pass rebuilt are not those of the forward pass, so its gradients are wrong."""


class DriftMonitor:
    """Reads the drift of each backward pass, and acts when it is too large.

    Args:
        threshold (float | None): largest accepted drift, relative to the largest feature of the level; ``drift_threshold`` of a
            backbone. Default: None, the value of :data:`DRIFT_THRESHOLD` for the features' dtype.
        action (str): 'raise' raises a :class:`ReversibilityError` before any optimizer step, 'warn' warns; ``on_drift`` of a
            backbone. Default: 'raise'.

    Attributes:
        drift (float): largest relative drift of the last backward pass; nan before the first one, and where the features were
            not finite.
        measured (bool): whether a backward pass has been judged.

    Raises:
        ValueError: for another action, or a threshold that is not a positive number.
    """

    def __init__(self, threshold: float | None = None, action: str = 'raise') -> None:
        if action not in ('raise', 'warn'):
            raise ValueError(f"on_drift must be 'raise' or 'warn', but got {action!r}")
        if threshold is not None and not (isinstance(threshold, (int, float)) and threshold > 0):
            raise ValueError('drift_threshold must be a positive number, or None for the default of the dtype, but got '
                             f'{threshold!r}')
        self.threshold, self.action = threshold, action
        self.drift = math.nan
        self.measured = self._warned = False

    def judge(self, comparisons: Sequence[Tensor], dtype: torch.dtype) -> bool:
        """Sets :attr:`drift`, and raises or warns if it is above the threshold.

        Features that were not finite in the forward pass cannot be rebuilt, and say nothing about the drift. They are left to
        the loss scaler, which skips the step because its gradients are not finite; without one, a warning tells the user, once.

        Args:
            comparisons (Sequence[Tensor]): the results of :func:`compare_features` in this backward pass.
            dtype (torch.dtype): dtype of the features.

        Returns:
            bool: whether the features of the forward pass were finite.

        Raises:
            ReversibilityError: if the drift is above the threshold and the action is 'raise'.
        """
        threshold = self.threshold or DRIFT_THRESHOLD[dtype]
        errors, scales = torch.stack(tuple(comparisons)).unbind(1)
        relative = (errors / scales.clamp_min(torch.finfo(torch.float32).tiny)).nan_to_num(math.inf)
        finite, drift = torch.stack([scales.isfinite().all().to(relative.dtype), relative.max()]).tolist()  # one transfer
        self.drift, self.measured = drift if finite else math.nan, True
        if not finite and not self._warned:
            self._warned = True
            warnings.warn('the features are not finite. With a loss scaler (float16) this step is skipped, and training goes '
                          'on. Without one the training has diverged: lower the learning rate', RuntimeWarning, stacklevel=2)
        if finite and drift > threshold:
            message = (f'the features rebuilt in the backward pass differ from those of the forward pass by {drift:.2g} of '
                       f'their largest value, but at most drift_threshold={threshold:.2g} is allowed, so the gradients of '
                       'this step are wrong. Usual causes: an F that is not deterministic, another thread that draws random '
                       'numbers, parameters changed between forward and backward, or features that grow without bound. Train '
                       "with reversible=False, with_cp=True to compare. on_drift='warn' only warns.")
            if self.action == 'raise':
                raise ReversibilityError(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return bool(finite)


def compare_features(rebuilt: Tensor, reference: Tensor) -> Tensor:
    """Returns (largest difference, largest |reference|) as float32 of shape (2, ), on the device of the features."""
    if not reference.numel():  # an empty batch
        return torch.zeros(2, device=reference.device)
    return torch.stack([(rebuilt - reference).abs().amax().float(), reference.abs().amax().float()])
