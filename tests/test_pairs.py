"""Every cache with every kind of method inside a layer and every method on guidance, on one pipeline.

Three at a time, so that each two of them meet at least once; `make nightly` takes all methods in all combinations.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import CACHING, INSIDE, assert_same_snapshot, snapshot
from hypothesis import settings
from small import CALIBRATED_STEPS, Asked, Setting, assert_consistent, build, call, plain, quietly

import dita
from dita import registry
from dita.errors import DitaError
from dita.schedulers.guidance.policy import GuidanceMethod

TINY = "wan"
ASKED = Asked(CALIBRATED_STEPS)
GUIDANCE = tuple(name for name in registry.names() if issubclass(registry.get(name), GuidanceMethod))
KINDS = ("adaspa", "asymrnr", "radial", "re-ttention", "sada-token", "sage", "sla", "tome")
"""Plans by scores and by place, rescaled, with a linear branch, of fewer bits; tokens reduced in attention, at what a
module reads and at what a block puts out."""
NIGHTLY = settings.get_current_profile_name() == "nightly"


def triples(cache: str) -> list[tuple[str, str, str]]:
    """Of one cache: with every kind inside a layer, and in these with every method on guidance at least once."""
    if NIGHTLY:
        return [(cache, inside, guidance) for inside in INSIDE for guidance in GUIDANCE]
    start = CACHING.index(cache)
    return [(cache, inside, GUIDANCE[(start + n) % len(GUIDANCE)]) for n, inside in enumerate(KINDS)]


def meet(pipe: Any, names: tuple[str, ...]) -> str:
    """Attach methods together and run them: "ran", or the error on attaching."""
    before = snapshot(pipe)
    try:
        dita.accelerate_pipeline(pipe, *(Setting(name).config(TINY) for name in names))
    except DitaError as error:
        assert_same_snapshot(before, snapshot(pipe))
        return str(error)
    output = call(TINY, pipe, ASKED)
    assert output.isfinite().all() and not torch.equal(output, plain(TINY, 0, ASKED)[0])
    run = dita.report(pipe).last
    assert_consistent(run)
    assert run.reused > 0
    dita.restore_pipeline(pipe)
    assert_same_snapshot(before, snapshot(pipe))
    return "ran"


@pytest.mark.parametrize("cache", CACHING)
def test_caches_meet_all_others(cache: str) -> None:
    pipe = build(TINY)
    call(TINY, pipe, ASKED)
    with quietly():
        for names in triples(cache):
            found = meet(pipe, names)
            assert found == "ran" or sum(name in found for name in names) >= 2, (names, found)
    assert torch.equal(call(TINY, pipe, ASKED), plain(TINY, 0, ASKED)[0])


def test_a_cache_counts_what_it_computes_whatever_happens_inside_a_layer() -> None:
    pipe = build(TINY)
    cache = Setting("taylorseer").config(TINY)
    with quietly():
        call(TINY, dita.accelerate_pipeline(pipe, cache), ASKED)
        alone = dita.report(pipe).last
        assert 0 < alone.computed_fraction < 1
        for name in (name for name in INSIDE if not registry.get(name).claims & cache.claims):
            call(TINY, dita.accelerate_pipeline(pipe, Setting(name).config(TINY), cache), ASKED)
            run = dita.report(pipe).last
            assert (run.computed_fraction, run.computed_steps) == (alone.computed_fraction, alone.computed_steps), name
            assert any(record.action in ("sparse", "low-bit") for record in run.records), name


def test_every_two_meet() -> None:
    met = {frozenset(pair) for c in CACHING for a, b, g in triples(c) for pair in ((a, b), (a, g), (b, g))}
    inside = INSIDE if NIGHTLY else KINDS
    pairs = [(a, b) for a in CACHING for b in inside] + [(a, g) for a in CACHING for g in GUIDANCE]
    pairs += [(b, g) for b in inside for g in GUIDANCE]
    assert len(GUIDANCE) >= 7 and not {frozenset(pair) for pair in pairs} - met
