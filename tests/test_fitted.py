"""The fitted forecast: its arithmetic against plain loops over tensors, its search, its files, and whole pipelines."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from exact_problems import distance, gaussian, mixture
from helpers import assert_same_snapshot, plain, snapshot
from pipelines import TINY

import dita
from dita.caching import Fitted, FittedTable
from dita.caching.anchors import as_mask, choose_anchors, spread
from dita.caching.fitted_gate import local_fit
from dita.caching.fitted_plan import Plan
from dita.caching.fitted_table import equal_steps, read_fit
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


@pytest.fixture(scope="module")
def found() -> Fitted:
    result = dita.calibrate(TINY["dit"].build(), calls=[TINY["dit"].call], budget=3)
    assert isinstance(result, Fitted)
    return result


def test_file_keeps_everything(found: Fitted, tmp_path: Any) -> None:
    path = tmp_path / "x.safetensors"
    found.save(path)
    table, settings = read_fit(path)
    assert table == found.table and settings == {"full": 3, "speedup": 0.0, "anchors": 5, "warmup": 1}
    assert dita.Method.from_json(found.to_json()) == found == dita.load_method(path)
    outputs = []
    for method in (found, Fitted(calibration=str(path)), dita.load_method(path)):
        pipe = TINY["dit"].build()
        with dita.accelerated(pipe, method):
            outputs.append(TINY["dit"].call(pipe))
            assert sum(r.action == "computed" for r in dita.report(pipe).runs[-1].records) == 3
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    pipe = TINY["dit"].build()
    with dita.accelerated(pipe, "fitted", calibration=path, full=4):
        TINY["dit"].call(pipe)
        assert sum(r.action == "computed" for r in dita.report(pipe).runs[-1].records) == 4


def damaged(path: Any, kind: str) -> None:
    """Spoil a saved fit."""
    from safetensors.torch import load_file, save_file

    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "text":
        path.write_text("not a fit")
    elif kind == "pickle":
        torch.save({"gram": torch.ones(3, 3)}, path)
    else:
        tensors = load_file(path)
        head = {
            "format": "dita fitted 1",
            "settings": {},
            "values": {"seconds": [0, 1, 0]},
            "model": "",
            "scheduler": "",
        }
        head |= {"shape": [], "steps": len(tensors["timesteps"])}
        if kind == "shape":
            tensors["gram"] = tensors["gram"][:-1].contiguous()
        elif kind == "infinite":
            tensors["gram"] = tensors["gram"] * float("inf")
        elif kind == "other format":
            head["format"] = "dita fitted 99"
        elif kind == "no head":
            head = {}
        elif kind == "missing":
            del tensors["unrest"]
        elif kind == "strange":
            head["values"] = {"seconds": [0, None, 0]}
        save_file(tensors, path, {"dita": json.dumps(head)})


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "text",
        "pickle",
        "shape",
        "infinite",
        "other format",
        "no head",
        "missing",
        "strange",
        "none",
    ],
)
def test_a_damaged_file_is_refused_and_changes_nothing(kind: str, found: Fitted, tmp_path: Any) -> None:
    path = tmp_path / "x.safetensors"
    if kind != "none":
        found.save(path)
        damaged(path, kind)
    pipe = TINY["dit"].build()
    before = snapshot(pipe)
    with pytest.raises(dita.DitaError, match=r"x\.safetensors|damaged"):
        dita.accelerate_pipeline(pipe, "fitted", calibration=str(path))
    assert_same_snapshot(snapshot(pipe), before)


def test_what_is_read_is_what_was_saved(found: Fitted, tmp_path: Any) -> None:
    path = tmp_path / "x.safetensors"
    method = found.replace(anchors=3, warmup=2, full=4)
    method.save(path)
    assert dita.load_method(path) == method


def test_a_gate_leaves_longer_runs_alone(found: Fitted) -> None:
    pipe = TINY["dit"].build()
    with dita.accelerated(pipe, found, gate=1.01):
        assert torch.isfinite(TINY["dit"].call(pipe, steps=12)).all()
        assert len(dita.report(pipe).runs[-1].computed_steps) == 3


def test_a_fit_of_another_model_is_refused(found: Fitted) -> None:
    pipe = TINY["pixart"].build()
    with pytest.raises(dita.DitaError, match="was measured on DiTTransformer2DModel"):
        dita.accelerate_pipeline(pipe, found)


def test_what_is_present_is_the_default(found: Fitted, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITA_CALIBRATIONS", str(tmp_path))
    pipe = TINY["dit"].build()
    assert "fbcache" in str(dita.report(dita.accelerate_pipeline(pipe)))
    dita.restore_pipeline(pipe)
    dita.calibrate(pipe, call=TINY["dit"].call, budget=3, save=True)
    (path,) = tmp_path.iterdir()
    assert "fitted" in str(dita.report(dita.accelerate_pipeline(pipe)))
    other = TINY["pixart"].build()
    assert "fbcache" in str(dita.report(dita.accelerate_pipeline(other)))
    path.write_bytes(b"spoilt")
    with pytest.warns(dita.DitaWarning, match="passed over"):
        dita.accelerate_pipeline(pipe)
    assert "fbcache" in str(dita.report(pipe))


def test_a_calibration_beside_the_pipeline_comes_first(found: Fitted, tmp_path: Any) -> None:
    pipe: Any = TINY["dit"].build()
    pipe.save_pretrained(tmp_path)
    found.save(tmp_path / "dita.safetensors")
    loaded: Any = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    report = str(dita.report(dita.accelerate_pipeline(loaded)))
    assert "fitted" in report and "dita.safetensors" in report


@pytest.mark.parametrize("tiny", ["dit", "flux", "flux-cfg", "wan", "wan-2", "sd3", "cogvideox"])
def test_one_calibration_serves_other_runs(tiny: str) -> None:
    pipe = TINY[tiny].build()
    fitted = dita.calibrate(pipe, call=TINY[tiny].call, budget=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", dita.DitaWarning)
        dita.accelerate_pipeline(pipe, fitted)
        for steps in (8, 5, 12, 8):
            output = TINY[tiny].call(pipe, steps=steps)
            assert torch.isfinite(output).all() and output.shape == plain(tiny, steps=steps).shape
            last = dita.report(pipe).runs[-1]
            computed = len(last.computed_steps)
            assert 4 <= computed <= 5 if tiny == "wan-2" else computed == 4
    dita.restore_pipeline(pipe)
    assert torch.equal(TINY[tiny].call(pipe), plain(tiny))


def test_an_image_to_image_run_takes_the_fit_of_whole_runs() -> None:
    pipe, whole = TINY["flux-img2img"].build(), TINY["flux"].build()
    fitted = dita.calibrate(whole, call=TINY["flux"].call, budget=3)
    with dita.accelerated(pipe, fitted):
        assert torch.isfinite(TINY["flux-img2img"].call(pipe)).all()
        last = dita.report(pipe).runs[-1]
        assert len(last.computed_steps) == 3 < last.steps < 8


def test_psnr_is_reached_with_few_steps() -> None:
    pipe = TINY["dit"].build()
    wanted = TINY["dit"].call(pipe)
    fitted: Any = dita.calibrate(pipe, call=TINY["dit"].call, psnr=30)
    assert 2 <= fitted.full < 8

    def reached(full: int) -> float:
        with dita.accelerated(pipe, fitted, full=full):
            return float(-10 * (TINY["dit"].call(pipe) - wanted).square().mean().log10())

    assert reached(fitted.full) >= 30 and (fitted.full == 2 or reached(fitted.full - 1) < 30)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"speedup": 3.0, "psnr": 30.0}, "give one of them"),
        ({"calls": (), "call": None}, "needs a call"),
        ({"call": lambda p: None}, "no whole sampling loop"),
        ({"calls": [lambda p: TINY["dit"].call(p, steps=5)]}, "different timesteps"),
        ({"call": lambda p: TINY["dit"].call(p, steps=2)}, "at least 3 steps"),
        ({"psnr": 200.0}, "no step can be left out"),
        ({"method": "magcache", "psnr": 30.0}, "only fitted"),
        ({"method": "magcache", "beside": ["cfg-zero"]}, "only fitted"),
        ({"method": "magcache", "save": "x.safetensors"}, "saved as JSON"),
        ({"speedup": 0.5}, "at least 1"),
        ({"budget": -1}, "whole number"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_bad_input_is_told(change: dict[str, Any], match: str) -> None:
    pipe = TINY["dit"].build()
    before = snapshot(pipe)
    with pytest.raises(dita.DitaError, match=match):
        dita.calibrate(pipe, **{"call": TINY["dit"].call, **change})
    assert_same_snapshot(snapshot(pipe), before)


def test_a_call_that_draws_other_noise_is_told() -> None:
    pipe = TINY["dit"].build()
    generator = torch.Generator().manual_seed(0)

    def call(p: Any) -> Any:
        return p(class_labels=[1], num_inference_steps=6, guidance_scale=2.0, generator=generator, output_type="np")

    with pytest.warns(dita.DitaWarning, match="other noise"):
        fitted: Any = dita.calibrate(pipe, call=call)
    assert not any(fitted.table.values["unrest"])


def test_local_fit_is_least_squares_on_the_tensors() -> None:
    moments, outputs = rough(9, 5)
    weights, error = local_fit(moments, [5, 3, 0], 7)
    rest = torch.stack([outputs[3] - outputs[5], outputs[0] - outputs[5]], 1)
    found = torch.linalg.lstsq(rest, (outputs[7] - outputs[5])[:, None]).solution[:, 0]
    assert np.allclose(weights, [1 - found.sum(), *found], rtol=1e-3)
    forecast = sum(w * outputs[a] for w, a in zip(weights, (5, 3, 0), strict=True))
    assert error == pytest.approx((forecast - outputs[7]).square().mean().item(), rel=1e-3)


def test_the_gate_computes_more_of_what_is_harder_and_nothing_of_what_is_not() -> None:
    pipe, call = exact(mixture("flow"), "flow-euler", 24, 0)
    fitted: Any = dita.calibrate(pipe, "fitted", call, budget=6)

    def computed(limit: float, scale: float) -> tuple[int, ...]:
        noise = mixture("flow").noise(batch=64, seed=0)
        noise[-1] *= scale
        with dita.accelerated(pipe, fitted, gate=limit):
            result = pipe(24, latents=noise)
            assert torch.isfinite(result).all()
            return dita.report(pipe).runs[-1].computed_steps

    plan = computed(0.0, 1.0)
    # One sample of 64 is off by more than the mean over all, but not tenfold.
    assert len(plan) == 6 and computed(10.0, 1.0) == plan
    hard = computed(1.5, 30.0)
    assert set(plan) < set(hard)
    with dita.accelerated(pipe, fitted, gate=1.5):
        noise = mixture("flow").noise(batch=64, seed=0)
        noise[-1] *= 30
        pipe(24, latents=noise)
        assert "harder than calibrated" in {r.reason for r in dita.report(pipe).runs[-1].records}


@pytest.mark.parametrize("gate", [-1.0, 0.5, 1.0])
def test_a_gate_is_above_1(gate: float) -> None:
    with pytest.raises(dita.DitaError, match="gate"):
        Fitted(gate=gate)


def test_without_a_calibration_it_says_so() -> None:
    pipe = TINY["dit"].build()
    with dita.accelerated(pipe, Fitted(speedup=2)), pytest.warns(dita.DitaWarning, match="no calibration"):
        TINY["dit"].call(pipe)


def test_seconds_tell_the_steps_of_a_speedup() -> None:
    table = FittedTable({"seconds": (1.0, 0.5, 0.1)}, steps=20)
    for speedup in (1.0, 1.5, 2.0):
        full = table.full_for(speedup, 20)
        assert table.speedup(full) >= speedup - 1e-9 and (full == 20 or table.speedup(full + 1) < speedup)
    # Out of reach, because of what is not in the steps: half of what the number of steps alone would ask for.
    assert table.full_for(50.0, 20) == 2 and table.full_for(3.0, 20) == 4
    assert np.allclose(equal_steps(4)[-1, :4], 0.25)


@pytest.mark.parametrize("guidance", ["guidance-interval", "cfg-cache", "cfg-zero"])
@pytest.mark.parametrize("tiny", ["dit", "wan"])
def test_goes_with_guidance_methods(guidance: str, tiny: str) -> None:
    pipe = TINY[tiny].build()
    alone = dita.calibrate(pipe, call=TINY[tiny].call, budget=4)
    fitted = dita.calibrate(pipe, call=TINY[tiny].call, budget=4, beside=[guidance])
    assert isinstance(alone, Fitted) and isinstance(fitted, Fitted) and alone.table and fitted.table
    assert alone.table.values["gram"] != fitted.table.values["gram"]
    dita.accelerate_pipeline(pipe, fitted, guidance)
    first = TINY[tiny].call(pipe)
    assert torch.isfinite(first).all() and torch.equal(first, TINY[tiny].call(pipe))
    assert dita.report(pipe).runs[-1].reused
    dita.restore_pipeline(pipe)
    assert torch.equal(TINY[tiny].call(pipe), plain(tiny))
