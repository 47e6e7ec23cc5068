"""Solver methods against their papers, written out by hand, and against problems with a known solution."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import exact_problems as exact
import pytest
import torch
from helpers import plain, snapshot
from pipelines import TINY

import dita
from dita.config import Method
from dita.errors import DitaError, DitaWarning
from dita.kernels.reduction.sada_token import SADAToken, TokenCache
from dita.loop import Step
from dita.schedulers.solvers import SADA, DualFast
from dita.schedulers.solvers.dualfast import CoefficientTable
from dita.schedulers.solvers.stability import FlowCriterion, lagrange
from dita.schedulers.timesteps.listed import listed_scheduler
from dita.schedulers.timesteps.schedule import Points
from dita.seams import Call, Position

EARLY = SADA(start=0.0, lagrange=0.5, interval=4, terms=3, agree="mean")


def called(config: Any, pipe: Any, steps: int, noise: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The output of a run, and the steps whose model call was made."""
    with dita.accelerated(pipe, config):
        output = pipe(steps, latents=noise)
        records = dita.report(pipe).last.records
    assert len(records) == steps and all(record.reason for record in records)
    return output, [record.step for record in records if record.action == "computed"]


# The problems themselves


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize("make", [exact.gaussian, exact.mixture])
def test_the_models_give_the_score(make: Any, process: str) -> None:
    problem = make(process)
    model = problem.pipeline("ddim" if process == "vp" else "flow-euler").transformer
    x, a, s = problem.noise(3).flatten(1), torch.tensor(0.6).double(), torch.tensor(0.5).double()
    means, covariances = problem.means @ model.axes.mT, model.axes @ torch.diag_embed(problem.variances) @ model.axes.mT
    noisy = torch.distributions.MultivariateNormal(a * means, a**2 * covariances + s**2 * torch.eye(exact.SIZE))
    mixed = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(problem.weights), noisy)
    x.requires_grad_()
    score = torch.autograd.grad(mixed.log_prob(x).sum(), x)[0]
    eps = -s * score
    expected = eps if process == "vp" else eps - (x - s * eps) / a
    found = model.output(x.detach().view(-1, *exact.SHAPE), (a, s)).flatten(1)
    torch.testing.assert_close(found, expected.detach())


def test_the_reference_solution_is_the_closed_form() -> None:
    for process, solver in (("vp", "euler"), ("flow", "flow-euler")):
        pipe, noise = exact.gaussian(process).pipeline(solver), exact.gaussian(process).noise(2)
        truth = pipe.exact(10, noise)
        first, last = exact.ends(pipe.scheduler)
        start = noise * pipe.scheduler.init_noise_sigma * first[0] if process == "vp" else noise
        found = exact.integrate(pipe.transformer, start, first, last, exact.FINE)
        assert exact.distance(found, truth) < 1e-8


def uneven(scheduler: Any, steps: int) -> Any:
    """A scheduler that holds every eighth timestep of a long run in the middle, and fewer towards its ends."""
    scheduler.set_timesteps(8 * steps)
    places = torch.arange(steps) / steps
    chosen = (8 * steps * (places - 0.1 * torch.sin(2 * torch.pi * places))).round().int().tolist()
    return listed_scheduler(scheduler, Points.of(scheduler).pick(chosen))


@pytest.mark.parametrize(
    ("solver", "listed"),
    [(name, False) for name in exact.SCHEDULERS]
    + [(name, True) for name in ("ddim", "dpm++2m", "unipc", "flow-euler")],
)
def test_solvers_converge_at_their_order(solver: str, listed: bool) -> None:
    entry = exact.SCHEDULERS[solver]
    pipe, noise = exact.gaussian(entry.process).pipeline(entry.build(even=True)), exact.gaussian("vp").noise(2)
    steps, errors = (25, 50, 100), []
    for n in steps:
        pipe.scheduler = uneven(entry.build(even=True), n) if listed else pipe.scheduler
        errors.append(exact.distance(pipe(n, latents=noise), pipe.exact(n, noise)))
    assert abs(exact.slope(steps, errors) - entry.order) < 0.2, errors


