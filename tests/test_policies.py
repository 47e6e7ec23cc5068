"""Decisions of the adaptive methods: per sample, exclusive thresholds, tables and their mismatches."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from pipelines import TINY

import dita
from dita.caching import FirstBlockCache, MagCache, MagnitudeTable
from dita.caching.bwcache import SettledBlocks
from dita.caching.dbcache import ProbeGate
from dita.caching.magcache import MagnitudeGate
from dita.caching.policy import View
from dita.errors import DitaError, DitaWarning
from dita.seams import Position


def view(step: int, steps: int = 20, **fields: Any) -> View:
    return View(Position(step, steps, 0, "cond", step, steps, step), shapes=((2, 4, 8, 8),), **fields)


def test_probe_gate_needs_every_sample() -> None:
    gate = ProbeGate(1, threshold=0.1)
    anchor = torch.ones(2, 3, 4)
    gate.computed(view(0, probe=anchor))
    both_close = anchor * 1.05
    one_far = torch.stack([anchor[0] * 1.05, anchor[1] * 1.5])
    assert not gate.decide(view(1, probe=both_close)).compute
    verdict = gate.decide(view(2, probe=one_far))
    assert verdict.compute and verdict.value == pytest.approx(0.5)
    assert relative_mean(one_far, anchor) > 0.1, "guard: a mean below the threshold would prove nothing"


def relative_mean(new: torch.Tensor, old: torch.Tensor) -> float:
    return ((new - old).abs().mean() / old.abs().mean()).item()


def test_probe_gate_threshold_is_exclusive_and_zero_never_skips() -> None:
    anchor = torch.ones(1, 2, 2)
    exact = ProbeGate(1, threshold=0.5)
    exact.computed(view(0, probe=anchor))
    assert exact.decide(view(1, probe=anchor * 1.5)).compute
    never = ProbeGate(1, threshold=0.0)
    never.computed(view(0, probe=anchor))
    assert never.decide(view(1, probe=anchor)).compute


def test_probe_is_compared_with_the_last_computed_step() -> None:
    """Small drifts add up: skipped steps do not move the anchor."""
    gate = ProbeGate(1, threshold=0.25)
    anchor = torch.ones(1, 2, 2)
    gate.computed(view(0, probe=anchor))
    seen = []
    for step in range(1, 5):
        current = view(step, probe=anchor * (1 + 0.1 * step))
        verdict = gate.decide(current)
        seen.append(verdict.compute)
        (gate.computed if verdict.compute else gate.skipped)(current)
    assert seen == [False, False, True, False]


def test_an_image_is_skipped_only_with_its_batch_mates_consent() -> None:
    """Alone, the two samples skip on different steps; together, only where both do."""
    tiny = TINY["dit"]
    skipped = []
    for rows in ({"first": 0, "batch": 1}, {"first": 1, "batch": 1}, {"first": 0, "batch": 2}):
        pipe = dita.accelerate_pipeline(tiny.build(), FirstBlockCache(threshold=0.22))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DitaWarning)
            tiny.call(pipe, steps=14, **rows)
        skipped.append({r.step for r in dita.report(pipe).last.records if r.action != "computed"})
    assert skipped[0] and skipped[0] != skipped[1], "guard: the samples must differ for the test to say anything"
    first = min(skipped[0] ^ skipped[1])
    assert first not in skipped[2]


def test_settled_blocks_reuse_then_tail() -> None:
    gate = SettledBlocks(threshold=0.2, reuse=0.1)
    steps, computed = 20, []
    for step in range(steps):
        current = view(step, steps)
        if step == 0 or gate.decide(current).compute:
            computed.append(step)
            current.block_change = None if step == 0 else torch.tensor([0.1, 0.15])
            gate.computed(current)
        else:
            gate.skipped(current)
    # First trigger at step 1 leaves 18 steps, the last 9 of which are computed; two are skipped after each test.
    assert computed == [0, 1, 4, 7, 10, *range(11, 20)]


def test_settled_blocks_needs_every_sample() -> None:
    gate = SettledBlocks(threshold=0.2, reuse=0.1)
    gate.computed(view(1, block_change=torch.tensor([0.01, 0.3])))
    assert gate.decide(view(2)).compute


def table(*ratios: float, **conditions: Any) -> MagnitudeTable:
    return MagnitudeTable({"cond/0": tuple(ratios)}, steps=len(ratios), **conditions)


def test_magnitude_gate_accumulates_products() -> None:
    gate = MagnitudeGate(table(1.0, 1.0, 0.9, 0.9, 0.9, 1.0), 0.35, 9, 0.0, ())
    values = []
    for step in range(2, 5):
        verdict = gate.decide(view(step, 6))
        values.append((verdict.compute, round(verdict.value or 0, 4)))
    # errors: 1 - 0.9, then + 1 - 0.81, then + 1 - 0.729
    assert values == [(False, 0.1), (False, 0.29), (True, 0.561)]


def test_magnitude_gate_limits() -> None:
    ones = table(*[1.0] * 10)
    most = MagnitudeGate(ones, 0.1, 2, 0.0, ())
    assert [most.decide(view(s, 10)).compute for s in (1, 2, 3)] == [False, False, True]
    assert MagnitudeGate(ones, 0.0, 2, 0.0, ()).decide(view(5, 10)).compute, "threshold 0, ratios of exactly 1"
    assert MagnitudeGate(ones, 0.1, 2, 0.5, ()).decide(view(4, 10)).reason == "retention"
    assert not MagnitudeGate(ones, 0.1, 2, 0.5, ()).decide(view(5, 10)).compute
    assert MagnitudeGate(ones, 0.1, 2, 0.0, (5,)).decide(view(5, 10)).reason == "always computed"


def test_magnitude_table_is_read_at_the_nearest_step() -> None:
    gate = MagnitudeGate(table(1.0, 1.1, 1.2, 1.3, 1.4), 1.0, 9, 0.0, ())
    places = [view(s, 9).position for s in (0, 2, 4, 6, 8)]
    assert [gate.table.nearest(gate.table.of(place), place) for place in places] == [1.0, 1.1, 1.2, 1.3, 1.4]
    with pytest.warns(DitaWarning, match="5 steps .now 9"):
        gate.begin(view(0, 9))


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"shape": (4, 16, 16)}, "an input of"),
        ({"scheduler": "Other:0"}, "Other:0"),
        ({"guidance": "uncond"}, r"guidance uncond .now cond"),
    ],
)
def test_magnitude_table_warns_of_other_conditions(conditions: dict[str, Any], message: str) -> None:
    gate = MagnitudeGate(table(*[1.0] * 20, **conditions), 0.1, 2, 0.0, ())
    with pytest.warns(DitaWarning, match=message):
        gate.begin(view(0, scheduler="Mine:1"))


def test_a_branch_without_ratios_says_whose_it_reads() -> None:
    with pytest.warns(DitaWarning, match="numbers of cond/0, none of uncond/0, which is decided by those of cond/0"):
        MagnitudeGate(table(*[1.0] * 20), 0.1, 2, 0.0, ()).begin(View(replace(view(0).position, branch="uncond")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("cond", "call 0", "pred_cond"):  # one branch, by other names
            MagnitudeGate(table(*[1.0] * 20), 0.1, 2, 0.0, ()).begin(View(replace(view(0).position, branch=name)))
        published = MagnitudeTable.published("flux")
        assert published is not None
        whole = view(0, 28).position
        MagnitudeGate(published, 0.1, 2, 0.0, ()).begin(View(replace(whole, branch="uncond")))


def test_magcache_calibrates_saves_loads_and_refuses_another_model(tmp_path: Any) -> None:
    wan, dit = TINY["wan"], TINY["dit"]
    pipe = wan.build()
    path = tmp_path / "wan.json"
    magcache = dita.calibrate(pipe, "magcache", wan.call, save=path, threshold=0.12)
    assert isinstance(magcache, MagCache) and magcache.table is not None and dita.load_method(path) == magcache
    assert set(magcache.table.values) == {"cond/0", "uncond/0"}
    assert all(len(r) == 8 and r[0] == 1.0 for r in magcache.table.values.values())
    assert len(set(magcache.table.values["cond/0"])) > 4, "real ratios differ from step to step"
    other = dit.build()
    with pytest.raises(DitaError, match="calibrate again"):
        dita.accelerate_pipeline(other, magcache)
    with pytest.raises(DitaError, match="dita.calibrate"):
        dita.accelerate_pipeline(other, "magcache")
    with pytest.raises(DitaError, match="not accelerated"):
        dita.report(other)


def test_magcache_has_flux_ratios_built_in() -> None:
    published = MagnitudeTable.published("flux")
    assert published is not None and len(published.of(view(0).position)) == 28
    pipe = dita.accelerate_pipeline(TINY["flux"].build(), "magcache", threshold=0.24, max_skip=5, retention=0.1)
    with pytest.warns(DitaWarning, match="28 steps"):
        TINY["flux"].call(pipe)
    assert dita.report(pipe).last.reused > 0


def test_calibration_leaves_an_accelerated_pipe_accelerated() -> None:
    pipe = dita.accelerate_pipeline(TINY["dit"].build(), FirstBlockCache.forced())
    magcache = dita.calibrate(pipe, "magcache", TINY["dit"].call)
    assert isinstance(magcache, MagCache) and "fbcache" in dita.report(pipe).methods[0]
    with pytest.raises(DitaError, match="ran no sampling loop"):
        dita.calibrate(pipe, "magcache", lambda p: None)
    with pytest.raises(DitaError, match="no numbers to measure"):
        dita.calibrate(pipe, "fbcache", TINY["dit"].call)


def test_the_first_branch_may_decide_for_all() -> None:
    """A step computed for one guidance branch and reused for the other puts the error on their difference."""
    tiny = TINY["flux-cfg"]
    pipe = dita.accelerate_pipeline(tiny.build(), "dbcache", fn=1, warmup=0, threshold=0.2, follow_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DitaWarning)
        tiny.call(pipe, steps=14)
    records = dita.report(pipe).last.records
    actions = {b: [r.action for r in records if r.branch == b] for b in ("cond", "uncond")}
    assert actions["cond"] == actions["uncond"] and len(actions["cond"]) == 14
    assert all(r.reason.startswith("as the first branch") for r in records if r.branch == "uncond" and r.step > 0)
