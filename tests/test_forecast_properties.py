"""What holds for every forecast, at any anchors: hypothesis draws orders, uneven gaps and distances."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dita.caching.foca import PredictCorrect
from dita.caching.forecast import BASES, Forecast, ladder_weights
from dita.caching.history import Entry
from dita.caching.hyca import SOLVERS, solver_weights

gaps = st.lists(st.integers(1, 9), min_size=0, max_size=4)
distance = st.integers(1, 9)


def anchors_of(steps_between: list[int]) -> list[int]:
    """Anchors newest first, the oldest at step 0."""
    rising = [0]
    for gap in steps_between:
        rising.append(rising[-1] + gap)
    return rising[::-1]


def forecast_of(weights: list[float], anchors: list[int], power: int) -> float:
    return sum(w * a**power for w, a in zip(weights, anchors, strict=False))


@pytest.mark.parametrize("basis", BASES)
@given(gaps, distance, st.integers(0, 4))
def test_weights_sum_to_one(basis: str, steps_between: list[int], k: int, order: int) -> None:
    anchors = anchors_of(steps_between)
    weights = Forecast(order, basis).weights(anchors[0] + k, anchors)
    assert len(weights) == min(order + 1, len(anchors))
    scale = sum(map(abs, weights))
    assert sum(weights) == pytest.approx(1, abs=1e-9 * scale)


@given(gaps, distance)
def test_newton_is_exact_by_order(steps_between: list[int], k: int) -> None:
    anchors = anchors_of(steps_between)
    weights = Forecast(4, "newton").weights(anchors[0] + k, anchors)
    for power in range(len(weights)):
        assert forecast_of(weights, anchors, power) == pytest.approx((anchors[0] + k) ** power, rel=1e-6, abs=1e-6)


@given(gaps.filter(bool), distance, st.integers(1, 4))
def test_taylor_is_exact_on_lines_whatever_the_gaps(steps_between: list[int], k: int, order: int) -> None:
    """On a line the newest slope is the slope everywhere, but the ladder's higher differences vanish too."""
    anchors = anchors_of(steps_between)
    weights = Forecast(order, "taylor").weights(anchors[0] + k, anchors)
    assert forecast_of(weights, anchors, 1) == pytest.approx(anchors[0] + k, rel=1e-9, abs=1e-9)


@given(st.integers(1, 6), distance, st.integers(1, 3))
def test_taylor_on_powers_with_equal_gaps(gap: int, k: int, order: int) -> None:
    """The published sum: backward differences of t^order at equal gaps, over k^j / j!."""
    anchors = [gap * i for i in range(order, -1, -1)]
    values = [float(a**order) for a in anchors]
    differences, total = values, 0.0
    for j in range(order + 1):
        total += differences[0] / gap**j * k**j / math.factorial(j)
        differences = [a - b for a, b in zip(differences, differences[1:], strict=False)]
    weights = Forecast(order, "taylor").weights(anchors[0] + k, anchors)
    assert forecast_of(weights, anchors, order) == pytest.approx(total, rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("basis", ["taylor", "newton", "hermite"])
@given(gaps, distance, st.integers(0, 4), st.floats(1, 12))
def test_amplification_is_kept(basis: str, steps_between: list[int], k: int, order: int, limit: float) -> None:
    anchors = anchors_of(steps_between)
    guarded = Forecast(order, basis, amplification=limit).weights(anchors[0] + k, anchors)
    free = Forecast(order, basis).weights(anchors[0] + k, anchors)
    assert sum(map(abs, guarded)) <= limit + 1e-6
    if sum(map(abs, free)) <= limit:
        assert guarded == free, "no order is given up without need"


def test_the_warm_up_trap() -> None:
    """Two anchors one step apart, five steps ahead: order 1 multiplies their noise by 11, and the guard reuses."""
    trapped = Forecast(1).weights(7, [2, 1])
    assert sum(map(abs, trapped)) == pytest.approx(11)
    assert Forecast(1, amplification=3).weights(7, [2, 1]) == [1.0]
    assert Forecast(1, amplification=3).weights(3, [2, 1]) == [2.0, -1.0]


@pytest.mark.parametrize("solver", SOLVERS)
@given(gaps.map(lambda g: g[:2]), distance)
def test_solvers_sum_to_one_and_keep_lines(solver: str, steps_between: list[int], k: int) -> None:
    anchors = anchors_of(steps_between)
    weights = solver_weights(solver, k, anchors)
    assert sum(weights) == pytest.approx(1, abs=1e-9)
    if solver != "reuse" and len(anchors) > 1:
        assert forecast_of(weights, anchors, 1) == pytest.approx(anchors[0] + k, rel=1e-9, abs=1e-9)


@given(st.integers(1, 6), st.integers(2, 9))
@settings(max_examples=40)
def test_foca_keeps_constants_and_lines(first: int, skips: int) -> None:
    """Run its window over forecasts: on a line every forecast is on the line."""
    rule = PredictCorrect(order=1)
    for value in (lambda t: 5.0, lambda t: 2.0 * t - 3):
        window = [(first, value(first), True), (0, value(0), True)]
        if first > 1:
            window.insert(1, (first - 1, value(first - 1), False))
        for step in range(first + 1, first + 1 + skips):
            weights = rule.entry_weights([s for s, _, _ in window], [r for _, _, r in window])
            assert sum(weights) == pytest.approx(1)
            forecast = sum(w * v for w, (_, v, _) in zip(weights, window, strict=True))
            assert forecast == pytest.approx(value(step), rel=1e-9, abs=1e-9)
            entries = [Entry(step, (), real=False), *(Entry(s, (), real=r) for s, _, r in window)]
            kept = rule.retain(entries)
            values = {step: forecast, **{s: v for s, v, _ in window}}
            window = [(e.step, values[e.step], e.real) for e in kept]
            assert len(window) <= 4 and sum(r for _, _, r in window) == 2


def test_ladder_needs_no_more_terms_than_anchors() -> None:
    assert ladder_weights([1.0, 2.0, 9.9], [3]) == [1.0]