# SADA


def sada_by_hand(pipe: Any, steps: int, noise: torch.Tensor, config: SADA) -> tuple[torch.Tensor, list[int]]:
    """SADA on a model that predicts noise, as in the authors' code: slopes of x = a x0 + s eps over unit time."""
    scheduler, model = pipe.scheduler, pipe.transformer
    scheduler.set_timesteps(steps)
    ve = isinstance(scheduler, diffusers.EulerDiscreteScheduler)
    x = noise * scheduler.init_noise_sigma
    switch = config.interval * round(config.lagrange * steps / config.interval)
    slopes: list[torch.Tensor] = []
    kept: list[tuple[int, torch.Tensor]] = []
    computed, skip, in_a_row, eps, planned = [], False, 0, torch.zeros(()), torch.zeros(())

    def level(i: int) -> tuple[float, float]:
        if hasattr(scheduler, "sigmas"):
            ratio = scheduler.sigmas[i].double()
            return float((1 + ratio**2) ** -0.5), float(ratio * (1 + ratio**2) ** -0.5)
        square = float(scheduler.alphas_cumprod[int(scheduler.timesteps[i])])
        return square**0.5, (1 - square) ** 0.5

    for i, t in enumerate(scheduler.timesteps):
        a, s = level(i)
        vp = x * a if ve else x
        if skip:
            x0 = planned
        else:
            eps = model(hidden_states=scheduler.scale_model_input(x, t), timestep=t, return_dict=False)[0]
            x0 = (vp - s * eps) / a
            computed.append(i)
        if i % config.interval == 1:
            kept = [*kept, (i, x0)][-config.terms :]
        x = scheduler.step((vp - a * x0) / s, t, x, return_dict=False)[0]
        beta = float(scheduler.betas[int(t)])
        slopes.append(0.5 * beta * steps * (eps / s - vp))
        skip = False
        if 3 <= i < min(int(config.stop * steps), steps - 2) and in_a_row < config.max_skip:
            f, f1, f2 = slopes[-1], slopes[-2], slopes[-3]
            # The authors' code has 1 here.
            gap = float(t - scheduler.timesteps[i + 1]) if config.reach == "step" else 1.0
            ahead = vp - gap / steps * (0.625 * f + 0.75 * f1 - 0.375 * f2)
            after, sigma = level(i + 1)
            momentum = (x * (after if ve else 1.0) - ahead) * ((f - f1) - (f1 - f2))
            if i >= switch:
                skip = i % config.interval != 0
                numbers = torch.tensor([float(n) for n, _ in kept], dtype=torch.float64)
                powers = torch.linalg.solve(
                    torch.vander(numbers, increasing=True), torch.stack([v.flatten() for _, v in kept])
                )
                planned = (torch.tensor([(i + 1.0) ** p for p in range(len(kept))]).double() @ powers).view(x.shape)
            elif momentum.mean() <= 0:
                skip, planned = True, (ahead - sigma * eps) / after
        in_a_row = in_a_row + 1 if skip else 0
    return x, computed


