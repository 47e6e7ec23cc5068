"""The fitted forecast: its arithmetic against plain loops over tensors, and its search."""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from exact_problems import distance, gaussian, mixture

import dita
from dita.caching import Fitted
from dita.caching.anchors import as_mask, choose_anchors, spread
from dita.caching.fitted_gate import Rest, local_fit
from dita.caching.fitted_plan import Plan
from dita.caching.fitting import CAUTION, Moments, Tracker, expected_error
from dita.caching.forecast import taylor_weights
from dita.response import linear_response

LINEAR = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "ddim-v": lambda: diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(),
    "lms": lambda: diffusers.LMSDiscreteScheduler(),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "cogvideox": lambda: diffusers.CogVideoXDDIMScheduler(),
}
OTHER = {
    "noise": lambda: diffusers.DDPMScheduler(),
    "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "clipped": lambda: diffusers.DDIMScheduler(clip_sample=True),
    "second order": lambda: diffusers.HeunDiscreteScheduler(),
    "other arguments": lambda: diffusers.CogVideoXDPMScheduler(),
}


def stepped(scheduler: Any, begin: int, outputs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Latents before every step and after the last."""
    states = [x]
    if begin:
        scheduler.set_begin_index(begin)
    for output, timestep in zip(outputs, scheduler.timesteps[begin:], strict=True):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(states[-1], timestep)
        states.append(scheduler.step(output, timestep, states[-1]).prev_sample)
    return torch.stack(states)


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("name", LINEAR)
def test_response_is_what_the_scheduler_does(name: str, begin: int) -> None:
    scheduler = LINEAR[name]()
    if begin and not hasattr(scheduler, "set_begin_index"):
        pytest.skip("it is told its timestep, and needs no first index")
    scheduler.set_timesteps(9)
    before = copy.deepcopy(vars(scheduler))
    response = linear_response(scheduler, begin)
    assert response is not None and response.shape == (10 - begin, 10 - begin)
    assert str(vars(scheduler)) == str(before)
    generator = torch.Generator().manual_seed(1)
    outputs, x = torch.randn(9 - begin, 2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    states = stepped(scheduler, begin, outputs, x).double().flatten(1).numpy()
    by_map = response @ torch.cat([outputs, x[None]]).double().flatten(1).numpy()
    assert np.abs(states - by_map).max() < 1e-4 * np.abs(states).max()


@pytest.mark.parametrize("name", OTHER)
def test_no_response_where_a_step_is_no_linear_map(name: str) -> None:
    scheduler = OTHER[name]()
    scheduler.set_timesteps(8)
    state = torch.get_rng_state()
    assert linear_response(scheduler) is None
    assert torch.equal(state, torch.get_rng_state())


def rough(steps: int, seed: int = 0, size: int = 400) -> tuple[Moments, torch.Tensor]:
    """Outputs that wander smoothly, and the latents they begin with: moments, float64 [S + 1, size]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(steps + 1, size, generator=generator, dtype=torch.float64)
    outputs = torch.cat([drawn[:-1].cumsum(0).cumsum(0) / 5 + 0.1 * drawn[:-1], drawn[-1:]])
    gram = (outputs @ outputs.T / size).numpy()
    scheduler = LINEAR["dpm"]()
    scheduler.set_timesteps(steps)
    response = linear_response(scheduler)
    assert response is not None
    # No feedback: the outputs at hand do not depend on the latents.
    moments = Moments(gram, response, np.zeros(steps))
    moments.__dict__["feedback"] = np.zeros(steps)
    return moments, outputs


def test_tracker_is_least_squares_on_the_tensors_themselves() -> None:
    moments, outputs = rough(10)
    response, computed = torch.from_numpy(moments.response), (0, 1, 3, 6, 7)
    tracker, used, kept = Tracker(moments, 3), [], []
    states = response @ outputs
    for s in range(10):
        weights = tracker.step([s in computed])[0]
        if s in computed:
            kept, latest = [outputs[s], *kept][:3], outputs[s]
        else:
            # The last latents, were all later outputs right and nothing put out in this step, and what they lack.
            before = response[10, :s] @ torch.stack(used) + response[10, s + 1 :] @ outputs[s + 1 :]
            lack = (states[10] - before) / response[10, s]
            rest = torch.stack([k - kept[0] for k in kept[1:]], 1) if len(kept) > 1 else torch.zeros(400, 0).double()
            found = torch.linalg.lstsq(rest, (lack - kept[0])[:, None]).solution[:, 0] if len(kept) > 1 else rest[0]
            by_hand = torch.cat([1 - found.sum()[None], found])
            assert torch.allclose(torch.from_numpy(weights[: len(kept)]), by_hand, rtol=1e-3, atol=1e-4)
            assert abs(weights.sum() - 1) < 1e-9
            latest = sum(w * k for w, k in zip(weights, kept, strict=False))
        used.append(latest)
        now = response[s + 1, : s + 1] @ torch.stack(used) + response[s + 1, 10] * outputs[10]
        assert tracker.distance()[0] == pytest.approx((now - states[s + 1]).square().mean().item(), rel=1e-3, abs=1e-9)
        assert tracker.error()[0] == pytest.approx((latest - outputs[s]).square().mean().item(), rel=1e-3, abs=1e-9)


def test_runs_side_by_side_are_runs_alone() -> None:
    moments, _ = rough(9, 1)
    masks = np.stack([as_mask(s, 9) for s in ((0, 1, 5), (0, 4, 8), (0, 2, 3, 7), tuple(range(9)))])
    together = expected_error(moments, masks, 4)
    alone = [expected_error(moments, mask[None], 4)[0] for mask in masks]
    assert np.allclose(together, alone, rtol=1e-9) and together[-1] == 0 < together[0]


def test_unrest_costs_what_no_weight_makes_good() -> None:
    moments, _ = rough(9, 2)
    restless = replace(moments, unrest=np.full(9, 2.0))
    restless.__dict__["feedback"] = np.zeros(9)
    mask = as_mask((0, 2, 6), 9)[None]
    tracker, distances = Tracker(moments, 3), []
    for s in range(9):
        distances.append(float(tracker.distance()[0]))
        tracker.step([mask[0, s]])
    reach = np.abs(moments.response[-1, :9])
    spans = ((2, range(2, 6)), (6, range(6, 9)))
    extra = sum((CAUTION * 2) ** 2 * distances[a] * reach[list(span)].sum() ** 2 for a, span in spans)
    assert expected_error(restless, mask, 3)[0] - expected_error(moments, mask, 3)[0] == pytest.approx(extra)


@pytest.mark.parametrize("full", [2, 3, 4])
def test_search_against_all_schedules(full: int) -> None:
    moments, _ = rough(9, 3)
    every: list[tuple[int, ...]] = [(0, *rest) for rest in itertools.combinations(range(1, 9), full - 1)]
    errors = expected_error(moments, np.stack([as_mask(s, 9) for s in every]), 3)
    chosen, error = choose_anchors(moments, full, 3)
    assert len(chosen) == full and chosen[0] == 0 and list(chosen) == sorted(set(chosen))
    assert error == pytest.approx(errors[every.index(chosen)])
    assert (
        error <= np.quantile(errors, 0.1) and error < expected_error(moments, as_mask(spread(9, full), 9)[None], 3)[0]
    )


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_spread_is_a_schedule(power: float) -> None:
    for steps, full in itertools.product((3, 7, 50), range(1, 4)):
        found = spread(steps, full, power)
        assert len(set(found)) == full and found[0] == 0 and list(found) == sorted(found) and found[-1] < steps


def exact(problem: Any, scheduler: str, steps: int, seed: int) -> tuple[Any, Any]:
    noise = problem.noise(batch=64, seed=seed)
    return problem.pipeline(scheduler), lambda pipe: pipe(steps, latents=noise)


def test_in_a_linear_problem_the_error_is_the_expected_one() -> None:
    pipe, call = exact(gaussian("vp"), "ddim", 24, 0)
    fitted: Any = dita.calibrate(pipe, "fitted", call)
    assert fitted.table.values["linear"] == 1
    other, unseen = exact(gaussian("vp"), "ddim", 24, 1)
    wanted = unseen(other)
    for full in (4, 6, 8, 10):
        with dita.accelerated(other, fitted, full=full):
            found = distance(unseen(other), wanted)
            computed = dita.report(other).runs[-1].computed_steps
        tracker = Tracker(fitted.table.moments, fitted.anchors)
        for step in range(24):
            tracker.step([step in computed])
        assert len(computed) == full and found == pytest.approx(float(tracker.distance()[0]) ** 0.5, rel=0.3)
        with warnings.catch_warnings(), dita.accelerated(other, Fitted(full=full)):
            warnings.simplefilter("ignore", dita.DitaWarning)
            assert found < 0.3 * distance(unseen(other), wanted)


def test_in_a_mixture_it_beats_extrapolation_on_the_same_steps() -> None:
    pipe, call = exact(mixture("flow"), "flow-euler", 24, 0)
    fitted: Any = dita.calibrate(pipe, "fitted", call)
    other, unseen = exact(mixture("flow"), "flow-euler", 24, 1)
    wanted = unseen(other)
    for full, share in ((6, 0.8), (9, 0.5), (12, 0.5)):
        with dita.accelerated(other, fitted, full=full):
            close = distance(unseen(other), wanted)
            computed = [r.step for r in dita.report(other).runs[-1].records if r.action == "computed"]
        assert len(computed) == full
        with warnings.catch_warnings(), dita.accelerated(other, Fitted(full=full)):
            warnings.simplefilter("ignore", dita.DitaWarning)
            assert close < share * distance(unseen(other), wanted)


def test_plan_without_a_fit_is_taylor() -> None:
    plan = Plan((0, 2, 5), None, 4)
    assert plan.weights((True,)) == ((1.0,), 0.0)
    assert plan.weights((True, False, True, False))[0] == tuple(taylor_weights(2, [2, 0]))


def test_plan_knows_steps_that_were_another_transformers() -> None:
    moments, _ = rough(8, 4)
    plan = Plan((0, 2, 5), moments, 3)
    late, _ = plan.weights((None, None, None, None, True))
    assert late == (1.0,)
    hole, _ = plan.weights((True, None, True, None, False))
    assert len(hole) == 2 and sum(hole) == pytest.approx(1)
    seen, _ = plan.weights((True, False, True, False, False))
    assert len(seen) == 2


def test_local_fit_is_least_squares_on_the_tensors() -> None:
    moments, outputs = rough(9, 5)
    weights, error = local_fit(moments, [5, 3, 0], 7)
    rest = torch.stack([outputs[3] - outputs[5], outputs[0] - outputs[5]], 1)
    found = torch.linalg.lstsq(rest, (outputs[7] - outputs[5])[:, None]).solution[:, 0]
    assert np.allclose(weights, [1 - found.sum(), *found], rtol=1e-3)
    forecast = sum(w * outputs[a] for w, a in zip(weights, (5, 3, 0), strict=True))
    assert error == pytest.approx((forecast - outputs[7]).square().mean().item(), rel=1e-3)


def test_the_gate_computes_more_of_what_is_harder_and_less_where_more_may_be_lost() -> None:
    pipe, call = exact(mixture("flow"), "flow-euler", 24, 0)
    fitted: Any = dita.calibrate(pipe, "fitted", call, budget=6)

    def computed(limit: float, scale: float = 1.0) -> tuple[int, ...]:
        noise = mixture("flow").noise(batch=64, seed=0)
        noise[-1] *= scale
        with dita.accelerated(pipe, fitted, gate=limit):
            assert torch.isfinite(pipe(24, latents=noise)).all()
            hard = "harder than calibrated" in {r.reason for r in dita.report(pipe).runs[-1].records}
            steps = dita.report(pipe).runs[-1].computed_steps
            assert hard == (not set(steps) <= set(plan or steps))
            return steps

    plan: tuple[int, ...] = ()
    plan = computed(0.0)
    assert len(plan) == 6 and len(computed(20.0)) < 6 < len(computed(1.0, 30.0))


def test_the_gate_keeps_hard_samples_within_what_the_plan_expects() -> None:
    pipe, call = exact(gaussian("vp"), "ddim", 24, 0)
    fitted: Any = dita.calibrate(pipe, "fitted", call, budget=6)
    noise = gaussian("vp").noise(batch=6, seed=1)
    noise[3:] *= 2
    wanted = pipe(24, latents=noise)

    def lost(limit: float) -> tuple[np.ndarray, list[int]]:
        with dita.accelerated(pipe, fitted, gate=limit, per_sample=True):
            found = (pipe(24, latents=noise) - wanted).square().flatten(1).mean(1).sqrt().numpy()
            done = [r.branch for r in dita.report(pipe).runs[-1].records if r.action == "computed"]
        return found, [sum(f"[{n}]" in name for name in done) for n in range(6)]

    (before, planned), (after, spent) = lost(0.0), lost(1.0)
    assert planned == [6] * 6 and before[3:].min() > 1.5 * before[:3].max()
    assert min(spent[3:]) > max(spent[:3]) and after[3:].max() < before[:3].max()


def test_the_rest_keeps_to_the_limit() -> None:
    moments, _ = rough(12, 6)
    schedule = choose_anchors(moments, 5, 3)[0]
    rest, past = Rest(moments, schedule, 3, 1.0), schedule[:3]

    def error(*steps: int) -> float:
        return float(expected_error(moments, as_mask(steps, 12)[None], 3)[0])

    assert rest.after(past, 1.0) == schedule[3:] and len(schedule[3:]) == 2
    for hardness in (0.05, 0.3, 2.0, 5.0):
        found = rest.after(past, hardness)
        assert len(found) == {0.05: 1, 0.3: 2, 2.0: 3, 5.0: 4}[hardness]
        lost = error(*past, *range(past[-1] + 1, 12))
        total, share = error(*schedule), error(*schedule) - lost
        spent = hardness * (error(*past, *found) - lost)
        assert spent <= max(total - hardness * lost, share) * (1 + 1e-6)
