from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from dita.errors import DitaError
from dita.eval.metrics import Gaussian, bootstrap_interval, bootstrap_rows, frechet_distance
from dita.eval.metrics import bootstrap as home


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("count", "expected"), [(10, 0.90), (60, 0.94)])
def test_share_of_intervals_that_hold_the_truth(count, expected):
    trials = 500
    intervals = [bootstrap_interval(values, resamples=400, seed=i) for i, values in enumerate(normal(trials, count))]
    covered = sum(low <= 0 <= high for _, low, high, _ in intervals) / trials
    assert covered == pytest.approx(expected, abs=0.035)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_agrees_with_scipy(level):
    values = normal(80).exp()
    ours = bootstrap_interval(values, level, resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (values.double().numpy(),),
        np.mean,
        confidence_level=level,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    width = ours.high - ours.low
    assert ours.estimate == pytest.approx(values.double().mean().item())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.03 * width)


def test_another_statistic_agrees_with_scipy():
    values = normal(101).exp()
    ours = bootstrap_interval(values, resamples=5_000, statistic=lambda rows: rows.median(-1).values)
    theirs = scipy.stats.bootstrap(
        (values.double().numpy(),),
        np.median,
        n_resamples=5_000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    assert ours.estimate == pytest.approx(values.median().item())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.1)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.1)


def test_width_is_that_of_the_normal_approximation_and_shrinks_with_the_root_of_the_count():
    for count in (400, 1600):
        values = normal(count)
        low, high = bootstrap_interval(values)[1:3]
        assert high - low == pytest.approx(2 * 1.96 * values.std().item() / math.sqrt(count), rel=0.06)


def test_the_seed_decides_and_the_chunks_do_not_change_the_law(monkeypatch):
    values = normal(50)
    first = bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) == first
    assert bootstrap_interval(values, seed=4) != first
    monkeypatch.setattr(home, "_CHUNK", 120)
    chunked = bootstrap_interval(values, seed=3)
    assert chunked.low == pytest.approx(first.low, abs=0.03)
    assert chunked.high == pytest.approx(first.high, abs=0.03)


def test_one_value_is_its_own_interval():
    assert bootstrap_interval(torch.tensor([3.5])) == (3.5, 3.5, 3.5, 1)


def test_rows_and_values_agree_on_the_mean():
    values = normal(40)
    by_value = bootstrap_interval(values, resamples=300, seed=2)
    by_row = bootstrap_rows(values[:, None], lambda part: part.mean().item(), resamples=300, seed=2)
    assert by_row == pytest.approx(by_value)


def test_interval_of_a_frechet_distance_holds_the_closed_form():
    shift = torch.tensor([1.0, 0.5, 0.0])
    data = Gaussian(torch.zeros(3).double(), torch.eye(3).double(), 10_000)
    interval = bootstrap_rows(2 * normal(1000, 3) + shift, lambda part: frechet_distance(Gaussian.fit(part), data))
    truth = shift.square().sum().item() + 3 * (2 - 1) ** 2
    assert interval.low < truth < interval.high
    assert interval.high - interval.low < 0.25 * truth
    assert interval.count == 1000


def test_interval_of_a_frechet_distance_of_few_rows_lies_above_it():
    data = Gaussian(torch.zeros(16).double(), torch.eye(16).double(), 10_000)
    interval = bootstrap_rows(normal(24, 16), lambda part: frechet_distance(Gaussian.fit(part), data), resamples=50)
    assert interval.low > interval.estimate


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        pytest.param(torch.tensor([]), {}, "at least one", id="empty"),
        pytest.param(torch.zeros(2, 2), {}, r"\(2, 2\)", id="rank"),
        pytest.param(torch.tensor([1.0, math.nan]), {}, "1 of 2 values are NaN", id="nan"),
        pytest.param(torch.tensor([1.0, math.inf]), {}, "infinite", id="inf"),
        pytest.param(torch.ones(3), {"level": 95}, "level is 95", id="level"),
        pytest.param(torch.ones(3), {"resamples": 0}, "at least 1 resample", id="resamples"),
        pytest.param(torch.ones(3), {"statistic": torch.sum}, "last dimension only", id="statistic"),
    ],
)
def test_senseless_input_is_refused(values, options, message):
    with pytest.raises(DitaError, match=message):
        bootstrap_interval(values, **options)


def test_senseless_rows_are_refused():
    for rows in (torch.ones(3), torch.ones(0, 3), torch.full((2, 2), math.nan)):
        with pytest.raises(DitaError, match="expected numbers|NaN"):
            bootstrap_rows(rows, lambda part: 0.0)
