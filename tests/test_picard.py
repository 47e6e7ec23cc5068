"""ParaDiGMS against the paper written by hand, its exact cases, and what it must leave alone or refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from exact_problems import distance, gaussian, mixture
from helpers import assert_same_snapshot, snapshot
from pipelines import TINY

import dita
from dita.schedulers.solvers.first_order import FirstOrder
from dita.schedulers.solvers.picard import Picard
from dita.schedulers.solvers.trajectory import Trajectory
from dita.schedulers.timesteps.listed import ListedDDIMScheduler, ListedFlowMatchEulerDiscreteScheduler

STEPS = 8
OTHER: dict[str, Callable[[], Any]] = {
    "pixart": lambda: DDIMScheduler(beta_end=0.002, clip_sample=False),
    "pixart-euler": lambda: EulerDiscreteScheduler(beta_end=0.002),
    "wan": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}
"""Schedulers for pipelines that come with one of higher order."""


def build(name: str) -> Any:
    pipe = TINY[name.removesuffix("-euler")].build()
    if name in OTHER:
        pipe.scheduler = OTHER[name]()
    return pipe


def call(name: str, pipe: Any, steps: int = STEPS, **extra: Any) -> torch.Tensor:
    return TINY[name.removesuffix("-euler")].call(pipe, steps=steps, **extra)


def with_picard(name: str, window: int, tolerance: float, steps: int = STEPS, **extra: Any) -> tuple[torch.Tensor, Any]:
    pipe = dita.accelerate_pipeline(build(name), Picard(window=window, tolerance=tolerance))
    output = call(name, pipe, steps, **extra)
    return output, dita.report(pipe).last


def relative(new: torch.Tensor, old: torch.Tensor) -> float:
    return ((new - old).norm() / old.norm()).item()


# The paper's algorithm, with one call of the transformer for each state


def first_calls(name: str, pipe: Any) -> list[dict[str, Any]]:
    """What the transformer is called with in the first step of a plain run, by name."""
    seen: list[dict[str, Any]] = []
    forward = pipe.transformer.forward
    names = list(type(pipe.transformer).forward.__code__.co_varnames)[1:]

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append({**dict(zip(names, args, strict=False)), **kwargs})
        return forward(*args, **kwargs)

    vars(pipe.transformer)["forward"] = recording
    call(name, pipe)
    del vars(pipe.transformer)["forward"]
    return seen[: TINY[name].branches]


class ByHand:
    """ParaDiGMS for one sample, as in the paper's algorithm 1."""

    def __init__(self, name: str, window: int, tolerance: float) -> None:
        self.name, self.window, self.tolerance = name, window, tolerance
        self.pipe = build(name)
        self.calls = first_calls(name, self.pipe)
        self.scheduler = self.pipe.scheduler
        self.strides: list[int] = []

    def output(self, x: torch.Tensor, place: int) -> torch.Tensor:
        """The guided output at one state."""
        t, results = self.scheduler.timesteps[place], []
        for arguments in self.calls:
            rows = arguments["hidden_states"].shape[0]
            time = (t / 1000 if self.name == "flux-cfg" else t).expand(rows)
            asked = {**arguments, "hidden_states": torch.cat([x] * rows), "timestep": time, "return_dict": False}
            with torch.no_grad():
                results.append(self.pipe.transformer(**asked)[0])
        if self.name == "dit":
            cond, uncond = results[0][:, : x.shape[1]].chunk(2)
        elif self.name == "sd3":
            uncond, cond = results[0].chunk(2)
        else:
            cond, uncond = results
        return uncond + 3.0 * (cond - uncond)

    def levels(self, place: int) -> tuple[float, float, float, float]:
        """Shares of picture and noise at a step's beginning and end."""
        if self.name != "dit":
            s, s_next = self.scheduler.sigmas[place : place + 2].tolist()
            return 1 - s, s, 1 - s_next, s_next
        t = int(self.scheduler.timesteps[place])
        before = t - 1000 // STEPS
        now = float(self.scheduler.alphas_cumprod[t])
        after = float(self.scheduler.alphas_cumprod[before] if before >= 0 else self.scheduler.final_alpha_cumprod)
        return now**0.5, (1 - now) ** 0.5, after**0.5, (1 - after) ** 0.5

    def drift(self, x: torch.Tensor, place: int) -> torch.Tensor:
        a, s, a_next, s_next = self.levels(place)
        output = self.output(x, place)
        if self.name == "dit":  # eps prediction, DDIM
            return a_next * (x - s * output) / a + s_next * output - x
        return (s_next - s) * output

    def variance(self, place: int) -> float:
        a, s, a_next, s_next = self.levels(place)
        found = (s_next / s) ** 2 * (s**2 - (a / a_next) ** 2 * s_next**2)
        return self.variance(place - 1) if place == STEPS - 1 and found == 0 else found

    def run(self) -> torch.Tensor:
        t, size = 0, self.window
        start: torch.Tensor = self.calls[0]["hidden_states"][:1]
        x = dict.fromkeys(range(size + 1), start)
        while t < STEPS:
            size = min(self.window, STEPS - t)
            drifts = [self.drift(x[t + j], t + j) for j in range(size)]
            new = {t + j + 1: x[t] + torch.stack(drifts[: j + 1]).sum(0) for j in range(size)}
            errors = {j: (new[t + j] - x[t + j]).square().mean().item() for j in range(1, size)}
            failed = [j for j, error in errors.items() if error > self.tolerance**2 * self.variance(t + j)]
            stride = min([*failed, size])
            x.update(new)
            for j in range(t + size + 1, t + stride + self.window + 1):
                x[j] = x[t + size]
            t += stride
            self.strides.append(stride)
        return x[STEPS]

    def picture(self) -> torch.Tensor:
        latents = self.run()
        if self.name != "dit":
            return latents
        with torch.no_grad():
            decoded = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample
        return (decoded / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("name", "tolerance"), [("dit", 0.05), ("sd3", 0.2), ("flux-cfg", 0.1)])
