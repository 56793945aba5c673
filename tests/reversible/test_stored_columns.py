# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Reversible training in which the last columns keep their activations: the gradients of plain autograd, in constant memory."""
import copy
import statistics

import pytest
import torch

from revcol_mm.models import RevCol, RevColC2f, RevColTransformerEncoder, RevColViT
from revcol_mm.reversible import ReversibilityError
from tests.common import CHANNELS, gradients_of, live_bytes, small_arch, worst_error

COLUMNS = 5
ARCH = dict(channels=(32, 48, 64, 96), depths=(1, 1, 1, 1), num_columns=COLUMNS)
TOLERANCE = 1e-5  # as for columns that are all rebuilt: float32's own error
NETS = dict(
    revcol=lambda **kwargs: RevCol(ARCH, drop_path_rate=0.3, layer_scale_init_value=0.5, **kwargs),
    huge=lambda **kwargs: RevCol(dict(ARCH, deep_to_shallow=True), layer_scale_init_value=0.5, **kwargs),
    vit=lambda **kwargs: RevColViT(dict(embed_dims=32, depths=(1, 1, 1, 1), num_heads=2, num_columns=COLUMNS), img_size=64,
                                   patch_size=8, drop_path_rate=0.3, **kwargs),
    # In float64, because batch statistics of 2 × 2 × 2 values make float32's own error large.
    c2f=lambda **kwargs: RevColC2f(dict(channels=CHANNELS, depths=(1, 1, 1, 1), num_columns=COLUMNS), **kwargs).double())


def step(net, image, autocast=None, **kwargs):
    """Gradients of the parameters and the image, and the buffers, after one step with the random numbers of seed 3."""
    net = copy.deepcopy(net).train()
    image = image.to(next(net.parameters()).dtype, copy=True).requires_grad_()
    torch.manual_seed(3)
    with torch.autocast('cpu', autocast, enabled=autocast is not None):
        features = net(image, **kwargs)
    generator = torch.Generator().manual_seed(4)
    sum((feature * torch.randn(feature.shape, generator=generator)).sum() for feature in features).backward()
    return dict(gradients_of(net), image=image.grad), dict(net.named_buffers()), net


def both_ways(name, stored, image=None, autocast=None, outputs=None, **kwargs):
    torch.manual_seed(0)
    plain = NETS[name](**kwargs)
    reversible = NETS[name](reversible=True, stored_columns=stored, **kwargs)
    reversible.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 64, 64) if image is None else image
    extra = {} if outputs is None else dict(outputs=outputs)
    return [step(net, image, autocast, **extra) for net in (reversible, plain)]


