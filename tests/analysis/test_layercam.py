# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""LayerCAM: the formula on an ordinary net, and features that a score can be differentiated by."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import batched_nms
from torch import nn

from revcol_mm.analysis import layercam as module
from revcol_mm.analysis.features import record_features
from revcol_mm.analysis.layercam import _segmentor_score, _to_picture, _to_pixels, find_class, layercam
from revcol_mm.models import RevCol, RevColC2f, RevColViT
from tests.common import small_arch


def test_the_map_is_that_of_the_definition_on_an_ordinary_net():
    """Against loops over positions and channels, and a gradient by hand: GAP and a linear layer behind one convolution."""
    convolution, linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, 4)
    image, label = torch.randn(1, 3, 6, 7), 2
    activation = convolution(image)
    hidden = F.softplus(activation)
    score = linear(hidden.mean((2, 3)))[0, label]
    gradient, = torch.autograd.grad(score, activation)
    found = layercam(activation.detach(), gradient)
    # d score / d A = w · sigmoid(A) / (H·W), because softplus' = sigmoid
    for i in range(6):
        for j in range(7):
            total = 0.
            for channel in range(5):
                a = activation[0, channel, i, j].item()
                weight = linear.weight[label, channel].item() / 42 / (1 + torch.tensor(-a).exp().item())
                total += max(weight, 0) * a
            assert found[0, i, j].item() == pytest.approx(max(total, 0), abs=1e-7)
    assert (found > 0).any() and (found == 0).any()


#: LayerCAM of pytorch-grad-cam 1.5.5, divided by its largest value, of class 1 of the net below; half of it is rectified.
GRAD_CAM = [[0., 0., 0., 0., 0.12531, 0.61731, 0.45275],
            [0., 0., 0., 0., 0.57953, 0.99973, 0.605],
            [0., 0., 0., 0.21631, 0.99017, 0.62451, 0.04282],
            [0., 0., 0., 0.84689, 0.87587, 0., 0.],
            [0., 0., 0.578, 1., 0.27088, 0., 0.],
            [0., 0., 0.63871, 0.63099, 0., 0., 0.]]


def test_the_map_is_that_of_pytorch_grad_cam():
    convolution, linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, 4)
    with torch.no_grad():
        for parameter in (*convolution.parameters(), *linear.parameters()):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).mul(7.3).sin().view_as(parameter))
    activation = convolution(torch.linspace(0, 40, 3 * 6 * 7).mul(3.1).sin().view(1, 3, 6, 7))
    score = linear(F.softplus(activation).mean((2, 3)))[0, 1]
    found = layercam(activation.detach(), *torch.autograd.grad(score, activation))[0]
    assert (found / found.max()).tolist() == [pytest.approx(row, abs=1e-5) for row in GRAD_CAM]


def test_tokens_give_the_map_that_their_grid_gives():
    activation, gradient = torch.randn(2, 2, 5, 3, 4).unbind()
    tokens = [value.flatten(2).transpose(1, 2) for value in (activation, gradient)]
    assert torch.equal(layercam(*tokens, channels=2).view(2, 3, 4), layercam(activation, gradient))


NETS = dict(RevCol=lambda: RevCol(small_arch(), layer_scale_init_value=1.0, frozen_stages=1),
            RevColViT=lambda: RevColViT(dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=2, num_columns=3), img_size=32),
            RevColC2f=lambda: RevColC2f(dict(channels=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_columns=3)))