def test_the_paper_by_hand(name: str, tolerance: float) -> None:
    hand = ByHand(name, 5, tolerance)
    expected = hand.picture()
    output, run = with_picard(name, 5, tolerance)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    begun = [sum(hand.strides[:k]) for k in range(len(hand.strides))]
    assert list(run.computed_steps) == begun and {1} < set(hand.strides), hand.strides
    assert relative(output, call(name, build(name))) > 1e-5, "a tolerance must be felt"


# What is exact


@pytest.mark.parametrize("window", [2, 5, 9])
def test_k_iterations_make_k_states_exact(window: int) -> None:
    steps = 9
    matrices = [0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(k)).double() for k in range(steps)]

    def after(x: torch.Tensor, place: int) -> torch.Tensor:
        return x + torch.tanh(matrices[place] @ x)

    truth = [torch.ones(3).double()]
    for place in range(steps):
        truth.append(after(truth[-1], place))
    path = Trajectory(0, truth[0])
    for k in range(1, steps + 1):
        places = path.window(window, steps)
        assert path.slide([after(path.states[p], p) for p in places], [-1.0] * (len(places) - 1)) == 1
        assert path.base == k and all(torch.equal(path.states[j], truth[j]) for j in range(k + 1))
        assert len(places) < 3 or not torch.allclose(path.states[places[-1]], truth[places[-1]], rtol=1e-12)


def test_drift_without_feedback_converges_in_two_iterations() -> None:
    path = Trajectory(0, torch.zeros(4))
    grown = []
    for _ in range(2):
        places = path.window(6, 20)
        grown.append(path.slide([path.states[p] + 2.0**p for p in places], [0.0] * (len(places) - 1)))
    assert grown == [1, 6] and torch.equal(path.states[7], torch.full((4,), 127.0))


ROW_WISE = ("dit", "sd3", "flux-cfg", "flux-img2img", "wan", "pixart", "pixart-euler", "cogvideox")


