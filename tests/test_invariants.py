"""What every registered method must keep, on DiT (batched guidance), Flux (distilled) and Wan (sequential)."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from helpers import (
    ACROSS_RUNS,
    CACHING,
    HANDLERS,
    IN_TURN,
    INSIDE,
    ON_THREE,
    SAMPLING,
    STEPPED,
    THREE,
    assert_same_snapshot,
    configured,
    plain,
    snapshot,
)
from pipelines import TINY

import dita
from dita import registry

on_some = pytest.mark.parametrize(("method", "tiny"), ON_THREE)
# What comes between runs tries the runtime more than the method: each method on one of the three.
in_turn = pytest.mark.parametrize(("method", "tiny"), IN_TURN)


def build(method: str, tiny: str, kind: str = "forced") -> Any:
    pipe = TINY[tiny].build()
    return dita.accelerate_pipeline(pipe, configured(method, kind, tiny))


@on_some
def test_disabled_is_bit_identical(method: str, tiny: str) -> None:
    pipe = build(method, tiny, "disabled")
    assert torch.equal(TINY[tiny].call(pipe), plain(tiny))
    run = dita.report(pipe).last
    assert run.reused == 0 and run.steps == 8 and len(run.records) == 8 * TINY[tiny].branches


@on_some
def test_forced_skips_and_restores(method: str, tiny: str) -> None:
    pipe = TINY[tiny].build()
    config = configured(method, "forced", tiny)
    TINY[tiny].call(pipe)
    before = snapshot(pipe)
    weights = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    dita.accelerate_pipeline(pipe, config)
    if method in ACROSS_RUNS:
        TINY[tiny].call(pipe, seed=3)
    output = TINY[tiny].call(pipe)
    run = dita.report(pipe).last
    assert run.finished and len(run.records) > 0
    if config.saves:
        assert run.steps <= 8 and 0 < run.reused < len(run.records)
    assert all(record.reason for record in run.records)
    assert run.peak_cache_bytes > 0 or method not in CACHING
    assert output.isfinite().all() and not torch.equal(output, plain(tiny))
    dita.restore_pipeline(pipe)
    assert_same_snapshot(before, snapshot(pipe))
    state = pipe.transformer.state_dict()
    assert list(state) == list(weights) and all(torch.equal(state[k], v) for k, v in weights.items())
    assert torch.equal(TINY[tiny].call(pipe), plain(tiny))


@in_turn
def test_same_seed_same_output_whatever_came_between(method: str, tiny: str) -> None:
    call = TINY[tiny].call
    pipe = build(method, tiny)
    bound = getattr(registry.get(method), "bound", False)
    first = call(pipe)
    if method in ACROSS_RUNS:
        second = call(pipe)
        dita.accelerate_pipeline(pipe, configured(method, "forced", tiny))
        assert torch.equal(call(pipe), first) and torch.equal(call(pipe), second), "attached anew"
        return
    assert torch.equal(call(pipe), first), "twice in a row"
    if method in INSIDE and method not in HANDLERS:
        call(pipe, batch=2)
        assert torch.equal(call(pipe), first), "after another batch size"
        return
    if method in STEPPED:
        with pytest.raises(dita.DitaError, match="of 8 steps, and this run has 11"):
            call(pipe, steps=11)
    else:
        with pytest.warns(dita.DitaWarning) if bound else _nothing():
            call(pipe, steps=11)
    call(pipe, batch=2)
    assert torch.equal(call(pipe), first), "after another number of steps and another batch size"
    if tiny != "dit":  # DiTPipeline has one resolution
        with pytest.warns(dita.DitaWarning) if bound else _nothing():
            call(pipe, size="large")
        assert torch.equal(call(pipe), first), "after another resolution"


@pytest.mark.parametrize(("method", "tiny"), [pair for pair in IN_TURN if pair[0] not in ACROSS_RUNS])
def test_exception_in_the_middle_leaves_nothing(method: str, tiny: str) -> None:
    call = TINY[tiny].call
    pipe = build(method, tiny)
    first = call(pipe)
    step, count = pipe.scheduler.step, 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            raise RuntimeError("the lamp went out")
        return step(*args, **kwargs)

    hooked = vars(pipe.scheduler)["step"]
    vars(pipe.scheduler)["step"] = broken
    with pytest.raises(RuntimeError, match="lamp"):
        call(pipe, seed=3)
    vars(pipe.scheduler)["step"] = hooked
    assert torch.equal(call(pipe), first)
    assert [run.finished for run in dita.report(pipe).runs] == [True, False, True]


THREADED = [(m, THREE[i % 3]) for i, m in enumerate((*CACHING[::2], *HANDLERS))] + [
    (m, t) for m, t in IN_TURN if m in SAMPLING and m not in ACROSS_RUNS
]


@pytest.mark.parametrize(("method", "tiny"), THREADED)
def test_two_pipes_interleaved_and_in_threads(method: str, tiny: str) -> None:
    call = TINY[tiny].call
    one, two = build(method, tiny), build(method, tiny)
    first, second = call(one, seed=1), call(two, seed=2)
    results: dict[str, torch.Tensor] = {}

    def work(name: str, pipe: Any, seed: int) -> None:
        results[name] = call(pipe, seed=seed)

    threads = [threading.Thread(target=work, args=job) for job in (("one", one, 1), ("two", two, 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results["one"], first) and torch.equal(results["two"], second)
    dita.restore_pipeline(one)
    assert torch.equal(call(two, seed=2), second), "restoring one pipe changed the other"
    assert torch.equal(call(one), plain(tiny))


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...
