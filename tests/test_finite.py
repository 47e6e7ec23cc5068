"""Where a number is not finite the step is computed, once said, and the run goes on as if nothing had been."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import Asked, build, call

import dita
from dita.caching import dbcache, speca
from dita.caching.engine import CacheHandler
from dita.caching.finite import Finite
from dita.caching.storage import Storage
from dita.config import Method

SIX = Asked(6)
METHODS: dict[str, Method] = {
    "fixed": dita.Method.from_json('{"method": "taylorseer", "schema": 1, "settings": {"interval": 2, "warmup": 1}}'),
    "gate": dbcache.FirstBlockCache.forced(),
    "rows": speca.SpeCa.forced(),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_overflows_where_it_is_kept_is_computed(name: str) -> None:
    """Features of 1e7 do not fit in 16 bits; the model itself normalises them away."""
    pipe = build("wan")
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            block.ffn.net[2].weight.mul_(1e7)
    expected = call("wan", pipe, SIX)
    assert expected.isfinite().all()
    dita.accelerate_pipeline(pipe, METHODS[name].replace(keep_as="fp16"))
    with pytest.warns(dita.DitaWarning) as said:
        got = call("wan", pipe, SIX)
    assert torch.equal(got, expected)
    assert len([w for w in said if ": what was kept is not finite at step" in str(w.message)]) == 1
    assert any(record.reason == "what was kept is not finite" for record in dita.report(pipe).last.records)


def test_a_gate_that_meets_nan_computes_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = dita.accelerate_pipeline(build("flux"), dbcache.FirstBlockCache(threshold=1e9, max_consecutive=1))
    plainly, count = dbcache.relative_l1, 0

    def once(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return plainly(new, old) * (float("nan") if count == 2 else 1)

    monkeypatch.setattr(dbcache, "relative_l1", once)
    with pytest.warns(dita.DitaWarning, match="fbcache: its indicator is not finite at step 3"):
        assert call("flux", pipe, SIX).isfinite().all()
    assert [record.action for record in dita.report(pipe).last.records] == [
        "computed", "reused", "computed", "computed", "reused", "computed",
    ]  # fmt: skip


def test_an_error_that_is_nan_does_not_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    """SpeCa skips unless an error is too large, and NaN is never too large."""
    verified = speca.Speculation.verified

    def spoiled(self: Any, *given: Any) -> None:
        verified(self, *given)
        self._error = float("nan")

    monkeypatch.setattr(speca.Speculation, "verified", spoiled)
    pipe = dita.accelerate_pipeline(build("wan"), speca.SpeCa(threshold=1e9, least=1, most=8))
    with pytest.warns(dita.DitaWarning, match="its indicator is not finite"):
        assert call("wan", pipe, SIX).isfinite().all()
    reasons = [record.reason for record in dita.report(pipe).last.records]
    assert "its indicator is not finite" in reasons


def test_disabled_methods_and_finite_features_never_ask_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked on the host is one number a call, and only of a step that would be skipped."""
    asked: list[Finite] = []
    holds = Finite.holds.fget
    assert holds is not None
    monkeypatch.setattr(Finite, "holds", property(lambda self: (asked.append(self), holds(self))[1]))
    pipe = dita.accelerate_pipeline(build("flux"), METHODS["fixed"])
    call("flux", pipe, SIX)
    assert len(asked) == dita.report(pipe).last.reused > 0
    assert isinstance(vars(pipe)["_dita_session"].runtimes[0].handlers[0], CacheHandler)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e5])
def test_one_number_is_enough(value: float) -> None:
    finite = Finite()
    finite.saw([None, torch.ones(3), torch.tensor([1, 2])], Storage())
    finite.end_call()
    assert finite.holds
    finite.saw([torch.tensor([[0.0, value], [1.0, 2.0]])], Storage(precision="fp16"))
    assert finite.holds, "told when the call ends"
    finite.end_call()
    assert not finite.holds and not finite.holds