@pytest.mark.parametrize("reach", ["timestep", "step"])
@pytest.mark.parametrize("solver", ["ddim", "euler", "dpm++2m", "unipc"])
@torch.no_grad()
def test_sada_follows_the_authors_on_noise(solver: str, reach: Any) -> None:
    problem, config = exact.mixture("vp"), replace(EARLY, reach=reach)
    noise = problem.noise(2)
    expected, steps = sada_by_hand(problem.pipeline(solver), 25, noise, config)
    output, computed = called(config, problem.pipeline(solver), 25, noise)
    assert computed == steps and len({n for n in range(25) if n < 12} - set(computed)) > 0
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tiny", ["flux", "flux-cfg"])
@torch.no_grad()
def test_sada_follows_the_authors_on_a_flow(tiny: str) -> None:
    pipe, config, steps = TINY[tiny].build(), SADA(lagrange=0.6, interval=4, max_skip=3), 16
    calls: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, a, k: calls.append(k), with_kwargs=True)
    TINY[tiny].call(pipe, steps=steps)
    hook.remove()
    branches = calls[: TINY[tiny].branches]
    x, past, computed, skip, in_a_row = branches[0]["hidden_states"], [], [], False, 0
    scale = 4.0 if len(branches) == 2 else 1.0
    with dita.accelerated(pipe, config):
        output = TINY[tiny].call(pipe, steps=steps, **({"true_cfg_scale": scale} if scale > 1 else {}))
        run = dita.report(pipe).last
    for i, t in enumerate(pipe.scheduler.timesteps):
        if not skip:
            computed.append(i)
            outs = [pipe.transformer(**{**k, "hidden_states": x, "timestep": t.expand(1) / 1000})[0] for k in branches]
            v = outs[0] if len(outs) == 1 else outs[1] + scale * (outs[0] - outs[1])
            past.append(v)
            used = v
        else:
            past.append(past[-1])
            used = 2 * past[-2] - past[-3]
        x = x + (pipe.scheduler.sigmas[i + 1] - pipe.scheduler.sigmas[i]) * used
        momentum = -(used - past[-2]) + (past[-2] - past[-3]) if i > 1 else torch.ones(1)
        asked = i % 4 != 0 if i >= 8 else skip or momentum.mean() <= 0  # on the line it is 0
        skip = 4 <= i < 14 and in_a_row < 3 and bool(asked)
        in_a_row = in_a_row + 1 if skip else 0
    assert sorted({r.step for r in run.records if r.action == "computed"}) == computed and len(computed) < steps
    torch.testing.assert_close(output, x, rtol=1e-4, atol=1e-4)


def test_sada_says_that_a_flow_has_no_polynomial() -> None:
    with pytest.warns(DitaWarning, match="no effect under flow matching"):
        dita.accelerate_pipeline(TINY["flux"].build(), SADA(terms=3))
    dita.accelerate_pipeline(TINY["flux"].build(), SADA())  # warnings are errors
    dita.accelerate_pipeline(TINY["dit"].build(), SADA(terms=3))


def test_sada_schedule_of_50_steps() -> None:
    assert SADA().phases(50) == (10, 47, 24) and SADA(lagrange=0.4).phases(50) == (10, 47, 20)
    assert SADA(start=0.0, stop=1.0).phases(8)[:2] == (3, 6)
    assert all(c.phases(10)[0] == 3 and c.phases(10)[1] <= 8 for c in SADA.ladder())
    problem = exact.gaussian("vp")
    _, computed = called(SADA(start=0.48), problem.pipeline("ddim"), 50, problem.noise(1))
    assert computed == [*range(26), 29, 33, 37, 41, 45, 48, 49]


def test_sada_polynomial_and_line() -> None:
    points = [(n, torch.tensor([n**3 - 2.0 * n, 1.0]).double()) for n in (1, 5, 9, 13)]
    torch.testing.assert_close(lagrange(points, 16), torch.tensor([16**3 - 32.0, 1.0]).double())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    criterion, x = FlowCriterion(), torch.zeros(2, 3)
    judged = []
    for n, rate in enumerate((0.0, 1.0, 2.0, 3.0, 5.0)):
        step = Step(Position(n, 8, 0, "", n, 8, n), scheduler, torch.full((2, 3), rate), None, x, None)
        if n > 2:
            assert torch.equal(criterion.stand_in(step, n), torch.full((2, 3), float(n)))
        judged.append(criterion.stepped(step, n, step.output, x, False))
    assert judged == [None, None, [0.0, 0.0], [0.0, 0.0], [-1.0, -1.0]]


