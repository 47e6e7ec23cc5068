"""The limit on what a forecast amplifies, over every method that takes it: hypothesis draws anchors and distances.

What a forecast is made of is read off its response: computed step n is a pattern in sample n and zero in the others,
so that sample n of a forecast holds the weight of step n, through forecasts, ladders and bands alike.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import CACHING
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import TINY

from dita import registry
from dita.anatomy import describe
from dita.caching.base import ForecastingMethod
from dita.caching.hyca import SOLVERS, SolverTable
from dita.caching.storage import Storage
from dita.errors import DitaError
from dita.seams import Call, Position, Site

SITE = Site("module", "a module")
FLUX = describe(TINY["flux"].build().transformer)
FORECASTING = [name for name in CACHING if issubclass(registry.get(name), ForecastingMethod)]
ORDER = {"dbcache": {"fn": 1, "order": 2}, "fbcache": {"order": 2}, "ab-cache": {"points": 3}}
PATTERN = torch.tensor([1.0, -1.0, -1.0, 1.0])[:, None].expand(4, len(SOLVERS))  # on a grid of 2 x 2: all high band


def methods(name: str) -> list[Any]:
    """The method with forecasts of order 2, in its variants."""
    base: Any = registry.get(name)(**ORDER.get(name, {}))
    if name == "hyca":
        return [base.replace(table=SolverTable({f"{SITE.name}, 0": tuple(range(len(SOLVERS)))}))]
    return [base, base.replace(push_forecasts=True)] if name == "ab-cache" else [base]


def response(how: Any, gaps: list[int], ahead: int, batch: int = 5) -> torch.Tensor:
    """The weights that a forecast so far ahead gives the computed steps: [batch, channels], zero for no such step."""
    history, step = how.make_history(Storage()), 0
    for number in range(len(gaps) + 1):
        step += gaps[number - 1] if number else 0
        feature = torch.zeros(batch, *PATTERN.shape)
        feature[number] = PATTERN
        history.push(step, (feature,))
    result: Any = None
    for now in range(step + 1, step + ahead + 1):
        position = Position(now, 100, 0, "all", now, 100, now)
        result = how.forecast(history, (), SITE, Call(position, grid=(1, 2, 2)))[0]
    return (result * PATTERN).mean(1)


@pytest.mark.parametrize("name", FORECASTING)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(1, 7), st.sampled_from([1.0, 2.5, 6.0]))
@settings(max_examples=25)
def test_the_limit_holds_at_any_anchors(name: str, gaps: list[int], ahead: int, limit: float) -> None:
    for method in methods(name):
        bounded = response(method.replace(amplification=limit).recipe(FLUX).how, gaps, ahead)
        assert bounded.abs().sum(0).max() <= limit * (1 + 1e-4)
        torch.testing.assert_close(bounded.sum(0), torch.ones(len(SOLVERS)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", FORECASTING)
def test_without_it_the_published_weights_stand(name: str) -> None:
    """Three anchors one step apart, five steps ahead: they come to more than 3, and a wide limit changes none."""
    for method in methods(name):
        assert method.amplification == 0
        free = response(method.recipe(FLUX).how, [1, 1], 5)
        assert free.abs().sum(0).max() > 3
        wide = response(method.replace(amplification=1e6).recipe(FLUX).how, [1, 1], 5)
        torch.testing.assert_close(wide, free)


def test_the_probe_of_cg_taylor_keeps_it_too() -> None:
    policy = registry.get("cg-taylor")(amplification=3).recipe(FLUX).when()  # pyright: ignore
    assert policy.how.weights(7, [2, 1]) == [1.0]


@pytest.mark.parametrize("name", FORECASTING)
def test_it_is_checked(name: str) -> None:
    with pytest.raises(DitaError, match="amplification is 0.5"):
        replace(methods(name)[0], amplification=0.5)
