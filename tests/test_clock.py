"""The run clock on real schedulers, driven by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dita.clock import MAX_BRANCHES, RunClock
from dita.seams import Position


def attached(scheduler: Any) -> tuple[RunClock, dict[str, int]]:
    events = {"started": 0, "finished": 0}

    def count(name: str) -> None:
        events[name] += 1

    holder = SimpleNamespace(scheduler=scheduler)
    clock = RunClock(lambda: holder.scheduler, lambda: count("started"), lambda: count("finished"))
    clock.attach()
    return clock, events


def drive(clock: RunClock, scheduler: Any, begin: int = 0) -> list[tuple[int, int, int, int]]:
    """Run the loop of an image-to-image pipeline; returns (step, stage, index, local_step) per model call."""
    sample = torch.ones(1, 4, 4, 4)
    places = []
    for timestep in scheduler.timesteps[begin:]:
        position = clock.position(0, None)
        assert position is not None
        places.append((position.step, position.stage, position.index, position.local_step))
        scheduler.step(sample * 0.1, timestep, sample)
    return places


@pytest.mark.parametrize(
    "cls", [DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler]
)
def test_one_call_per_step(cls: Any) -> None:
    scheduler = cls()
    clock, events = attached(scheduler)
    for steps in (5, 3):
        scheduler.set_timesteps(steps)
        assert clock.steps == steps
        assert drive(clock, scheduler) == [(n, 0, n, n) for n in range(steps)]
        assert not clock.running and clock.position(0, None) is None
    assert events == {"started": 2, "finished": 2}


@pytest.mark.parametrize("cls", [HeunDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_heun_has_two_stages(cls: Any) -> None:
    scheduler = cls()
    clock, events = attached(scheduler)
    scheduler.set_timesteps(4)
    assert clock.steps == 4
    assert [p[:2] for p in drive(clock, scheduler)] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    assert events["finished"] == 1


@pytest.mark.parametrize("cls", [DDIMScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("return_dict", [True, False])
def test_finished_steps_may_be_corrected(cls: Any, return_dict: bool) -> None:
    """Once per solver step, after its last stage; what the scheduler returns besides the latents stays."""
    scheduler, plain, seen = cls(), cls(), []

    def on_step(model: int, position: Position, latents: torch.Tensor) -> torch.Tensor:
        seen.append((model, position.step, position.index, position.branch))
        return latents if position.step == 1 else latents + 1

    clock = RunClock(lambda: scheduler, lambda: None, lambda: None, on_step)
    clock.attach()
    sample = torch.ones(1, 4, 4, 4)
    for each in (scheduler, plain):
        each.set_timesteps(3)
    corrected = []
    for timestep in scheduler.timesteps:
        assert clock.position(3, None) is not None
        new, old = (s.step(sample * 0.1, timestep, sample, return_dict=return_dict) for s in (scheduler, plain))
        assert len(new) == len(old) and (not return_dict or torch.equal(new.prev_sample, new[0]))
        corrected.append(torch.equal(new[0], old[0] + 1))
        assert corrected[-1] or torch.equal(new[0], old[0])
    assert corrected == ([True, False, True] if cls is DDIMScheduler else [False, True, False, False, True])
    assert seen == [(3, n, n, "") for n in range(3)]


def test_begin_is_read_from_set_begin_index() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    clock, events = attached(scheduler)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(6)
    assert clock.steps == 4
    assert drive(clock, scheduler, begin=6) == [(n, 0, 6 + n, n) for n in range(4)]
    assert events["finished"] == 1


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler])
def test_begin_is_found_at_the_first_step(cls: Any) -> None:
    """Schedulers that are told nothing start where their first timestep says."""
    scheduler = cls()
    clock, events = attached(scheduler)
    scheduler.set_timesteps(10)
    places = drive(clock, scheduler, begin=7)
    assert places[1:] == [(1, 0, 8, 1), (2, 0, 9, 2)]
    assert clock.steps == 3 and events["finished"] == 1


def test_begin_with_another_argument_order() -> None:
    scheduler = CogVideoXDPMScheduler()
    clock, _ = attached(scheduler)
    scheduler.set_timesteps(6)
    times, sample = scheduler.timesteps, torch.ones(1, 2, 4, 4, 4)
    step: Any = scheduler.step
    step(sample, None, times[4], None, sample)
    assert clock.begin == 4


def test_branches_and_strangers() -> None:
    scheduler = DDIMScheduler()
    clock, _ = attached(scheduler)
    assert clock.position(0, None) is None, "no run yet"
    scheduler.set_timesteps(3)
    named = [clock.position(0, name) for name in ("cond", "uncond", "cond")]
    assert [p.branch if p else None for p in named] == ["cond", "uncond", None]
    unnamed = [clock.position(1, None) for _ in range(MAX_BRANCHES + 1)]
    assert [p.branch if p else None for p in unnamed] == ["call 0", "call 1", "call 2", "call 3", None]


def test_second_model_has_its_own_first_step() -> None:
    scheduler: Any = DDIMScheduler()
    clock, _ = attached(scheduler)
    scheduler.set_timesteps(4)
    sample, local = torch.ones(1, 4, 4, 4), []
    for number, timestep in enumerate(scheduler.timesteps):
        position = clock.position(0 if number < 2 else 1, "cond")
        assert position is not None
        local.append((position.step, position.local_step))
        scheduler.step(sample, timestep, sample)
    assert local == [(0, 0), (1, 1), (2, 0), (3, 1)]


def test_detach_leaves_no_trace() -> None:
    scheduler = DDIMScheduler()
    before = set(vars(scheduler))
    clock, _ = attached(scheduler)
    assert set(vars(scheduler)) - before == {"set_timesteps", "step"}
    clock.detach()
    assert set(vars(scheduler)) == before