def test_sada_asks_every_sample() -> None:
    problem, config = exact.mixture("vp"), SADA(lagrange=1.0, agree="all")
    noise = problem.noise(1)
    alone = called(config, problem.pipeline("ddim"), 20, noise)[1]
    assert called(config, problem.pipeline("ddim"), 20, noise.repeat(3, 1, 1, 1))[1] == alone and len(alone) < 20
    many = [
        called(replace(config, agree=a), problem.pipeline("ddim"), 20, problem.noise(8))[1] for a in ("all", "mean")
    ]
    assert len(many[0]) > len(many[1])


def test_sada_stays_closer_to_the_long_run_than_fewer_steps() -> None:
    config = SADA(lagrange=0.2)
    for solver in ("ddim", "euler", "dpm++2m", "unipc", "flow-euler"):
        problem = exact.gaussian(exact.SCHEDULERS[solver].process)
        pipe, noise = problem.pipeline(solver), problem.noise(2)
        long = pipe(50, latents=noise)
        output, computed = called(config, pipe, 50, noise)
        assert len(computed) == 22
        assert exact.distance(output, long) < 0.8 * exact.distance(pipe(22, latents=noise), long)


def test_a_new_expert_is_computed() -> None:
    pipe = TINY["wan-2"].build()
    with dita.accelerated(pipe, SADA.forced()):
        TINY["wan-2"].call(pipe)
        records = dita.report(pipe).last.records
    first = min(r.step for r in records if r.model == "transformer_2")
    assert {r.action for r in records if r.step == first} == {"computed"}
    assert any(r.action == "skipped" for r in records)


@pytest.mark.parametrize(
    ("tiny", "others", "outer"),
    [
        ("dit", (dita.registry.get("taylorseer").forced(),), True),
        ("flux-cfg", (SADAToken.forced(),), True),
        ("flux-cfg", (dita.registry.get("guidance-interval").forced(),), False),
        ("dit", (dita.registry.get("guidance-interval").forced(),), True),
        ("wan", (dita.registry.get("guidance-interval").forced(), dita.registry.get("taylorseer").forced()), False),
    ],
)
def test_sada_goes_along_with_others(tiny: str, others: tuple[Method, ...], outer: bool) -> None:
    pipe, spec = TINY[tiny].build(), TINY[tiny]
    spec.call(pipe)
    before = snapshot(pipe)
    dita.accelerate_pipeline(pipe, *((SADA.forced(), *others) if outer else (*others, SADA.forced())))
    first, again = spec.call(pipe), spec.call(pipe)
    run = dita.report(pipe).last
    assert first.isfinite().all() and torch.equal(first, again)
    # One call of a batch makes two records, so does one of each branch.
    assert len(run.records) == 16
    whole = [n for n in range(8) if all(r.action == "skipped" for r in run.records if r.step == n)]
    assert whole == [4, 6]
    dita.restore_pipeline(pipe)
    assert all(snapshot(pipe)[path].keys() == found.keys() for path, found in before.items())
    assert torch.equal(spec.call(pipe), plain(tiny))


def test_tokens_are_judged_by_where_skipped_steps_led() -> None:
    transformer = TINY["flux"].build().transformer
    cache = SADAToken().handler(dita.anatomy.describe(transformer))
    assert isinstance(cache, TokenCache)
    for step in (0, 1, 4):
        latents = torch.full((2, 3, 4), float(step))
        cache.begin_call(Call(Position(step, 8, 0, "all", step, 8, step, 1000.0 - step), latents=latents))
        cache.stepped(Position(step, 8, 0, "", step, 8, step), latents[:1] + 1)
    assert [(time, float(x.mean()), len(x)) for time, x in cache._points] == [(999.0, 1.0, 1), (996.0, 4.0, 1)]


# DualFast


