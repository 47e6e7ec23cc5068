"""Published schedules, and the mathematics of forecasts."""

from __future__ import annotations

import random

import pytest
import torch

from dita.caching.forecast import BASES, Forecast, newton_weights, taylor_weights
from dita.caching.history import History
from dita.caching.policy import FixedInterval, Guards, View, relative_l1
from dita.errors import DitaError
from dita.seams import Position


def at(step: int, steps: int = 50) -> View:
    return View(Position(step, steps, 0, "cond", step, steps, step))


@pytest.mark.parametrize(
    ("interval", "warmup", "expected"),
    [
        (6, 3, [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]),
        (5, 3, [0, 1, 2, 7, 12, 17, 22, 27, 32, 37, 42, 47]),
        (7, 3, [0, 1, 2, 9, 16, 23, 30, 37, 44]),
        (4, 3, [0, 1, 2, *range(6, 50, 4)]),
        (3, 3, [0, 1, 2, *range(5, 50, 3)]),
        (5, 1, list(range(0, 50, 5))),
        (1, 1, list(range(50))),
    ],
)
def test_taylorseer_schedules(interval: int, warmup: int, expected: list[int]) -> None:
    """Counts 10, 12, 9, 14, 18 of 50 for intervals 6, 5, 7, 4, 3 are those of TaylorSeer's tables."""
    policy = FixedInterval(interval, warmup)
    assert [step for step in range(50) if policy.decide(at(step)).compute] == expected


def ladder_forecast(values: list[float], anchors: list[int], step: int) -> float:
    """TaylorSeer's own recursion, run forward over the anchors, oldest first."""
    ladder: list[float] = []
    last = None
    for anchor, value in sorted(zip(anchors, values, strict=True)):
        new = [value]
        for j, old in enumerate(ladder):
            new.append((new[j] - old) / (anchor - last))  # pyright: ignore[reportOperatorIssue]
        ladder, last = new, anchor
    factorial = [1, 1, 2, 6]
    return sum(d * (step - max(anchors)) ** j / factorial[j] for j, d in enumerate(ladder))


@pytest.mark.parametrize("seed", range(20))
def test_taylor_weights_are_the_authors_ladder(seed: int) -> None:
    rng = random.Random(seed)
    anchors = sorted(rng.sample(range(40), rng.randint(1, 4)), reverse=True)
    values = [rng.uniform(-2, 2) for _ in anchors]
    k = rng.randint(1, 7)
    expected = ladder_forecast(values, anchors, anchors[0] + k)
    weights = taylor_weights(k, anchors)
    assert sum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_second_order_coefficients_in_closed_form() -> None:
    k, d1, d2 = 5, 6, 1
    expected = [
        1 + k / d1 + k**2 / (2 * d1**2),
        -k / d1 - k**2 / (2 * d1**2) - k**2 / (2 * d1 * d2),
        k**2 / (2 * d1 * d2),
    ]
    assert taylor_weights(k, [8, 2, 1]) == pytest.approx(expected)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("anchors", [[4], [9, 3], [12, 6, 0], [8, 2, 1], [20, 14, 8, 2], [9, 8, 2, 1]])
def test_weights_sum_to_one_and_follow_polynomials(basis: str, anchors: list[int]) -> None:
    for k in (1, 3, 5):
        weights = Forecast(order=3, basis=basis).weights(anchors[0] + k, anchors)
        assert len(weights) == len(anchors) and sum(weights) == pytest.approx(1)
        degree = {"newton": len(anchors) - 1, "taylor": min(1, len(anchors) - 1)}.get(basis, 0)
        for power in range(degree + 1):
            forecast = sum(w * a**power for w, a in zip(weights, anchors, strict=True))
            assert forecast == pytest.approx((anchors[0] + k) ** power, rel=1e-9)


def test_taylor_is_not_silently_newton() -> None:
    """On t^2 with equal gaps N, published order 2 gives k^2 - kN, the polynomial k^2."""
    gap, k, anchors = 6, 5, [0, -6, -12]
    squares = [a * a for a in anchors]
    assert sum(w * s for w, s in zip(taylor_weights(k, anchors), squares, strict=True)) == pytest.approx(
        k * k - k * gap
    )
    assert sum(w * s for w, s in zip(newton_weights(k, anchors), squares, strict=True)) == pytest.approx(k * k)


@pytest.mark.parametrize(
    ("order", "basis"), [(6, "taylor"), (-1, "taylor"), (1.0, "taylor"), (True, "taylor"), (1, "fourier")]
)
def test_forecast_refuses(order: int, basis: str) -> None:
    with pytest.raises(DitaError, match="expected"):
        Forecast(order, basis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_history_forecasts_linear_features(dtype: torch.dtype) -> None:
    history = History(2)
    for step in (0, 2, 5):
        history.push(step, (torch.full((2, 3), float(step), dtype=dtype), None))
    assert history.steps == [5, 2] and history.bytes_held() == 2 * 6 * torch.finfo(dtype).bits // 8
    (forecast, none) = history.combine(taylor_weights(3, history.steps))
    assert none is None and forecast is not None and forecast.dtype == dtype
    torch.testing.assert_close(forecast, torch.full((2, 3), 8.0, dtype=dtype))


def test_history_keeps_copies_and_reuses_memory() -> None:
    history = History(1)
    feature = torch.zeros(4)
    history.push(0, (feature,))
    feature += 1
    kept = history.newest[0]
    assert kept is not None and kept.eq(0).all(), "the model wrote into its tensor after it was kept"
    history.push(1, (feature,))
    assert history.newest[0] is kept and kept.eq(1).all(), "the dropped entry's memory is used again"
    history.push(2, (torch.ones(2, 3),))
    assert history.newest[0] is not None and history.newest[0].shape == (2, 3)
    reused = history.combine([1.0])[0]
    assert reused is not None and reused is not history.newest[0], "what goes back into the model is not what is kept"


def test_history_weights_per_channel() -> None:
    history = History(2)
    history.push(0, (torch.ones(1, 2, 3),))
    history.push(1, (torch.full((1, 2, 3), 2.0),))
    weights = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, -2.0]])
    result = history.combine(weights)[0]
    assert result is not None
    torch.testing.assert_close(result, torch.tensor([2.0, 3.0, 4.0]).expand(1, 2, 3))


@pytest.mark.parametrize(
    ("guards", "step", "in_row", "total", "reason"),
    [
        (Guards(warmup=3), 2, 0, 0, "warm-up"),
        (Guards(warmup=3), 3, 0, 0, None),
        (Guards(tail=2), 48, 0, 0, "tail"),
        (Guards(tail=2), 47, 0, 0, None),
        (Guards(max_consecutive=2), 10, 2, 2, "max_consecutive"),
        (Guards(max_consecutive=2), 10, 1, 2, None),
        (Guards(max_consecutive=0), 10, 0, 0, "max_consecutive"),
        (Guards(max_total=5), 10, 0, 5, "max_total"),
        (Guards(), 10, 99, 99, None),
    ],
)
def test_guards(guards: Guards, step: int, in_row: int, total: int, reason: str | None) -> None:
    view = at(step)
    view.skipped_in_row = in_row
    verdict = guards.verdict(view, total)
    assert (verdict.reason if verdict else None) == reason


def test_relative_l1_is_per_sample() -> None:
    old = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    new = torch.tensor([[1.0, 2.0], [2.0, 2.0], [0.0, 1.0], [0.0, 0.0]])
    assert relative_l1(new, old).tolist() == [0.5, 0.0, float("inf"), 0.0]
