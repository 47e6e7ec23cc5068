"""Whether a pipeline of diffusers runs as it should with dita: plain, accelerated, and restored."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from diffusers.utils import logging
from tiny_models.sampling import Counted, counting

import dita
from dita.caching import EasyCache, FirstBlockCache, TaylorSeer
from dita.config import Method
from dita.reporting import RunReport, StepRecord
from tiny_pipelines.base import TinyPipeline

FORECAST = TaylorSeer(interval=2, warmup=1)
"""The forecast at a fixed interval: every other step is computed."""


@dataclass(frozen=True)
class Ran:
    """What one pipeline did.

    Attributes:
        tiny: the entry.
        seams: that its transformer offers; () if it was refused.
        default: share of the transformer's calls that the default recipe computed.
        forecast: the same for the forecast.
        refusal: why it was refused; "" if it was not.
    """

    tiny: TinyPipeline
    seams: tuple[str, ...]
    default: float = 1.0
    forecast: float = 1.0
    refusal: str = ""


def check(tiny: TinyPipeline, deep: bool = True) -> Ran:
    """Run one pipeline plain, with the default recipe, with a forecast, and restored.

    Args:
        tiny: which.
        deep: run each recipe twice, to see that the second run is the first.

    Raises:
        AssertionError: an output was not finite, not the same twice, or not restored; nothing was left out; or the
            schedule was not counted from the loop's own steps.
    """
    with _quiet():
        return _check(tiny, deep)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the pipelines say: it is not at stake."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def samples_apart(tiny: TinyPipeline) -> bool | None:
    """Whether a pipeline that makes two samples a call makes the same ones when they are run one by one.

    Args:
        tiny: which.

    Returns:
        None if the pipeline is refused, or makes one sample a call from the inputs of its entry.
    """
    with _quiet():
        return _samples_apart(tiny)


def _samples_apart(tiny: TinyPipeline) -> bool | None:
    pipe = tiny.build()
    found = _of_two(tiny, pipe)
    if found is None:
        return None
    plain, inputs = found
    try:
        dita.accelerate_pipeline(pipe, FirstBlockCache.disabled(), per_sample=True)
    except dita.DitaError:
        return None
    output = tiny.call(pipe, steps=2, **inputs)
    named = {record.branch.partition("[")[2] for record in dita.report(pipe).last.records}
    same = output.shape == plain.shape and (output - plain).abs().max() < 1e-3 * plain.abs().max()
    return bool(same) and named >= {"0]", "1]"}


def _of_two(tiny: TinyPipeline, pipe: Any) -> tuple[torch.Tensor, dict[str, Any]] | None:
    """The plain output of two samples a call, and what asks for them: a number, or every embedding and mask twice."""
    given, counts = tiny.inputs(), ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
    single = {n: v for n, v in given.items() if isinstance(v, torch.Tensor) and _of_text(n) and len(v) == 1}
    twice = {name: torch.cat([value, value]) for name, value in single.items()}
    asked = {name: 2 for name in counts if name in signature(type(pipe).__call__).parameters}
    count = len(tiny.call(pipe, steps=2))
    for inputs in filter(None, (asked, twice)):
        try:
            plain = tiny.call(pipe, steps=2, **inputs)
        except (AssertionError, RuntimeError, TypeError, ValueError):
            continue  # pipelines that do not repeat the masks they are given fail where they join them
        if len(plain) == 2 * count:
            return plain, inputs
    return None


def _of_text(name: str) -> bool:
    return "embed" in name or "attention_mask" in name


def _check(tiny: TinyPipeline, deep: bool) -> Ran:
    pipe = tiny.build()
    models = [pipe.components[name] for name in tiny.holds]
    with counting(torch.nn.ModuleList(models), attention=False) as whole:
        plain = tiny.call(pipe)
    assert plain.isfinite().all() and plain.std() > 0, tiny.key
    try:
        dita.accelerate_pipeline(pipe)
    except dita.DitaError as refusal:
        assert torch.equal(tiny.call(pipe), plain), tiny.key
        return Ran(tiny, (), refusal=str(refusal))
    default, _ = _accelerated(tiny, pipe, plain, deep)
    dita.accelerate_pipeline(pipe, FORECAST)
    forecast, count = _accelerated(tiny, pipe, plain, deep)
    _check_forecast(tiny, forecast, count, whole)
    if tiny.executed and deep:
        _check_tail(tiny, pipe, plain)
    dita.restore_pipeline(pipe)
    assert torch.equal(tiny.call(pipe), plain), tiny.key
    supported = dita.supports(pipe, FORECAST)
    seams = tuple(seam for seam, (there, _) in supported.seams.items() if there)
    return Ran(tiny, seams, default.computed_fraction, forecast.computed_fraction)


def _accelerated(tiny: TinyPipeline, pipe: Any, plain: torch.Tensor, twice: bool) -> tuple[RunReport, Counted]:
    models = torch.nn.ModuleList([pipe.components[name] for name in tiny.holds])
    with counting(models, attention=False) as count:
        output = tiny.call(pipe)
    run = dita.report(pipe).last
    assert output.shape == plain.shape and output.isfinite().all(), tiny.key
    assert run.finished and run.steps == (tiny.executed or tiny.steps), (tiny.key, run)
    assert torch.equal(output, plain) == (run.reused == 0), (tiny.key, run)
    if twice:
        assert torch.equal(tiny.call(pipe), output), tiny.key
        again = dita.report(pipe).last
        assert [r.action for r in again.records] == [r.action for r in run.records], tiny.key
    return run, count


def _check_forecast(tiny: TinyPipeline, run: RunReport, count: Counted, whole: Counted) -> None:
    """It left out work, and began anew for every transformer and branch."""
    assert 0 < run.reused < len(run.records) and count.modules < whole.modules, (tiny.key, run, count, whole)
    streams: dict[tuple[str, str, int], list[StepRecord]] = {}
    for record in run.records:
        streams.setdefault((record.model, record.branch, record.stage), []).append(record)
    assert {model for model, _, _ in streams} == set(tiny.holds), (tiny.key, streams)
    for stream, records in streams.items():
        assert records[0].action == "computed", (tiny.key, stream)
        begin = records[0].step
        assert [r.step for r in records] == list(range(begin, begin + len(records))), (tiny.key, stream)


def _check_tail(tiny: TinyPipeline, pipe: Any, plain: torch.Tensor) -> None:
    """Of a loop that begins in the middle, a method that computes the last step computes it."""
    method: Method = EasyCache.forced()
    dita.accelerate_pipeline(pipe, method)
    run, _ = _accelerated(tiny, pipe, plain, twice=False)
    last = [r for r in run.records if r.step == run.steps - 1]
    assert run.reused > 0 and last and all(r.action == "computed" for r in last), (tiny.key, run)