@pytest.mark.parametrize(("solver", "back"), [("ddim", 1), ("dpm++2m", 1), ("flow-euler", 3), ("flow-euler", 100)])
@torch.no_grad()
def test_dualfast_by_hand(solver: str, back: int) -> None:
    problem = exact.gaussian(exact.SCHEDULERS[solver].process)
    pipe, noise = problem.pipeline(solver), problem.noise(2)
    output, computed = called(DualFast(c0=0.4, decay=2.0, back=back), pipe, 10, noise)
    assert computed == list(range(10))
    pipe.scheduler.set_timesteps(10)
    x, past = noise, []
    for i, t in enumerate(pipe.scheduler.timesteps):
        past.append(pipe.transformer(x, t, return_dict=False)[0])
        c = 0.4 * (1 - i / 10) ** 2
        x = pipe.scheduler.step(past[i] + c * (past[i] - past[max(0, i - back)]), t, x, return_dict=False)[0]
    torch.testing.assert_close(output, x)


def test_half_of_the_last_change_makes_eulers_method_one_of_second_order() -> None:
    problem = exact.gaussian("flow")
    pipe, noise, steps = problem.pipeline("flow-euler"), problem.noise(2), (25, 50, 100)
    truths = [pipe.exact(n, noise) for n in steps]
    for config, order in ((DualFast.disabled(), 1), (DualFast(c0=0.5, decay=0.0), 2)):
        with dita.accelerated(pipe, config):
            errors = [exact.distance(pipe(n, latents=noise), t) for n, t in zip(steps, truths, strict=True)]
        assert abs(exact.slope(steps, errors) - order) < 0.3


def test_dualfast_takes_the_best_it_tried() -> None:
    problem = exact.gaussian("vp")
    pipe, noise, steps = problem.pipeline("ddim"), problem.noise(4, seed=5), 8
    search = DualFast(tried=(-0.25, 0.5, 1.0), decays=(0.0, 1.0), fine=5)
    found = search.calibrated(pipe, lambda p: p(steps, latents=noise))
    table = found.table
    assert table is not None and table.steps == steps
    goal = pipe(5 * steps, latents=noise)
    errors = {(0.0, 0.0): exact.distance(pipe(steps, latents=noise), goal)}
    for c0 in search.tried:
        for decay in search.decays:
            output = called(DualFast(c0=c0, decay=decay), pipe, steps, noise)[0]
            errors[c0, decay] = exact.distance(output, goal)
    best = min(errors, key=lambda pair: errors[pair])
    assert (table.values["c0"], table.values["decay"]) == best != (0.0, 0.0)
    assert table.values["error"] == pytest.approx(errors[best])
    assert table.values["plain"] == pytest.approx(errors[0.0, 0.0])
    assert DualFast.from_json(found.to_json()) == found
    other = problem.noise(4, seed=6)
    truth = pipe.exact(steps, other)
    output = called(found, pipe, steps, other)[0]
    assert exact.distance(output, truth) < 0.7 * exact.distance(pipe(steps, latents=other), truth)
    with dita.accelerated(pipe, found), pytest.warns(dita.DitaWarning, match="8 steps"):
        pipe(5, latents=other)
    worse = DualFast(tried=(-1.0,), decays=(0.0,), fine=5).calibrated(pipe, lambda p: p(steps, latents=noise)).table
    assert worse is not None and worse.values["c0"] == 0.0


def test_dualfast_on_a_pipeline_with_a_cache() -> None:
    pipe, spec = TINY["dit"].build(), TINY["dit"]
    spec.call(pipe)
    found = dita.calibrate(pipe, DualFast(tried=(0.25,), decays=(0.0,), fine=2), lambda p: spec.call(p, steps=4))
    assert isinstance(found, DualFast) and found.table is not None
    dita.accelerate_pipeline(pipe, replace(found, c0=0.25, table=None), dita.registry.get("taylorseer").forced())
    output = spec.call(pipe)
    run = dita.report(pipe).last
    assert output.isfinite().all() and len(run.records) == 16 and 0 < run.reused < 16
    assert torch.equal(spec.call(pipe), output)
    dita.restore_pipeline(pipe)
    assert torch.equal(spec.call(pipe), plain("dit"))


