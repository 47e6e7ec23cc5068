"""Guidance methods against loops written by hand, published numbers and identities."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from guided_loops import STEPS, W, by_hand, computed, ddim_run, moment, run
from helpers import assert_same_snapshot, plain, snapshot
from pipelines import TINY
from torch.nn.functional import cosine_similarity

import dita
from dita.caching import MagCache, TaylorSeer
from dita.config import Method
from dita.errors import DitaError, DitaWarning
from dita.loop import Request
from dita.schedulers.guidance import AdaptiveGuidance, CFGCache, CFGZero, LinearAG
from dita.schedulers.guidance.adaptive import Similarity
from dita.schedulers.guidance.cfg_cache import CachedDifference, low_frequencies, on_grid
from dita.schedulers.guidance.cfg_zero import ZeroStar, nearest_scale
from dita.schedulers.guidance.linear_ag import Estimates
from dita.schedulers.guidance.linear_fit import LinearWeights
from dita.schedulers.guidance.moment import refuse_stream
from dita.schedulers.guidance.policy import GuidanceLoop
from dita.watching import watched


@pytest.mark.parametrize("tiny", ["dit", "wan"])
def test_adaptive_guidance_by_hand(tiny: str) -> None:
    gammas: list[float] = []

    def note(i: int, c: torch.Tensor, u: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        assert u is not None
        gammas.append(cosine_similarity(c.flatten(1), u.flatten(1)).item())
        return u

    guided = by_hand(tiny, lambda i, t: True, note)
    assert torch.equal(guided.float(), plain(tiny)), "the loop by hand is the pipeline's"
    threshold = max(gammas[:4]) - 1e-6
    last = next(i for i, gamma in enumerate(gammas) if gamma >= threshold)
    expected = by_hand(tiny, lambda i, t: i <= last, lambda i, c, u, x: c if u is None else u)
    output, report = run(tiny, AdaptiveGuidance(threshold=threshold))
    assert torch.equal(output, expected) and not torch.equal(output, plain(tiny))
    assert computed(report, "uncond") == list(range(last + 1)) and computed(report, "cond") == list(range(STEPS))


def test_adaptive_guidance_switches_each_sample_for_good() -> None:
    policy = Similarity(0.9, "output")
    policy.begin_run(ddim_run())
    near, far = torch.tensor([1.0, 0.1]), torch.tensor([0.0, 1.0])
    c = torch.tensor([[1.0, 0.0]] * 3)
    seen = []
    for step, rows in enumerate([(far, near, far), (near, far, far), (far, far, near), (far, far, far)]):
        at = moment(step, batch=3)
        assert policy.wants(at).branches == ("both" if step < 3 else "cond")
        out = policy.uncond(at, c, torch.stack(rows) if step < 3 else None)
        seen.append([torch.equal(out[i], c[i]) for i in range(3)])
    # The evaluation that reaches the threshold is still guided; what a later cosine says does not count.
    assert seen == [[False, False, False], [False, True, False], [True, True, False], [True, True, True]]


def test_adaptive_guidance_image_does_not_depend_on_its_batch_mates() -> None:
    watcher = Similarity(2.0, "output")
    with watched(TINY["dit"].build(), GuidanceLoop(watcher, "x")) as pipe:
        TINY["dit"].call(pipe, batch=3)
    best = torch.tensor(watcher.history).cummax(0).values
    # Some sample reaches it at step 4 or before, not all; a little less, since a batch rounds otherwise.
    config = AdaptiveGuidance(threshold=best[4].min().item() - 1e-5)
    together, report = run("dit", config, batch=3)
    alone = [run("dit", config, first=row) for row in range(3)]
    torch.testing.assert_close(together, torch.cat([output for output, _ in alone]), atol=1e-5, rtol=1e-4)
    lasts = [len(computed(r, "uncond")) for _, r in alone]
    assert len(set(lasts)) > 1 and len(computed(report, "uncond")) == max(lasts)


def test_adaptive_guidance_compares_what_the_solver_steps() -> None:
    outputs: list[torch.Tensor] = []
    pipe: Any = TINY["dit"].build()
    watcher = Similarity(2.0, "output")
    hook = pipe.transformer.register_forward_hook(lambda m, a, out: outputs.append(out.sample))
    with watched(pipe, GuidanceLoop(watcher, "x")):
        TINY["dit"].call(pipe)
    hook.remove()
    wanted = [cosine_similarity(o[:1, :4].flatten(1), o[1:, :4].flatten(1)).item() for o in outputs]
    assert [row[0] for row in watcher.history] == pytest.approx(wanted, abs=1e-6)
    assert wanted[0] != pytest.approx(cosine_similarity(outputs[0][:1].flatten(1), outputs[0][1:].flatten(1)).item())


@pytest.mark.parametrize("tiny", ["flux-cfg", "mochi", "cogvideox"])
def test_adaptive_guidance_of_clean_pictures(tiny: str) -> None:
    pipe: Any = TINY[tiny].build()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        seen.append((kwargs["hidden_states"], out[0]))

    watcher = Similarity(2.0, "clean")
    hook = pipe.transformer.register_forward_hook(note, with_kwargs=True)
    with watched(pipe, GuidanceLoop(watcher, "x")):
        TINY[tiny].call(pipe)
    hook.remove()
    for i, row in enumerate(watcher.history):
        if TINY[tiny].batched_cfg:
            (x, _), (u, c) = seen[i][0].chunk(2), seen[i][1].chunk(2)
        else:
            (x, c), (_, u) = seen[2 * i], seen[2 * i + 1]
        if tiny == "cogvideox":
            alpha = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps[i]].sqrt()
            pair = [alpha * x - (1 - alpha**2).sqrt() * v for v in (c, u)]
        else:  # a straight line to the last sigma, which is 1 where time runs upwards
            left = pipe.scheduler.sigmas[-1] - pipe.scheduler.sigmas[i]
            pair = [x + left * v for v in (c, u)]
        assert row[0] == pytest.approx(cosine_similarity(pair[0].flatten(1), pair[1].flatten(1)).item(), abs=1e-5)


def test_adaptive_guidance_calibrates_its_threshold() -> None:
    pipe, call = TINY["wan"].build(), TINY["wan"].call
    config = dita.calibrate(pipe, "adaptive-guidance", lambda p: call(p, batch=2), share=0.5)
    assert isinstance(config, AdaptiveGuidance) and Method.from_json(config.to_json()) == config
    with dita.accelerated(pipe, config):
        call(pipe, batch=2)
        steps = computed(dita.report(pipe).last, "uncond")
    assert steps == list(range(len(steps))) and 0 < len(steps) <= 4
    assert config.threshold is not None
    later = replace(config, threshold=config.threshold + 1e-6)  # the least that does it
    with dita.accelerated(pipe, later):
        call(pipe, batch=2)
        assert len(computed(dita.report(pipe).last, "uncond")) > 4
    with pytest.raises(DitaError, match="no guided sampling loop"):
        dita.calibrate(TINY["flux"].build(), "adaptive-guidance", TINY["flux"].call)


def test_adaptive_guidance_on_a_flow_without_a_threshold_is_warned_of() -> None:
    assert AdaptiveGuidance().uncalibrated and not AdaptiveGuidance(threshold=0.991).uncalibrated
    assert AdaptiveGuidance().policy(()).threshold == 0.991
    flow = TINY["wan"].build()
    with pytest.warns(DitaWarning, match="dita.calibrate"):
        dita.accelerate_pipeline(flow, AdaptiveGuidance())
    dita.accelerate_pipeline(flow, AdaptiveGuidance(threshold=0.991))  # warnings are errors
    dita.accelerate_pipeline(TINY["dit"].build(), AdaptiveGuidance())


@pytest.mark.parametrize("shape", [(8, 8), (9, 11), (5, 12), (30, 52), (3, 4)])
def test_cfg_cache_splits_as_the_shifted_transform_does(shape: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    spectrum = np.fft.fftshift(np.fft.fft2(x.double().numpy()), axes=(-2, -1))
    y, z = np.ogrid[: shape[0], : shape[1]]
    disc = (y - shape[0] // 2) ** 2 + (z - shape[1] // 2) ** 2 <= (min(shape) // 5) ** 2
    wanted = np.fft.ifft2(np.fft.ifftshift(spectrum * disc, axes=(-2, -1)))
    assert abs(wanted.imag).max() < 1e-12
    np.testing.assert_allclose(low_frequencies(x).numpy(), wanted.real, atol=1e-5)
    half = low_frequencies(x.bfloat16())
    assert half.dtype == torch.float32 and half.isfinite().all()


def test_cfg_cache_packed_tokens_lie_on_their_grid_frame_by_frame() -> None:
    film = torch.randn(2, 5, 3, 10, 15)  # [B, C, F, h, w]
    tokens = film.movedim(1, -1).flatten(1, 3)
    torch.testing.assert_close(on_grid(tokens, (3, 10, 15)), film.transpose(1, 2))
    config, wanted = CFGCache(low=2.0, high=1.0, form="corrected"), low_frequencies(film).movedim(1, -1).flatten(1, 3)
    policy = CachedDifference(config)
    policy.begin_run(ddim_run())
    model = SimpleNamespace(config=SimpleNamespace(in_channels=5, out_channels=5))
    sizes = {"num_frames": 3, "height": 10, "width": 15}
    at = moment(0, batch=2)
    request = Request(at.position, ("cond",), (), (), {"hidden_states": tokens, **sizes}, SimpleNamespace(model=model))  # pyright: ignore
    at = replace(at, request=request)
    policy.uncond(at, torch.zeros_like(tokens), tokens)
    low = policy.uncond(at, torch.zeros_like(tokens), None) - tokens
    torch.testing.assert_close(low, wanted, atol=1e-5, rtol=1e-4)
    lost = replace(request, kwargs={"hidden_states": tokens})
    policy.begin_run(ddim_run())
    assert "not known" in policy.wants(replace(at, request=lost)).reason
    assert policy.uncond(replace(at, request=lost), tokens, tokens) is tokens


def test_cfg_cache_published_schedule_and_weights() -> None:
    policy = CachedDifference(CFGCache())
    policy.begin_run(ddim_run(50))
    c, d = torch.zeros(1, 1, 10, 10), torch.randn(1, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    low, full = low_frequencies(d), []
    for step in range(50):
        t = 981.0 - 20 * step
        at = moment(step, 50, t)
        if policy.wants(at).branches == "both":
            full.append(step)
            policy.uncond(at, c, d)
            continue
        since = [981.0 - 20 * i for i in range(full[-1] + 1, step + 1)]
        a = 1.1 ** sum(99 < s < 901 for s in since)
        b = 1.1 ** sum(s < 301 for s in since)
        torch.testing.assert_close(policy.uncond(at, c, None), a * low + b * (d - low), atol=1e-5, rtol=1e-5)
    # 641 is step 17, the last one before branches are left out.
    assert full == [*range(18), 20, 25, 30, 35, 40, 45]


@pytest.mark.parametrize(("tiny", "form"), [("dit", "published"), ("wan", "corrected"), ("wan", "published")])
def test_cfg_cache_by_hand(tiny: str, form: str) -> None:
    kept: list[torch.Tensor] = []
    config = CFGCache(interval=4, below=980.0, low=1.3, high=0.8, low_range=(200.0, 960.0), form=form)
    timesteps: dict[int, float] = {}

    def both(i: int, t: float) -> bool:
        timesteps[i] = t
        return i == 0 or t >= 980 or i % 4 == 0

    def stand_in(i: int, c: torch.Tensor, u: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        if u is not None:
            low = low_frequencies(u - c)
            kept[:] = [low, u - c - low]
            return u
        weights = (1.3 if 200 < timesteps[i] < 960 else 1.0, 0.8 if timesteps[i] < 301 else 1.0)
        parts = [w * part for w, part in zip(weights, kept, strict=True)]
        if form == "published":
            kept[:] = parts
        return c + parts[0] + parts[1]

    output, report = run(tiny, config)
    torch.testing.assert_close(output, by_hand(tiny, both, stand_in).float(), atol=2e-6, rtol=1e-5)
    assert 0 < len(computed(report, "uncond")) < STEPS and report.peak_cache_bytes > 0
    other, _ = run(tiny, replace(config, form="corrected" if form == "published" else "published"))
    assert not torch.equal(output, other)


def test_cfg_cache_counts_timesteps_from_the_noise_on_mochi() -> None:
    _, report = run("mochi", CFGCache(interval=100))
    steps = computed(report, "uncond")
    assert steps == list(range(len(steps))) and 1 < len(steps) < STEPS, "the noisy steps are the full ones"


def test_cfg_cache_second_expert_begins_with_both_branches() -> None:
    _, report = run("wan-2", CFGCache(interval=100, below=1001.0))
    first = {r.model: r.step for r in reversed(report.records)}
    assert len(first) == 2 and computed(report, "uncond") == sorted(first.values())


def test_cfg_zero_scale_is_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    c, u = (torch.randn(3, 4, 5, 6, generator=generator) for _ in range(2))
    s = nearest_scale(c, u)
    assert s.shape == (3, 1, 1, 1)
    error = (c - s * u).double().square().flatten(1).sum(1)
    for other in (0.8 * s, 1.2 * s, s + 0.01, s - 0.01):
        assert ((c - other * u).double().square().flatten(1).sum(1) > error).all()
    torch.testing.assert_close(((c - s * u) * u).flatten(1).sum(1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(nearest_scale(2 * u, u).flatten(), torch.full((3,), 2.0))
    assert nearest_scale(c, torch.zeros_like(u)).isfinite().all()
    assert not CFGZero(zero_steps=0).saves and CFGZero().saves, "without zero steps no run is called idle"


@pytest.mark.parametrize("tiny", ["dit", "wan"])
@pytest.mark.parametrize("zero", [0, 2])
def test_cfg_zero_by_hand(tiny: str, zero: int) -> None:
    scheduler: Any = TINY[tiny].build().scheduler
    scheduler.set_timesteps(STEPS)

    def stand_in(i: int, c: torch.Tensor, u: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        assert u is not None
        if i < zero:
            still = torch.zeros_like(x)
            if tiny == "dit":  # noise n = x0 = x / (alpha + sigma) moves nowhere on the line between the two
                bar = scheduler.alphas_cumprod[scheduler.timesteps[i]]
                still = x / (bar.sqrt() + (1 - bar).sqrt())
            return (still - W * c) / (1 - W)
        s = (c * u).sum() / (u * u).sum()
        return s * u

    expected = by_hand(tiny, lambda i, t: True, stand_in)
    output, report = run(tiny, CFGZero(zero_steps=zero))
    torch.testing.assert_close(output, expected.float(), atol=2e-5, rtol=1e-4)
    assert computed(report, "cond") == computed(report, "uncond") == list(range(zero, STEPS))


@pytest.mark.parametrize("tiny", ["qwen", "flux-cfg", "sd3", "wan"])
def test_cfg_zero_leaves_the_latents_of_a_flow_where_they_are(tiny: str) -> None:
    # Qwen-Image divides by the norm of what it combined, which is zero here.
    seen: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(values["latents"].clone())
        return values

    output, _ = run(tiny, CFGZero(zero_steps=3), callback_on_step_end=keep)
    torch.testing.assert_close(seen[1], seen[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(seen[2], seen[0], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(seen[3], seen[2], atol=1e-3) and output.isfinite().all()


def test_cfg_zero_counts_steps() -> None:
    assert [ZeroStar(0.04, True).first(steps) for steps in (50, 28, 20, 8)] == [2, 1, 1, 1]
    assert [ZeroStar(k, True).first(50) for k in (0, 0.0, 1, 3)] == [0, 0, 1, 3]
    _, report = run("sd3-heun", CFGZero(zero_steps=1))
    assert [(r.step, r.stage, r.branch) for r in report.records if r.action == "skipped"] == [
        (0, stage, branch) for stage in (0, 1) for branch in ("cond", "uncond")
    ]


@pytest.mark.parametrize(
    ("config", "cache", "tiny"),
    [
        (AdaptiveGuidance(threshold=-1.0), TaylorSeer(interval=2, warmup=2), "dit"),
        (CFGCache.forced(), TaylorSeer(interval=3, warmup=2), "wan"),
        (CFGZero(zero_steps=2), MagCache.forced(), "dit"),
        (LinearAG(stop=1.0), MagCache.forced(), "wan"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_with_a_cache(config: Method, cache: Method, tiny: str) -> None:
    pipe, call = TINY[tiny].build(), TINY[tiny].call
    first = call(pipe)
    before = snapshot(pipe)
    parts = [m.calibrated(pipe, call) if m.needs_calibration else m for m in (config, cache)]
    dita.accelerate_pipeline(pipe, *parts)
    output = call(pipe)
    report = dita.report(pipe).last
    actions = [record.action for record in report.records]
    assert output.isfinite().all() and report.steps == STEPS and len(actions) == 2 * STEPS
    assert "skipped" in actions and "computed" in actions and {"reused", "forecast"} & set(actions)
    assert torch.equal(call(pipe), output)
    dita.restore_pipeline(pipe)
    assert_same_snapshot(before, snapshot(pipe))
    assert torch.equal(call(pipe), first)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (AdaptiveGuidance, {"threshold": -2}), (AdaptiveGuidance, {"of": "noise"}), (AdaptiveGuidance, {"share": 1.5}),
        (CFGCache, {"interval": 0}), (CFGCache, {"form": "paper"}), (CFGCache, {"low": -1}),
        (CFGCache, {"high_range": (1.0,)}), (CFGCache, {"low_range": (0.0, "9")}), (CFGZero, {"zero_steps": -1}),
        (CFGZero, {"zero_steps": 1.0}), (CFGZero, {"zero_steps": True}), (CFGZero, {"rescale": 1}),
        (LinearAG, {"interval": 0}), (LinearAG, {"stop": 2}), (LinearAG, {"runs": 0}), (LinearAG, {"ridge": -1}),
    ],
)  # fmt: skip
def test_settings_out_of_range(cls: type[Method], settings: dict[str, object]) -> None:
    with pytest.raises(DitaError, match="expected"):
        cls(**settings)


@pytest.mark.parametrize("method", [AdaptiveGuidance(threshold=0.9, of="clean"), CFGZero()], ids=lambda m: m.name)
def test_schedulers_that_do_not_say_what_is_predicted_are_refused(method: Method) -> None:
    pipe: Any = TINY["flux-cfg"].build()
    pipe.scheduler = EDMEulerScheduler(prediction_type="epsilon")
    before = snapshot(pipe)
    with pytest.raises(DitaError, match="EDMEulerScheduler"):
        dita.accelerate_pipeline(pipe, method)
    assert_same_snapshot(before, snapshot(pipe))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    dita.restore_pipeline(dita.accelerate_pipeline(pipe, method))


def test_batches_of_several_runs_are_refused() -> None:
    with pytest.raises(DitaError, match="several runs"):
        refuse_stream("cfg-cache", moment(0), torch.zeros(2, 3))
    request = Request(moment(0).position, ("cond",), (), (), {}, SimpleNamespace(), entries=(3, 2))  # pyright: ignore
    for policy in (Similarity(0.9, "output"), CachedDifference(CFGCache()), Estimates(LinearWeights({}), 2, 1.0)):
        with pytest.raises(DitaError, match="several runs"):
            policy.wants(replace(moment(0), request=request))
