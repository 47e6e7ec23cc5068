"""Timesteps chosen, searched or told otherwise: lists on stock schedulers, optimal steps, aligner, evolution."""

from __future__ import annotations

import itertools
import random
import warnings
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from exact_problems import distance, gaussian, mixture
from helpers import assert_same_snapshot, plain, snapshot
from pipelines import TINY

import dita
from dita.fingerprint import fingerprint
from dita.schedulers.levels import predicts
from dita.schedulers.timesteps import AutoDiffusion, OptimalSteps, TimestepAligner
from dita.schedulers.timesteps.alignment import minimise
from dita.schedulers.timesteps.autodiffusion import SearchTable
from dita.schedulers.timesteps.evolution import Space, evolve
from dita.schedulers.timesteps.listed import (
    ListedDDIMScheduler,
    ListedDPMSolverMultistepScheduler,
    ListedFlowMatchEulerDiscreteScheduler,
    ListedUniPCMultistepScheduler,
    listed_scheduler,
)
from dita.schedulers.timesteps.paths import best_paths, jump_errors
from dita.schedulers.timesteps.schedule import Points, straightened, stride
from dita.schedulers.timesteps.tracing import trace


def search_table(points: Points, left_out: Any = None, budget: int = 0) -> SearchTable:
    """A table as a search would have found it."""
    values = {"timesteps": points.timesteps, "sigmas": points.sigmas, "budget": budget or len(points)}
    return SearchTable({**values, "left_out": left_out or ((),) * len(points)})


@pytest.mark.parametrize("tiny", ["dit", "pixart", "flux-cfg", "wan", "cogvideox", "mochi"])
def test_the_schedulers_own_list_is_the_plain_run(tiny: str) -> None:
    pipe, call = TINY[tiny].build(), TINY[tiny].call
    points = trace("m", pipe, call).points
    before = snapshot(pipe)
    written = call(dita.accelerate_pipeline(pipe, AutoDiffusion(steps=8, table=search_table(points))))
    assert torch.equal(written, plain(tiny))
    # Asked for more, the same list has to be written out; what is done with it is the scheduler's own.
    longer = call(pipe, steps=10)
    assert torch.equal(longer, plain(tiny)) and dita.report(pipe).last.steps == 8
    dita.restore_pipeline(pipe)
    assert_same_snapshot(before, snapshot(pipe))
    assert torch.equal(call(pipe), plain(tiny))


def test_ddim_steps_to_any_timestep() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(50)
    noise, sample = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for now, then in ((999, 995), (700, 33), (400, 0), (20, -1), (0, -1)):
        with stride(scheduler, now - then):
            found = scheduler.step(noise, now, sample).prev_sample  # pyright: ignore
        alphas = scheduler.alphas_cumprod
        a, b = alphas[now], alphas[then] if then >= 0 else torch.tensor(1.0)
        clean = (sample - (1 - a).sqrt() * noise) / a.sqrt()
        assert torch.allclose(found, b.sqrt() * clean + (1 - b).sqrt() * noise, atol=1e-5)
    assert scheduler.num_inference_steps == 50
    own = scheduler.step(noise, 980, sample).prev_sample  # pyright: ignore
    with stride(scheduler, 20):
        assert torch.equal(scheduler.step(noise, 980, sample).prev_sample, own)  # pyright: ignore


