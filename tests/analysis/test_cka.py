# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""CKA in minibatches, against the plain formula."""
import math

import pytest
import torch

from revcol_mm.analysis.cka import MinibatchCKA


def hsic(k: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741
    """The estimator as Song et al. write it (their equation 5)."""
    n, one = len(k), torch.ones(len(k), dtype=k.dtype)
    k, l = (m - m.diag().diag() for m in (k, l))  # noqa: E741
    return ((k @ l).trace() + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)) / (
        n * (n - 3))


def plain_cka(x: torch.Tensor, y: torch.Tensor, block: int) -> float:
    terms = []
    for start in range(0, len(x) - block + 1, block):
        k, l = (z[start:start + block].flatten(1).double() for z in (x, y))  # noqa: E741
        k, l = k @ k.T, l @ l.T  # noqa: E741
        terms.append((hsic(k, l), hsic(k, k), hsic(l, l)))
    kl, kk, ll = (sum(term) for term in zip(*terms))
    return (kl / (kk * ll).sqrt()).item()


def measured(features: dict, block: int, batch: int) -> dict:
    cka = MinibatchCKA(block)
    for start in range(0, len(next(iter(features.values()))), batch):
        cka.add({name: value[start:start + batch] for name, value in features.items()})
    return cka.similarities()


@pytest.fixture
def features():
    x = torch.randn(100, 6, 5, 5) + 3  # a mean that a sloppy sum would feel
    y = x.mean((2, 3)) @ torch.randn(6, 4) + 0.3 * torch.randn(100, 4)
    return dict(x=x, y=y, labels=(y[:, :1] > y[:, :1].mean()).float())


@pytest.mark.parametrize('block', [100, 25, 30])  # one block; four; three, and ten images that are left over
def test_the_similarities_are_those_of_the_plain_formula_whatever_the_batch(features, block):
    expected = {(a, b): plain_cka(features[a], features[b], block) for a in features for b in features}
    for batch in (1, 7, 32, 100):
        found = measured(features, block, batch)
        assert found == pytest.approx(expected, abs=1e-6)
    assert 0.1 < found['x', 'y'] < 0.95


def test_numbers_that_stand_alone_are_compared_as_sets_of_one_number(features):
    labels = torch.cat([features['y'], torch.eye(10)[torch.arange(100) % 10]], 1)
    cka = MinibatchCKA(25, alone='labels')
    for part in torch.arange(100).split(7):
        cka.add(dict(x=features['x'][part], labels=labels[part]))
    found = cka.similarities_alone()
    for name, other in dict(x=features['x'], labels=labels).items():
        expected = [plain_cka(other, labels[:, index:index + 1], 25) for index in range(labels.shape[1])]
        assert found[name].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_number_that_is_the_same_everywhere_or_differs_in_one_image_only_has_no_similarity_alone():
    cka = MinibatchCKA(10, alone='labels')
    for _ in range(3):
        single, first = torch.zeros(10), torch.zeros(10)
        single[4], first[0] = 0.3, 1.
        cka.add(dict(x=torch.randn(10, 5), labels=torch.stack([single, first, torch.full((10, ), 0.1), torch.randn(10)], 1)))
    assert cka.similarities_alone()['x'].isnan().tolist() == [True, True, True, False]


def test_a_set_is_like_itself_like_its_rotation_and_like_its_multiple(features):
    x = features['x'].flatten(1)
    rotation = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], dtype=torch.float64))[0]
    sets = dict(x=x, rotated=(x.double() @ rotation).float(), scaled=-7.5 * x, shifted=x + torch.randn(x.shape[1]))
    found = measured(sets, 50, 16)
    assert found['x', 'x'] == pytest.approx(1, abs=1e-12)
    for name in sets:
        assert found['x', name] == pytest.approx(1, abs=1e-5)  # the rotated and the shifted numbers are rounded to float32
    stretched = measured(dict(x=x, y=x * torch.linspace(0.1, 9, x.shape[1])), 50, 16)
    assert stretched['x', 'y'] < 0.95  # no other linear map leaves it


def test_independent_features_have_no_similarity_however_small_the_blocks():
    # The spread over 200 blocks is below 1/√200 = 0.07; the biased estimator gives 0.9 for blocks of 8 images.
    assert abs(measured(dict(x=torch.randn(1600, 50), y=torch.randn(1600, 50)), 8, 500)['x', 'y']) < 0.2


def test_a_set_without_variation_has_no_similarity(features):
    found = measured(dict(x=features['x'], constant=torch.full((100, 1), 0.1)), 50, 32)
    assert math.isnan(found['x', 'constant']) and math.isnan(found['constant', 'constant']) and not math.isnan(found['x', 'x'])


def test_what_waits_does_not_grow_with_the_number_of_images():
    cka = MinibatchCKA(16)
    for _ in range(20):
        cka.add(dict(x=torch.randn(6, 10)))
        waiting = torch.cat(cka._waiting['x'])
        assert len(waiting) < 16 and all(part.untyped_storage().nbytes() <= 16 * 10 * 4 for part in cka._waiting['x'])
    assert cka.blocks == 20 * 6 // 16


@pytest.mark.parametrize('block', [3, 0, -1, 4.0])
def test_a_block_that_is_too_small_is_refused(block):
    with pytest.raises(ValueError, match=f'block must be an integer of at least 4, .* but got {block}'):
        MinibatchCKA(block)


def test_fewer_images_than_a_block_are_refused():
    with pytest.raises(ValueError, match='at least one block of 8 images, but there are fewer'):
        measured(dict(x=torch.randn(7, 3)), 8, 4)
