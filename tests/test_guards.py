"""Guards that the user puts on any caching method: what they forbid to skip is computed, in full, in every branch."""

from __future__ import annotations

import functools
import json
import warnings
from typing import Any

import pytest
import torch
from helpers import CACHING, THREE, configured, plain
from pipelines import TINY

import dita
from dita.caching import DBCache, Guards, TaylorSeer
from dita.caching.base import CachingMethod
from dita.config import Method
from dita.errors import DitaError

STEPS = 8
PARTIAL = ("bac", "cachequant", "clusca", "duca", "fitted", "foresight", "icc", "qandc", "toca")
"""Methods that run a part of a skipped step, correct what they reuse, or plan ahead."""
IN_TURN = [(method, THREE[i % 3]) for i, method in enumerate(CACHING)]


def guarded(method: str, tiny: str, guards: Any) -> Any:
    """The forced setting with guards; what is fitted to a schedule is measured on the guarded one."""
    config: Any = configured(method, "forced", tiny)
    if method != "qandc":
        return config.replace(guards=guards)
    config = config.replace(guards=guards, table=None)
    return config.calibrated(TINY[tiny].build(), functools.partial(TINY[tiny].call, steps=STEPS))


def run(tiny: str, config: Method) -> tuple[torch.Tensor, Any]:
    """Output and report of one run."""
    pipe = dita.accelerate_pipeline(TINY[tiny].build(), config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*steps were reused", category=dita.DitaWarning)
        output = TINY[tiny].call(pipe)
    return output, dita.report(pipe).last


@pytest.mark.parametrize(("method", "tiny"), IN_TURN)
def test_what_a_guard_forbids_to_skip_is_computed(method: str, tiny: str) -> None:
    _, held = run(tiny, guarded(method, tiny, {"forced": [2, 5 - STEPS], "tail": 1, "max_consecutive": 1}))
    assert held.reused > 0, "and others are still skipped"
    for records in held.streams().values():
        actions = {record.step: record.action for record in records}
        assert all(actions[step] == "computed" for step in (2, 5, 7)), actions
        assert not any(actions[n] != "computed" != actions[n + 1] for n in range(STEPS - 1)), actions


@pytest.mark.parametrize(("method", "tiny"), [pair for pair in IN_TURN if pair[0] in PARTIAL])
def test_a_run_that_is_forced_throughout_is_the_plain_one(method: str, tiny: str) -> None:
    output, held = run(tiny, guarded(method, tiny, {"forced": range(STEPS)}))
    assert held.reused == 0
    if method == "qandc":  # its factors come to 1
        torch.testing.assert_close(output, plain(tiny), rtol=1e-3, atol=1e-3)
    else:
        assert torch.equal(output, plain(tiny))


def test_guards_are_joined_with_the_method_s_own() -> None:
    own = DBCache(warmup=3, max_consecutive=4, guards={"warmup": 1, "max_consecutive": 2, "tail": 1})
    pipe = TINY["flux"].build()
    guards = own.replace(fn=1).cached(dita.anatomy.describe(pipe.transformer)).recipe.guards
    assert guards == Guards(warmup=3, tail=1, max_consecutive=2)


def test_a_correction_is_for_the_head_it_was_fitted_to() -> None:
    method: Any = configured("cachequant", "forced", "dit")
    heads = method.table.values["heads"]
    odd = next(step for step in range(1, STEPS - 1) if step not in heads and step + 1 not in heads)
    output, _ = run("dit", method.replace(guards={"forced": [odd]}))
    uncorrected, _ = run("dit", method.replace(guards={"forced": [odd]}, affine=False))
    table, cut = method.table, {}
    # Without corrections from the forced step to the next head, nothing changes.
    following = min((head for head in heads if head > odd), default=STEPS)
    for name, rows in table.values.items():
        if "," in name:
            cut[name] = tuple(() if odd < step < following else row for step, row in enumerate(rows))
    same, _ = run("dit", method.replace(guards={"forced": [odd]}, table=type(table)({**table.values, **cut}, steps=8)))
    assert torch.equal(output, same) and not torch.equal(output, uncorrected)


def test_a_fit_to_another_schedule_is_refused() -> None:
    method: Any = configured("qandc", "forced", "dit")
    with pytest.raises(DitaError, match="tail:1"):
        dita.accelerate_pipeline(TINY["dit"].build(), method.replace(guards={"tail": 1}))


def test_guards_round_trip_and_name_themselves() -> None:
    method = TaylorSeer(interval=4, guards={"forced": [20, 10, 20], "max_total": 9})
    assert method.label() == "guards=max_total:9,forced:10/20 interval=4"
    assert CachingMethod.from_json(method.to_json()) == method == TaylorSeer.from_json(method.to_json())
    assert json.loads(method.to_json())["settings"]["guards"] == {"max_total": 9, "forced": [10, 20]}
    assert hash(method) == hash(method.replace(guards=Guards(max_total=9, forced=(10, 20))))
    assert TaylorSeer().label() == "default" and TaylorSeer(interval=4) == TaylorSeer(interval=4, guards={})
    old = json.loads(TaylorSeer().to_json())
    del old["settings"]["guards"]
    assert TaylorSeer.from_json(json.dumps(old)) == TaylorSeer()


@pytest.mark.parametrize(
    "wrong", ["tail", {"tails": 1}, {"tail": -1}, {"forced": 3}, {"forced": [1.5]}, {"warmup": "a"}]
)
def test_wrong_guards_are_refused(wrong: Any) -> None:
    with pytest.raises(DitaError, match="guard"):
        TaylorSeer(guards=wrong)