# What cannot be done


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SADA(start=1.5), "start"),
        (lambda: SADA(interval=0), "interval"),
        (lambda: SADA(terms=0), "terms"),
        (lambda: SADA(max_skip=-1), "max_skip"),
        (lambda: SADA(agree="some"), "agree is 'some'; expected all or mean"),  # pyright: ignore[reportArgumentType]
        (lambda: SADA(reach="run"), "reach"),  # pyright: ignore[reportArgumentType]
        (lambda: DualFast(c0=-2.0), "c0"),
        (lambda: DualFast(back=0), "back"),
        (lambda: DualFast(fine=1), "fine"),
        (lambda: DualFast(tried=()), "tried"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(DitaError, match=message):
        make()


def test_unsuitable_pipelines_are_left_as_they_are() -> None:
    pipe = TINY["sd3-heun"].build()
    noisy = exact.mixture("vp").pipeline(diffusers.EulerAncestralDiscreteScheduler())
    sde = exact.mixture("vp").pipeline(diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"))
    for target, message in ((pipe, "twice"), (noisy, "noise of its own"), (sde, "noise of its own")):
        before = dict(vars(target.scheduler))
        for config in (SADA(), DualFast.forced()):
            with pytest.raises(DitaError, match=message):
                dita.accelerate_pipeline(target, config)
        assert vars(target.scheduler) == before and "_dita_session" not in vars(target)
    flux = TINY["flux"].build()
    with pytest.raises(DitaError, match="has no numbers"):
        dita.accelerate_pipeline(flux, DualFast())
    with pytest.raises(DitaError, match="exclude each other"):
        dita.accelerate_pipeline(flux, SADA(), DualFast.forced())
    random = exact.gaussian("vp").pipeline("ddim")
    with pytest.raises(DitaError, match="same noise"):
        DualFast(tried=(0.5,), fine=2).calibrated(random, lambda p: p(4))
    with pytest.raises(DitaError, match="calibrate"):
        CoefficientTable.from_dict({"values": 1})


def test_sada_refuses_a_run_that_draws_noise() -> None:
    pipe = TINY["pixart"].build()
    pipe.scheduler = diffusers.DDIMScheduler()
    with dita.accelerated(pipe, SADA()):
        with pytest.raises(DitaError, match="eta=1"):
            TINY["pixart"].call(pipe, eta=1.0)
        assert TINY["pixart"].call(pipe).isfinite().all()


# The benchmark


def test_the_benchmark_passes_its_gate_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    solvers = import_module("solvers")
    arguments = ["--methods", "dualfast", "--steps", "20", "40", "--calls", "6", "--batch", "1", "--out", str(tmp_path)]
    monkeypatch.setitem(solvers.SETTINGS, "dualfast", ({"c0": 0.5, "decay": 0.0},))
    assert solvers.main(arguments) == 0
    written = json.loads((tmp_path / "solvers.json").read_text())
    assert {row["solver"] for row in written["order"]} == set(exact.SCHEDULERS)
    refused = [row["solver"] for row in written["calls"] if "refused" in row]
    assert refused == ["heun", "flow-heun"]
    rows = {(row["solver"], row["method"]): row for row in written["calls"] if "refused" not in row}
    assert rows["flow-euler", "dualfast"]["error"] < rows["flow-euler", "dualfast"]["plain_error"]
    assert rows["flow-euler", "dualfast"]["plain_error"] == rows["flow-euler", "plain"]["error"]
    assert "| flow-euler | dualfast |" in capsys.readouterr().out
    slow = {"method": "plain", "solver": "ddim", "order": 0.5, "expected": 1}
    assert solvers.gate([slow], []) == ["ddim has order 0.50, expected 1"]