@pytest.mark.filterwarnings("ignore:0 of")
@pytest.mark.parametrize("name", ROW_WISE)
def test_tolerance_0_is_the_plain_run_on_transformers_that_take_a_timestep_for_each_row(name: str) -> None:
    output, run = with_picard(name, 3, 0.0, steps=4)
    assert relative(output, call(name, build(name), 4)) < 1e-5 and not run.note
    assert len(run.computed_steps) == run.steps
    assert any(record.branch == "check" for record in run.records), "or else a wrong transformer is not refused"


SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "ddim-v": lambda: DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", thresholding=True),
    "cogvideox": lambda: CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "euler": lambda: EulerDiscreteScheduler(),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow-inverted": lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    "listed-ddim": lambda: ListedDDIMScheduler(listed_timesteps=[990, 700, 500, 300, 100, 20, 0]),
    "listed-flow": lambda: ListedFlowMatchEulerDiscreteScheduler(listed_sigmas=[1.0, 0.9, 0.7, 0.4, 0.3, 0.2, 0.1]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_copy_steps_like_the_scheduler_and_leaves_no_trace(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(7)
    before = copy.deepcopy(vars(scheduler))
    solver = FirstOrder(scheduler)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 4, 4, generator=generator)
    outputs = [torch.randn(x.shape, generator=generator) for _ in range(7)]
    made = {place: solver.step(place, outputs[place], x) for place in (5, 0, 6, 2, 1, 4, 3)}
    read = {place: solver.scaled(place, x) for place in range(7)}
    after = vars(scheduler)
    assert before.keys() == after.keys()
    assert all(
        torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        for key, value in before.items()
    )
    for place, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            assert torch.equal(scheduler.scale_model_input(x, t), read[place])
        assert torch.equal(scheduler.step(outputs[place], t, x).prev_sample, made[place])


def test_variances() -> None:
    for build_scheduler in (SCHEDULERS["ddim"], SCHEDULERS["cogvideox"]):
        scheduler = build_scheduler()
        scheduler.set_timesteps(10)
        own = [float(scheduler._get_variance(int(t), int(t) - 100)) for t in scheduler.timesteps]
        found = FirstOrder(scheduler).variances()
        assert found[:-1] == pytest.approx(own[:-1], rel=1e-4) and found[-1] == found[-2] > own[-1] == 0
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    now, to = scheduler.sigmas[:-2].double(), scheduler.sigmas[1:-1].double()
    ancestral = (to**2 * (now**2 - to**2) / now**2).tolist()  # sigma_up^2
    assert FirstOrder(scheduler).variances()[:-1] == pytest.approx(ancestral, rel=1e-4)


@pytest.mark.filterwarnings("ignore:0 of")
@pytest.mark.parametrize(
    ("problem", "scheduler"), [(gaussian, "ddim"), (gaussian, "euler"), (gaussian, "flow-euler"), (mixture, "ddim")]
)
def test_exact_problems(problem: Any, scheduler: str) -> None:
    """At equal steps the parallel answer is the sequential one: the difference is far below the solver's error."""
    made = problem("flow" if scheduler.startswith("flow") else "vp")
    noise = made.noise(batch=3)
    pipe = made.pipeline(scheduler)
    plain = pipe(40, latents=noise)
    error = distance(plain, pipe.exact(40, latents=noise))
    calls = []
    for tolerance, share in ((0.0, 1e-6), (0.01, 0.02), (0.1, 0.2)):
        pipe = dita.accelerate_pipeline(made.pipeline(scheduler), Picard(window=10, tolerance=tolerance))
        assert distance(pipe(40, latents=noise), plain) <= share * error
        calls.append(pipe.transformer.calls - 1)  # one of them saw whether rows may differ
    assert calls[0] == 40 and 4 <= calls[2] <= calls[1] <= 20, calls


# The engine


def test_an_image_does_not_depend_on_its_batch_mates() -> None:
    together, run = with_picard("dit", 4, 0.1, batch=3)
    runs = [with_picard("dit", 4, 0.1, first=row) for row in range(3)]
    torch.testing.assert_close(together, torch.cat([output for output, _ in runs]), rtol=1e-4, atol=1e-5)
    alone = [single.computed_steps for _, single in runs]
    assert len(set(alone)) > 1, "the samples of this test must slide differently"
    assert len(run.computed_steps) <= max(map(len, alone))


def test_the_report_counts_calls_and_rows() -> None:
    for name in ("dit", "flux-cfg"):
        pipe, rows = build(name), []
        forward = pipe.transformer.forward

        def counting(*args: Any, forward: Any = forward, rows: list[int] = rows, **kwargs: Any) -> Any:
            rows.append(len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]))
            return forward(*args, **kwargs)

        vars(pipe.transformer)["forward"] = counting
        dita.accelerate_pipeline(pipe, Picard(window=4, tolerance=0.1))
        call(name, pipe)
        first = len(rows)
        call(name, pipe)
        run = dita.report(pipe).last
        del rows[:first]  # of the first run, in which a further call is made
        assert sum(r.branch == "check" for r in dita.report(pipe).runs[0].records) == 1 and len(rows) == first - 1
        reasons = [r.reason for r in run.records if r.action == "computed"]
        assert reasons[-1].endswith(f"call {len(rows)} in a row, {sum(rows)} rows in all"), reasons
        assert {r.reason for r in run.records if r.action == "skipped"} == {"solved ahead"}
        left_out = {r.step for r in run.records if r.action == "skipped"}
        assert left_out and left_out | set(run.computed_steps) == set(range(STEPS)) and not run.note
        assert run.peak_cache_bytes > 0


