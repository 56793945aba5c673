# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The bytes of a step: counted without memory, they are those of a real step on the CPU, by torch's own accounts."""
import copy
import gc
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from revcol_mm.models import RevCol, RevColViT
from revcol_mm.utils.memory import LiveBytes, count_step, without_memory
from tests.common import ROOT, live_bytes, mostly_slow, small_arch

WAYS = dict(plain={}, checkpointed=dict(with_cp=True), reversible=dict(reversible=True),
            stored=dict(reversible=True, stored_columns=2))
NETS = dict(tiny=(RevCol, 'tiny'), small=(RevCol, 'small'), base=(RevCol, 'base'), vit=(RevColViT, 'small'))
#: Between the passes torch.utils.checkpoint keeps the state of the CPU's generator for every column.
RANDOM_STATE = 5056


def build(kind, arch, **options):
    """A network with values that are none, because initialising takes longer than a step."""
    with torch.device('meta'):
        net = kind(arch, **options).train()
    net.to_empty(device='cpu')
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        tensor.data.fill_(0.5 if 'alpha' in name else 0.01)
    return net


def counted_without_memory(net, shape, **kwargs):
    with without_memory(net) as copied:
        return count_step(copied, torch.empty(shape), **kwargs)


def backward(output):
    torch.autograd.backward(output, [torch.ones_like(feature) for feature in output])


@pytest.mark.parametrize('name,way', mostly_slow(
    [(name, way) for name in NETS for way in WAYS], [('tiny', 'reversible')]))
def test_the_count_without_memory_is_the_allocators_account_of_a_real_step(name, way):
    net = build(*NETS[name], **WAYS[way])
    image = torch.randn(1, 3, 96, 64)
    counted = counted_without_memory(net, image.shape)
    kept, peak = live_bytes(lambda: net(image), backward)
    assert counted.kept == kept - (RANDOM_STATE * net.num_columns if way == 'checkpointed' else 0)
    # The kernels' own workspaces are in the allocator's peak; that of the CPU's attention is 3.3 % here, others are below 2 %.
    assert 0.96 * peak <= counted.peak_with_gradients <= peak
    net.zero_grad(set_to_none=True)
    assert count_step(net, image) == counted


@pytest.mark.parametrize('way', ['plain', 'reversible', 'stored'])
def test_what_is_kept_is_what_the_graph_saves_and_the_output(way):
    net, image = build(RevCol, small_arch(4), **WAYS[way]), torch.randn(1, 3, 64, 64)
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor.detach()

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = net(image)
    for feature in output:
        keep(feature)
    own = {tensor.untyped_storage()._cdata for tensor in net.parameters()}
    expected = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in own)
    assert counted_without_memory(net, image.shape).kept == expected


@pytest.mark.slow
def test_anchors_are_counted():
    """With γ = 0.5 and a budget of 2^12, twelve columns can be rebuilt from one stream, and the first one needs none."""
    without, with_one = (build(RevCol, small_arch(count, depths=(1, 1, 1, 1)), reversible=True) for count in (13, 14))
    counted = counted_without_memory(with_one, (1, 3, 64, 64))
    assert counted == count_step(with_one, torch.randn(1, 3, 64, 64))
    stream = 8 * sum(channels * (16 // 2**level)**2 for level, channels in enumerate(with_one.channels))
    assert counted.kept - counted_without_memory(without, (1, 3, 64, 64)).kept == stream


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_mixed_precision_keeps_what_autocast_on_cuda_keeps(dtype):
    """The reference runs CUDA's own autocast, on tensors that say they are on a GPU and have no storage."""
    with torch.device('meta'):
        net = RevCol(small_arch()).train()
    counted = counted_without_memory(net, (2, 3, 64, 64), autocast=dtype)
    with FakeTensorMode(), mock.patch('torch.cuda.amp.common.amp_definitely_not_available', lambda: False), \
            mock.patch('torch.cuda.is_bf16_supported', lambda *args, **kwargs: True):
        memo = {id(parameter): nn.Parameter(torch.empty(parameter.shape, device='cuda'), parameter.requires_grad)
                for parameter in net.parameters()}
        copied, image = copy.deepcopy(net, memo), torch.empty(2, 3, 64, 64, device='cuda')
        with LiveBytes([*copied.parameters(), image]) as live:
            with torch.autocast('cuda', dtype):
                output = copied(image)
            gc.collect()
            kept = live.now
    assert output[0].device.type == 'cuda' and counted.kept == kept
    assert counted.kept < counted_without_memory(net, (2, 3, 64, 64)).kept


def test_recomputation_under_mixed_precision_runs_by_the_same_rules():
    """torch.utils.checkpoint compares dtypes; reversible training would count too little."""
    with torch.device('meta'):
        net = RevCol(small_arch(), with_cp=True).train()
    counted_without_memory(net, (2, 3, 64, 64), autocast=torch.float16)


def test_a_tensor_of_a_parameters_shape_counts_and_a_view_does_not():
    linear = nn.Linear(16, 16, bias=False)
    x = torch.randn(16, 16)
    step = count_step(linear, x, forward=lambda x: linear(x).view(-1)[:4].exp())
    assert step.kept == 4 * 4  # the four exponentials; the product is used up, and x and the weight do not count
    assert step.peak >= 16 * 16 * 4


def test_processes_can_be_forked_after_counting():
    code = """if True:
        import os
        import torch
        from revcol_mm.models import RevCol
        from revcol_mm.utils.memory import count_step, without_memory
        with torch.device('meta'):
            net = RevCol(dict(channels=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_columns=1))
        with without_memory(net) as counted:
            count_step(counted, torch.empty(1, 3, 32, 32))
        child = os.fork()
        if not child:
            torch.ones((), requires_grad=True).backward()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_counting_changes_neither_the_model_nor_the_engine():
    from revcol_mm.reversible import autograd
    net, fetch = build(RevCol, small_arch(), reversible=True), autograd.fetch_smallest_gammas
    parameters = list(net.parameters())
    counted_without_memory(net, (1, 3, 64, 64))
    assert autograd.fetch_smallest_gammas is fetch
    assert all(new is old and old.grad is None and not old.is_meta for new, old in zip(net.parameters(), parameters))
    assert torch.nn.functional.layer_norm.__module__ == 'torch.nn.functional'


@pytest.mark.slow
def test_a_huge_network_is_counted_without_its_memory():
    """2 billion parameters are 8 GiB, which no test could have."""
    with torch.device('meta'):
        net = RevCol('huge', reversible=True).train()
    counted = counted_without_memory(net, (1, 3, 640, 640))
    # Kept by hand: the stem's output in float32, the last column's stream in float64 and its features in float32.
    features = sum(channels * (160 // 2**level)**2 for level, channels in enumerate(net.channels))
    assert counted.kept == pytest.approx(4 * 360 * 160**2 + (8 + 4) * features, rel=0.2)