class TestExact:

    @pytest.mark.parametrize('stored', [1, 3, COLUMNS, COLUMNS + 1])  # 0 is what all other tests of the engine use
    @pytest.mark.parametrize('name', NETS)
    def test_gradients_are_those_of_plain_autograd(self, name, stored):
        (ours, buffers, net), (plain, expected, _) = both_ways(name, stored)
        assert worst_error(ours, plain) <= TOLERANCE
        for key, value in expected.items():  # running statistics, updated once
            torch.testing.assert_close(buffers[key], value, rtol=1e-5, atol=1e-7)
        assert net.monitor.measured == (stored < COLUMNS)

    @pytest.mark.parametrize('stored', [1, 2, 3])
    def test_the_context_of_the_levels_reaches_all_columns(self, stored):
        results = []
        for reversible in (True, False):
            torch.manual_seed(0)
            net = RevColTransformerEncoder(16, 2, 32, num_columns=3, dropout=0.3, reversible=reversible, stored_columns=stored)
            x = torch.randn(2, 7, 16, requires_grad=True)
            mask = torch.zeros(2, 7, dtype=torch.bool)
            mask[0, 4:] = True
            torch.manual_seed(1)
            encoded = net.train()(x, src_key_padding_mask=mask)[~mask]
            (encoded * torch.randn(encoded.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
            results.append(dict(gradients_of(net), x=x.grad))
        assert worst_error(*results) <= TOLERANCE

    @pytest.mark.parametrize('stored', [1, 3])
    @pytest.mark.parametrize('outputs', [
        [(0, 3), (1, 0), (3, 2), (4, 3)], [(1, 3), (2, 0)], [(3, 1), (3, 0), (3, 1)], [(4, 0)]])
    def test_outputs_of_columns_on_either_side_of_the_join(self, outputs, stored):
        (ours, _, _), (plain, _, _) = both_ways('revcol', stored, outputs=outputs)
        assert worst_error(ours, plain) <= TOLERANCE

    @pytest.mark.parametrize('stored', [1, 3, 4])
    @pytest.mark.parametrize('frozen_stages', [0, 1, 3])
    def test_frozen_columns(self, frozen_stages, stored):
        results = []
        for reversible in (True, False):
            torch.manual_seed(0)
            net = RevCol(ARCH, layer_scale_init_value=0.5, frozen_stages=frozen_stages, reversible=reversible,
                         stored_columns=stored).train()
            sum(feature.square().sum() for feature in net(torch.randn(2, 3, 64, 64))).backward()
            results.append(gradients_of(net))
        assert worst_error(*results) <= TOLERANCE

    @pytest.mark.parametrize('stored', [1, 3])
    def test_under_autocast_the_error_is_that_of_plain_autocast(self, stored):
        image = torch.randn(2, 3, 64, 64)
        (ours, _, _), (plain, _, net) = both_ways('huge', stored, image, torch.bfloat16)
        exact, _, _ = step(net.zero_grad() or net, image)
        assert worst_error(ours, exact) <= 1.1 * worst_error(plain, exact)

    def test_checkpointed_stored_columns(self):
        net = NETS['revcol'](reversible=True, stored_columns=2)
        image = torch.randn(2, 3, 64, 64)
        expected = step(net, image)[0]
        net.with_cp = True
        assert worst_error(step(net, image)[0], expected) == 0

    def test_the_rebuilt_columns_are_checked(self):
        net = RevCol(ARCH, reversible=True, stored_columns=2).train()
        loss = sum(feature.sum() for feature in net(torch.randn(1, 3, 64, 64)))
        with torch.no_grad():
            net.subnet1.alpha0.add_(0.1)
        with pytest.raises((ReversibilityError, RuntimeError), match='differ|modified by an inplace operation'):
            loss.backward()

    def test_without_gradients_and_without_reversible_nothing_changes(self):
        net = RevCol(ARCH, stored_columns=2)
        image = torch.randn(1, 3, 64, 64)
        features = net(image)
        net.reversible = True
        assert all(map(torch.equal, net.eval()(image), features))
        assert not net.monitor.measured


class TestConstantMemory:

    @staticmethod
    def measure(num_columns, stored):
        """(bytes kept between forward and backward, bytes at the peak) of a step; ``stored`` is None for plain training."""
        sizes = RevCol.ARCHS['tiny']
        with torch.device('meta'):  # initialising the columns takes longer than their step
            net = RevCol(dict(sizes, num_columns=num_columns), reversible=stored is not None, stored_columns=stored or 0)
        net.to_empty(device='cpu').train()
        for name, parameter in net.named_parameters():
            parameter.data.fill_(0.5 if 'alpha' in name else 0.01)
            parameter.grad = torch.zeros_like(parameter)
        image = torch.randn(1, 3, 112, 112)
        return live_bytes(lambda: sum(feature.sum() for feature in net(image)), lambda loss: loss.backward())

    @pytest.mark.slow
    @pytest.mark.parametrize('stored', [1, 2])
    def test_memory_does_not_grow_with_the_columns(self, stored):
        plain, ours = ({count: self.measure(count, k) for count in counts}
                       for k, counts in ((None, (4, 8)), (stored, (4, 8, 16, 32))))
        for index, what in enumerate(('between forward and backward', 'at the peak')):
            slopes = [statistics.linear_regression(list(points), [bytes_[index] for bytes_ in points.values()]).slope
                      for points in (ours, plain)]
            assert slopes[1] > 2**20, what  # a column's activations: the measurement sees them
            assert abs(slopes[0] / slopes[1]) <= 0.01, what

    @pytest.mark.slow
    def test_each_stored_column_costs_the_activations_of_a_plain_one(self):
        plain = self.measure(8, None)[0] - self.measure(7, None)[0]
        kept = [self.measure(8, stored)[0] for stored in (1, 2, 3)]
        assert all(abs((more - less) / plain - 1) <= 0.01 for less, more in zip(kept, kept[1:]))


@pytest.mark.parametrize('stored', [-1, 1.5, True, None, '2'])
def test_a_wrong_number_of_stored_columns_is_named(stored):
    with pytest.raises(ValueError, match=f'stored_columns must be a number of columns, 0 or more, but got {stored!r}'):
        RevCol(small_arch(), reversible=True, stored_columns=stored)


def test_checkpointing_needs_stored_columns():
    with pytest.raises(ValueError, match='unless stored_columns is at least 1'):
        RevCol(small_arch(), reversible=True, with_cp=True)
