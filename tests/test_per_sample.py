"""Samples run one by one: an image is the same alone and in any batch, and computed only where it has to be."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from helpers import IN_TURN, assert_same_snapshot, configured, plain, snapshot
from pipelines import TINY

import dita
from dita import registry
from dita.caching import AdaCache, DiCache, FirstBlockCache
from dita.config import Method
from dita.errors import DitaError, DitaWarning
from dita.reporting import RunReport
from dita.schedulers.guidance import GuidanceInterval
from dita.schedulers.resolution import RALU

OWN = [(method, tiny) for method, tiny in IN_TURN if not registry.get(method).joint]
JOINT = sorted({method for method, _ in IN_TURN if registry.get(method).joint})
DECIDING: tuple[tuple[str, Method], ...] = (
    ("dit", FirstBlockCache(threshold=0.22)),
    ("dit", AdaCache(stretch=1.0)),
    ("sd3", DiCache(threshold=0.2)),
    ("wan", FirstBlockCache(threshold=0.1)),
)
"""Settings at which the first two samples of a pipeline are skipped at different steps of 14."""


def built(tiny: str) -> Any:
    pipe = TINY[tiny].build()
    if getattr(pipe, "vae", None) is not None:
        pipe.vae.enable_slicing()  # images are decoded one by one too
    return pipe


def acted(run: RunReport, sample: str = "") -> list[tuple[int, str, str, float | None]]:
    """What was done and why, for the calls of one sample, or all of them."""
    named = [(r, *r.branch.partition("[")[::2]) for r in run.settle().records]
    return [(r.step, branch, r.action, r.value) for r, branch, rest in named if rest == (sample and f"{sample}]")]


@pytest.mark.parametrize(("method", "tiny"), OWN)
def test_an_image_is_the_same_alone_and_in_a_batch(method: str, tiny: str) -> None:
    config = configured(method, "forced", tiny)
    call = functools.partial(TINY[tiny].call, steps=8 if config.needs_calibration else 5)
    pipe = dita.accelerate_pipeline(built(tiny), config, per_sample=True)
    assert torch.equal(call(pipe, batch=2)[1:], call(pipe, batch=1, first=1))


@pytest.mark.parametrize(("tiny", "config"), DECIDING)
def test_each_sample_is_decided_for_by_itself(tiny: str, config: Method) -> None:
    pipe = dita.accelerate_pipeline(built(tiny), config, per_sample=True)
    call = functools.partial(TINY[tiny].call, pipe, steps=14)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DitaWarning)
        both, run = call(batch=2), dita.report(pipe).last
        for sample in (0, 1):
            assert torch.equal(call(first=sample), both[sample : sample + 1])
            assert acted(dita.report(pipe).last) == acted(run, str(sample))
    skipped = [[step for step, _, action, _ in acted(run, s) if action != "computed"] for s in "01"]
    assert skipped[0] != skipped[1], "guard: the samples must differ for the test to say anything"


@pytest.mark.parametrize("tiny", ["dit", "flux", "wan"])
def test_nothing_skipped_is_the_plain_image_of_each(tiny: str) -> None:
    pipe = dita.accelerate_pipeline(built(tiny), FirstBlockCache.disabled(), per_sample=True)
    both = TINY[tiny].call(pipe, batch=2)
    for sample in (0, 1):
        assert torch.equal(both[sample : sample + 1], plain(tiny, first=sample))


@pytest.mark.parametrize(
    ("tiny", "config", "per_sample", "length", "whole"),
    [("dit", GuidanceInterval(stop=0.5), True, 8, 12 / 16), ("flux", RALU((2, 2, 3)), False, 7, 3 / 7)],
    ids=["per-sample", "ralu"],
)
def test_what_was_computed_is_counted_the_same_in_any_batch(
    tiny: str, config: Method, per_sample: bool, length: int, whole: float
) -> None:
    pipe = dita.accelerate_pipeline(built(tiny), config, per_sample=per_sample)
    for batch in (1, 3):
        TINY[tiny].call(pipe, batch=batch)
        run = dita.report(pipe).last
        names = {record.branch for record in run.records}
        assert batch == 1 or any(name.endswith("[2]") for name in names), "guard: samples ran one by one"
        assert (run.length, run.computed_fraction) == pytest.approx((length, whole))


@pytest.mark.parametrize("method", JOINT)
def test_what_decides_for_a_whole_batch_is_refused(method: str) -> None:
    pipe = TINY["flux-cfg"].build()
    before = snapshot(pipe)
    with pytest.raises(DitaError, match=f"{method} decides about all samples"):
        dita.accelerate_pipeline(pipe, method, per_sample=True)
    with pytest.raises(DitaError, match="expected True or False"):
        dita.accelerate_pipeline(pipe, "fbcache", per_sample=1)  # pyright: ignore[reportArgumentType]
    assert_same_snapshot(before, snapshot(pipe))
