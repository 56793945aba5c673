# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What the tests of several folders share: paths, a small architecture, gradients, the tools as modules, narrow models."""
import contextlib
import functools
import gc
import importlib.util
import io
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Iterable

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from revcol_mm.utils.flops import Cost, count

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'
DATA = ROOT / 'tests' / 'data'

#: Widths of a network that runs in milliseconds.
CHANNELS = (8, 16, 24, 32)

#: What holds a number of channels in a model's config.
WIDTHS = ('channels', 'in_channels', 'out_channels', 'feat_channels', 'conv_out_channels', 'fc_out_channels', 'embed_dims',
          'feedforward_channels', 'num_feats')
SHRINK, COLUMNS = 8, 4  # intermediate supervision wants columns in fours


def small_arch(num_columns: int = 3, **changes) -> dict:
    """An ``arch`` of RevCol whose level 2 has two blocks, so that a block which is not the first of its level is there too."""
    return dict(dict(channels=CHANNELS, depths=(1, 1, 2, 1), num_columns=num_columns), **changes)


def gradients_of(net: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the gradients, by the parameter's name; without those parameters that have none."""
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}


def worst_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest relative error in the Euclidean norm of two equally named sets of tensors."""
    assert set(actual) == set(expected)
    errors = [(actual[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-30) for name in expected]
    return torch.stack(errors).max().item()  # nan if any is, which Python's max may drop


def live_bytes(forward: Callable[[], Any], backward: Callable[[Any], Any]) -> tuple[int, int]:
    """Bytes that torch's CPU allocator hands out for a step and holds, by its own account.

    Args:
        forward (Callable): the forward pass.
        backward (Callable): the backward pass; gets what the forward pass returned.

    Returns:
        tuple[int, int]: bytes held between the two passes, and at the peak. What lived before does not count.
    """
    gc.collect()  # what earlier tests have left would count as freed
    gc.disable()  # and would decide when the collector runs
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = forward()
            gc.collect()
            with record_function('between the passes'):
                pass
            backward(result)
    finally:
        gc.enable()
    held = peak = between = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
        elif event.name() == 'between the passes':
            between = held
    return between, peak


def mostly_slow(cases: Iterable, quick: Iterable) -> list:
    """Parameters of a test, of which ``make test`` runs the quick ones, and ``make test-slow`` the others.

    Args:
        cases (Iterable): values, or tuples of them.
        quick (Iterable): the cases, or their first values, that run every time.
    """
    quick = tuple(quick)
    marked = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case, )
        often = case in quick or values[0] in quick
        marked.append(pytest.param(*values, marks=[] if often else [pytest.mark.slow]))
    return marked


def load_tool(name: str) -> ModuleType:
    """``tools/{name}.py`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """``tools/{name}.py`` with these arguments, run in this process, from the root of the checkout."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            load_tool(name).main(list(arguments))
        except SystemExit as end:  # as the interpreter does with it
            code = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
    return subprocess.CompletedProcess([name, *arguments], code, out.getvalue(), err.getvalue())


def build_optimizer(model: nn.Module, optimizer: dict | None = None, **paramwise) -> OptimWrapper:
    """AdamW, or what ``optimizer`` changes of it, whose parameter groups come from our constructor."""
    optimizer = dict(dict(type='AdamW', lr=0.1, weight_decay=0.05), **(optimizer or {}))
    return build_optim_wrapper(model, dict(
        type='OptimWrapper', optimizer=optimizer, constructor='LayerDecayOptimWrapperConstructor', paramwise_cfg=paramwise))


def parameter_groups(wrapper: OptimWrapper) -> dict[str, dict]:
    """{parameter's name: its group}."""
    return {name: group for group in wrapper.optimizer.param_groups for name in group['param_names']}


def load_config(name: str) -> Config:
    return Config.fromfile(CONFIGS / f'{name}.py')


@functools.cache
def count_config(name: str) -> dict[str, Cost]:
    """Parameters and multiply-adds of a config, which is counted once: several tests ask for the same ones."""
    return count(load_config(name))


def narrow(cfg: Config) -> Config:
    """The one rule: an eighth of every width, and four columns; kernels, blocks, paths and heads as they are.

    Attention has fewer heads where the narrow width is no multiple of their number. DINO has an eighth of its queries, and
    Mask2Former compares masks at a 64th of its points, which is where their steps spend their time.
    DINO's transformer keeps its width: mmdet's position encoding of the decoder is written for 256 channels.
    """
    model = cfg.model
    backbone = MODELS.get(model.backbone.type)
    if isinstance(model.backbone.arch, str):
        name = backbone.ALIASES.get(model.backbone.arch, model.backbone.arch)
        model.backbone.arch = {key: value for key, value in backbone.ARCHS[name].items()}
    arch = model.backbone.arch
    if 'num_columns' in arch:
        arch.num_columns = min(arch.num_columns, COLUMNS)
    if 'num_heads' in arch:
        arch.num_heads = math.gcd(arch.num_heads, arch.embed_dims // SHRINK)
    if model.type == 'DINO':
        model.num_queries //= SHRINK
        divide_widths(model.backbone)
        model.neck.in_channels = [width // SHRINK for width in model.neck.in_channels]
    else:
        divide_widths(model)
    points = (model.get('decode_head') or {}).get('train_cfg') or {}
    if 'num_points' in points:
        points.num_points //= SHRINK ** 2
    return cfg


def divide_widths(node: dict | Iterable) -> None:
    for key, value in node.items() if isinstance(node, dict) else ():
        if key in WIDTHS:
            node[key] = [width // SHRINK for width in value] if isinstance(value, (list, tuple)) else value // SHRINK
        divide_widths(value)
    for item in node if isinstance(node, list) else ():
        divide_widths(item)
