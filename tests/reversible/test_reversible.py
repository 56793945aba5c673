# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Reversible training: the gradients of plain autograd, with nothing stored."""
import copy
import io
import math
import statistics
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from revcol_mm.models import RevCol, RevColC2f
from revcol_mm.models.layers import ConvNeXtBlock
from revcol_mm.reversible import MIN_GAMMA, ReversibilityError, ReversibleColumn, place_anchors, run_reversibly
from revcol_mm.reversible.autograd import fetch_smallest_gammas
from tests.common import gradients_of, live_bytes, mostly_slow, small_arch, worst_error

NARROW = small_arch(4)
#: Where float32 itself is measured: LayerNorm over 8 channels is too noisy a net for that.
WIDER = dict(NARROW, channels=(32, 48, 64, 96), depths=(1, 1, 1, 1))
#: Relative error in the Euclidean norm of the worst parameter. Plain float32 gradients themselves are off by about 1e-6 to
#: 1e-5 from float64 ones at 4 to 32 columns.
TOLERANCE = 1e-5


def build(arch=NARROW, gamma=0.5, layer_scale=False, seed=0, **kwargs) -> RevCol:
    """A net in training mode; ``gamma`` is a value, or 'random' for values from [1e-3, 2] with random signs; with
    ``layer_scale`` that of the blocks is drawn from [0.1, 1], so that F matters."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = RevCol(arch, **kwargs).train()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            draw = torch.rand(parameter.shape, generator=generator)
            if 'alpha' in name and gamma == 'random':
                sign = torch.where(torch.rand(parameter.shape, generator=generator) < 0.5, -1., 1.)
                parameter.copy_((1e-3 + (2 - 1e-3) * draw) * sign)
            elif 'alpha' in name:
                parameter.fill_(gamma)
            elif name.endswith('.gamma') and layer_scale:
                parameter.copy_(0.1 + 0.9 * draw)
    return net


def loss_weights(net, image):
    """Random weights of each output, scaled so that every level counts alike."""
    with torch.no_grad():
        features = net.eval()(image)
    net.train()
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(feature.shape, generator=generator) / feature.std() for feature in features]


def gradients(net, image, weights, reversible, dtype=torch.float32, autocast=None) -> dict:
    """Gradient of every parameter and of the image ('image') for loss Σ feature·weight."""
    net = copy.deepcopy(net).to(dtype)
    net.reversible = reversible
    image = image.to(dtype, copy=True).requires_grad_()
    with torch.autocast('cpu', autocast, enabled=autocast is not None):
        features = net(image)
    sum((feature * weight.to(feature.dtype)).sum() for feature, weight in zip(features, weights)).backward()
    return dict(double_gradients_of(net), image=image.grad.double())


def double_gradients_of(net) -> dict:
    return {name: gradient.double() for name, gradient in gradients_of(net).items()}


def both_ways(net, step) -> list:
    """What ``step(net)`` returns with reversible training and with plain autograd, each on a copy of its own."""
    results = []
    for reversible in (True, False):
        ours = copy.deepcopy(net)
        ours.reversible = reversible
        results.append(step(ours))
    return results


def compare(net, image, **kwargs) -> float:
    weights = loss_weights(net, image)
    return worst_error(gradients(net, image, weights, True, **kwargs), gradients(net, image, weights, False, **kwargs))


class TestExact:

    @pytest.mark.parametrize('layer_scale', [False, True])
    @pytest.mark.parametrize('gamma', [0.5, 'random', 1e-3])
    @pytest.mark.parametrize('columns', [4, 8, 16, 32])
    def test_gradients_are_those_of_plain_autograd(self, columns, gamma, layer_scale):
        net = build(dict(WIDER, num_columns=columns), gamma, layer_scale)
        assert compare(net, torch.randn(2, 3, 64, 64)) <= TOLERANCE

    @pytest.mark.parametrize('seed', [0, 5, 11])
    @pytest.mark.parametrize('columns', [16, 32])
    def test_where_nothing_is_a_power_of_two(self, columns, seed):
        # Division by 0.5 rounds nothing, and at most random γ the next column is an anchor: here twelve are rebuilt in a row.
        net = build(dict(WIDER, num_columns=columns), 0.51, layer_scale=True, seed=seed)
        image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        assert compare(net, image) <= TOLERANCE

    @pytest.mark.parametrize('arch, gamma', mostly_slow(
        [('tiny', 'random'), ('small', 'random'), ('base', 'random'), ('base', 0.51)], ['tiny']))
    def test_gradients_are_those_of_plain_autograd_at_real_widths(self, arch, gamma):
        assert compare(build(arch, gamma, layer_scale=True), torch.randn(1, 3, 64, 96)) <= TOLERANCE

    @pytest.mark.slow
    def test_at_64_columns_the_error_is_that_of_float32_itself(self):
        ours, plain = [], []
        for seed in range(8):
            net = build(dict(WIDER, num_columns=64), 0.5, seed % 2 == 0, seed)
            image = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(100 + seed))
            weights = loss_weights(net, image)
            exact = gradients(net, image, weights, False, torch.float64)
            ours.append(worst_error(gradients(net, image, weights, True), exact))
            plain.append(worst_error(gradients(net, image, weights, False), exact))
        assert sum(ours) <= 1.5 * sum(plain)
        # The worst of 3,000 tensors of a single net is noisy on both sides: of 16 nets one gave 1.8, the others 0.6 to 1.5.
        assert all(a <= 2.5 * b for a, b in zip(ours, plain))

    @pytest.mark.parametrize('columns', [4, 16])
    def test_the_first_steps_of_a_training_from_scratch_on_padded_images(self, columns):
        # Warm-up moves the zero biases by 1e-8, and some γ to the float32 number next to 0.5. Where the image is padded,
        # LayerNorm then amplifies by up to 1000 what differs by one rounding.
        net = build(dict(WIDER, num_columns=columns))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if 'alpha' in name or name.endswith('bias'):
                    parameter += 2e-8 * torch.where(torch.rand(parameter.shape, generator=generator) < 0.5, -1., 1.)
        image = torch.randn(1, 3, 96, 128, generator=generator)
        image[..., 72:, :] = 0
        weights = loss_weights(net, image)
        net.reversible = True
        sum((feature * weight).sum() for feature, weight in zip(net(image), weights)).backward()
        assert net.drift <= 1e-5
        assert compare(net, image) <= TOLERANCE

    def test_under_autocast_the_error_is_that_of_plain_autocast(self):
        net = build(dict(WIDER, num_columns=8), 0.5, layer_scale=True)
        image = torch.randn(2, 3, 64, 64)
        weights = loss_weights(net, image)
        exact = gradients(net, image, weights, False)
        ours = worst_error(gradients(net, image, weights, True, autocast=torch.bfloat16), exact)
        plain = worst_error(gradients(net, image, weights, False, autocast=torch.bfloat16), exact)
        assert ours <= 1.1 * plain

    def test_under_autocast_gradients_are_those_of_autograd_through_the_same_stream(self):
        net = build(dict(WIDER, num_columns=8), 0.5, layer_scale=True)
        image = torch.randn(2, 3, 64, 64)
        weights = loss_weights(net, image)
        ours = gradients(net, image, weights, True, autocast=torch.bfloat16)
        stored = copy.deepcopy(net)
        leaf = image.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16):
            x = stored.stem(leaf.contiguous(memory_format=torch.channels_last)).float()
            p = stream = None
            for column in stored.columns:  # equation 3 with γ·p + F in float64 and every F on its rounding
                y, y_stream = [], []
                for index, level in enumerate(column.levels):
                    f = level(y[-1] if y else x, *(p[j] for j in column.above[index]))
                    s = f.double() if stream is None else f.double() + column.gammas[index].double() * stream[index]
                    y_stream.append(s)
                    y.append(s.float())
                p, stream = y, y_stream
        sum((feature * weight).sum() for feature, weight in zip(p, weights)).backward()
        expected = double_gradients_of(stored)
        # The features are the same to the bit. What is left: gradients summed in float64 there, in float32 here, and rounded to
        # bfloat16 inside of F.
        assert worst_error(ours, dict(expected, image=leaf.grad.double())) <= 1e-3

    @pytest.mark.parametrize('budget, expected', [(2.**12, set()), (2.**3, {1, 4}), (2., {1, 2, 3, 4, 5, 6})])
    def test_anchors_bound_the_amplification_between_them(self, budget, expected):
        net = build(dict(NARROW, num_columns=8))
        assert place_anchors(fetch_smallest_gammas(net.columns)(), budget) == expected

    def test_anchors_follow_the_smallest_gamma_of_the_present_step(self):
        columns = build(dict(NARROW, num_columns=4)).columns
        with torch.no_grad():
            columns[2].gammas[1].view(-1)[3] = -0.25
            columns[3].gammas[0].zero_()
        assert fetch_smallest_gammas(columns)() == pytest.approx([0.5, 0.25, MIN_GAMMA])
        assert fetch_smallest_gammas(columns[:1])() == []

    def test_all_processes_of_a_sharded_network_ask_each_other(self, monkeypatch):
        # One process may hold a whole γ of one dimension, which looks as if it were not sharded, and the others nothing of it.
        asked = []
        monkeypatch.setattr('torch.distributed.all_reduce', lambda values, op: asked.append(values))
        for gamma in (torch.full((5, ), 0.25), torch.empty(0)):
            column = SimpleNamespace(gammas=[gamma], gamma_shapes=[(5, )], _fsdp_wrapped_module=None)
            fetch_smallest_gammas([column] * 3)
        assert [values.tolist() for values in asked] == [[0.25] * 2, [math.inf] * 2]
        with pytest.raises(NotImplementedError):  # values of the meta device cannot be read
            fetch_smallest_gammas([column] * 3, torch.device('meta'))
        assert asked[-1].device.type == 'meta'  # where the columns compute, though γ is on the CPU

    def test_a_pass_without_anchors_is_refused_and_the_same_pass_with_them_is_exact(self, monkeypatch):
        net = build(dict(NARROW, num_columns=32), 0.5, layer_scale=True, reversible=True)
        image = torch.randn(2, 3, 64, 64)
        monkeypatch.setattr('revcol_mm.reversible.autograd.place_anchors', lambda smallest, budget: set())
        with pytest.raises(ReversibilityError, match='differ'):
            sum(feature.sum() for feature in net(image)).backward()
        assert net.drift > 1e-2
        monkeypatch.undo()
        sum(feature.sum() for feature in net(image)).backward()
        assert net.drift < 1e-4

    def test_the_extra_path_of_huge_is_exact(self):
        assert compare(build(dict(NARROW, deep_to_shallow=True), 'random', layer_scale=True),
                       torch.randn(2, 3, 65, 47)) <= TOLERANCE


class TestConstantMemory:

    @staticmethod
    def measure(arch, num_columns, reversible):
        """(bytes kept between forward and backward, bytes at the peak) of a step; parameters and their gradients aside."""
        sizes = RevCol.ARCHS[arch]
        with torch.device('meta'):  # initialising 32 columns takes longer than their step
            net = RevCol(dict(sizes, num_columns=num_columns), reversible=reversible)
        net.to_empty(device='cpu').train()
        for name, parameter in net.named_parameters():
            parameter.data.fill_(0.5 if 'alpha' in name else 0.01)
            parameter.grad = torch.zeros_like(parameter)
        image = torch.randn(1, 3, 64, 64)
        return live_bytes(lambda: sum(feature.sum() for feature in net(image)), lambda loss: loss.backward())

    @pytest.mark.parametrize('arch,counts', mostly_slow(  # S has T's widths and depths
        [('tiny', (4, 16)), ('tiny', (4, 8, 16, 32)), ('base', (4, 8, 16, 32))], [('tiny', (4, 16))]))
    def test_memory_does_not_grow_with_the_columns(self, arch, counts):
        # A plain step is linear in the columns to the byte, so that two points give its slope.
        plain, ours = ({count: self.measure(arch, count, reversible) for count in numbers}
                       for reversible, numbers in ((False, (4, 6)), (True, counts)))
        for index, what in enumerate(('between forward and backward', 'at the peak')):
            slopes = [statistics.linear_regression(list(points), [bytes_[index] for bytes_ in points.values()]).slope
                      for points in (ours, plain)]
            assert slopes[1] > 2**20, what  # a column's activations: the measurement sees them
            assert abs(slopes[0] / slopes[1]) <= 0.01, what


class _Drop(nn.Module):
    """A level with BatchNorm and dropout: random, and with a state."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, below, *above):
        return nn.functional.dropout(self.norm(self.linear(below + sum(above))), 0.5, self.training)