@pytest.mark.parametrize("tiny", ["dit", "flux", "pixart", "wan"])  # DDIM, flow matching's Euler, DPM++ 2M, UniPC
def test_a_list_is_saved_and_loaded_with_the_pipeline(tiny: str, tmp_path: Any) -> None:
    pipe, call = TINY[tiny].build(), TINY[tiny].call
    points, kind = trace("m", pipe, call).points.pick([0, 1, 4, 6]), predicts(pipe.scheduler)
    dita.accelerate_pipeline(pipe, AutoDiffusion(steps=4, table=search_table(points)))
    attached = call(pipe, steps=4)
    dita.restore_pipeline(pipe)
    pipe.scheduler = listed_scheduler(pipe.scheduler, points)
    assert torch.equal(call(pipe, steps=4), attached) and torch.equal(call(pipe, steps=4), attached)
    with pytest.raises(dita.DitaError, match="num_inference_steps=4"):
        call(pipe, steps=8)
    pipe.scheduler.save_pretrained(tmp_path / "alone")
    again: Any = type(pipe.scheduler).from_pretrained(tmp_path / "alone")
    assert fingerprint(again) == fingerprint(pipe.scheduler) and predicts(again) == kind
    pipe.scheduler = type(again).from_config(again.config)
    assert torch.equal(call(pipe, steps=4), attached)
    if tiny == "dit":  # the one whose components are all there
        pipe.save_pretrained(tmp_path / "pipe")
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded.scheduler, ListedDDIMScheduler) and torch.equal(call(loaded, steps=4), attached)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    "kind", [ListedDDIMScheduler, ListedDPMSolverMultistepScheduler, ListedUniPCMultistepScheduler]
)
@pytest.mark.parametrize("listed", [None, [1000, 3], [5, 5], [3, 9], [3.5, 1]])
def test_listed_schedulers_refuse_other_timesteps(kind: Any, listed: Any) -> None:
    with pytest.raises(dita.DitaError, match="listed_timesteps"):
        kind(listed_timesteps=listed, **({} if kind is ListedDDIMScheduler else {"listed_sigmas": [9.0, 3.0]}))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ListedFlowMatchEulerDiscreteScheduler, {}),
        (ListedFlowMatchEulerDiscreteScheduler, {"invert_sigmas": True}),
        (ListedDPMSolverMultistepScheduler, {"listed_timesteps": [900, 500]}),
        (ListedUniPCMultistepScheduler, {"listed_timesteps": [900, 500], **FLOW}),
    ],
)
@pytest.mark.parametrize("listed", [None, [0.5, 0.5], [0.9, -0.1], [0.2, 0.9, 0.5]])
def test_listed_schedulers_refuse_other_sigmas(kind: Any, options: dict[str, Any], listed: Any) -> None:
    with pytest.raises(dita.DitaError, match="listed_sigmas"):
        kind(listed_sigmas=listed, **options)


def test_listed_schedulers_refuse_what_they_cannot_run() -> None:
    pair = {"listed_timesteps": [999, 500]}
    with pytest.raises(dita.DitaError, match="from below 1 "):
        ListedUniPCMultistepScheduler(**pair, **FLOW, listed_sigmas=[1.0, 0.5])
    with pytest.raises(dita.DitaError, match="2 listed_timesteps and 3 listed_sigmas"):
        ListedDPMSolverMultistepScheduler(**pair, listed_sigmas=[9.0, 3.0, 1.0])
    with pytest.raises(dita.DitaError, match="holds a list"):
        listed_scheduler(HeunDiscreteScheduler(), Points((1.0,)))
    missing: Any = None  # what a table answers that chose for other numbers of steps
    with pytest.raises(dita.DitaError, match="got NoneType"):
        listed_scheduler(DDIMScheduler(), missing)


def test_a_predictor_with_timesteps_of_its_own_is_refused() -> None:
    scheduler = UniPCMultistepScheduler(solver_p=DDIMScheduler())  # pyright: ignore[reportArgumentType]
    with pytest.raises(dita.DitaError, match="DDIMScheduler predict"):
        listed_scheduler(scheduler, Points((999.0, 500.0), (9.0, 1.0)))
    pipe = TINY["dit"].build()
    pipe.scheduler = scheduler
    before = snapshot(pipe)
    with pytest.raises(dita.DitaError, match="Leave solver_p out"):
        dita.accelerate_pipeline(pipe, OptimalSteps(choice="even"))
    assert_same_snapshot(before, snapshot(pipe))


def test_a_list_never_leads_back_to_noise() -> None:
    """UniPC's end is then the last sigma of its own run, which a list passes long before."""
    scheduler = UniPCMultistepScheduler(**FLOW, final_sigmas_type="sigma_min")  # pyright: ignore
    scheduler.set_timesteps(20)
    listed = listed_scheduler(scheduler, Points.of(scheduler).pick([0, 10, 19]))
    listed.set_timesteps(3)
    assert listed.sigmas[-1] == listed.sigmas[-2] == scheduler.sigmas[-1]


