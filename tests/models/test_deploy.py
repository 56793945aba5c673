# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RevCol folded for inference, and exported to ONNX."""
import copy

import pytest
import torch
from mmengine.runner.checkpoint import _load_checkpoint_to_model

from revcol_mm.checkpoint import CheckpointError, load_pretrained
from revcol_mm.models import RevCol
from tests.common import small_arch

ARCH = small_arch()
HUGE = dict(ARCH, deep_to_shallow=True)


def make_net(arch=ARCH, **options) -> RevCol:
    """A net in which everything that is folded counts: LayerScale, norms and biases far from their initial values."""
    net = RevCol(arch, drop_path_rate=0.2, layer_scale_init_value=1.0, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif parameter.dim() == 2 or parameter.shape[-1] < 4:
                parameter.mul_(8)
        net.subnet1.alpha0.view(-1)[:3] = torch.tensor([0., -1e-5, 1e-5])  # below what the inverse allows
    return net


def largest_deviation(outputs, expected) -> float:
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize('arch', [ARCH, HUGE])
@torch.no_grad()
def test_folded_net_computes_the_same_function(arch):
    net, images = make_net(arch).eval(), torch.randn(2, 3, 97, 70)
    expected = net(images)
    net.switch_to_deploy()
    outputs = net(images)
    assert largest_deviation(outputs, expected) < 1e-5
    assert all(output.is_contiguous() for output in outputs)


@torch.no_grad()
def test_folding_is_exact_but_for_rounding():
    net, images = make_net().double().eval(), torch.randn(1, 3, 64, 64, dtype=torch.double)
    expected = net(images)
    net.switch_to_deploy()
    assert largest_deviation(net(images), expected) < 1e-13


def test_folded_net_has_no_layer_scale_and_constant_shortcuts():
    net = make_net()
    before = net.state_dict()
    net.switch_to_deploy()
    names = set(net.state_dict())
    gone = set(before) - names
    assert {name.rpartition('.')[2] for name in gone if 'blocks' in name} == {'gamma', 'weight', 'bias'}
    assert all(name.endswith('.gamma') or '.norm.' in name or name.startswith('subnet0.alpha') for name in gone)
    assert names - set(before) == {'deployed'}
    assert not any('alpha' in name for name, _ in net.named_parameters())
    torch.testing.assert_close(net.subnet1.alpha0.view(-1)[:3], torch.tensor([1e-3, -1e-3, 1e-3]))


def test_folding_twice_changes_nothing():
    net = make_net()
    net.switch_to_deploy()
    once = copy.deepcopy(net.state_dict())
    net.switch_to_deploy()
    torch.testing.assert_close(net.state_dict(), once, rtol=0, atol=0)


def test_folded_net_refuses_training():
    net = make_net(reversible=True)
    net.switch_to_deploy()
    assert not net.training
    with pytest.raises(RuntimeError, match='cannot be trained'):
        torch.nn.Sequential(net).train()
    assert not any(output.requires_grad for output in net(torch.randn(1, 3, 64, 64)))


def test_folding_refuses_half_precision():
    with pytest.raises(ValueError, match='fold first'):
        make_net().half().switch_to_deploy()


def test_folded_weights_load_into_a_folded_net():
    net, other, images = make_net(), make_net(), torch.randn(1, 3, 64, 64)
    net.switch_to_deploy()
    other.switch_to_deploy()
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other(images), net(images), rtol=0, atol=0)


@pytest.mark.parametrize('folded_net', [True, False])
@pytest.mark.parametrize('strict', [True, False])
def test_folded_and_unfolded_weights_are_never_mixed(folded_net, strict):
    net, other = make_net(), make_net()
    (net if folded_net else other).switch_to_deploy()
    untouched = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match='folded'):
        net.load_state_dict(other.state_dict(), strict=strict)
    torch.testing.assert_close(net.state_dict(), untouched, rtol=0, atol=0)


def test_mmengine_refuses_to_mix_them_too():
    detector, folded = torch.nn.Module(), make_net()
    detector.backbone = make_net()
    folded.switch_to_deploy()
    with pytest.raises(RuntimeError, match='folded'):
        _load_checkpoint_to_model(detector, {'state_dict': {f'backbone.{k}': v for k, v in folded.state_dict().items()}})


def test_pretrained_weights_must_be_unfolded(tmp_path):
    folded = make_net()
    folded.switch_to_deploy()
    torch.save(folded.state_dict(), tmp_path / 'folded.pth')
    with pytest.raises(CheckpointError, match='give the checkpoint that it was folded from'):
        load_pretrained(make_net(), str(tmp_path / 'folded.pth'))


def test_a_folded_net_takes_no_pretrained_weights(tmp_path):
    folded = make_net()
    torch.save(folded.state_dict(), tmp_path / 'unfolded.pth')
    folded.switch_to_deploy()
    with pytest.raises(CheckpointError, match='load it first, then fold'):
        load_pretrained(folded, str(tmp_path / 'unfolded.pth'))