class TestComplete:

    def test_drop_path_is_replayed(self):
        net = build(drop_path_rate=0.5, layer_scale=True)
        image = torch.randn(4, 3, 64, 64)
        weights = loss_weights(net, image)

        def step(reversible):
            torch.manual_seed(5)
            return gradients(net, image, weights, reversible), torch.rand(1)

        (ours, after), (plain, expected_after) = step(True), step(False)
        assert worst_error(ours, plain) <= TOLERANCE
        assert torch.equal(after, expected_after), 'replaying must not disturb the random numbers that follow'

    def test_the_backward_pass_runs_in_the_modes_of_the_forward_pass(self):
        net = build(drop_path_rate=0.5)  # with LayerScale 1e-6, so that the drift would not show another mode
        image = torch.randn(4, 3, 64, 64)
        weights = loss_weights(net, image)

        def step(net):
            torch.manual_seed(5)
            loss = sum((feature * weight).sum() for feature, weight in zip(net(image), weights))
            net.eval()
            loss.backward()
            assert not any(part.training for part in net.modules())
            return gradients_of(net)

        assert worst_error(*both_ways(net, step)) <= TOLERANCE

    @pytest.mark.parametrize('inverse', [True, False])
    def test_parametrized_weights_are_trained_and_not_replaced(self, inverse):
        class Adapted(nn.Module):  # a weight and a product of two small matrices, as LoRA has it
            def __init__(self, weight):
                super().__init__()
                self.a = nn.Parameter(torch.randn(len(weight), 2) / 4)
                self.b = nn.Parameter(torch.randn(2, weight[0].numel()) / 4)

            def forward(self, weight):
                return weight + (self.a @ self.b).view_as(weight)

            if inverse:
                def right_inverse(self, weight):
                    return weight

        net = build(layer_scale=True)
        convolution = net.columns[1].levels[2].fusion.down[0]
        parametrize.register_parametrization(convolution, 'weight', Adapted(convolution.weight))
        image = torch.randn(1, 3, 64, 64)
        weights = loss_weights(net, image)
        before = {name: value.clone() for name, value in net.state_dict().items()}

        def step(net):
            sum((feature * weight).sum() for feature, weight in zip(net(image), weights)).backward()
            assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
            return gradients_of(net)

        ours, plain = both_ways(net, step)
        assert any('parametrizations.weight.0.a' in name for name in ours)
        assert worst_error(ours, plain) <= TOLERANCE

    def test_frozen_columns_below_an_image_with_a_gradient_compute_alike_in_both_passes(self):
        net = build(dict(WIDER, num_columns=8), frozen_stages=7, layer_scale=True, reversible=True)
        image = torch.randn(1, 3, 64, 64, requires_grad=True)
        sum(feature.square().sum() for feature in net(image)).backward()
        assert net.drift <= 1e-6

    def test_cudnn_does_not_choose_an_algorithm_in_each_pass(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
        seen = []

        class Level(nn.Module):
            def forward(self, below, *above):
                seen.append(torch.backends.cudnn.benchmark)
                return below + sum(above)

        columns = [ReversibleColumn([Level(), Level()], [(1, 4, 1, 1)] * 2, [(1, ), ()], first) for first in (True, False)]
        x = torch.randn(1, 4, 2, 2, requires_grad=True)
        sum(feature.sum() for feature in run_reversibly(columns, x)).backward()
        assert seen == [False] * 8 and torch.backends.cudnn.benchmark

    @pytest.mark.parametrize('rate, kept', [(0., False), (0.5, True)])
    def test_random_state_is_kept_only_where_something_is_random(self, rate, kept):
        net = build(drop_path_rate=rate, reversible=True)
        features = net(torch.randn(1, 3, 64, 64))
        node = features[0].grad_fn
        while not hasattr(node, 'random'):  # back to the last column's
            node = node.next_functions[-1][0]
        assert any(state is not None for state in node.random) == kept

    def test_dropout_is_replayed_and_batch_norm_updated_once(self):

        def step(reversible):
            torch.manual_seed(0)
            columns = [ReversibleColumn([_Drop(4), _Drop(4)], [(1, 4, 1, 1)] * 2, [(1, ), ()], first=index == 0)
                       for index in range(3)]
            x = torch.randn(2, 4, 8, 8, requires_grad=True)
            torch.manual_seed(1)
            if reversible:
                y = run_reversibly(columns, x)
            else:
                y = None
                for column in columns:
                    y = column(x, y)
            sum(feature.square().sum() for feature in y).backward()
            network = nn.ModuleList(columns)
            return dict(gradients_of(network), x=x.grad), network.state_dict()

        results = [step(True), step(False)]
        # A convolution's bias before BatchNorm has no gradient but rounding noise.
        keys = [key for key in results[1][0] if not key.endswith('linear.bias')]
        assert worst_error(*({key: grads[key] for key in keys} for grads, _ in results)) <= TOLERANCE
        for name, value in results[1][1].items():
            assert torch.allclose(results[0][1][name], value, rtol=1e-5, atol=1e-7), name

    @pytest.mark.parametrize('frozen_stages', [0, 1, 3])
    def test_frozen_columns(self, frozen_stages):
        net = build(frozen_stages=frozen_stages, layer_scale=True)
        image = torch.randn(2, 3, 64, 64)
        weights = loss_weights(net, image)

        def step(net):
            sum((feature * weight).sum() for feature, weight in zip(net(image), weights)).backward()
            return gradients_of(net), net.drift

        (ours, drift), (plain, _) = both_ways(net, step)
        assert worst_error(ours, plain) <= TOLERANCE
        assert drift < 1e-6, 'the features of the last frozen column must be compared with the rebuilt ones'

    @pytest.mark.parametrize('reversible', [True, False])
    @pytest.mark.parametrize('frozen_stages', [0, 2, 4])
    def test_frozen_columns_pass_the_gradient_of_the_image(self, frozen_stages, reversible):
        net = build(layer_scale=True)
        image = torch.randn(2, 3, 64, 64)
        weights = loss_weights(net, image)
        expected = gradients(net, image, weights, False)['image']
        net.frozen_stages = frozen_stages
        net.train()
        actual = gradients(net, image, weights, reversible)
        assert not any(name.startswith('stem') for name in actual)
        assert worst_error(dict(image=actual['image']), dict(image=expected)) <= TOLERANCE

    def test_frozen_parameters(self):
        net = build(layer_scale=True)
        net.subnet2.level1.requires_grad_(False)
        net.subnet1.alpha2.requires_grad_(False)
        assert compare(net, torch.randn(2, 3, 64, 64)) <= TOLERANCE

    def test_an_image_without_gradient(self):
        net = build(reversible=True)
        sum(feature.sum() for feature in net(torch.randn(1, 3, 64, 64))).backward()
        assert net.stem[0].weight.grad is not None

    @pytest.mark.parametrize('used', [(0, ), (2, ), (3, ), (0, 2)])
    def test_only_some_outputs_in_the_loss(self, used):
        net = build(layer_scale=True)
        image = torch.randn(2, 3, 64, 64)

        def step(net):
            features = dict(zip(net.out_indices, net(image)))
            sum(features[index].square().sum() for index in used).backward()
            return {name: gradient for name, gradient in gradients_of(net).items() if gradient.abs().max() > 0}

        expected = both_ways(net, step)[1]
        for out_indices in (used, (0, 1, 2, 3)):
            net.out_indices = out_indices
            for actual in both_ways(net, step):
                assert worst_error(actual, expected) <= TOLERANCE

    def test_inner_outputs_alone(self):
        net = build(layer_scale=True)
        image = torch.randn(2, 3, 64, 64)

        def step(net):
            inner, _ = net(image, outputs=[(1, 3), (3, 3)])
            wanted = [net.stem[0].weight, net.subnet1.level3.blocks[0].dwconv.weight]
            return dict(enumerate(torch.autograd.grad(inner.square().sum(), wanted)))

        assert worst_error(*both_ways(net, step)) <= TOLERANCE

    @pytest.mark.parametrize('outputs', [[(0, 0)], [(2, 3)], [(1, 2), (2, 0)]])
    def test_later_columns_that_are_not_asked_for_do_not_run(self, outputs):
        image = torch.randn(2, 3, 64, 64)

        def step(net):
            runs = [0] * net.num_columns

            def count(index):
                runs[index] += 1

            for index, column in enumerate(net.columns):
                for block in column.level0.blocks:
                    block.register_forward_hook(lambda *_, index=index: count(index))
            loss = sum(feature.square().sum() for feature in net(image, outputs=outputs))
            forward = list(runs)
            loss.backward()
            return gradients_of(net), forward, runs

        last = max(column for column, _ in outputs)
        asked = [int(index <= last) for index in range(4)]
        (ours, *our_runs), (plain, *plain_runs) = both_ways(build(layer_scale=True), step)
        assert worst_error(ours, plain) <= TOLERANCE
        assert plain_runs == [asked, asked]
        assert our_runs == [asked, [2 * runs for runs in asked]]  # once more in the backward pass
        assert not any(name.startswith('subnet3') for name in ours)

    def test_autograd_grad(self):
        net = build(layer_scale=True)
        image = torch.randn(2, 3, 64, 64)

        def step(net):
            wanted = [net.subnet3.level0.blocks[0].gamma, net.subnet2.alpha1]
            loss = sum(feature.square().sum() for feature in net(image))
            result = dict(enumerate(torch.autograd.grad(loss, wanted)))
            assert not gradients_of(net)
            return result

        assert worst_error(*both_ways(net, step)) <= TOLERANCE

    def test_gradient_accumulation_and_loss_scaling(self):

        def step(net):
            scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
            for seed in (0, 1):
                image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
                scaler.scale(sum(feature.square().mean() for feature in net(image))).backward()
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
            scaler.unscale_(optimizer)
            return gradients_of(net)

        assert worst_error(*both_ways(build(layer_scale=True), step)) <= TOLERANCE

    def test_overflow_is_left_to_the_loss_scaler(self):
        net = build(reversible=True)
        sum(feature.sum() for feature in net(torch.full((1, 3, 64, 64), math.inf))).backward()
        assert math.isnan(net.drift)

    def test_two_forwards_before_one_backward(self):
        images = [torch.randn(2, 3, 64, 64) for _ in range(2)]

        def step(net):
            losses = [sum(feature.square().sum() for feature in net(image)) for image in images]
            losses[0].backward()
            losses[1].backward()
            return gradients_of(net)

        assert worst_error(*both_ways(build(layer_scale=True), step)) <= TOLERANCE

    def test_a_second_backward_is_right_when_retained_and_refused_when_not(self):
        net = build(layer_scale=True, reversible=True)
        loss = sum(feature.square().sum() for feature in net(torch.randn(1, 3, 64, 64)))
        loss.backward(retain_graph=True)
        once = gradients_of(net)
        loss.backward()
        assert all(torch.equal(gradient, 2 * once[name]) for name, gradient in gradients_of(net).items())
        with pytest.raises(RuntimeError, match='second time'):
            loss.backward()

    def test_double_backward_is_refused(self):
        net = build(reversible=True)
        loss = sum(feature.sum() for feature in net(torch.randn(1, 3, 64, 64)))
        with pytest.raises(RuntimeError, match='reversible=False'):
            torch.autograd.grad(loss, net.stem[0].weight, create_graph=True)

    def test_no_grad_and_eval_take_the_plain_path(self):
        net, plain = build(reversible=True), build()
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(net(image), plain(image)))
        net.eval(), plain.eval()
        image.requires_grad_()
        grads = [torch.autograd.grad(sum(feature.sum() for feature in module(image)), image)[0] for module in (net, plain)]
        assert torch.equal(*grads)

    def test_parameter_hooks_fire_once(self):
        net = build(reversible=True)
        calls = []
        net.subnet2.level1.blocks[0].pwconv1.weight.register_hook(lambda grad: calls.append('tensor') or 3 * grad)
        net.subnet2.level1.blocks[0].pwconv1.weight.register_post_accumulate_grad_hook(lambda _: calls.append('accumulated'))
        plain = build()
        image = torch.randn(1, 3, 64, 64)
        for module in (net, plain):
            sum(feature.square().sum() for feature in module(image)).backward()
        assert calls == ['tensor', 'accumulated']
        ours, theirs = (module.subnet2.level1.blocks[0].pwconv1.weight.grad for module in (net, plain))
        assert torch.allclose(ours, 3 * theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())

    @pytest.mark.slow
    def test_a_compiled_network_trains_reversibly(self):
        net = build(gamma=0.5, layer_scale=True)
        image = torch.randn(1, 3, 64, 64)
        weights = loss_weights(net, image)
        expected = gradients(net, image, weights, False)
        net.reversible = True
        features = torch.compile(net, backend='eager')(image)
        sum((feature * weight).sum() for feature, weight in zip(features, weights)).backward()
        actual = double_gradients_of(net)
        assert worst_error(dict(actual, image=expected['image']), expected) <= TOLERANCE

    @pytest.mark.parametrize('part', mostly_slow(['levels', 'levels in place', 'blocks', 'columns'], ['blocks']))
    def test_compiled_parts_train_reversibly(self, part):
        """torch.compile's wrapper shows every parameter under two names."""
        net = build(gamma=0.5, layer_scale=True)
        image = torch.randn(1, 3, 64, 64)
        weights = loss_weights(net, image)
        expected = gradients(net, image, weights, False)
        net.reversible = True
        parameters = list(net.parameters())
        if part == 'levels in place':
            for level in [level for column in net.columns for level in column.levels]:
                level.compile(backend='eager')
        wrapped = dict(
            columns=[(net, 'subnet1')], levels=[(column, f'level{index}') for column in net.columns for index in range(4)],
            blocks=[(column.level2.blocks, '0') for column in net.columns])
        for owner, name in wrapped.get(part, ()):
            setattr(owner, name, torch.compile(getattr(owner, name), backend='eager'))
        sum((feature * weight).sum() for feature, weight in zip(net(image), weights)).backward()
        actual = {name.replace('_orig_mod.', ''): grad for name, grad in double_gradients_of(net).items()}
        assert worst_error(dict(actual, image=expected['image']), expected) <= TOLERANCE
        assert all(one is other for one, other in zip(parameters, net.parameters()))

    @pytest.mark.parametrize('shared', ['module', 'parameter'])
    def test_shared_modules_and_tied_parameters(self, shared):
        net = build(layer_scale=True)
        for column in net.columns:
            first, second = column.level2.blocks
            if shared == 'module':
                second.pwconv1 = first.pwconv1
            else:
                second.pwconv1.weight = first.pwconv1.weight
        assert compare(net, torch.randn(2, 3, 64, 64)) <= TOLERANCE

    def test_an_empty_batch(self):
        net = build(reversible=True)
        sum(feature.sum() for feature in net(torch.randn(0, 3, 64, 64))).backward()
        assert net.stem[0].weight.grad.abs().max() == 0

    def test_copies_train_on_their_own(self):
        net = build(reversible=True)
        image = torch.randn(1, 3, 64, 64)
        loss = sum(feature.sum() for feature in net(image))
        twin = copy.deepcopy(net)
        sum(feature.sum() for feature in twin(image)).backward()
        assert all(parameter.grad is None for parameter in net.parameters())
        loss.backward()
        assert torch.equal(net.stem[0].weight.grad, twin.stem[0].weight.grad)

    def test_a_parameter_changed_before_the_backward_pass_is_refused(self):
        net = build(reversible=True)
        loss = sum(feature.sum() for feature in net(torch.randn(1, 3, 64, 64)))
        with torch.no_grad():
            net.subnet2.level0.blocks[0].pwconv1.weight.add_(1.)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            loss.backward()

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
    def test_a_model_of_another_dtype(self, dtype):
        net = build(WIDER, layer_scale=True, reversible=True)
        image = torch.randn(1, 3, 64, 64)
        weights = loss_weights(net, image)
        exact = gradients(net, image, weights, False, dtype=torch.float64)
        plain, ours = (worst_error(gradients(net, image, weights, reversible, dtype=dtype), exact)
                       for reversible in (False, True))
        assert ours <= max(1.5 * plain, 1e-12), 'no worse than plain autograd in this precision'
        net.to(dtype)
        features = net(image.to(dtype))
        assert all(feature.dtype == dtype for feature in features)
        sum(feature.float().sum() for feature in features).backward()
        assert net.drift < 1e-6

    def test_outputs_have_the_dtype_of_the_plain_path(self):
        image = torch.randn(1, 3, 64, 64)
        with torch.autocast('cpu', torch.bfloat16):
            for ours, plain in zip(build(reversible=True)(image), build()(image)):
                assert ours.dtype == plain.dtype and ours.is_contiguous()

    @pytest.mark.parametrize('reversible', [False, True])
    def test_gradients_run_through_the_blocks_in_the_layout_of_the_features(self, reversible):
        net = build(reversible=reversible)
        found = []

        def watch(module, args, output):
            if output.requires_grad:
                output.register_hook(lambda grad: found.append(grad.is_contiguous(memory_format=torch.channels_last)))

        for module in net.modules():
            if isinstance(module, ConvNeXtBlock):
                module.register_forward_hook(watch)
        sum(feature.sum() for feature in net(torch.randn(2, 3, 64, 64))).backward()
        assert len(found) == sum(net.depths) * net.num_columns and all(found)

    # Plain C2f columns are left out: their contiguous outputs feed the next level, and autograd refuses to have them changed.
    @pytest.mark.parametrize('kind, reversible', [(RevCol, False), (RevCol, True), (RevColC2f, True)])
    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
    @pytest.mark.parametrize('size', [64, 32])  # at 32, level 3 is 1×1: both layouts at once
    def test_outputs_may_be_changed_in_place(self, kind, size, dtype, reversible):
        torch.manual_seed(0)
        net = kind(dict(NARROW, num_columns=2), reversible=reversible).to(dtype).train()
        image, results = torch.randn(2, 3, size, size, dtype=dtype), []
        for inplace in (True, False):
            net.zero_grad()
            sum(nn.functional.relu(feature, inplace=inplace).sum() for feature in net(image)).backward()
            results.append(gradients_of(net))
        assert worst_error(*results) <= TOLERANCE

    def test_a_network_can_be_traced_with_gradients(self):
        net, image, file = build().eval(), torch.randn(1, 3, 64, 64), io.BytesIO()
        torch.jit.save(torch.jit.trace(net, image, check_trace=False), file)  # the check compares mangled class names
        file.seek(0)
        for traced, plain in zip(torch.jit.load(file)(image), net(image)):
            torch.testing.assert_close(traced, plain)


