# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Training without stored activations: the backward pass rebuilds the features of the columns (sections 2.1 and 2.2.1).

Every column is one node of autograd's graph, and the end of the stack is another one::

    forward:   column 0, column 1, …, column n-1, end       each column leaves its stream to the next one (ForwardState)
    backward:  end, column n-1, …, column 1, column 0       each leaves the rebuilt stream to the next (BackwardState)

The order of the backward pass is certain, because every column reads the features of the column before it, and the end reads
the last column. Between the two passes only the stem's output, the stream of the last column and a few anchors are kept.

**Precision.** Rebuilding divides by γ once per column, which amplifies rounding errors. Therefore the *stream* γ·p + F is
carried in float64. Every F runs in the working precision, on the stream rounded to it: while the drift stays below half a
rounding step, F reads in the backward pass bit for bit what it read in the forward pass. :func:`round_stream` rounds in a way
that keeps sums off the edge between two numbers. Where the product of 1/|γ| along the columns would exceed
:data:`ANCHOR_BUDGET`, the stream of a column is kept: it is an *anchor*.

**Check.** The first column has no shortcut, so its rebuilt features are compared with the recomputed ones in every backward
pass. The rebuilt features at each anchor are compared with the anchor, and features that came from outside of the pass, such
as those of the last frozen column, with what was kept of them. Two things are not checked: a backward pass that ends before
any of these (``torch.autograd.grad`` for parameters of late columns only), and an error of the recomputed F that is smaller
than the threshold.
"""
import math
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.utils.checkpoint import get_device_states, set_device_states

from .column import MIN_GAMMA, ReversibleColumn, couple, keep_invertible, level_inputs, uncouple
from .drift import DriftMonitor, compare_features

#: dtype of the stream and of its gradient.
STREAM_DTYPE = torch.float64
#: Largest product of 1/|γ| along the columns that are rebuilt from one anchor. It is smaller than float64's 2^52: once the
#: drift changes the float32 rounding of an input of F, an error of 2^-24 enters, and the remaining columns amplify it. On eight
#: networks of 64 columns with γ = 0.5, a budget of 2^16 gave gradients with 0.5 to 4.3 times plain float32's error; 2^12 and
#: 2^8 gave 0.6 to 1.5 times.
ANCHOR_BUDGET = 2.0**12
#: Whether F runs in a reversible pass.
_RUNS_TWICE: ContextVar[bool] = ContextVar('runs_twice', default=False)


def run_reversibly(columns: Sequence[ReversibleColumn], x: Tensor, p: Sequence[Tensor] | None = None,
                   outputs: Sequence[tuple[int, int]] | None = None, monitor: DriftMonitor | None = None,
                   context: Mapping[str, Any] | None = None) -> tuple[Tensor, ...]:
    """Runs columns so that the backward pass rebuilds their features instead of reading stored ones.

    Args:
        columns (Sequence[ReversibleColumn]): the stack, in order.
        x (Tensor): the stem's output.
        p (Sequence[Tensor] | None): features of the column before the stack, for example of a frozen one. They are kept.
            Default: None, for a stack that starts with the first column.
        outputs (Sequence[tuple[int, int]] | None): (column, level) of each feature to return. Features of inner columns have
            exact gradients too, and are not stored either. Columns behind the last one named do not run. Default: None, all
            levels of the last column.
        monitor (DriftMonitor | None): reads the drift. Default: None, a new one.
        context (Mapping | None): keyword arguments of every level, in the forward pass and in the recomputation, for example an
            attention mask. They get no gradients, and must not change before the backward pass. Default: None.

    Returns:
        tuple[Tensor]: the features named by ``outputs``, in the layout in which the columns return them.

    Raises:
        ReversibilityError: in the backward pass, if the drift is above the monitor's threshold.
        ValueError: for a tensor in ``context`` that requires a gradient.
        RuntimeError: on a device without float64; in a backward pass with ``create_graph=True``.
    """
    if outputs is None:
        outputs = [(len(columns) - 1, level) for level in range(columns[-1].num_levels)]
    columns = columns[:1 + max(column for column, _ in outputs)]  # the backward pass starts from the last column that runs
    call = ReversibleCall(columns, x, monitor or DriftMonitor(), context)
    features = {}
    for index, column in enumerate(columns):
        p = column(x, p, call)
        features.update({(c, level): p[level] for c, level in outputs if c == index})
    return _End.apply(call, x, *(features[key] for key in outputs))


@dataclass
class ForwardState:
    """What the forward pass of one column leaves to the next column.

    Attributes:
        num_columns: number of columns that have run.
        stream: float64 stream of the last column that has run, one tensor per level; empty before the first one.
        dtypes: dtypes of that column's features, one per level.
    """
    num_columns: int = 0
    stream: list[Tensor] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)


@dataclass
class BackwardState:
    """What the backward pass of one node leaves to the column before it, which calls these features y.

    Attributes:
        x: the stem's output.
        y_stream: rebuilt float64 stream, one tensor per level.
        y: the stream rounded to the dtype of the features: what the column returned in the forward pass.
        grad_stream: for each level, the gradient of the stream that came through the shortcuts, in float64, or None. What came
            through F is not in it: autograd hands that on.
        comparisons: results of :func:`~.drift.compare_features` so far.
    """
    x: Tensor
    y_stream: list[Tensor]
    y: list[Tensor]
    grad_stream: list[Tensor | None]
    comparisons: list[Tensor]


class ReversibleCall:
    """One reversible forward pass and its backward passes: their common settings, and the state of each.

    Args:
        columns (Sequence[ReversibleColumn]): the columns that run.
        x (Tensor): the stem's output.
        monitor (DriftMonitor): reads the drift.
        context (Mapping | None): keyword arguments of every level. Default: None.

    Raises:
        RuntimeError: on a device without float64.
        ValueError: for a tensor in ``context`` that requires a gradient.
    """

    def __init__(self, columns: Sequence[ReversibleColumn], x: Tensor, monitor: DriftMonitor,
                 context: Mapping[str, Any] | None = None) -> None:
        device = x.device.type
        if device == 'mps':
            raise RuntimeError('reversible=True needs a device with float64 for its additive stream, but got the device '
                               f'{x.device}: build the backbone with reversible=False, with_cp=True')
        self.context = dict(context or {})
        for name, value in self.context.items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(f'context[{name!r}] must not require a gradient, because a reversible pass computes gradients '
                                 "of x, p and the columns' parameters only: detach it, or use the plain path")
        self.monitor = monitor
        self.autocast = dict(device_type=device, enabled=torch.is_autocast_enabled(device),
                             dtype=torch.get_autocast_dtype(device), cache_enabled=False)
        self.smallest_gammas = fetch_smallest_gammas(columns, x.device)
        self.forward_state = ForwardState()
        self.backward_state: BackwardState | None = None

    @cached_property
    def anchors(self) -> set[int]:
        """Indices of the columns whose streams are kept. The second column is the first to ask."""
        return place_anchors(self.smallest_gammas(), ANCHOR_BUDGET)

    def run_column(self, column: ReversibleColumn, x: Tensor, p: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        """The forward pass of one column, as one node: see :class:`ReversibleColumn`."""
        parameters = [column.level_parameters(level) for level in range(column.num_levels)]
        names = [tuple(level) for level in parameters]
        tensors = [tensor for level in parameters for tensor in level.values()]
        return _Column.apply(self, column, names, x, *(p or ()), *([] if column.first else column.gammas), *tensors)


def round_stream(stream: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds the stream to the dtype of the features: first to 33 significant bits, then to the nearest feature.

    With a γ of few digits, such as the initial 0.5, one sum in fifty lies exactly in the middle between two float32 numbers,
    where the smallest drift would change the result. The first step removes this drift.
    """
    if dtype == stream.dtype:
        return stream
    bits = stream.view(torch.int64) + 2**19  # of the 53 bits, the last 20 are rounded; infinity and nan stay what they are
    return bits.bitwise_and_(-2**20).view(stream.dtype).to(dtype)


