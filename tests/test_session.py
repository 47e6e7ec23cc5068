"""Attaching: atomic, replaceable, scoped, on one instance only, with errors that say what to do."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from helpers import CACHING, METHODS, SAMPLING, assert_same_snapshot, configured, plain, snapshot, suitable
from pipelines import TINY
from torch import nn

import dita
from dita.caching import BWCache, DBCache, FirstBlockCache, TaylorSeer
from dita.errors import DitaError, DitaWarning
from dita.patch import Patch
from dita.runtime import ModelRuntime

DIT = TINY["dit"]


def test_the_same_pipe_comes_back_and_classes_stay_untouched() -> None:
    pipe = DIT.build()
    block = type(pipe.transformer.transformer_blocks[0])
    forward, step = block.forward, type(pipe.scheduler).step
    assert dita.accelerate_pipeline(pipe, "taylorseer") is pipe
    assert block.forward is forward and type(pipe.scheduler).step is step
    other = DIT.build()
    assert torch.equal(DIT.call(other), plain("dit")), "another pipe of the class is not accelerated"
    assert dita.restore_pipeline(pipe) is pipe and dita.restore_pipeline(pipe) is pipe


def test_second_call_replaces_the_first() -> None:
    pipe = DIT.build()
    before = snapshot(pipe)
    dita.accelerate_pipeline(pipe, TaylorSeer(interval=2, warmup=1))
    dita.accelerate_pipeline(pipe, TaylorSeer(interval=4, warmup=1))
    DIT.call(pipe)
    assert dita.report(pipe).last.computed_steps == (0, 4)
    assert dita.report(pipe).methods == ("taylorseer(interval=4 warmup=1)",)
    dita.restore_pipeline(pipe)
    before["scheduler"] |= dict.fromkeys(vars(pipe.scheduler).keys() - before["scheduler"].keys())
    assert_same_snapshot(before, snapshot(pipe))


def test_context_manager_restores_what_was_there_before() -> None:
    pipe = DIT.build()
    with dita.accelerated(pipe, "fbcache", threshold=0.2):
        assert "threshold=0.2" in dita.report(pipe).methods[0]
    with pytest.raises(DitaError, match="not accelerated"):
        dita.report(pipe)
    dita.accelerate_pipeline(pipe, BWCache())
    with pytest.raises(KeyError), dita.accelerated(pipe, TaylorSeer()):
        raise KeyError
    assert dita.report(pipe).methods == ("bwcache(default)",)


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        (("taylorsear",), {}, "did you mean taylorseer"),
        (("taylorseer",), {"interva": 3}, "has no setting interva; it has: .*interval"),
        (("taylorseer",), {"interval": 0}, "interval is 0; expected a whole number from 1"),
        (("taylorseer", "fbcache"), {}, "taylorseer and fbcache exclude each other"),
        (("taylorseer", "fbcache"), {"interval": 3}, "configure a single method, but 2"),
        ((DBCache(fn=4),), {}, "has 4: nothing is left to reuse"),
        ((DBCache(fn=2, bn=2),), {}, "2 at the end"),
        ((DBCache(fn=1, bn=9),), {}, "9 at the end"),
        ((3,), {}, "expected a method name or config, got int"),
    ],
)
def test_bad_input_changes_nothing(methods: Any, options: dict[str, Any], message: str) -> None:
    pipe = DIT.build()
    before = snapshot(pipe)
    with pytest.raises(DitaError, match=message):
        dita.accelerate_pipeline(pipe, *methods, **options)
    assert_same_snapshot(before, snapshot(pipe))
    dita.accelerate_pipeline(pipe, FirstBlockCache())
    before = snapshot(pipe)
    with pytest.raises(DitaError, match=message):
        dita.accelerate_pipeline(pipe, *methods, **options)
    assert_same_snapshot(before, snapshot(pipe))


def test_a_failing_hook_rolls_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = DIT.build()
    before = snapshot(pipe)
    applied = 0
    apply = Patch.apply

    def breaks_later(self: Patch) -> None:
        nonlocal applied
        applied += 1
        if applied == 6:
            raise MemoryError("no room")
        apply(self)

    monkeypatch.setattr(Patch, "apply", breaks_later)
    with pytest.raises(MemoryError):
        dita.accelerate_pipeline(pipe, TaylorSeer())
    monkeypatch.undo()
    assert_same_snapshot(before, snapshot(pipe))
    assert torch.equal(DIT.call(pipe), plain("dit"))


@pytest.mark.parametrize("thing", [3, nn.Linear(2, 2), None])
def test_not_a_pipeline(thing: Any) -> None:
    with pytest.raises(DitaError, match="expected a diffusers pipeline"):
        dita.accelerate_pipeline(thing, "taylorseer")


def test_no_transformer() -> None:
    pipe = type("Pipe", (), {"scheduler": None, "components": {"unet": nn.Linear(1, 1), "scheduler": None}})()
    with pytest.raises(DitaError, match=r"it holds unet \(Linear\)"):
        dita.accelerate_pipeline(pipe, "taylorseer")


def test_shared_transformer() -> None:
    one = dita.accelerate_pipeline(DIT.build(), TaylorSeer.forced())
    cls: Any = type(one)
    two = cls(transformer=one.transformer, vae=one.vae, scheduler=type(one.scheduler).from_config(one.scheduler.config))
    two.set_progress_bar_config(disable=True)
    with pytest.raises(DitaError, match="is shared with a DiTPipeline that is already accelerated"):
        dita.accelerate_pipeline(two, "taylorseer")
    assert torch.equal(DIT.call(two), plain("dit")), "calls from a plain pipe that shares the model stay plain"
    same = DIT.call(one)
    assert torch.equal(DIT.call(one), same) and dita.report(one).last.reused == 4


def test_scheduler_may_be_replaced() -> None:
    pipe = dita.accelerate_pipeline(DIT.build(), TaylorSeer(interval=2, warmup=1))
    first = DIT.call(pipe)
    old = pipe.scheduler
    pipe.scheduler = type(old).from_config(old.config)
    assert torch.equal(DIT.call(pipe), first) and dita.report(pipe).last.reused == 4
    assert torch.equal(DIT.call(pipe), first) and len(dita.report(pipe).runs) == 3
    assert "step" not in vars(old) and "step" in vars(pipe.scheduler)
    dita.restore_pipeline(pipe)
    assert "step" not in vars(pipe.scheduler) and torch.equal(DIT.call(pipe), plain("dit"))


def test_a_copied_scheduler_does_not_tick() -> None:
    """LTX2 and others deep-copy their scheduler inside a call."""
    pipe = dita.accelerate_pipeline(DIT.build(), TaylorSeer(interval=4, warmup=1))
    pipe.scheduler.set_timesteps(8)
    twin = copy.deepcopy(pipe.scheduler)
    clock = vars(pipe)["_dita_session"].clock
    sample = torch.ones(1, 4, 8, 8)
    twin.step(sample, twin.timesteps[0], sample)
    assert clock.done == 0
    pipe.scheduler.step(sample, pipe.scheduler.timesteps[0], sample)
    assert clock.done == 1


def test_a_copied_pipeline_is_plain() -> None:
    pipe = dita.accelerate_pipeline(DIT.build(), TaylorSeer.forced())
    fast = DIT.call(pipe)
    twin = copy.deepcopy(pipe)
    assert torch.equal(DIT.call(twin), plain("dit"))
    with pytest.raises(DitaError, match="not accelerated"):
        dita.report(twin)
    dita.accelerate_pipeline(twin, TaylorSeer.forced())
    assert torch.equal(DIT.call(twin), fast) and torch.equal(DIT.call(pipe), fast)
    dita.restore_pipeline(twin)
    assert torch.equal(DIT.call(twin), plain("dit")) and torch.equal(DIT.call(pipe), fast)


def test_calls_outside_a_run_are_plain() -> None:
    pipe = DIT.build()
    inputs = {"timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
    x = torch.ones(1, 4, 8, 8)
    with torch.no_grad():
        expected = pipe.transformer(x, **inputs).sample
        dita.accelerate_pipeline(pipe, TaylorSeer.forced())
        for _ in range(3):
            assert torch.equal(pipe.transformer(x, **inputs).sample, expected)
        DIT.call(pipe)
        assert torch.equal(pipe.transformer(x, **inputs).sample, expected)
    assert len(dita.report(pipe).runs) == 1


def test_signatures_are_what_pipelines_inspect() -> None:
    pipe = DIT.build()
    names = {
        name: list(inspect.signature(getattr(pipe.scheduler, name)).parameters) for name in ("step", "set_timesteps")
    }
    forward = list(inspect.signature(pipe.transformer.forward).parameters)
    dita.accelerate_pipeline(pipe, "taylorseer")
    assert {n: list(inspect.signature(getattr(pipe.scheduler, n)).parameters) for n in names} == names
    assert list(inspect.signature(pipe.transformer.forward).parameters) == forward


def test_offload_hooks_added_before_and_after() -> None:
    """accelerate replaces forward too; ours comes off whoever came last."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    for ours_first in (True, False):
        pipe = DIT.build()
        block = pipe.transformer.transformer_blocks[1]
        if not ours_first:
            add_hook_to_module(block, ModelHook())
        dita.accelerate_pipeline(pipe, BWCache.forced())
        if ours_first:
            add_hook_to_module(block, ModelHook())
        DIT.call(pipe)
        assert dita.report(pipe).last.reused > 0
        dita.restore_pipeline(pipe)
        assert torch.equal(DIT.call(pipe), plain("dit"))
        remove_hook_from_module(block)
        assert torch.equal(DIT.call(pipe), plain("dit"))


