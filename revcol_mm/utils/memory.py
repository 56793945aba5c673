# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Bytes that a training step needs, counted by running its code, without the memory for it if you like.

:func:`count_step` runs a forward and a backward pass and counts the storages that live. It needs tensors, but not their values:
in :func:`without_memory` a model runs on tensors that have a shape, a layout and a dtype, and no storage. So it counts RevCol-H
in seconds, and it counts what the code really does: what plain autograd saves, what ``torch.utils.checkpoint`` keeps, and what
a backward pass that rebuilds columns holds at its largest moment.

The bytes are those of the tensors. What a GPU holds besides (the CUDA context, the workspaces of cuDNN and cuBLAS, and
memory that the caching allocator has reserved and does not use) is not in them.
"""
import copy
import gc
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..reversible import autograd
from ..reversible.drift import DriftMonitor

#: The γ of a model without values: what a column starts with.
INITIAL_GAMMA = 0.5


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one step, without parameters, buffers and the input.

    Attributes:
        kept: what lives between the forward and the backward pass, the output included.
        peak: what lives at the largest moment of the step, gradients of the parameters aside.
        peak_with_gradients: the same with the gradients, each from the moment at which it exists. It may be another moment.
    """
    kept: int
    peak: int
    peak_with_gradients: int


class LiveBytes(TorchDispatchMode):
    """Keeps account of the storages that come into being under this mode, and of their end; on any device.

    Args:
        known (Iterable[Tensor]): tensors that were there before. Views of them do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._indices: dict[int, int | None] = {_key(tensor): None for tensor in known}
        self._events: list[tuple[int, int]] = []  # (index of a storage, its bytes, or minus its bytes where it ends)
        self._sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            key = _key(tensor)
            if key not in self._indices:
                storage = tensor.untyped_storage()
                index = self._indices[key] = len(self._sizes)
                self._sizes.append(storage.nbytes())
                self._events.append((index, self._sizes[index]))
                weakref.finalize(storage, self._free, key)
        return result

    def _free(self, key: int) -> None:
        index = self._indices.pop(key)
        self._events.append((index, -self._sizes[index]))

    @property
    def now(self) -> int:
        """Bytes that live at this moment."""
        return sum(size for _, size in self._events)

    def peak(self, but: Iterable[Tensor] = ()) -> int:
        """Bytes at the largest moment so far. The storages of ``but``, which must live, count at no moment."""
        left_out = {self._indices.get(_key(tensor)) for tensor in but}
        now = peak = 0
        for index, size in self._events:
            if index not in left_out:
                now += size
                peak = max(peak, now)
        return peak


def count_step(model: nn.Module, *inputs: Any, forward: Callable | None = None,
               autocast: torch.dtype | None = None) -> StepBytes:
    """Runs a forward and a backward pass, and counts the bytes that live.

    The backward pass starts with one gradient for each tensor of the output that needs one, as the layers behind the model
    would give it. Gradients of the parameters are None before and after, as with ``zero_grad(set_to_none=True)``.

    Args:
        model (nn.Module): the model.
        *inputs: what it gets; does not count.
        forward (Callable | None): the forward pass, for example ``detector.extract_feat``. Default: None, the model itself.
        autocast (torch.dtype | None): mixed precision with this dtype, on the CPU, but by the rules that CUDA has. Default:
            None.

    Returns:
        StepBytes: the bytes.
    """
    forward = forward or model
    model.zero_grad(set_to_none=True)
    with _cuda_rules(), LiveBytes([*model.parameters(), *model.buffers(), *_tensors(inputs)]) as live:
        with torch.autocast('cpu', autocast, enabled=autocast is not None):
            output = [tensor for tensor in _tensors(forward(*inputs)) if tensor.requires_grad]
        gc.collect()
        kept = live.now
        torch.autograd.backward(output, [torch.ones_like(tensor) for tensor in output])
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        step = StepBytes(kept, live.peak(but=gradients), live.peak())
    model.zero_grad(set_to_none=True)
    return step


@contextmanager
def without_memory(model: nn.Module) -> Iterator[nn.Module]:
    """Gives a copy of a model that has shapes and no values, and lets it run; create its inputs in this context, too.

    The code runs as on the CPU, and calls the kernels' rules for shapes and layouts instead of the kernels. γ counts as
    :data:`INITIAL_GAMMA` where the columns place their anchors, nothing draws random numbers, and no drift is judged.

    Args:
        model (nn.Module): a model on any device, the meta device for example. It is not changed.

    Yields:
        nn.Module: the copy.
    """
    def initial_gammas(columns, device=None):
        return lambda: [INITIAL_GAMMA] * (len(columns) - 1)

    # If the first backward pass of a process is one without memory, autograd forbids every later one in a forked process.
    torch.ones((), requires_grad=True).backward()
    with FakeTensorMode():
        shapes = {id(tensor): torch.empty(tensor.shape, dtype=tensor.dtype)
                  for tensor in (*model.parameters(), *model.buffers())}
        shapes.update({id(parameter): nn.Parameter(shapes[id(parameter)], parameter.requires_grad)
                       for parameter in model.parameters()})
        with mock.patch.object(autograd, 'fetch_smallest_gammas', initial_gammas), \
                mock.patch.object(autograd._RandomState, 'differs_from', lambda *states: False), \
                mock.patch.object(DriftMonitor, 'judge', lambda *args: True):
            yield copy.deepcopy(model, shapes)


@contextmanager
def _cuda_rules() -> Iterator[None]:
    """Autocast on CUDA runs norms in float32, and autocast on the CPU does not. In this context it does."""
    def in_float32(norm: Callable) -> Callable:
        def run(*args, **kwargs):
            if torch.is_autocast_enabled('cpu'):
                args, kwargs = tree_map(lambda leaf: leaf.float() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            return norm(*args, **kwargs)
        return run

    with mock.patch.object(F, 'layer_norm', in_float32(F.layer_norm)), \
            mock.patch.object(F, 'group_norm', in_float32(F.group_norm)):
        yield


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