@pytest.mark.parametrize('kind', NETS)
def test_one_backward_pass_gives_the_gradients_by_all_features(kind):
    """The change of the score along each gradient, against finite differences in float64."""
    net = NETS[kind]().double().eval().requires_grad_(False)
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)

    def score():
        return sum((feature.sin() * torch.linspace(-1, 2, feature.numel(), dtype=feature.dtype).view_as(feature)).sum()
                   for feature in net(image))

    with record_features(net) as features:
        value = score()
    assert sorted(features) == [(column, level) for column in range(3) for level in range(4)]
    gradients = dict(zip(features, torch.autograd.grad(value, list(features.values()))))
    for column, level in [(0, 0), (0, 3), (1, 1), (2, 2), (2, 3)]:
        direction = torch.randn_like(features[column, level])
        values = []
        for step in (1e-5, -1e-5):
            # The level's output is changed where it is made: by the shortcut's end, in a column that adds one.
            with _shifted(net.columns[column], level, step * direction):
                values.append(score().item())
        expected = (values[0] - values[1]) / 2e-5
        assert (gradients[column, level] * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


class _shifted:
    """Adds a constant to F[level] of a column, and so to its feature y[level] = F[level] + γ·p."""

    def __init__(self, column, level, shift):
        self.module, self.shift = column.levels[level], shift

    def __enter__(self):
        self.handle = self.module.register_forward_hook(lambda module, args, output: output + self.shift)

    def __exit__(self, *args):
        self.handle.remove()


def test_no_hook_is_left_behind():
    net = NETS['RevCol']().eval()
    with record_features(net) as features:
        net(torch.randn(1, 3, 32, 32))
    first = dict(features)
    net(torch.randn(1, 3, 32, 32))
    assert all(features[key] is first[key] for key in first) and not any(column._forward_hooks for column in net.columns)


def test_a_class_has_a_name_or_a_number():
    assert find_class(None, ('cat', 'dog')) is None
    assert find_class('dog', ('cat', 'dog')) == find_class('1', ('cat', 'dog')) == find_class('1', None) == 1
    for name, classes in (('horse', ('cat', 'dog')), ('2', ('cat', 'dog')), ('-1', ('cat', 'dog')), ('cat', None)):
        with pytest.raises(ValueError, match=f'the class must be .* but got {name!r}'):
            find_class(name, classes)


def test_a_name_of_two_classes_is_refused_with_their_numbers():
    classes = ('crane', 'maillot', 'crane', '0')
    with pytest.raises(ValueError, match="the class must be one, but got 'crane', the name of 2: .* numbers, 0, 2$"):
        find_class('crane', classes)
    assert find_class('maillot', classes) == 1
    assert [find_class(str(number), classes) for number in range(4)] == [0, 1, 2, 3]
    assert find_class('0', ('1', '0')) == 1  # without repetition a name goes before a number


class Segmentor(nn.Module):
    """Stands in for a segmentor, whose logits are given."""
    decode_head = SimpleNamespace(threshold=0.5)

    def encode_decode(self, images, metas):
        return images


SAMPLES = [SimpleNamespace(metainfo=dict(img_shape=(2, 2)))]  # the third column is padding


def test_padding_counts_neither_for_the_class_of_a_segmentor_nor_for_its_score():
    logits = torch.tensor([[[[2., 2., 0.], [1., 0., 0.]], [[0., 0., 9.], [0., 1., 9.]]]])
    score, label, _ = _segmentor_score(Segmentor(), logits, SAMPLES, None, None, None)
    assert label == 0 and score.item() == pytest.approx((2 + 2 + 1) / 3)


def test_a_segmentor_with_one_channel_has_two_classes():
    logits = torch.tensor([[[[2., -1., 9.], [4., 3., 9.]]]])
    for label, expected in ((None, (2 + 4 + 3) / 3), (1, (2 + 4 + 3) / 3), (0, 1.)):
        score, found, _ = _segmentor_score(Segmentor(), logits, SAMPLES, label, None, None)
        assert found == (1 if label is None else label) and score.item() == pytest.approx(expected)


@pytest.mark.parametrize('size', [(75, 64), (32, 100)])
def test_a_map_lies_over_the_pixels_that_its_positions_stand_for(size):
    """A level whose map is 1 everywhere: 1 where its positions see the image, 0 where a strided convolution drops the rest."""
    images = torch.zeros(1, 3, *size)
    for level in range(4):
        cells = [length // (4 * 2**level) for length in size]
        found = _to_pixels(torch.ones(1, *cells), level, None, images, images[0])
        seen = [count * 4 * 2**level for count in cells]
        assert found.shape == size and found[:seen[0], :seen[1]].min() == 1
        assert found[seen[0]:].max(initial=0) == 0 and found[:, seen[1]:].max(initial=0) == 0
    tokens = torch.eye(5 * 7)[8].view(1, -1)  # 16 pixels each: row 1, column 1 of 5 × 7
    found = _to_pixels(tokens, 0, SimpleNamespace(patch_size=16), torch.zeros(1, 3, 75, 100), torch.zeros(3, 75, 100))
    assert (found > 0.9).nonzero()[0].mean() == (found > 0.9).nonzero()[1].mean() == 23.5


@pytest.mark.parametrize('channels, dtype', [(3, torch.uint16), (1, torch.uint8), (4, torch.float32)])
def test_the_picture_of_other_pixels_is_eight_bits(channels, dtype):
    pixels = (1000 * torch.rand(channels, 5, 6) if dtype != torch.uint8 else 200 * torch.rand(channels, 5, 6)).to(dtype)
    picture = _to_picture(pixels)
    assert picture.shape == (5, 6, 3) and picture.dtype == np.uint8 and picture.max() > 100


def test_soft_nms_passes_the_gradient_to_the_scores_and_keeps_their_values():
    boxes = torch.tensor([[0., 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40]])
    scores = torch.tensor([0.9, 0.8, 0.7], requires_grad=True)
    settings = dict(type='soft_nms', iou_threshold=0.3, min_score=0.01)
    expected, kept = batched_nms(boxes, scores.detach(), torch.zeros(3), settings)
    with module._differentiable_soft_nms():
        found, again = batched_nms(boxes, scores, torch.zeros(3), settings)
    assert torch.equal(kept, again) and torch.allclose(found, expected, rtol=1e-6, atol=0)
    gradient, = torch.autograd.grad(found[:, 4].sum(), scores)
    assert gradient[kept].tolist() == pytest.approx((expected[:, 4] / scores[kept]).tolist()) and gradient.min() < 0.5