def test_nothing_reused_is_said() -> None:
    pipe = dita.accelerate_pipeline(DIT.build(), FirstBlockCache(threshold=1e-9))
    with pytest.warns(DitaWarning, match="0 of 8 steps were reused by fbcache.*: 7 x probe change against 1e-09"):
        DIT.call(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dita.accelerate_pipeline(pipe, FirstBlockCache.disabled())
        DIT.call(pipe)


def test_gradients_are_left_alone_and_said() -> None:
    pipe = dita.accelerate_pipeline(DIT.build(), TaylorSeer.forced())
    pipe.scheduler.set_timesteps(4)
    x = torch.ones(1, 4, 8, 8)
    with pytest.warns(DitaWarning, match="gradients are enabled"):
        for t in pipe.scheduler.timesteps:
            out = pipe.transformer(x, timestep=t[None], class_labels=torch.tensor([1])).sample
            assert out.requires_grad
            pipe.scheduler.step(out[:, :4].detach(), t, x)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method: str) -> None:
    name = "dit" if method not in SAMPLING or "dit" in suitable(method) else "wan"  # both cast what they are given
    pipe = TINY[name].build().to(torch.bfloat16)
    config = configured(method, "forced", name)
    dita.accelerate_pipeline(pipe, config)
    for _ in range(2 if config.across_runs else 1):
        assert TINY[name].call(pipe).isfinite().all()
    assert dita.report(pipe).last.reused > 0 or not config.saves
    if method not in CACHING:
        return
    kept = [
        tensor
        for stream in vars(pipe)["_dita_session"].runtimes[0].handlers[0]._streams.values()
        for history in stream.histories.values()
        for tensor in history.newest
        if tensor is not None
    ]
    assert kept and {tensor.dtype for tensor in kept} == {torch.bfloat16}


