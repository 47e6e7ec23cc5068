from __future__ import annotations

import math

import pytest
import torch

from dita.errors import DitaError
from dita.eval.metrics import Gaussian, frechet_distance, kernel_distance


def features(count: int, size: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize(("count", "size"), [(40, 8), (100, 64), (3, 2)])
def test_a_whole_set_equals_torchmetrics(count, size):
    from torchmetrics.image.kid import poly_mmd

    ours, data = features(count, size, 0), features(count, size, 1, 0.3)
    expected = poly_mmd(data.double(), ours.double()).item()
    found = kernel_distance(ours, data, subsets=3)
    assert found.mean == pytest.approx(expected, rel=1e-9)
    assert found.std == pytest.approx(0, abs=1e-9)
    assert found.subset_size == count


def test_subsets_equal_torch_fidelity_within_their_own_spread():
    from torch_fidelity.metric_kid import kid_features_to_metric

    ours, data = features(300, 32, 2, 0.2), features(250, 32, 3)
    theirs = kid_features_to_metric(
        ours.double(), data.double(), kid_subsets=200, kid_subset_size=50, rng_seed=0, verbose=False
    )
    found = kernel_distance(ours, data, subsets=200, subset_size=50)
    error = found.std / math.sqrt(200)
    assert found.mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=4 * error)
    assert found.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=0.25)
    assert (found.subsets, found.subset_size) == (200, 50)


def test_sets_from_one_distribution_average_zero_where_frechet_does_not():
    kernel, frechet = [], []
    for trial in range(200):
        one, two = features(40, 16, 2 * trial), features(40, 16, 2 * trial + 1)
        kernel.append(kernel_distance(one, two, subsets=1).mean)
        frechet.append(frechet_distance(Gaussian.fit(one), Gaussian.fit(two)))
    values = torch.tensor(kernel)
    error = (values.std() / math.sqrt(len(values))).item()
    assert abs(values.mean().item()) < 3 * error
    assert 0.2 < (values < 0).float().mean() < 0.8
    assert min(frechet) > 0


def test_the_expectation_does_not_depend_on_the_count_and_has_a_closed_form():
    # In one dimension the cubic kernel compares the first three raw moments, weighted 3, 3 and 1.
    shift = 0.7
    moments = (shift, 1 + shift**2, shift**3 + 3 * shift)
    truth = 3 * moments[0] ** 2 + 3 * (moments[1] - 1) ** 2 + moments[2] ** 2
    ours, data = features(4000, 1, 4, shift), features(4000, 1, 5)
    for size in (5, 50, 1000):
        found = kernel_distance(ours, data, subsets=400 if size < 1000 else 20, subset_size=size)
        assert found.mean == pytest.approx(truth, rel=0.25)


def test_it_grows_with_the_distance_and_follows_the_seed():
    data = features(200, 8, 6)
    means = [kernel_distance(features(200, 8, 7, shift), data, subsets=20).mean for shift in (0.0, 0.3, 0.6, 1.2)]
    assert means == sorted(means)
    ours = features(200, 8, 7, 0.3)
    first, again, other = (kernel_distance(ours, data, 10, 50, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.mean != other.mean


@pytest.mark.parametrize(
    ("ours", "data", "options", "message"),
    [
        pytest.param(torch.ones(4, 3), torch.ones(4, 2), {}, r"\[N, D\] and \[M, D\]", id="sizes"),
        pytest.param(torch.ones(4), torch.ones(4), {}, r"\[N, D\] and \[M, D\]", id="rank"),
        pytest.param(torch.ones(1, 3), torch.ones(9, 3), {}, "subsets of 1 vectors", id="one"),
        pytest.param(torch.ones(4, 3), torch.ones(9, 3), {"subset_size": 5}, "2 to 4", id="subset"),
        pytest.param(torch.ones(4, 3), torch.ones(4, 3), {"subsets": 0}, "at least 1", id="none"),
        pytest.param(torch.full((4, 3), math.nan), torch.ones(4, 3), {}, "NaN", id="nan"),
    ],
)
def test_unfit_features_are_refused(ours, data, options, message):
    with pytest.raises(DitaError, match=message):
        kernel_distance(ours, data, **options)
