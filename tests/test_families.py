"""Every method on every supported family, on real pipeline classes with tiny weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    ACROSS_RUNS,
    CACHING,
    INSIDE,
    SAMPLING,
    THREE,
    assert_same_snapshot,
    configured,
    plain,
    ran,
    snapshot,
    suitable,
)
from pipelines import TINY

import dita
from dita import registry
from dita.anatomy import describe
from dita.caching import FirstBlockCache, TaylorSeer
from dita.kernels.sparse import AdaSpa

OTHERS = [name for name in TINY if name not in THREE]
VIDEO = ("cogvideox", "hunyuan", "ltx", "mochi")
IMAGE = [name for name in OTHERS if name not in VIDEO]
LOOPS = ("flux-cfg", "sd3-heun", "wan-2")
"""They differ from another one in their loop alone, which tries the clock more than the method."""
MODELS = [name for name in OTHERS if name not in (*LOOPS, "flux-img2img")]  # that one has a test of its own below
# Of models and loops each caching method takes some in turn; those inside a layer were made for video. What reduces
# tokens is tried on every model in test_reduction.
PAIRS = (
    [
        (m, t)
        for i, m in enumerate(CACHING)
        for t in (MODELS[i % len(MODELS)], MODELS[(i + 3) % len(MODELS)], LOOPS[i % len(LOOPS)])
    ]
    + [
        (m, t)
        for i, m in enumerate(INSIDE)
        if "reduction" not in registry.get(m).__module__
        for t in (VIDEO[i % 4], VIDEO[(i + 1) % 4], IMAGE[i % len(IMAGE)])
    ]
    + [
        (m, fit[(2 * i + k) % len(fit)])
        for i, m in enumerate(SAMPLING)
        if m not in ACROSS_RUNS and (fit := [t for t in suitable(m) if t not in THREE])
        for k in range(min(3, len(fit)))
    ]
)


@pytest.mark.parametrize(("method", "tiny"), PAIRS)
def test_skips_and_comes_off(method: str, tiny: str) -> None:
    steps = 8 if tiny in ("wan-2", "flux-img2img") else 6  # a run of two models, and one that begins in the middle
    pipe = TINY[tiny].build()
    before = snapshot(pipe)
    dita.accelerate_pipeline(pipe, configured(method, "forced", tiny, steps))
    output = TINY[tiny].call(pipe, steps=steps)
    run = dita.report(pipe).last
    assert output.isfinite().all() and not torch.equal(output, plain(tiny, steps=steps))
    assert run.finished and (0 < run.reused < len(run.records) or not registry.get(method).saves)
    dita.restore_pipeline(pipe)
    assert_same_snapshot(before, snapshot(pipe), ran(tiny))
    assert torch.equal(TINY[tiny].call(pipe, steps=steps), plain(tiny, steps=steps))


@pytest.mark.parametrize("tiny", OTHERS)
def test_disabled_hooks_change_nothing(tiny: str) -> None:
    """One method per seam: hooks on every module, on every block with a probe, on every attention."""
    pipe = TINY[tiny].build()
    for config in (TaylorSeer.disabled(), FirstBlockCache.disabled(), AdaSpa.disabled()):
        with dita.accelerated(pipe, config):
            assert torch.equal(TINY[tiny].call(pipe), plain(tiny)), config.name


@pytest.mark.parametrize("tiny", TINY)
def test_declared_entries_agree_with_discovery(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table says nothing that the source of the ten families would not tell."""
    model = TINY[tiny].build().components["transformer"]
    declared = describe(model)
    monkeypatch.setattr("dita.discovery.MODELS", {})
    monkeypatch.setattr("dita.discovery.BLOCKS", {})
    discovered = describe(model)
    assert discovered.family == "" and declared.family
    assert [(b.path, b.entry.returns) for b in discovered.blocks] == [
        (b.path, b.entry.returns) for b in declared.blocks
    ]
    assert [p.site for p in discovered.modules] == [p.site for p in declared.modules]


@pytest.mark.parametrize(
    ("tiny", "branches"),
    [
        ("dit", {"all"}), ("sd3", {"all"}), ("flux", {"cond"}), ("flux-cfg", {"cond", "uncond"}),
        ("wan", {"cond", "uncond"}), ("qwen", {"cond", "uncond"}), ("ltx", {"cond_uncond"}),
    ],
)  # fmt: skip
def test_branches_are_named(tiny: str, branches: set[str]) -> None:
    pipe = dita.accelerate_pipeline(TINY[tiny].build(), FirstBlockCache.forced())
    TINY[tiny].call(pipe)
    assert {record.branch for record in dita.report(pipe).last.records} == branches


def test_heun_keeps_a_stream_per_stage() -> None:
    pipe = dita.accelerate_pipeline(TINY["sd3-heun"].build(), TaylorSeer(interval=3, warmup=1))
    TINY["sd3-heun"].call(pipe, steps=8)
    run = dita.report(pipe).last
    assert run.steps == 8 and len(run.records) == 15
    computed = {s: [r.step for r in run.records if r.stage == s and r.action == "computed"] for s in (0, 1)}
    assert computed == {0: [0, 3, 6], 1: [0, 3, 6]}, "the interval counts solver steps, not evaluations"


@pytest.mark.parametrize("method", CACHING[::2])
def test_image_to_image_with_every_method(method: str) -> None:
    strength, steps = 0.6, 5  # AdaCache always computes four
    tiny = TINY["flux-img2img"]
    pipe = tiny.build()
    config = configured(method, "forced", "flux-img2img")
    base = tiny.call(pipe, strength=strength)
    dita.accelerate_pipeline(pipe, config)
    first = tiny.call(pipe, strength=strength)
    run = dita.report(pipe).last
    assert run.finished and run.steps == steps and run.computed_steps[0] == 0 and run.reused > 0
    assert not torch.equal(first, base) and torch.equal(tiny.call(pipe, strength=strength), first)
    dita.restore_pipeline(pipe)
    assert torch.equal(tiny.call(pipe, strength=strength), base)


@pytest.mark.parametrize(("strength", "steps"), [(0.3, 3), (0.7, 6)])
def test_image_to_image_counts_executed_steps(strength: float, steps: int) -> None:
    tiny = TINY["flux-img2img"]
    pipe = tiny.build()
    base = tiny.call(pipe, strength=strength)
    positions: list[Any] = []
    dita.accelerate_pipeline(pipe, TaylorSeer(interval=2, warmup=1))
    handler = vars(pipe)["_dita_session"].runtimes[0].handlers[0]
    begin = handler.begin_call
    handler.begin_call = lambda call: (positions.append(call.position), begin(call))
    output = tiny.call(pipe, strength=strength)
    run = dita.report(pipe).last
    assert run.steps == steps and run.computed_steps == tuple(range(0, steps, 2))
    assert [p.index for p in positions] == list(range(8 - steps, 8)) and {p.schedule_length for p in positions} == {8}
    assert output.isfinite().all() and not torch.equal(output, base)


def test_second_expert_starts_afresh() -> None:
    pipe = dita.accelerate_pipeline(TINY["wan-2"].build(), TaylorSeer(interval=8, warmup=1))
    TINY["wan-2"].call(pipe)
    firsts: dict[str, str] = {}
    for record in dita.report(pipe).last.records:
        firsts.setdefault(f"{record.model} {record.branch}", record.action)
    assert len(firsts) == 4 and set(firsts.values()) == {"computed"}, firsts