class _Fickle(nn.Module):
    """An F that is not the same the second time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls = 0

    def forward(self, below, *above):
        self.calls += 1
        return (below + sum(above)) * self.weight + 0.1 * self.calls


class TestSelfChecking:

    @pytest.mark.parametrize('position', [0, 1, 2])
    def test_wrong_features_raise(self, position):
        columns = [ReversibleColumn([_Fickle() if index == position else nn.Conv2d(4, 4, 1)], [(1, 4, 1, 1)], [()],
                                    first=index == 0) for index in range(3)]
        y, = run_reversibly(columns, torch.randn(1, 4, 8, 8, requires_grad=True))
        with pytest.raises(ReversibilityError, match='threshold'):
            y.sum().backward()

    def test_wrong_features_below_a_frozen_column_raise(self):
        frozen = ReversibleColumn([nn.Conv2d(4, 4, 1)], [(1, 4, 1, 1)], [()], first=True).requires_grad_(False)
        x = torch.randn(1, 4, 8, 8)
        y, = run_reversibly([ReversibleColumn([_Fickle()], [(1, 4, 1, 1)], [()])], x, frozen(x, None))
        with pytest.raises(ReversibilityError):
            y.sum().backward()

    @pytest.mark.parametrize('options, warns', [(dict(on_drift='warn'), True), (dict(drift_threshold=1e9), False)])
    def test_warns_where_asked_and_lets_a_large_threshold_pass(self, options, warns):
        net = build(dict(NARROW, num_columns=32), reversible=True, **options)
        fickle = net.subnet0.level3.blocks[0]
        original, calls = fickle.forward, []
        fickle.forward = lambda x: original(x) * (1 + len(calls) + 0 * (calls.append(1) or 0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            sum(feature.sum() for feature in net(torch.randn(1, 3, 64, 64))).backward()
        assert any('gradients of this step are wrong' in str(w.message) for w in caught) == warns
        assert net.drift > 0.1