def fetch_smallest_gammas(columns: Sequence[ReversibleColumn], device: torch.device | None = None) -> Callable[[], list[float]]:
    """Starts to fetch the smallest |γ| of every column but the first, at least :data:`MIN_GAMMA`, from the device.

    γ is read in every pass, so the values are never those of an earlier step.

    Args:
        columns (Sequence[ReversibleColumn]): the columns, which may be sharded.
        device (torch.device | None): where the columns compute; FSDP may keep their γ elsewhere. Default: None, where γ is.

    Returns:
        Callable[[], list[float]]: waits for the values, and returns them. On CUDA it waits for this transfer alone: columns
        that were started since then go on, and the device does not run out of work.
    """
    gammas, sharded = [], False
    for column in columns[1:]:
        for gamma in column.gammas:
            sharded |= isinstance(gamma, DTensor) or hasattr(column, '_fsdp_wrapped_module')  # the same in all processes
            local = (gamma.to_local() if isinstance(gamma, DTensor) else gamma).detach()
            gammas.append(local.abs().amin().float() if local.numel() else local.new_tensor(math.inf, dtype=torch.float32))
    if not gammas:
        return list
    smallest = torch.stack(gammas).to(device)
    if sharded:  # each process holds a part
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
    smallest = smallest.view(len(columns) - 1, -1).amin(1).clamp_min(MIN_GAMMA)
    if not smallest.is_cuda:
        values = smallest.tolist()
        return lambda: values
    fetched = smallest.to('cpu', non_blocking=True)  # one transfer for all columns
    event = torch.cuda.current_stream(smallest.device).record_event()

    def wait() -> list[float]:
        event.synchronize()
        return fetched.tolist()

    return wait