def test_dynamic_programme_against_brute_force() -> None:
    costs = torch.rand(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    costs[torch.ones(8, 8).tril().bool()] = torch.inf
    found = best_paths(costs)
    assert sorted(found) == list(range(1, 7))

    def total(path: tuple[int, ...]) -> float:
        return sum(float(costs[a, b]) for a, b in itertools.pairwise((*path, 7)))

    for jumps, path in found.items():
        every = [(0, *rest) for rest in itertools.combinations(range(1, 7), jumps - 1)]
        assert tuple(path) == min(every, key=total)


def test_jump_errors_are_those_of_ddim() -> None:
    """A jump in straight coordinates is what DDIM does with the reference's own output."""
    pipe = mixture("vp").pipeline("ddim")
    fine = trace("m", pipe, lambda p: p(10, latents=mixture("vp").noise(2)))
    errors, scheduler = jump_errors(fine.straight(), fine.u), pipe.scheduler
    scheduler.set_timesteps(10)
    u, scale = straightened(scheduler)
    assert torch.equal(u, fine.u)
    output = pipe.transformer(fine.states[2], scheduler.timesteps[2]).sample
    with stride(scheduler, 500):
        reached = scheduler.step(output, int(scheduler.timesteps[2]), fine.states[2]).prev_sample
    assert errors[2, 7].item() == pytest.approx(distance(reached / scale[7], fine.states[7] / scale[7]), rel=1e-4)
    assert errors[2, 3] == 0 and errors[3, 2] == torch.inf


@pytest.mark.parametrize("rounds", [0, 6])
def test_optimal_steps_follow_the_fine_run_better(rounds: int) -> None:
    problem = mixture("vp")
    pipe, noise = problem.pipeline("ddim"), problem.noise(4, seed=1)
    fine = pipe(50, latents=noise)
    found = OptimalSteps(steps=6, rounds=rounds).calibrated(pipe, lambda p: p(50, latents=problem.noise(4)))
    with dita.accelerated(pipe, found.replace(choice="even")):
        even = distance(pipe(50, latents=noise), fine)
    assert even == pytest.approx(distance(pipe(6, latents=noise), fine), rel=0.2)
    with dita.accelerated(pipe, found):
        assert distance(pipe(50, latents=noise), fine) < 0.8 * even
        run = dita.report(pipe).last
    assert run.steps == 6 and len(run.records) == 50 and run.reused == 44
    assert dita.config.Method.from_json(found.to_json()) == found


def test_optimal_steps_by_hand() -> None:
    """Flow matching over the chosen sigmas, written as a plain loop."""
    problem = mixture("flow")
    pipe, noise = problem.pipeline("flow-euler"), problem.noise(2)
    found = OptimalSteps().calibrated(pipe, lambda p: p(20, latents=noise))
    assert found.table is not None
    points = found.table.points(5)
    assert points is not None
    x, sigmas = noise.clone(), (*points.sigmas, 0.0)
    for timestep, now, then in zip(points.timesteps, sigmas, sigmas[1:], strict=False):
        x = x + (then - now) * pipe.transformer(x, timestep).sample
    with dita.accelerated(pipe, found):
        assert torch.allclose(pipe(5, latents=noise), x, atol=1e-5)
        with pytest.warns(dita.DitaWarning):
            pipe(21, latents=noise)
        assert "no timesteps were chosen" in dita.report(pipe).last.records[0].reason


def test_search_without_gradients_finds_a_planted_optimum() -> None:
    calls: list[float] = []

    def error(x: float) -> float:
        calls.append(x)
        return abs(x - 2.7) ** 1.5 + 0.1

    place, least = minimise(error, -10.0, 10.0, 30)
    assert place == pytest.approx(2.7, abs=1e-2) and least == min(map(error, calls[:30])) and len(calls) >= 30
    assert minimise(lambda x: -x, 0.0, 1.0, 8)[0] == 1.0


@pytest.mark.parametrize(
    ("make", "solver", "steps", "share"), [(gaussian, "flow-euler", 8, 0.35), (mixture, "ddim", 5, 0.65)]
)
def test_aligner_brings_few_steps_nearer_to_many_and_to_the_truth(
    make: Any, solver: str, steps: int, share: float
) -> None:
    """On noise that the calibration has not seen."""
    problem = make("flow" if solver == "flow-euler" else "vp")
    pipe, other, unseen = problem.pipeline(solver), problem.noise(8, seed=3), problem.noise(12, seed=1)
    found = TimestepAligner(fine=20, evaluations=12).calibrated(pipe, lambda p: p(steps, latents=other))
    aims = pipe(20 * steps, latents=unseen), pipe.exact(steps, latents=unseen)
    before = [distance(pipe(steps, latents=unseen), aim) for aim in aims]
    with dita.accelerated(pipe, found):
        after = [distance(pipe(steps, latents=unseen), aim) for aim in aims]
        with pytest.warns(dita.DitaWarning, match=f"{steps} steps"):
            longer = pipe(steps + 1, latents=unseen)
    assert after[0] < share * before[0] and after[1] < share * before[1], (before, after)
    assert torch.equal(longer, pipe(steps + 1, latents=unseen))


def test_aligner_tells_the_transformer_alone() -> None:
    """By hand: the scheduler steps from t, the transformer reads t + offset."""
    problem = mixture("vp")
    pipe, noise = problem.pipeline("ddim"), problem.noise(2)
    found = TimestepAligner(fine=4, evaluations=5).calibrated(pipe, lambda p: p(4, latents=noise))
    assert found.table is not None
    offsets = found.table.values["offset"]
    assert any(offsets)
    pipe.scheduler.set_timesteps(4)
    x = noise
    for t, offset in zip(pipe.scheduler.timesteps, offsets, strict=True):
        x = pipe.scheduler.step(pipe.transformer(x, t + offset).sample, t, x).prev_sample
    with dita.accelerated(pipe, found):
        assert torch.allclose(pipe(4, latents=noise), x, atol=1e-4)


def test_evolution_finds_a_planted_list_within_the_budget() -> None:
    wanted = (0, 2, 5, 11, 23)

    def score(candidate: Any) -> float:
        return sum(abs(a - b) for a, b in zip(candidate.entries, wanted, strict=True))

    best, least = evolve(score, [Space(30, 4, 5)] * 12, 30, 0.25, random.Random(0))
    assert least <= 2 < score(Space(30, 4, 5).even()), best
    assert evolve(score, [Space(30, 4, 5)] * 12, 30, 0.25, random.Random(0)) == (best, least)
    dice, space = random.Random(1), Space(30, 4, 5, most=2)
    one = space.fresh(dice)
    for _ in range(200):
        one = dice.choice((space.fresh(dice), space.mutated(one, 0.5, dice), space.crossed(one, space.even(), dice)))
        ran = sum(4 - len(blocks) for blocks in one.left_out)
        assert one.entries[0] == 0 and list(one.entries) == sorted(set(one.entries)) and max(one.entries) < 30
        assert 20 - 2 < ran <= 20 and max(map(len, one.left_out)) <= 2


def test_autodiffusion_beats_the_even_list() -> None:
    problem = mixture("vp")
    pipe, noise = problem.pipeline("ddim"), problem.noise(2)
    found = AutoDiffusion(steps=4, population=8, generations=3).calibrated(pipe, lambda p: p(20, latents=noise))
    assert found.table is not None
    scores = found.table.values["scores"]
    assert scores["found"] < 0.8 * scores["even"]
    fine = pipe(20, latents=noise)
    with dita.accelerated(pipe, found):
        assert distance(pipe(20, latents=noise), fine) ** 2 == pytest.approx(scores["found"], rel=1e-6)
    judged = AutoDiffusion(steps=4, population=4, generations=1, fitness=lambda out: float(out.abs().mean()))
    table = judged.calibrated(pipe, lambda p: p(20, latents=noise)).table
    assert table is not None and table.values["scores"]["found"] <= table.values["scores"]["even"]
    assert "fitness" not in judged.to_json()


@pytest.mark.parametrize("tiny", ["dit", "flux"])
def test_blocks_left_out_are_the_identity(tiny: str) -> None:
    pipe, call = TINY[tiny].build(), TINY[tiny].call
    points = trace("m", pipe, call).points
    left_out = ((), (1,), (0, 3), *((),) * 5)
    dita.accelerate_pipeline(pipe, AutoDiffusion(steps=8, table=search_table(points, left_out)))
    found, run = call(pipe), dita.report(pipe).last
    assert {record.step for record in run.records if record.action == "partial"} == {1, 2}
    assert "without block 0, 3" in next(record.reason for record in run.records if record.step == 2)
    dita.restore_pipeline(pipe)

    anatomy = dita.anatomy.describe(pipe.transformer)
    calls = dict.fromkeys(range(len(anatomy.blocks)), 0)

    def by_hand(number: int, block: Any) -> Any:
        forward = block.module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            calls[number] += 1
            if number in left_out[calls[number] - 1]:
                return block.pack(block.read(args, kwargs))
            return forward(*args, **kwargs)

        return run

    for number, block in enumerate(anatomy.blocks):
        block.module.forward = by_hand(number, block)
    assert torch.equal(call(pipe), found)


@pytest.mark.parametrize("cache", ["taylorseer", "fbcache"])
def test_lists_and_left_out_blocks_go_with_caches(cache: str) -> None:
    pipe, call = TINY["flux-cfg"].build(), TINY["flux-cfg"].call
    points = trace("m", pipe, call).points.pick([0, 1, 2, 3, 4, 6])
    method = AutoDiffusion(steps=6, table=search_table(points, ((), (1,), (2, 4), (0,), (), ())))
    before = snapshot(pipe)
    dita.accelerate_pipeline(pipe, method, dita.registry.get(cache).forced())
    found, run = call(pipe), dita.report(pipe).last
    assert found.isfinite().all() and run.steps == 6 and len(run.records) == 16
    assert any(record.action in ("reused", "forecast", "partial") for record in run.records)
    assert torch.equal(call(pipe), found)
    dita.restore_pipeline(pipe)
    assert_same_snapshot(before, snapshot(pipe))
    assert torch.equal(call(pipe), plain("flux-cfg"))


def test_runs_from_the_middle_are_left_alone() -> None:
    pipe, call = TINY["flux-img2img"].build(), TINY["flux-img2img"].call
    warned = pytest.warns(dita.DitaWarning, match=r"strength 0\.7")
    with warned, pytest.raises(dita.DitaError, match="from pure noise"):
        OptimalSteps().calibrated(pipe, call)
    found = OptimalSteps(steps=5).calibrated(pipe, lambda p: call(p, strength=1.0))
    dita.accelerate_pipeline(pipe, found)
    with pytest.warns(dita.DitaWarning, match=r"strength 0\.7"):
        assert torch.equal(call(pipe), plain("flux-img2img"))
    call(pipe, strength=1.0)
    assert dita.report(pipe).last.steps == 5


@pytest.mark.parametrize("method", [OptimalSteps(), TimestepAligner(), AutoDiffusion(steps=4)])
def test_unsuitable_pipelines_and_missing_tables(method: Any) -> None:
    pipe = TINY["sd3-heun"].build()
    with pytest.raises(dita.DitaError, match="once a step"):
        dita.accelerate_pipeline(pipe, method)
    pipe = TINY["dit"].build()
    before = snapshot(pipe)
    with pytest.raises(dita.DitaError, match="calibrate"):
        dita.accelerate_pipeline(pipe, method)
    assert_same_snapshot(before, snapshot(pipe))
    noisy = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(dita.DitaError, match="noise of its own"):
        method.calibrated(mixture("flow").pipeline(noisy), lambda p: p(8, latents=mixture("flow").noise(1)))


def test_calls_must_repeat_themselves() -> None:
    pipe = mixture("flow").pipeline("flow-euler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in (TimestepAligner(fine=2, evaluations=5), AutoDiffusion(steps=3), OptimalSteps(rounds=2)):
            with pytest.raises(dita.DitaError, match="same noise"):
                method.calibrated(pipe, lambda p: p(6, latents=torch.randn(1, 2, 4, 4)))


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        (OptimalSteps, {"steps": -1}), (OptimalSteps, {"choice": "odd"}), (OptimalSteps, {"power": 0}),
        (TimestepAligner, {"strength": 2}), (TimestepAligner, {"evaluations": 4}), (TimestepAligner, {"fine": 1}),
        (AutoDiffusion, {"population": 1}), (AutoDiffusion, {"skip": 1.5}), (AutoDiffusion, {"seed": 0.5}),
    ],
)  # fmt: skip
def test_bad_settings(method: Any, setting: dict[str, Any]) -> None:
    with pytest.raises(dita.DitaError, match=next(iter(setting))):
        method(**setting)
