"""What a further method costs: a config and a recipe. This one forecasts the model's output (the model seam)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from helpers import assert_same_snapshot, plain, snapshot
from pipelines import TINY

import dita
from dita import registry
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.forecast import Forecast
from dita.caching.policy import FixedInterval


@dataclass(frozen=True)
class OutputForecast(CachingMethod):
    """Attributes: interval."""

    interval: int = 2
    order: int = 1
    what: str = "model"

    name: ClassVar[str] = "output-forecast"
    title: ClassVar[str] = "Output forecast"
    arxiv: ClassVar[str] = "none"
    axes: ClassVar[str] = "model output; fixed interval; linear"
    seams: ClassVar[frozenset[str]] = frozenset({"model"})
    citation: ClassVar[str] = "@misc{none}"

    def recipe(self, anatomy: Any) -> Recipe:
        return Recipe(what=self.what, when=lambda: FixedInterval(self.interval, 2), how=Forecast(self.order))

    @classmethod
    def disabled(cls) -> OutputForecast:
        return cls(interval=1)


@pytest.fixture
def registered() -> Iterator[None]:
    registry.register(OutputForecast)
    yield
    registry._METHODS.pop("output-forecast")


@pytest.mark.parametrize("tiny", TINY)
def test_model_seam(tiny: str, registered: None) -> None:
    pipe = TINY[tiny].build()
    TINY[tiny].call(pipe)
    before = snapshot(pipe)
    dita.accelerate_pipeline(pipe, "output-forecast")
    output = TINY[tiny].call(pipe)
    run = dita.report(pipe).last
    assert run.reused > 0 and output.isfinite().all() and not torch.equal(output, plain(tiny))
    assert {r.action for r in run.records} == {"computed", "forecast"}
    dita.accelerate_pipeline(pipe, OutputForecast.disabled())
    assert torch.equal(TINY[tiny].call(pipe), plain(tiny))
    dita.restore_pipeline(pipe)
    assert_same_snapshot(before, snapshot(pipe))


@pytest.mark.parametrize("tiny", ["dit", "flux", "wan"])
def test_the_trunk_is_the_span_of_all_blocks(tiny: str) -> None:
    outputs = []
    for what in ("trunk", "span"):
        pipe = dita.accelerate_pipeline(TINY[tiny].build(), OutputForecast(what=what))
        outputs.append(TINY[tiny].call(pipe))
    assert torch.equal(*outputs) and not torch.equal(outputs[0], plain(tiny))
