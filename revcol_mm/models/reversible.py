# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The multi-level reversible unit (RevCol, ICLR 2023, section 3.2) and its training without stored activations.

A column turns the features p of the column before it into its own features y, level by level (equation 3)::

    forward:  y[l] = F[l](y[l-1], p[j] for j in above[l]) + γ[l]·p[l]        l = 0 … L-1,   y[-1] = x, the stem's output
    inverse:  p[l] = (y[l] − F[l](y[l-1], p[j] for j in above[l])) / γ[l]    l = L-1 … 0,   every j > l

so that the features of all columns follow from those of the last. :func:`run_columns` trains a stack of columns that
way: between forward and backward it keeps the stem's output, the features of the last column, and a few anchors.

**Precision.** Rebuilding divides by γ once a column, which amplifies every rounding error. Therefore the *stream* γ·p + F is
carried in float64, while every F runs in the working precision on the stream's rounding (so a rebuilt input of F is bit for
bit the one of the forward pass, as long as the drift stays below half a rounding step). Before the product of 1/|γ| along the
columns passes :data:`ANCHOR_BUDGET`, a column's stream is kept: an *anchor*.

**Check.** The first column has no shortcut: its rebuilt features are compared with the recomputed ones in every backward pass,
and so are the rebuilt features at each anchor, and those of the last frozen column. Unchecked remain: a backward pass that
ends before it meets one of these (``torch.autograd.grad`` for parameters of late columns only), and the recomputation of F
itself where its error is smaller than the threshold.
"""
import math
import warnings
from typing import Any, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.func import functional_call

#: Smallest |γ|: below it the inverse of a column would amplify without bound.
MIN_GAMMA = 1e-3
#: Of the additive stream and its gradient.
STREAM_DTYPE = torch.float64
#: Largest product of 1/|γ| along the columns that are rebuilt from one anchor. Not float64's 2^52: once the drift flips one
#: float32 rounding of an input of F, an error of 2^-24 enters, and the columns that remain amplify it. On eight nets of 64
#: columns, γ = 0.5, 2^16 gave gradients with 0.5 to 4.3 times plain float32's error; 2^12, and 2^8 alike, 0.6 to 1.5.
ANCHOR_BUDGET = 2.0**12
#: Largest drift, relative to the largest feature of the level, that passes, by the features' dtype. One flipped rounding, 2^-24
#: in float32, may grow to 2^-12 = 2.4e-4 within the budget, more where F amplifies; 1.6e-5 is the largest that a hundred random
#: nets showed. Drifts just below 1e-3, forced by a larger budget, came with gradient errors of 2e-4 to 3e-4, which no training
#: notices; where rebuilding has failed the drift is 0.1 to 1000.
DRIFT_THRESHOLD = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class ReversibilityError(RuntimeError):
    """The features that a backward pass rebuilt are not those of the forward pass: its gradients are wrong."""


def keep_invertible(gamma: Tensor) -> Tensor:
    """γ with |γ| raised to at least :data:`MIN_GAMMA`, its sign kept; a γ of exactly 0 becomes +MIN_GAMMA.

    A function of the parameter, which is never written to: training, evaluation, EMA copies and sharded parameters all see the
    same value. The gradient passes straight through, so that a γ which has fallen below the bound can recover.
    """
    value = gamma.detach()
    bound = torch.where(value < 0, -MIN_GAMMA, MIN_GAMMA).to(value.dtype)
    value = torch.where(value.abs() < MIN_GAMMA, bound, value)
    return value + (gamma - gamma.detach()) if torch.is_grad_enabled() and gamma.requires_grad else value


def couple(f: Tensor, gamma: Tensor, p: Tensor) -> Tensor:
    """Forward: y[l] = F[l](…) + γ[l]·p[l]."""
    return torch.addcmul(f, gamma, p)


def uncouple(y: Tensor, f: Tensor, gamma: Tensor) -> Tensor:
    """Inverse: p[l] = (y[l] − F[l](…)) / γ[l]."""
    return (y - f).div_(gamma)


def run_levels(column: nn.Module, gammas: Iterable[Optional[Tensor]], x: Tensor, p: Optional[Sequence[Tensor]],
               context: Optional[Mapping[str, Any]] = None) -> Tuple[Tensor, ...]:
    """Equation 3 in one precision, for plain autograd and for inference: y[0 … L-1] from x, p and γ."""
    y: List[Tensor] = []
    for index, (level, gamma) in enumerate(zip(column.levels, gammas)):
        f = level(y[-1] if y else x, *(p[j] for j in column.above[index]), **(context or {}))
        y.append(f if column.first else couple(f, gamma, p[index]))
    return tuple(y)


class ReversibleColumn(nn.Module):
    """A column: L levels F[l], their shortcuts' γ[l], and which levels of the column before each F[l] reads.

    Any modules can be levels: ``F[l](below, *above, **context)`` gets y[l-1] (the stem's output for l = 0), the features that
    ``above[l]`` names, and what this call hands to every level (an attention mask, say; nothing by default), and returns a
    tensor of the shape of p[l]. Submodules and parameters are named as in the released
    checkpoints: ``level{l}``, ``alpha{l}`` (= γ[l]).

    Args:
        levels: the L modules F[l].
        gamma_shapes: shape of each γ[l], broadcastable to level l's features.
        above: for each level, the levels of the column before that it reads; every one > l. Ignored in the first column.
        first: the first column has no column before it: no upward path and no shortcut. Its γ stand in the released
            files and have no effect: parameters without gradient.
        gamma_init: initial value of γ. Default: 0.5.
    """

    def __init__(self, levels: Sequence[nn.Module], gamma_shapes: Sequence[Tuple[int, ...]],
                 above: Sequence[Tuple[int, ...]], first: bool = False, gamma_init: float = 0.5) -> None:
        super().__init__()
        for level, sources in enumerate(above):
            if any(j <= level for j in sources):
                raise ValueError(f'above[{level}] = {sources}: a level may read only higher levels of the column before '
                                 'it, or the column cannot be inverted')
        self.first = first
        self.num_levels = len(levels)
        self.gamma_shapes = tuple(map(tuple, gamma_shapes))
        self.above = tuple(() if first else tuple(sources) for sources in above)
        for index, shape in enumerate(gamma_shapes):
            gamma = torch.full(shape, float(gamma_init))
            self.register_parameter(f'alpha{index}', nn.Parameter(gamma, requires_grad=not first))
        for index, level in enumerate(levels):
            self.add_module(f'level{index}', level)
        # Inside a FullyShardedDataParallel forward the parameters are plain attributes, which named_parameters() misses.
        self._level_names = [tuple(name for name, _ in level.named_parameters()) for level in levels]

    @property
    def levels(self) -> List[nn.Module]:
        return [self._modules[f'level{index}'] for index in range(self.num_levels)]

    @property
    def gammas(self) -> List[Tensor]:
        return [getattr(self, f'alpha{index}') for index in range(self.num_levels)]

    def forward(self, x: Tensor, p: Optional[Sequence[Tensor]], call: Optional['ReversibleCall'] = None,
                context: Optional[Mapping[str, Any]] = None) -> Tuple[Tensor, ...]:
        """Features of this column, one per level.

        Args:
            x: the stem's output.
            p: features of the column before; None in the first column.
            call: the state of a reversible pass, which carries its own context (see :func:`run_columns`); None for plain
                autograd.
            context: keyword arguments of every level.
        """
        if call is not None:
            return call.apply(self, x, p)
        gammas = [None] * self.num_levels if self.first else map(keep_invertible, self.gammas)
        return run_levels(self, gammas, x, p, context)

    def level_parameters(self, index: int) -> dict:
        """Name and tensor of every parameter that F[index] uses, wherever a wrapper has put them.

        Each place of a parameter comes once: a module that several others share under one name, a tied parameter under each
        of its own.

        Raises:
            RuntimeError: if a part of the level is sharded by itself, so that its parameters are not at hand here.
        """
        level = self._modules[f'level{index}']
        found = {}
        for prefix, module in level.named_modules():
            if isinstance(module, (FSDPModule, FullyShardedDataParallel)):
                raise RuntimeError(f'level{index}{"." * bool(prefix)}{prefix} is sharded by itself, and a reversible column '
                                   'hands all its parameters to one node of the graph: shard whole columns '
                                   "(strategy.type=RevColFSDPStrategy does; FSDP's mixed precision wraps every BatchNorm by "
                                   'itself), or build the backbone with reversible=False')
            found.update({f'{prefix}.{leaf}' if prefix else leaf: parameter
                          for leaf, parameter in module._parameters.items() if parameter is not None})
        known = set(map(id, found.values()))
        for name in self._level_names[index]:
            if name not in found:
                owner, _, leaf = name.rpartition('.')
                try:
                    value = getattr(level.get_submodule(owner), leaf)
                except AttributeError:  # gone since construction, e.g. folded away
                    continue
                if isinstance(value, Tensor) and id(value) not in known:  # torch.compile's wrapper shows the same ones again
                    found[name] = value
        return found


class ReversibleCall:
    """The state of one reversible forward pass and of its backward pass. Two passes never share one.

    ``stream`` is the float64 stream of the column that the pass has reached, ``features`` its rounding to the working
    precision, ``x`` the stem's output (in the backward pass only), ``grad_stream`` what the shortcuts of the column after it
    have handed down: the stream's gradient, in float64 like the stream, while what F hands down goes through autograd.
    """

    def __init__(self, columns: Sequence[ReversibleColumn], x: Tensor, monitor: 'DriftMonitor',
                 context: Optional[Mapping[str, Any]] = None) -> None:
        device = x.device.type
        if device == 'mps':
            raise RuntimeError('reversible=True carries its additive stream in float64, which the device '
                               f'{x.device} does not have: build the backbone with reversible=False, with_cp=True')
        self.monitor = monitor
        self.context = dict(context or {})
        for name, value in self.context.items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(f'context[{name!r}] requires a gradient, which a reversible pass would lose: only x, p and '
                                 "the columns' parameters get one. Detach it, or use the plain path")
        self.autocast = dict(device_type=device, enabled=torch.is_autocast_enabled(device),
                             dtype=torch.get_autocast_dtype(device), cache_enabled=False)
        self.cuda_devices = [x.device] if device == 'cuda' else []
        self.anchors = place_anchors(columns, ANCHOR_BUDGET)
        self.reached = -1
        self.stream: Optional[List[Tensor]] = None
        self.features: Optional[List[Tensor]] = None
        self.dtypes: List[torch.dtype] = []
        self.x: Optional[Tensor] = None
        self.grad_stream: List[Optional[Tensor]] = []
        self.drifts: List[Tensor] = []

    def apply(self, column: ReversibleColumn, x: Tensor, p: Optional[Sequence[Tensor]]) -> Tuple[Tensor, ...]:
        parameters = [column.level_parameters(index) for index in range(column.num_levels)]
        tensors = [value for level in parameters for value in level.values()]
        names = [tuple(level) for level in parameters]
        return _Column.apply(self, column, names, x, *(p or ()), *([] if column.first else column.gammas), *tensors)

    def record_rng(self) -> tuple:
        return (torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.cuda_devices))

    def replay_rng(self, states: tuple) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self.cuda_devices, states[1:]):
            torch.cuda.set_rng_state(state, device)


class DriftMonitor:
    """Reads the drift of each backward pass, and acts when it is too large.

    Args:
        threshold: largest drift relative to the largest feature of the level; None takes :data:`DRIFT_THRESHOLD` of the
            features' dtype.
        action: 'raise' a :class:`ReversibilityError` (before any optimizer step), or 'warn'.
    """

    def __init__(self, threshold: Optional[float] = None, action: str = 'raise') -> None:
        if action not in ('raise', 'warn'):
            raise ValueError(f"on_drift={action!r}: 'raise' or 'warn'")
        if threshold is not None and not (isinstance(threshold, (int, float)) and threshold > 0):
            raise ValueError(f'drift_threshold={threshold!r}: a positive number, or None for the default of the dtype')
        self.threshold, self.action = threshold, action
        #: Largest relative drift of the last backward pass; nan before the first, and where the features were not finite.
        self.drift = math.nan

    def judge(self, drifts: List[Tensor], dtype: torch.dtype) -> None:
        threshold = self.threshold or DRIFT_THRESHOLD[dtype]
        errors, scales = torch.stack(drifts).unbind(1)
        # One transfer a backward pass. Features that overflowed in the forward pass are the loss scaler's affair.
        relative = torch.where(scales.isfinite(), errors / scales.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        finite, drift = torch.stack([scales.isfinite().all().to(relative.dtype), relative.nan_to_num(math.inf).max()]).tolist()
        self.drift = drift if finite else math.nan
        if drift > threshold:
            message = (f'the features rebuilt in the backward pass differ from those of the forward pass by {drift:.2g} of '
                       f'their largest value (threshold {threshold:.2g}), so the gradients of this step are wrong. Usual '
                       'causes: an F that is not deterministic, parameters changed between forward and backward, or '
                       'features that grow without bound. Train with reversible=False, with_cp=True to compare.')
            if self.action == 'raise':
                raise ReversibilityError(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def place_anchors(columns: Sequence[ReversibleColumn], budget: float) -> set:
    """Indices of the columns whose features must be kept, for the γ of this moment.

    Going back from the last column, column i multiplies an error by up to 1/min|γ|; where the product since the last
    anchor would pass the budget, column i itself becomes an anchor.
    """
    if len(columns) < 2:
        return set()
    gammas, sharded = [], False
    for column in columns[1:]:
        for gamma, shape in zip(column.gammas, column.gamma_shapes):
            sharded |= isinstance(gamma, DTensor) or tuple(gamma.shape) != shape
            local = (gamma.to_local() if isinstance(gamma, DTensor) else gamma).detach()
            gammas.append(local.abs().amin().float() if local.numel() else local.new_tensor(math.inf, dtype=torch.float32))
    smallest = torch.stack(gammas)
    if sharded:  # each process holds a part
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
    smallest = smallest.view(len(columns) - 1, -1).amin(1).clamp_min(MIN_GAMMA).tolist()  # one transfer for all columns
    anchors, product = set(), 1.0
    for index in range(len(columns) - 1, 0, -1):
        factor = max(1.0, 1.0 / smallest[index - 1])
        if product * factor > budget:
            anchors.add(index)
            product = 1.0
        product *= factor
    return anchors


def run_columns(columns: Sequence[ReversibleColumn], x: Tensor, p: Optional[Sequence[Tensor]] = None,
                outputs: Optional[Sequence[Tuple[int, int]]] = None,
                monitor: Optional[DriftMonitor] = None,
                context: Optional[Mapping[str, Any]] = None) -> Tuple[Tensor, ...]:
    """Runs columns so that the backward pass rebuilds their features instead of finding them stored.

    Args:
        columns: the stack, in order.
        x: the stem's output.
        p: features of the (frozen) column before the stack; None if the stack starts with the first column.
        outputs: (column, level) of each feature to return. Default: all levels of the last column. Features of inner
            columns can be outputs as well: their gradients are exact, and they are still not stored. Columns behind the last
            one named do not run.
        monitor: reads the drift.
        context: keyword arguments of every level, in the forward pass and in the recomputation alike, e.g. an attention mask.
            They get no gradients, and must not be changed before the backward pass.

    Returns:
        tuple[Tensor]: the features named by ``outputs``, contiguous.

    Raises:
        ReversibilityError: in the backward pass, if the drift is above the monitor's threshold.
        ValueError: for a tensor in ``context`` that requires a gradient.
        RuntimeError: on a device without float64; in a backward pass with ``create_graph=True``.
    """
    if outputs is None:
        outputs = [(len(columns) - 1, level) for level in range(columns[-1].num_levels)]
    columns = columns[:1 + max(column for column, _ in outputs)]  # the backward pass rebuilds from the last one that runs
    call = ReversibleCall(columns, x, monitor or DriftMonitor(), context)
    taken = {}
    for index, column in enumerate(columns):
        p = column(x, p, call)
        taken.update({(c, level): p[level] for c, level in outputs if c == index})
    return tuple(map(contiguous, _Outputs.apply(call, x, *(taken[key] for key in outputs))))


def contiguous(feature: Tensor) -> Tensor:
    """The feature, contiguous; the gradient of a copy comes back channels-last if the feature was.

    The backward pass of a network in channels-last format runs in the layout of the gradient that it gets. In that of a
    contiguous copy, every block would reorder it.
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


class _Column(torch.autograd.Function):
    """One column as one node of the graph: it stores parameters, and its input features only where they are an anchor."""

    @staticmethod
    def forward(ctx, call: ReversibleCall, column: ReversibleColumn, names: List[tuple], x: Tensor, *tensors: Tensor):
        ctx.set_materialize_grads(False)
        p, gammas, parameters = _split(column, tensors)
        ctx.call, ctx.column, ctx.names = call, column, names
        call.reached = ctx.index = call.reached + 1
        # Features that come from outside the graph (a frozen column) end the backward pass: kept, to compare with.
        ctx.stops = not any(ctx.needs_input_grad[4:4 + len(p)])
        ctx.anchored = bool(p) and (ctx.stops or ctx.index - 1 in call.anchors)
        stream = call.stream if call.stream is not None else [feature.to(STREAM_DTYPE) for feature in p]
        rng: List[Optional[tuple]] = []
        y_stream: List[Tensor] = []
        y: List[Tensor] = []
        after = call.record_rng()
        for index, level in enumerate(column.levels):
            before = after
            with torch.autocast(**call.autocast):
                f = level(y[-1] if y else x, *(p[j] for j in column.above[index]), **call.context)
            after = call.record_rng()
            changed = any(not torch.equal(a, b) for a, b in zip(before, after))
            rng.append(before if changed else None)
            feature_dtype = torch.result_type(f, column.gammas[index])
            if not column.first:
                f = couple(f, keep_invertible(gammas[index]), stream[index])
            y.append(f.to(feature_dtype))
            y_stream.append(f.to(STREAM_DTYPE))
        call.stream, call.dtypes = y_stream, [feature.dtype for feature in y]
        ctx.rng = rng
        # The stream itself, not its rounding: of that, the column before could not be rebuilt.
        kept = (p if ctx.stops else stream) if ctx.anchored else ()
        ctx.save_for_backward(*gammas, *parameters, *kept)
        return tuple(y)

    @staticmethod
    def backward(ctx, *grads: Optional[Tensor]):
        if torch.is_grad_enabled():
            raise RuntimeError('a reversible RevCol cannot be differentiated twice (create_graph=True): build it with '
                               'reversible=False')
        call, column = ctx.call, ctx.column
        levels, coupled = column.num_levels, not column.first
        saved = ctx.saved_tensors
        gammas = saved[:levels] if coupled else ()
        count = sum(len(names) for names in ctx.names)
        parameters = saved[len(gammas):len(gammas) + count]
        anchor = saved[len(gammas) + count:]
        need_x, *needs = ctx.needs_input_grad[3:]
        need_p, need_gamma, need_parameters = _split(column, needs)

        y_stream, y, x = call.stream, call.features, call.x
        grad_y = list(grads)
        grad_x: Optional[Tensor] = None
        grad_p: List[Optional[Tensor]] = [None] * len(need_p)
        grad_gamma: List[Optional[Tensor]] = [None] * len(need_gamma)
        grad_parameters: List[Optional[Tensor]] = [None] * count
        p: List[Optional[Tensor]] = [kept.to(dtype) for kept, dtype in zip(anchor, call.dtypes)] or [None] * levels
        p_stream: List[Optional[Tensor]] = [None] * levels
        end = count
        grad_shortcut: List[Optional[Tensor]] = [None] * levels
        for index in reversed(range(levels)):
            start = end - len(ctx.names[index])
            grad = _add(call.grad_stream[index], grad_y[index])
            if not coupled and grad is None:  # nobody needs this level: it is neither rebuilt nor differentiated
                end = start
                continue
            below = y[index - 1] if index else x
            above = [p[j] for j in column.above[index]]
            wanted = [index > 0 or need_x, *(need_p[j] for j in column.above[index]), *need_parameters[start:end]]
            f, leaves = _recompute(call, column, index, ctx.names[index], ctx.rng[index], [below, *above],
                                   parameters[start:end], wanted if grad is not None else [False] * len(wanted))
            value = f.detach()
            if coupled:
                gamma = keep_invertible(gammas[index]).to(STREAM_DTYPE)
                rebuilt = uncouple(y_stream[index], value, gamma)
                if anchor:
                    call.drifts.append(_deviation(rebuilt, anchor[index]))
                    p_stream[index] = anchor[index].to(STREAM_DTYPE)
                else:
                    p_stream[index] = rebuilt
                    p[index] = rebuilt.to(call.dtypes[index])
            else:
                call.drifts.append(_deviation(y_stream[index], value))
            if grad is not None:
                grad_feature = grad.to(call.dtypes[index])
                results = iter(torch.autograd.grad(f, leaves, grad_feature.to(f.dtype), allow_unused=True) if leaves else ())
                results = [next(results) if want else None for want in wanted]
                if index:
                    grad_y[index - 1] = _add(grad_y[index - 1], results[0])
                else:
                    grad_x = results[0]
                for j, result in zip(column.above[index], results[1:]):
                    grad_p[j] = _add(grad_p[j], result)
                grad_parameters[start:end] = results[1 + len(above):]
                if coupled:
                    if need_p[index]:
                        grad_shortcut[index] = gamma * grad
                    if need_gamma[index]:
                        grad_gamma[index] = (grad_feature * p[index]).sum_to_size(gamma.shape).to(gammas[index].dtype)
            del f, leaves
            end = start

        if ctx.index:
            call.grad_stream = grad_shortcut
        else:  # p came from outside, where there is no stream
            totals = [_add(shortcut, grad) for shortcut, grad in zip(grad_shortcut, grad_p)]
            grad_p = [total if total is None else total.to(dtype) for total, dtype in zip(totals, call.dtypes)]
        ends = not coupled or ctx.stops
        call.stream, call.features = (None, None) if ends else (p_stream, p)
        if ends and call.drifts:
            drifts, call.drifts = call.drifts, []
            call.monitor.judge(drifts, call.dtypes[0])
        return (None, None, None, grad_x, *grad_p, *grad_gamma, *grad_parameters)


class _Outputs(torch.autograd.Function):
    """The end of the stack: the one node whose backward comes first. It stores what the rebuilding starts from."""

    @staticmethod
    def forward(ctx, call: ReversibleCall, x: Tensor, *features: Tensor):
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(x, *call.stream)
        call.stream = None
        # What is contiguous becomes an output of the network as it is: copies, that it may be changed in place.
        return tuple(feature.clone() if feature.is_contiguous() else feature for feature in features)

    @staticmethod
    def backward(ctx, *grads: Optional[Tensor]):
        call = ctx.call
        call.x, *call.stream = ctx.saved_tensors
        call.features = [stream.to(dtype) for stream, dtype in zip(call.stream, call.dtypes)]
        call.grad_stream, call.drifts = [None] * len(call.stream), []
        return (None, None, *grads)


def _split(column: ReversibleColumn, items: Sequence) -> tuple:
    """(p, γ, the levels' parameters) out of the flat inputs of :class:`_Column`."""
    levels = 0 if column.first else column.num_levels
    return items[:levels], items[levels:2 * levels], items[2 * levels:]


def _recompute(call: ReversibleCall, column: ReversibleColumn, index: int, names: tuple, rng: Optional[tuple],
               inputs: List[Tensor], parameters: Sequence[Tensor], wanted: Sequence[bool]) -> tuple:
    """F[index] once more, with the random numbers and autocast state of the forward pass.

    Parameters stand in as detached leaves, so that their hooks fire once, for the gradient that this node returns; buffers as
    copies, so that running statistics are updated once.

    Returns:
        tuple: F's output, and the leaves that want a gradient.
    """
    level = column._modules[f'level{index}']
    tensors = [tensor.detach().requires_grad_(want) for tensor, want in zip([*inputs, *parameters], wanted)]
    buffers = {name: buffer.clone() for name, buffer in level.named_buffers()}
    stand_ins = {**buffers, **dict(zip(names, tensors[len(inputs):]))}
    with torch.random.fork_rng(call.cuda_devices, enabled=rng is not None):
        if rng is not None:
            call.replay_rng(rng)
        with torch.set_grad_enabled(any(wanted)), torch.autocast(**call.autocast):
            f = functional_call(level, stand_ins, tuple(tensors[:len(inputs)]), call.context, tie_weights=False)
    return f, [tensor for tensor, want in zip(tensors, wanted) if want]


def _deviation(rebuilt: Tensor, reference: Tensor) -> Tensor:
    """(largest difference, largest reference value), as float32 on the device."""
    if not reference.numel():  # an empty batch
        return torch.zeros(2, device=reference.device)
    return torch.stack([(rebuilt - reference).abs().amax().float(), reference.abs().amax().float()])


def _add(total: Optional[Tensor], term: Optional[Tensor]) -> Optional[Tensor]:
    return term if total is None else total if term is None else total + term