def place_anchors(smallest: Sequence[float], budget: float) -> set[int]:
    """Indices of the columns whose streams must be kept.

    Going back from the last column, column i amplifies an error by up to 1/min|γ|. Where the product since the last anchor
    would exceed the budget, column i becomes an anchor.

    Args:
        smallest (Sequence[float]): smallest |γ| of columns 1, 2, …
        budget (float): largest product of 1/|γ| between two anchors.

    Returns:
        set[int]: indices of columns, each at least 1.
    """
    anchors, product = set(), 1.0
    for index in range(len(smallest), 0, -1):
        factor = max(1.0, 1.0 / smallest[index - 1])
        if product * factor > budget:
            anchors.add(index)
            product = 1.0
        product *= factor
    return anchors


class _Column(torch.autograd.Function):
    """One column as one node of the graph. It stores its parameters, and at an anchor also the stream that it reads."""

    @staticmethod
    def forward(ctx, call: ReversibleCall, column: ReversibleColumn, names: list[tuple], x: Tensor, *tensors: Tensor):
        ctx.set_materialize_grads(False)
        p, gammas, parameters = _split(column, names, tensors)
        state = call.forward_state
        # The frozen columns before are not part of this call, and do not count.
        ctx.call, ctx.column, ctx.names, ctx.trained_index = call, column, names, state.num_columns
        p_stream = state.stream or [feature.to(STREAM_DTYPE) for feature in p]
        ctx.p_dtypes = [feature.dtype for feature in p]
        # Where p needs no gradient (a frozen column), this node is the last of the backward pass, and compares with p itself.
        frozen = bool(p) and not any(ctx.needs_input_grad[4:4 + len(p)])
        ctx.ends_pass = frozen or ctx.trained_index == 0
        # An anchor is the float64 stream, because the column before cannot be rebuilt from the rounded stream.
        anchor = p if frozen or not state.stream else p_stream if ctx.trained_index - 1 in call.anchors else ()
        y: list[Tensor] = []
        y_stream: list[Tensor] = []
        ctx.random: list[_RandomState | None] = []
        ctx.modes: list[list[bool]] = []
        after = _RandomState(x)
        for level, module in enumerate(column.levels):
            before = after
            ctx.modes.append([part.training for part in module.modules()])
            with _repeatable(), torch.autocast(**call.autocast):
                f = module(*level_inputs(level, column.above[level], x, y, p), **call.context)
            after = _RandomState(x)
            ctx.random.append(before if after.differs_from(before) else None)
            dtype = torch.result_type(f, column.gammas[level])
            if not column.first:
                f = couple(f, keep_invertible(gammas[level]), p_stream[level])
            y.append(f.to(dtype) if column.first else round_stream(f, dtype))
            y_stream.append(f.to(STREAM_DTYPE))
        call.forward_state = ForwardState(ctx.trained_index + 1, y_stream, [feature.dtype for feature in y])
        ctx.save_for_backward(*gammas, *(parameter for level in parameters for parameter in level), *anchor)
        return tuple(y)

    @staticmethod
    def backward(ctx, *grad_y: Tensor | None):
        if torch.is_grad_enabled():
            raise RuntimeError('a reversible RevCol cannot be differentiated twice (create_graph=True): build it with '
                               'reversible=False')
        column = _ColumnBackward(ctx, grad_y)
        for level in reversed(range(ctx.column.num_levels)):
            column.run_level(level)
        return (None, None, None, *column.finish())


