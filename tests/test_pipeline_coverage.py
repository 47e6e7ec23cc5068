"""docs/pipelines.md: every pipeline it lists is run here, and none of its rows is out of date."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import dita
from dita.caching import EasyCache, TaylorSeer
from dita.clock import RunClock
from dita.grid import channel_axis, token_grid
from dita.loop import Loop, Request

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
coverage: Any = import_module("pipeline_coverage")
TINY_PIPELINES: dict[str, Any] = coverage.TINY_PIPELINES
PAGE = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
SAME = f"diffusers {diffusers.__version__} " in PAGE
KEYS = list(TINY_PIPELINES)
ROWS = [tuple(line.split(" | ")) for line in PAGE.splitlines() if line.startswith("| ") and "| pipeline |" not in line]


@pytest.mark.parametrize("key", KEYS)
def test_a_pipeline_runs_as_the_page_says(key: str) -> None:
    """Every third, and what begins in the middle, is looked at closely; the script does so for all."""
    tiny = TINY_PIPELINES[key]
    ran = coverage.check(tiny, deep=KEYS.index(key) % 3 == 0 or bool(tiny.executed))
    # The page speaks of one version; that pipelines run is tried on any.
    said = [tuple(cell.removeprefix("| ") for cell in row[:4]) for row in ROWS]
    assert not SAME or coverage.cells(ran) in said, f"run {coverage.COMMAND}"


def test_the_page_has_a_row_for_every_entry_and_counts_them() -> None:
    assert sorted(row[0].removeprefix("| ") for row in ROWS) == sorted(KEYS), f"run {coverage.COMMAND}"
    refused = {row[0].removeprefix("| ").split(" (")[0] for row in ROWS if row[3] == "none"}
    classes = {tiny.name for tiny in TINY_PIPELINES.values()}
    assert len(classes - refused) >= 40 and f"{len(classes - refused)} pipeline classes of diffusers" in PAGE
    missing = [line[2:].split(" (")[0] for line in PAGE.splitlines() if line.startswith("- ")]
    assert not SAME or missing == coverage.uncovered(), f"run {coverage.COMMAND}"
    assert not SAME or f"exports {len(classes) + len(missing)} pipelines" in PAGE


@pytest.mark.parametrize("key", ["FluxControlNetPipeline", "HiDreamImagePipeline", "ZImagePipeline"])
def test_two_samples_run_one_by_one_as_they_do_together(key: str) -> None:
    """Residuals of a ControlNet, text whose second axis is the batch, latents in a list."""
    assert coverage.samples_apart(TINY_PIPELINES[key])


def test_pipelines_that_step_copies_of_their_scheduler_are_refused() -> None:
    pipe = TINY_PIPELINES["SkyReelsV2DiffusionForcingPipeline"].build()
    before = dict(vars(pipe.scheduler)), dict(vars(pipe.transformer))
    with pytest.raises(dita.DitaError, match="cannot be accelerated: it steps every frame with a copy"):
        dita.accelerate_pipeline(pipe)
    with pytest.raises(dita.DitaError, match="steps every frame with a copy"):
        dita.supports(pipe)
    assert (dict(vars(pipe.scheduler)), dict(vars(pipe.transformer))) == before


@pytest.mark.parametrize("name", ["StableUnCLIPPipeline", "UnCLIPPipeline"])
def test_priors_with_a_scheduler_of_their_own_are_refused(name: str) -> None:
    kind = type(name, (getattr(diffusers, name),), {"__init__": lambda self: None})
    with pytest.raises(dita.DitaError, match="the scheduler named prior_scheduler"):
        dita.accelerate_pipeline(kind())


def test_a_step_that_is_taken_back_counts_once() -> None:
    """As Cosmos does to learn the clean sample."""
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    clock = RunClock(lambda: scheduler, lambda: None, lambda: None)
    clock.attach()
    scheduler.set_timesteps(3)
    steps = []
    for timestep in scheduler.timesteps:
        position = clock.position(0, "cond")
        assert position is not None
        steps.append((position.step, position.steps, round(position.timestep) == round(float(timestep))))
        scheduler.step(torch.zeros(1, 4), timestep, torch.ones(1, 4))
        assert scheduler._step_index is not None
        scheduler._step_index -= 1
        scheduler.step(torch.zeros(1, 4), timestep, torch.ones(1, 4))
    assert steps == [(0, 3, True), (1, 3, True), (2, 3, True)] and not clock.running


def test_a_list_of_timesteps_that_ends_with_its_goal() -> None:
    """Sana Sprint's scheduler lists one more than it executes: the last step is still the last."""
    scheduler: Any = diffusers.SCMScheduler()
    finished: list[bool] = []
    clock = RunClock(lambda: scheduler, lambda: None, lambda: finished.append(True))
    clock.attach()
    scheduler.set_timesteps(3, intermediate_timesteps=None)
    for timestep in scheduler.timesteps[:-1]:
        position = clock.position(0, None)
        assert position is not None and position.steps == 3
        scheduler.step(torch.zeros(1, 4, 2, 2), timestep, torch.ones(1, 4, 2, 2))
    assert finished == [True] and not clock.running


@pytest.mark.parametrize(
    "key", ["FluxFillPipeline", "FluxControlPipeline", "CogVideoXImageToVideoPipeline", "Kandinsky5I2VPipeline"]
)
def test_conditions_beside_the_latents_are_left_out_of_their_change(key: str) -> None:
    """Their channels stand last, or after the frames, and the output has fewer than the input."""
    tiny = TINY_PIPELINES[key]
    pipe = dita.accelerate_pipeline(tiny.build(), EasyCache.forced())
    output, run = tiny.call(pipe), dita.report(pipe).last
    assert output.isfinite().all() and 0 < run.reused < len(run.records)


def test_kandinsky_has_channels_last() -> None:
    pipe = TINY_PIPELINES["Kandinsky5T2VPipeline"].build()
    latents = torch.zeros(1, 3, 8, 12, 4)
    assert channel_axis(pipe.transformer, latents) == 4
    assert token_grid(pipe.transformer, {}, latents) == (3, 4, 6)


class Scales(Loop):
    """Remembers the guidance scale that each call is said to have."""

    def __init__(self) -> None:
        self.seen: list[float | None] = []

    def model(self, request: Request, run: Any) -> Any:
        self.seen.append(request.scale)
        return run(request)


def test_a_scale_that_changes_from_step_to_step_is_known_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, watch, used = TINY_PIPELINES["CogVideoXPipeline (dynamic guidance)"], Scales(), []
    monkeypatch.setattr(TaylorSeer, "loop", lambda self, anatomies, pipe: watch)
    pipe = dita.accelerate_pipeline(tiny.build(), TaylorSeer.disabled())
    tiny.call(pipe, callback_on_step_end=lambda p, *_: used.append(p.guidance_scale) or {})
    assert len(set(used)) == tiny.steps and watch.seen == pytest.approx(used)


def test_two_experts_keep_apart() -> None:
    tiny = TINY_PIPELINES["WanPipeline (two experts)"]
    pipe = dita.accelerate_pipeline(tiny.build(), TaylorSeer(interval=8, warmup=1))
    tiny.call(pipe)
    actions = [(r.model, r.action) for r in dita.report(pipe).last.records if r.branch == "cond"]
    assert {m for m, a in actions if a == "computed"} == {"transformer", "transformer_2"}
    assert [a for _, a in actions].count("computed") == 2 and len(actions) == tiny.steps