def test_default_is_by_family_and_documented() -> None:
    from dita import defaults

    for tiny, threshold in (("flux", 0.08), ("hunyuan", 0.06), ("dit", 0.05)):
        pipe = dita.accelerate_pipeline(TINY[tiny].build())
        (label,) = dita.report(pipe).methods
        assert label.startswith("fbcache(") and vars(pipe)["_dita_session"].methods[0].threshold == threshold
        assert f"{threshold:.2f}" in (defaults.__doc__ or "")


def test_a_skipped_span_that_never_ends_is_an_error() -> None:
    """Skip-layer guidance leaves blocks out; if the last one is left out, nothing would deliver the forecast."""
    pipe = TINY["sd3"].build()
    dita.accelerate_pipeline(pipe, DBCache(fn=1, warmup=0, threshold=1e9))
    last = pipe.transformer.transformer_blocks[-1]

    def left_out(*args: Any, **kwargs: Any) -> Any:
        return kwargs["encoder_hidden_states"], kwargs["hidden_states"]

    def leave_out(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        vars(last)["_compiled_call_impl"] = left_out
        return tensors

    with pytest.raises(DitaError, match="never reached the end"):
        TINY["sd3"].call(pipe, callback_on_step_end=leave_out)
    assert isinstance(vars(pipe)["_dita_session"].runtimes[0], ModelRuntime)


def test_cite() -> None:
    pipe = dita.accelerate_pipeline(DIT.build(), "taylorseer")
    assert dita.cite(pipe).startswith("@inproceedings{liu2025taylorseer")