class _ColumnBackward:
    """The backward pass of one column: for each level, the last one first, it rebuilds p[l] and differentiates F[l].

    The gradient of p[l] has two parts, which go different ways to the column before. The part through the shortcut, γ[l] times
    the gradient of y[l], is added up along all columns, so it stays in float64 and goes through :class:`BackwardState`. The
    part through the F that read p[l] has the dtype of the features, and autograd hands it on. :meth:`run_level` of the column
    before adds the two.

    Attributes:
        p, p_stream: features and stream of the column before. At an anchor they are known from the start, elsewhere for the
            levels above the present one.
        grad_y: for each level, the gradient of y[l] that came through autograd; each level adds that of y[l-1].
        grad_x, grad_p, grad_gamma, grad_parameters: what the node returns, as far as it is known.
        grad_shortcut: the part of p's gradient that comes through the shortcuts, in float64.
    """

    def __init__(self, ctx, grad_y: Sequence[Tensor | None]) -> None:
        self.ctx, self.call, self.column, self.state = ctx, ctx.call, ctx.column, ctx.call.backward_state
        levels, inputs = self.column.num_levels, 0 if self.column.first else self.column.num_levels
        saved = ctx.saved_tensors
        end = inputs + sum(map(len, ctx.names))
        _, self.gammas, self.parameters = _split(self.column, ctx.names, (*[None] * inputs, *saved[:end]))
        self.anchor = saved[end:]
        self.need_x = ctx.needs_input_grad[3]
        self.need_p, self.need_gamma, self.need_parameters = _split(self.column, ctx.names, ctx.needs_input_grad[4:])
        self.p = [round_stream(kept, dtype) for kept, dtype in zip(self.anchor, ctx.p_dtypes)] or [None] * levels
        self.p_stream: list[Tensor | None] = [None] * levels
        self.grad_y = list(grad_y)
        self.grad_x: Tensor | None = None
        self.grad_p: list[Tensor | None] = [None] * inputs
        self.grad_shortcut: list[Tensor | None] = [None] * levels
        self.grad_gamma: list[Tensor | None] = [None] * inputs
        self.grad_parameters: list[list[Tensor | None]] = [[None] * len(names) for names in ctx.names]

    def run_level(self, level: int) -> None:
        """The backward pass of one level."""
        grad = _add(self.state.grad_stream[level], self.grad_y[level])
        if self.column.first and grad is None:  # no loss depends on this level, and nothing has to be rebuilt from it
            return
        needs = [level > 0 or self.need_x, *(self.need_p[j] for j in self.column.above[level]), *self.need_parameters[level]]
        f, leaves = self._recompute(level, needs if grad is not None else [False] * len(needs))
        gamma = None if self.column.first else keep_invertible(self.gammas[level]).to(STREAM_DTYPE)
        self._rebuild(level, f.detach(), gamma)
        if grad is None:
            return
        grad_feature = grad.to(self.state.y[level].dtype)
        grads = iter(torch.autograd.grad(f, leaves, grad_feature.to(f.dtype), allow_unused=True) if leaves else ())
        grad_below, *others = [next(grads) if need else None for need in needs]
        if level:
            self.grad_y[level - 1] = _add(self.grad_y[level - 1], grad_below)
        else:
            self.grad_x = grad_below
        for j, grad_above in zip(self.column.above[level], others):
            self.grad_p[j] = _add(self.grad_p[j], grad_above)
        self.grad_parameters[level] = others[len(self.column.above[level]):]
        if gamma is None:
            return
        if self.need_p[level]:
            self.grad_shortcut[level] = gamma * grad
        if self.need_gamma[level]:
            self.grad_gamma[level] = (grad_feature * self.p[level]).sum_to_size(gamma.shape).to(self.gammas[level].dtype)

    def _rebuild(self, level: int, f: Tensor, gamma: Tensor | None) -> None:
        """Rebuilds p[l] from y[l] and F[l]. In the first column and at an anchor, it compares with known features."""
        y_stream, comparisons = self.state.y_stream[level], self.state.comparisons
        if gamma is None:
            comparisons.append(compare_features(y_stream, f))
            return
        rebuilt = uncouple(y_stream, f, gamma)
        if self.anchor:
            comparisons.append(compare_features(rebuilt, self.anchor[level]))
            rebuilt = self.anchor[level].to(STREAM_DTYPE)
        else:
            self.p[level] = round_stream(rebuilt, self.ctx.p_dtypes[level])
        self.p_stream[level] = rebuilt

    def _recompute(self, level: int, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:
        """Computes F[l] again, with the random numbers, the autocast state and the training modes of the forward pass.

        Detached leaves take the place of the parameters, so that the parameters' hooks run once, for the gradient that this
        node returns. Copies take the place of the buffers, so that running statistics are updated once.

        Returns:
            tuple[Tensor, list[Tensor]]: F's output, and the leaves that need a gradient.
        """
        module, names = self.column._modules[f'level{level}'], self.ctx.names[level]
        inputs = level_inputs(level, self.column.above[level], self.state.x, self.state.y, self.p)
        tensors = [tensor.detach().requires_grad_(need) for tensor, need in zip([*inputs, *self.parameters[level]], needs)]
        replaced = {name: buffer.clone() for name, buffer in module.named_buffers()}
        replaced.update(zip(names, tensors[len(inputs):]))
        with _replay(self.ctx.random[level]), _in_modes(module, self.ctx.modes[level]), _repeatable(), \
                torch.set_grad_enabled(any(needs)), torch.autocast(**self.call.autocast):
            f = functional_call(module, replaced, tuple(tensors[:len(inputs)]), self.call.context, tie_weights=False)
        return f, [tensor for tensor, need in zip(tensors, needs) if need]

    def finish(self) -> tuple[Tensor | None, ...]:
        """Leaves the state to the column before, or ends the pass. Returns the gradients of x, p, γ and the parameters."""
        state, call, grad_p = self.state, self.call, self.grad_p
        if self.ctx.trained_index == 0:  # p came from outside of this pass, where there is no stream
            totals = map(_add, self.grad_shortcut, grad_p)
            grad_p = [total if total is None else total.to(dtype) for total, dtype in zip(totals, self.ctx.p_dtypes)]
        grads = (self.grad_x, *grad_p, *self.grad_gamma, *(grad for level in self.grad_parameters for grad in level))
        if not self.ctx.ends_pass:
            call.backward_state = BackwardState(state.x, self.p_stream, self.p, self.grad_shortcut, state.comparisons)
        else:
            call.backward_state = None
            if not call.monitor.judge(state.comparisons, state.y[0].dtype):  # a loss scaler must skip this step
                return tuple(None if grad is None else torch.full_like(grad, math.nan) for grad in grads)
        return grads


class _End(torch.autograd.Function):
    """The end of the stack: the node whose backward pass is the first. It keeps what the rebuilding starts from."""

    @staticmethod
    def forward(ctx, call: ReversibleCall, x: Tensor, *features: Tensor):
        ctx.set_materialize_grads(False)
        ctx.call, ctx.dtypes = call, call.forward_state.dtypes
        ctx.save_for_backward(x, *call.forward_state.stream)
        call.forward_state = ForwardState()
        # A contiguous feature becomes an output of the network as it is: it is copied, so that users may change it in place.
        return tuple(feature.clone() if feature.is_contiguous() else feature for feature in features)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        x, *stream = ctx.saved_tensors
        features = [round_stream(level, dtype) for level, dtype in zip(stream, ctx.dtypes)]
        # Compared with itself, a feature that is not finite is found: what overflows in any column reaches the last one.
        comparisons = [compare_features(feature, feature) for feature in features]
        ctx.call.backward_state = BackwardState(x, stream, features, [None] * len(stream), comparisons)
        return (None, None, *grads)


def contiguous(feature: Tensor) -> Tensor:
    """Returns the feature in contiguous layout. If this makes a copy of a channels-last feature, its gradient is channels-last.

    A network in channels-last format runs its backward pass in the layout of the gradient that it gets. With the gradient of a
    contiguous copy, every block would have to reorder it.
    """
    if feature.is_contiguous() or not feature.requires_grad or torch.jit.is_tracing():
        return feature.contiguous()
    return _Contiguous.apply(feature)


class _Contiguous(torch.autograd.Function):

    @staticmethod
    def forward(ctx, feature: Tensor):
        ctx.channels_last = feature.dim() == 4 and feature.is_contiguous(memory_format=torch.channels_last)
        return feature.contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.contiguous(memory_format=torch.channels_last) if ctx.channels_last else grad


class _RandomState:
    """State of the random-number generators that F can draw from: the CPU's, and that of the device of x."""

    def __init__(self, x: Tensor) -> None:
        self.device_type = x.device.type
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(x)

    def differs_from(self, other: '_RandomState') -> bool:
        return any(not torch.equal(a, b) for a, b in zip((self.cpu, *self.states), (other.cpu, *other.states)))


@contextmanager
def _repeatable() -> Iterator[None]:
    """In this context F computes alike in both passes, bit by bit.

    cuDNN's benchmark mode measures in every thread which algorithm is the fastest, and on a GPU the backward pass has a thread
    of its own. Modules ask :func:`runs_twice`.
    """
    benchmark, token = torch.backends.cudnn.benchmark, _RUNS_TWICE.set(True)
    if benchmark:
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        _RUNS_TWICE.reset(token)
        if benchmark:
            torch.backends.cudnn.benchmark = True


def runs_twice() -> bool:
    """Whether F runs now in a reversible pass, so that it must not compute otherwise without a graph than with one."""
    return _RUNS_TWICE.get()


@contextmanager
def _in_modes(module: nn.Module, modes: Sequence[bool]) -> Iterator[None]:
    """Puts every part of a module into training or evaluation mode, and back."""
    parts = list(module.modules())
    now = [part.training for part in parts]
    if now == modes:
        yield
        return
    try:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
        yield
    finally:
        for part, mode in zip(parts, now):
            part.training = mode


@contextmanager
def _replay(random: _RandomState | None) -> Iterator[None]:
    """Makes F draw the random numbers of the forward pass again. ``random`` is None if it drew none."""
    if random is None:
        yield
        return
    with torch.random.fork_rng(random.devices, device_type=random.device_type if random.devices else 'cuda'):
        torch.set_rng_state(random.cpu)
        set_device_states(random.devices, random.states, device_type=random.device_type)
        yield


def _split(column: ReversibleColumn, names: Sequence[Sequence[str]], items: Sequence) -> tuple[Sequence, Sequence, list]:
    """Splits a list with one item for each of the node's inputs after x into (p, γ, the parameters of each level)."""
    levels = 0 if column.first else column.num_levels
    rest = iter(items[2 * levels:])
    return items[:levels], items[levels:2 * levels], [[next(rest) for _ in level] for level in names]


def _add(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    return term if total is None else total if term is None else total + term