def test_the_euler_scheduler_begins_alone() -> None:
    _, run = with_picard("pixart-euler", 4, 0.5)
    assert run.records[0].reason == "the first step alone" and run.reused > 0


@pytest.mark.filterwarnings("ignore:0 of")
def test_sparse_attention_goes_along() -> None:
    name = "dit"
    radial = dita.registry.get("radial").forced()
    pipe = dita.accelerate_pipeline(build(name), radial)
    alone = call(name, pipe, batch=2)
    dita.accelerate_pipeline(pipe, Picard(window=3, tolerance=0.0), radial)
    assert relative(call(name, pipe, batch=2), alone) < 1e-5
    dita.accelerate_pipeline(pipe, radial, Picard(window=4, tolerance=0.2))
    assert call(name, pipe, batch=2).isfinite().all()
    run = dita.report(pipe).last
    assert {r.action for r in run.records} >= {"sparse", "skipped"}
    dita.restore_pipeline(pipe)
    assert torch.equal(call(name, pipe), call(name, build(name)))


@pytest.mark.parametrize("other", ["taylorseer", "guidance-interval", "sada", "sada-token"])
def test_what_counts_steps_is_excluded(other: str) -> None:
    pipe = build("dit")
    before = snapshot(pipe)
    with pytest.raises(dita.DitaError, match=f"{other} and picard exclude each other"):
        dita.accelerate_pipeline(pipe, other, "picard")
    assert_same_snapshot(before, snapshot(pipe))


# What is refused, or left alone


def refused(pipe: Any, match: str) -> None:
    before = snapshot(pipe)
    with pytest.raises(dita.DitaError, match=match):
        dita.accelerate_pipeline(pipe, "picard")
    assert_same_snapshot(before, snapshot(pipe))


def test_unsuitable_pipelines_are_refused() -> None:
    refused(TINY["pixart"].build(), "DPMSolverMultistepScheduler")
    refused(TINY["sd3-heun"].build(), "FlowMatchHeunDiscreteScheduler")
    refused(TINY["wan"].build(), "UniPCMultistepScheduler")
    pipe = TINY["wan-2"].build()
    pipe.scheduler = OTHER["wan"]()
    refused(pipe, "changes between several")
    pipe = TINY["flux"].build()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    refused(pipe, "stochastic_sampling")


