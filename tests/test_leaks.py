"""Nothing piles up over many runs, nothing is kept that the report does not count, and pipelines run side by side."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import CACHING
from small import SCHEDULERS, Asked, Setting, build, call, plain, quietly

import dita
from dita.errors import DitaError

SLACK = 4096
"""Bytes of small tensors that no report counts: latents, indices, a method's own numbers."""


@pytest.fixture(autouse=True, scope="module")
def newcomers() -> Iterator[None]:
    """What was there before these tests is not looked at: looking at all of torch takes a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive() -> tuple[int, int]:
    """How many tensors are alive, but for weights, and the bytes of their storages."""
    gc.collect()
    kinds = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and type(o) is not torch.nn.Parameter)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kinds}
    return len(held), sum(held.values())


RECIPES: tuple[tuple[Setting, ...], ...] = (
    (Setting("taylorseer"),),
    (Setting("fbcache"), Setting("adaspa")),
    (Setting("teacache", keep="bf16"), Setting("cfg-cache")),
    (Setting("hyca", keep="host"),),
    (Setting("toca"), Setting("guidance-interval")),
    (Setting("sada-token"),),
    (Setting("easycache", keep="budget"), Setting("tome")),
    (Setting("fitted"), Setting("adaptive-guidance")),
    (Setting("sada"),),
    (Setting("progressive-resolution"), Setting("bwcache")),
)


def test_300_runs_leave_nothing() -> None:
    pipe = build("wan")
    asked = Asked(2)

    def cycle() -> int:
        runs = 0
        for recipe in RECIPES:
            dita.accelerate_pipeline(pipe, *(setting.config("wan") for setting in recipe))
            for what in ("run", "broken", "run"):
                handle = None
                if what == "broken":
                    handle = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
                try:
                    call("wan", pipe, asked)
                except (Lamp, DitaError):
                    assert what == "broken"
                finally:
                    if handle is not None:
                        handle.remove()
                runs += 1
            dita.restore_pipeline(pipe)
        return runs

    with quietly():
        cycle()
        before, objects, runs = alive(), len(gc.get_objects()), 0
        while runs < 300:
            runs += cycle()
        after, grown = alive(), len(gc.get_objects()) - objects
    assert runs == 300 and after == before
    assert grown < 300, "less than an object a run"


class Lamp(RuntimeError):
    """Went out."""


def fail(*_: Any) -> None:
    raise Lamp


@pytest.mark.parametrize("name", CACHING[::3])
def test_what_is_kept_after_a_run_is_what_the_report_counts(name: str) -> None:
    config = Setting(name).config("wan")
    pipe, asked = build("wan"), Asked(5)  # as many steps as a setting is calibrated with
    call("wan", pipe, asked)
    before = alive()[1]
    with quietly():
        dita.accelerate_pipeline(pipe, config)
        call("wan", pipe, asked)
        call("wan", pipe, asked)
    counted = vars(pipe)["_dita_session"].runtimes[0].bytes_held()
    assert alive()[1] - before <= 1.1 * counted + SLACK and counted <= dita.report(pipe).last.peak_cache_bytes
    dita.restore_pipeline(pipe)
    assert alive()[1] <= before + 256


FOUR = {
    "dit": (Setting("taylorseer"),),
    "flux": (Setting("dbcache"), Setting("adaspa")),
    "sd3": (Setting("teacache"), Setting("cfg-cache")),
    "wan": (Setting("easycache"), Setting("guidance-interval")),
}


def test_four_pipelines_in_four_threads() -> None:
    pipes = {tiny: build(tiny) for tiny in FOUR}
    for tiny, recipe in FOUR.items():
        dita.accelerate_pipeline(pipes[tiny], *(setting.config(tiny) for setting in recipe))
    asked = [Asked(5, seed) for seed in range(3)]
    alone = {tiny: [call(tiny, pipe, a) for a in asked] for tiny, pipe in pipes.items()}
    together: dict[str, list[torch.Tensor]] = {}
    start = threading.Barrier(4)

    def work(tiny: str) -> None:
        start.wait()
        together[tiny] = [call(tiny, pipes[tiny], a) for a in asked]

    threads = [threading.Thread(target=work, args=(tiny,)) for tiny in FOUR]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tiny in FOUR:
        assert all(torch.equal(one, two) for one, two in zip(alone[tiny], together[tiny], strict=True)), tiny
        assert not torch.equal(alone[tiny][0], plain(tiny, 0, asked[0])[0]), "something was skipped"


def test_one_transformer_in_two_pipelines_used_in_turn() -> None:
    one = build("wan")
    two: Any = type(one)(**{**one.components, "scheduler": SCHEDULERS["wan"][1]()})
    two.set_progress_bar_config(disable=True)
    first, second = Setting("taylorseer").config("wan"), Setting("easycache").config("wan")
    results: list[list[torch.Tensor]] = []
    for _ in range(2):
        with dita.accelerated(one, first):
            fast = [call("wan", one, Asked(5)), call("wan", two, Asked(5)), call("wan", one, Asked(5))]
            assert torch.equal(fast[0], fast[2]) and torch.equal(fast[1], plain("wan", 1, Asked(5))[0])
        with dita.accelerated(two, second):
            other = [call("wan", two, Asked(5)), call("wan", one, Asked(5))]
            assert torch.equal(other[1], plain("wan", 0, Asked(5))[0])
        results.append([fast[0], other[0]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0], plain("wan", 0, Asked(5))[0])
    assert not torch.equal(results[0][1], plain("wan", 1, Asked(5))[0])