def test_bad_settings() -> None:
    wrong: list[dict[str, Any]] = [{"window": 0}, {"window": 2.5}, {"tolerance": -0.1}, {"tolerance": float("nan")}]
    for settings in wrong:
        with pytest.raises(dita.DitaError):
            Picard(**settings)
    assert Picard.from_json(Picard(window=7, tolerance=0.3).to_json()) == Picard(window=7, tolerance=0.3)


def test_noise_asked_for_in_a_run_and_a_later_scheduler_are_refused() -> None:
    pipe = dita.accelerate_pipeline(build("pixart"), "picard")
    with pytest.raises(dita.DitaError, match="eta=0.5"):
        call("pixart", pipe, eta=0.5)
    pipe.scheduler = TINY["pixart"].build().scheduler
    with pytest.raises(dita.DitaError, match="DPMSolverMultistepScheduler"):
        call("pixart", pipe)


def test_a_transformer_with_one_timestep_for_all_rows_is_refused() -> None:
    pipe = build("flux-cfg")
    forward = pipe.transformer.forward

    def first_for_all(*args: Any, **kwargs: Any) -> Any:
        kwargs["timestep"] = kwargs["timestep"][:1].expand(len(kwargs["timestep"]))
        return forward(*args, **kwargs)

    vars(pipe.transformer)["forward"] = first_for_all
    plain = call("flux-cfg", pipe)
    dita.accelerate_pipeline(pipe, "picard")
    for _ in range(2):
        with pytest.raises(dita.DitaError, match="timestep for each row"):
            call("flux-cfg", pipe)
    dita.restore_pipeline(pipe)
    assert torch.equal(call("flux-cfg", pipe), plain)


LEFT_ALONE: dict[str, tuple[str, dict[str, Any], str]] = {
    "another combination": ("ltx", {"guidance_rescale": 0.7}, "combines its branches otherwise"),
    "another scale at each step": ("cogvideox", {"use_dynamic_cfg": True}, "the guidance scale changed"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_is_not_known_is_run_plainly(case: str) -> None:
    name, extra, why = LEFT_ALONE[case]
    pipe = dita.accelerate_pipeline(build(name), Picard(window=4, tolerance=0.1))
    with pytest.warns(dita.DitaWarning, match=why):
        output = call(name, pipe, **extra)
    run = dita.report(pipe).last
    assert run.reused == 0 and why in run.note
    assert relative(output, call(name, build(name), **extra)) < 1e-5


def at_step(wanted: int, change: Callable[[dict[str, Any]], dict[str, Any]], *names: str) -> dict[str, Any]:
    """Arguments of a pipeline that changes its loop's variables at the end of one step."""

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return change(values) if step == wanted else values

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": list(names)}


@pytest.mark.parametrize(("name", "changed"), [("sd3", "latents"), ("flux-cfg", "prompt_embeds")])
def test_a_change_in_the_middle_ends_it_without_harm(name: str, changed: str) -> None:
    extra = at_step(3, lambda values: {**values, changed: 1.1 * values[changed]}, changed)
    output, run = with_picard(name, 4, 0.5, **extra)
    expected = "sample that the last step left" if changed == "latents" else "encoder_hidden_states changed"
    assert expected in run.note and run.reused > 0
    assert {4, 5, 6, 7} <= set(run.computed_steps)
    assert relative(output, call(name, build(name), **extra)) < 0.1


@pytest.mark.parametrize(
    ("name", "extra", "why"),
    [
        ("sd3", {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9}, "more branches"),
        (
            "wan",
            at_step(1, lambda v: {"negative_prompt_embeds": 2 * v["negative_prompt_embeds"]}, "negative_prompt_embeds"),
            "encoder_hidden_states changed",
        ),
    ],
)
def test_what_is_seen_too_late_is_an_error(name: str, extra: dict[str, Any], why: str) -> None:
    pipe = dita.accelerate_pipeline(build(name), Picard(window=4, tolerance=10.0))
    with pytest.raises(dita.DitaError, match=why):
        call(name, pipe, **extra)
