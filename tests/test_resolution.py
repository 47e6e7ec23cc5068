"""Runs in stages of different resolution: progressive resolution, bottleneck sampling, RALU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from einops import rearrange
from helpers import assert_same_snapshot, plain, ran, snapshot
from pipelines import TINY
from pipelines_base import pooled, text
from torch.overrides import TorchFunctionMode

import dita
from dita.caching import TaylorSeer
from dita.errors import DitaError
from dita.eval.vae import SpaceToDepthVAE
from dita.kernels.sparse import AdaSpa
from dita.loop import Loop, Request, Run, Runner, tensors_of
from dita.schedulers.base import SamplingMethod
from dita.schedulers.guidance import GuidanceInterval
from dita.schedulers.resolution import RALU, BottleneckSampling, ProgressiveResolution
from dita.schedulers.resolution.edges import most_edges
from dita.schedulers.resolution.layout import Layout, noise_weights
from dita.schedulers.resolution.matching import matched, mismatch, starts
from dita.schedulers.resolution.mixture import Mixture, copied, lacking, latents_of, sequence_of, tokens_in, tokens_of
from dita.schedulers.resolution.positions import run_at
from dita.schedulers.resolution.ralu import RegionAdaptive
from dita.schedulers.resolution.staged import StagedLoop
from dita.seams import Position
from dita.watching import watched

TEXT = 6  # tokens of Flux's prompt
PUBLISHED = {
    ((5, 6, 7), (0.3, 0.45, 1.0)): (5.019, 2.589, 2.226, 6.317),
    ((2, 3, 5), (0.2, 0.3, 1.0)): (8.141, 2.856, 2.193, 6.261),
}


def attached(tiny: str, *methods: Any, **call: Any) -> tuple[torch.Tensor, Any]:
    """Output and report of one run; the pipeline is restored, which is checked."""
    pipe = TINY[tiny].build()
    before = snapshot(pipe)
    dita.accelerate_pipeline(pipe, *methods)
    output = TINY[tiny].call(pipe, **call)
    run = dita.report(pipe).last
    dita.restore_pipeline(pipe)
    assert_same_snapshot(before, snapshot(pipe), ran(tiny))
    return output, run


# The papers by hand


def shift(level: np.ndarray | float, h: float) -> Any:
    return h * level / (1 + (h - 1) * level)


class Amplified(TorchFunctionMode):
    """Attention written out, with the bias on the scores of the first tokens, which are text."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (kwargs[name] for name in ("query", "key", "value"))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores[..., :TEXT] += -np.log2(np.sqrt((k.shape[2] - TEXT) / 16)) * np.log(2)
        return scores.softmax(-1) @ v


def flux_by_hand(stages: list[tuple[int, np.ndarray, float]], around: Any = nullcontext) -> torch.Tensor:
    """Stages (side in latent pixels, noise levels, level at which the next begins) around Flux's own transformer."""
    pipe = TINY["flux"].build()
    generator = [torch.Generator().manual_seed(0)]
    noise = torch.randn((1, 16, 8, 8), generator=generator[0])
    x = 2 * F.avg_pool2d(noise, 2) if stages[0][0] == 4 else noise
    for number, (side, levels, following) in enumerate(stages):
        half = side // 2
        rows, columns = torch.meshgrid(torch.arange(half), torch.arange(half), indexing="ij")
        ids = torch.stack([torch.zeros(half, half), rows, columns], dim=-1).reshape(-1, 3)
        for n, level in enumerate(levels[:-1]):
            with torch.no_grad(), around():
                packed = pipe.transformer(
                    hidden_states=rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
                    timestep=torch.tensor([level], dtype=torch.float32),
                    guidance=torch.tensor([3.5]),
                    pooled_projections=pooled(range(1), 3),
                    encoder_hidden_states=text(range(1), 1),
                    txt_ids=torch.zeros(TEXT, 3),
                    img_ids=ids,
                ).sample
            v = rearrange(packed, "b (h w) (c p q) -> b c (h p) (w q)", h=half, p=2, q=2)
            if n + 2 == len(levels) and number + 1 < len(stages):
                size = stages[number + 1][0]
                how: Any = {"mode": "bilinear"} if size > side else {"mode": "area"}
                clean = F.interpolate(x - float(level) * v, size=(size, size), **how)
                # A pipeline packs its latents, so that noise is drawn token by token.
                drawn = torch.randn((1, size * size // 4, 64), generator=generator[0])
                fresh = rearrange(drawn, "b (h w) (c p q) -> b c (h p) (w q)", h=size // 2, p=2, q=2)
                x = (1 - following) * clean + following * fresh
            else:
                x = x + float(levels[n + 1] - level) * v
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def flux_levels() -> np.ndarray:
    """What FluxPipeline sets for 16 tokens and 8 steps."""
    mu = 0.5 + (16 - 256) * (1.15 - 0.5) / (4096 - 256)
    return np.append(shift(np.linspace(1, 1 / 8, 8), np.exp(mu)), 0.0)


@pytest.mark.parametrize("amplify", [False, True])
def test_progressive_resolution_is_the_papers_loop(amplify: bool) -> None:
    levels = flux_levels()
    late = shift(levels, 1.2857)
    around = Amplified if amplify else nullcontext
    expected = flux_by_hand([(4, levels[:5], late[4]), (8, late[4:], 0.0)], around)
    output, run = attached("flux", ProgressiveResolution((0.5, 1.0), amplify=amplify))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert [r.tokens for r in run.records] == [0.25] * 4 + [1.0] * 4
    assert [r.action for r in run.records] == ["partial"] * 4 + ["computed"] * 4
    assert run.records[0].reason == "4 of 16 tokens; stage 1: 2 x 2 tokens a frame"
    assert "4 on fewer tokens (mean 25%)" in str(run)


def test_bottleneck_is_high_low_high() -> None:
    levels = flux_levels()
    at = lambda share: np.interp(share, np.arange(9) / 8, levels)  # noqa: E731
    config = BottleneckSampling((1.0, 0.5, 1.0), (1, 2, 2), (1.0, 0.9, 0.6), (1.0, 1.5, 1.5))
    first = at(np.linspace(0, 0.25, 3))  # 8 steps split 2 : 3 : 3
    low, high = shift(at(np.linspace(0.1, 0.625, 4)), 1.5), shift(at(np.linspace(0.4, 1.0, 4)), 1.5)
    expected = flux_by_hand([(8, first, low[0]), (4, low, high[0]), (8, high, 0.0)])
    output, run = attached("flux", config)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert [r.tokens for r in run.records] == [1.0] * 2 + [0.25] * 3 + [1.0] * 3


# Schedules and noise


def test_published_schedules_of_ralu() -> None:
    levels = RegionAdaptive(RALU(), None, RALU().fit(3.0)).plan((1.0, 0.0))
    assert [stage.scale for stage in levels] == [0.5, 0.5, 1.0] and [stage.steps for stage in levels] == [5, 6, 7]
    first = [0.0, *(e / (6.317 * (1 - e) + e) for e in (0.3, 0.45))]
    for stage, start, end, h in zip(levels, first, (0.3, 0.45, 1.0), (5.019, 2.589, 2.226), strict=True):
        begin, stop = ((1 - t) / (h - (h - 1) * (1 - t)) for t in (start, end))
        assert np.allclose(stage.levels, shift(np.linspace(begin, stop, stage.steps + 1), h), atol=1e-12)
    assert levels[1].levels[0] > levels[0].levels[-1], "the clock is put back"


def test_matching_is_the_papers() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    case, published = next(iter(PUBLISHED.items()))
    bounds = [(0.5, 10)] * 3 + [(2, 100)]
    found = optimize.minimize(mismatch, (3, 3, 3, 2), args=(*case, 3.0), bounds=bounds)
    assert np.allclose(found.x, published, atol=0.006), "the authors' search finds their numbers on this mismatch"


@pytest.mark.parametrize(("case", "published"), PUBLISHED.items())
def test_matching_finds_about_the_published_numbers(case: tuple[Any, Any], published: tuple[float, ...]) -> None:
    own = matched(*case, 3.0)
    assert np.allclose(own, published, rtol=0.1) and mismatch(own, *case, 3.0) < 1.02 * mismatch(published, *case, 3.0)


@pytest.mark.parametrize(("old", "new"), [(16, 8), (16, 12), (10, 7), (12, 4)])
def test_shrunk_noise_is_white(old: int, new: int) -> None:
    weights = noise_weights(old, new)
    torch.testing.assert_close(weights @ weights.T, torch.eye(new), atol=1e-5, rtol=0)


def test_shrunk_noise_by_two_is_the_mean_times_two() -> None:
    noise = torch.randn(2, 4, 8, 12)
    small = Layout("tensor", 1, 4, 6, 2, 4).shrunk_noise(noise, (2, 3))
    torch.testing.assert_close(small, 2 * F.avg_pool2d(noise, 2))
    packed, layout = rearrange(noise, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2), Layout("ids", 1, 4, 6, 2, 3)
    torch.testing.assert_close(layout.opened(layout.shrunk_noise(packed, (2, 3)), (2, 3))[:, :, 0], small)


@pytest.mark.parametrize("how", ["tokens", "pixels"])
def test_noise_of_enlarged_tokens_is_white_in_closed_form(how: Any) -> None:
    z, end = 6.317, 0.3
    start = starts((end, 1.0), z)[1]
    beta = start / end
    basis = torch.eye(16, dtype=torch.float64).view(16, 4, 1, 2, 2)
    root = lacking(basis, how, z).reshape(16, 16)
    copies = copied(torch.eye(4, dtype=torch.float64).view(4, 1, 2, 2), how).reshape(4, 16)
    group = copies.T @ copies  # 1 1^T among the four copies of each pixel
    torch.testing.assert_close(root.T @ root, torch.eye(16, dtype=torch.float64) - group / z**2)
    whole = beta**2 * (1 - end) ** 2 * group + (1 - start) ** 2 * root.T @ root
    torch.testing.assert_close(whole, (1 - start) ** 2 * torch.eye(16, dtype=torch.float64))
    assert copies.sum(0).eq(1).all()


@pytest.mark.parametrize("exact", [True, False])
def test_transitions_of_ralu_on_samples(exact: bool) -> None:
    torch.manual_seed(0)
    loop = RegionAdaptive(RALU(exact=exact), None, RALU().fit(3.0))
    end, start = 0.3, 1 - starts((0.3, 1.0), 6.317)[1]
    picture = torch.randn(1, 1, 50_000, 1, 2, 2)
    noisy = end * picture + (1 - end) * torch.randn_like(picture)
    for new, clean in (
        (loop._enlarged(noisy, 1 - end, start), copied(picture, "tokens")),
        (loop._renoised(noisy, 1 - end, start), picture),
    ):
        flat, true = new.flatten(3)[0, 0], clean.flatten(3)[0, 0]
        assert abs((flat * true).mean() / (true * true).mean() - (1 - start)) < 5e-3
        rest = (flat - (1 - start) * true) / start
        covariance = rest.T @ rest / len(rest)
        kept = new.ndim == 6
        factor = 1 + 6.317**-2 if kept and not exact else 1.0  # published: 2.5 % too much in tokens that stay
        assert (covariance - factor * torch.eye(covariance.shape[0])).abs().max() < (0.012 if kept else 0.025)


class Oracle(Loop):
    """Answers every call as a model that knows the picture would: the same value everywhere."""

    def begin_run(self, run: Run) -> None:
        self.scheduler = run.scheduler

    def model(self, request: Request, run: Runner) -> Any:
        sigma = float(self.scheduler.sigmas[request.position.index])
        rises = bool(self.scheduler.config.get("invert_sigmas"))
        v = (request.latents - 0.7) / (1 - sigma if rises else sigma)
        request.leave_out("the oracle answers")
        return request.answer((-v if rises else v,))


@dataclass(frozen=True)
class Answered(SamplingMethod):
    name: ClassVar[str] = "answered"

    def make(self, anatomies: Any, pipe: Any) -> Loop:
        return Oracle()

    @classmethod
    def disabled(cls) -> Any:
        return None


@pytest.mark.parametrize("method", [ProgressiveResolution, BottleneckSampling, RALU])
@pytest.mark.parametrize("tiny", ["flux", "sd3", "wan", "wan-dpm", "ltx", "mochi"])
def test_a_model_that_knows_the_picture_gets_it(tiny: str, method: Any) -> None:
    """x0, noise levels and sizes agree through all stages, whatever solver steps in between."""
    name = tiny.removesuffix("-dpm")
    if method is RALU and tiny == "mochi":
        pytest.skip("positions of mochi are a full grid")
    pipe = TINY[name].build()
    if name != tiny:
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        pipe.scheduler = DPMSolverMultistepScheduler(**options)
    dita.accelerate_pipeline(pipe, method.forced(), Answered())
    output = TINY[name].call(pipe)
    torch.testing.assert_close(output, torch.full_like(output, 0.7), atol=2e-4, rtol=0)
    assert output.shape == plain(name).shape


# Positions


class Mixed(Loop):
    """At one step, runs the model plainly, and on mixtures of tokens of two resolutions."""

    def __init__(self) -> None:
        self.whole: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.parts: list[torch.Tensor] = []

    def model(self, request: Request, run: Runner) -> Any:
        result = run(request)
        if request.position.step == 2:
            layout, branches = Layout.of(request), len(request.roles)
            low = (layout.rows // 2, layout.columns // 2)
            everything = torch.arange(low[0] * low[1]).expand(request.batch, layout.frames, -1)
            mixture = Mixture.of(low, everything)
            tokens = tokens_of(layout, request.latents, layout.full)
            tokens = rearrange(tokens, "b f (h i w j) c p q -> b f (h w i j) c p q", i=2, j=2, h=low[0], w=low[1])
            places = mixture.positions(2.0)
            found = tensors_of(run_at(request, run, layout, layout.full, places, sequence_of(layout, tokens)))[0]
            assert found is not None
            parts = [mixture.assembled(*_groups(tokens_in(layout, part))) for part in found.chunk(branches)]
            sorted_back = torch.cat(parts)
            expected = tensors_of(result)[0]
            assert expected is not None
            self.whole.append((latents_of(layout, sorted_back, layout.full), expected))
            chosen = torch.stack([torch.tensor([[n % 4] * layout.frames]).view(-1, 1) for n in range(request.batch)])
            some = Mixture.of(low, chosen)
            sequence = sequence_of(layout, tokens[:, :, : some.count])
            part = tensors_of(run_at(request, run, layout, low, some.positions(1.0), sequence))[0]
            assert part is not None and part.shape == sequence.shape
            self.parts.append(part.unflatten(0, (branches, -1)))
        return result


def _groups(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = rearrange(tokens, "b f (l four) c p q -> b f l four c p q", four=4)
    return groups[:, :, :0], groups


@pytest.mark.parametrize("tiny", ["flux", "sd3", "wan", "ltx"])
def test_positions_travel_with_the_tokens(tiny: str) -> None:
    """With everything enlarged the call is the plain one after sorting; with some, samples keep to themselves."""
    pipe, two, one = TINY[tiny].build(), Mixed(), Mixed()
    with watched(pipe, two):
        TINY[tiny].call(pipe, batch=2)
    for found, expected in two.whole:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with watched(pipe, one):
        TINY[tiny].call(pipe)
    for both, single in zip(two.parts, one.parts, strict=True):
        torch.testing.assert_close(both[:, :1], single, atol=1e-5, rtol=1e-4)
        assert not torch.equal(both[:, 1], both[:, 0])
    assert torch.equal(TINY[tiny].call(pipe), plain(tiny))


@pytest.mark.parametrize("tiny", ["flux", "sd3", "wan", "ltx"])
def test_stretched_positions_span_the_large_picture(tiny: str) -> None:
    """At full size they are the model's own; below, they change what the model sees."""
    pipe = TINY[tiny].build()
    outputs = []

    class Stretching(Loop):
        def model(self, request: Request, run: Runner) -> Any:
            result = run(request)
            if request.position.step == 0:
                loop = StagedLoop("m", pipe, stretched=True)
                loop.layout = Layout.of(request)
                outputs.append((tensors_of(loop._stretched(request, run, loop.layout.full))[0], tensors_of(result)[0]))
            return result

    with watched(pipe, Stretching()):
        TINY[tiny].call(pipe, batch=2)
    for found, expected in outputs:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    if tiny in ("flux", "wan"):
        config = ProgressiveResolution((0.5, 1.0))
        assert not torch.equal(attached(tiny, config)[0], attached(tiny, config.replace(stretched=True))[0])


def test_edges_decide_what_is_enlarged() -> None:
    vae = SpaceToDepthVAE((3, 12), 12, 12)
    pictures = torch.full((2, 3, 16, 16), -0.5)
    pictures[0, :, 9:14, 1:6], pictures[1, :, :, 13] = 1.0, 1.0
    encoded: Any = vae.encode(pictures)
    latents = encoded.latent_dist.mean[:, :, None]
    pipe = SimpleNamespace(vae=vae)
    for decode in (True, False):
        assert most_edges(pipe, latents, (2, 2), 1, decode)[0].tolist() == [[2]]
        assert most_edges(pipe, latents, (2, 2), 2, decode)[1].tolist() == [[1, 3]]


# On pipelines


@pytest.mark.parametrize("tiny", ["flux-cfg", "sd3", "wan", "mochi"])
def test_stages_of_one_size_are_bit_identical(tiny: str) -> None:
    with pytest.warns(dita.DitaWarning, match="8 x stage 1: full resolution"):
        output, run = attached(tiny, ProgressiveResolution((1.0, 1.0), (0.5, 1.0), (1.0, 1.0)))
    assert torch.equal(output, plain(tiny)) and run.reused == 0


@pytest.mark.parametrize(
    ("method", "tiny"),
    [
        (RALU.forced(), "flux-cfg"),
        (RALU.forced(), "wan"),
        (BottleneckSampling(), "qwen"),
        (ProgressiveResolution((0.5, 1.0), amplify=True), "mochi"),
    ],
)
def test_samples_do_not_depend_on_batch_mates(method: Any, tiny: str) -> None:
    torch.testing.assert_close(attached(tiny, method, batch=2)[0][:1], attached(tiny, method)[0], atol=1e-4, rtol=1e-3)


def test_caches_begin_anew_with_a_stage() -> None:
    output, run = attached("flux", ProgressiveResolution((0.5, 1.0)), TaylorSeer(interval=3, order=1, warmup=1))
    steps = [r.step for r in run.records if r.action in ("partial", "computed")]
    assert output.isfinite().all() and steps == [0, 3, 4, 6]
    output, run = attached("flux", RALU.forced(), TaylorSeer(interval=2, order=1, warmup=1), batch=2)
    assert output.isfinite().all() and {r.branch for r in run.records} == {"cond", "cond[0]", "cond[1]"}
    assert [r.step for r in run.records if r.action in ("reused", "forecast")] == [1, 3, 3, 7]


def test_sparse_attention_follows_the_grid() -> None:
    config = AdaSpa.forced()
    output, run = attached("wan", ProgressiveResolution((0.5, 1.0)), config)
    assert output.isfinite().all() and any(r.density < 1 for r in run.records if r.step >= 4)
    output, run = attached("flux", RALU.forced(), config)
    mixed = [r for r in run.records if r.step in (2, 3, 4)]
    assert output.isfinite().all() and all("does not tell" in r.reason and r.density == 1 for r in mixed)


def test_guidance_composes_in_either_order() -> None:
    guidance = GuidanceInterval(stop=0.5)
    one, run = attached("flux-cfg", RALU.forced(), guidance, batch=2)
    other, _ = attached("flux-cfg", guidance, RALU.forced(), batch=2)
    assert torch.equal(one, other)
    assert {r.step for r in run.records if r.action == "skipped"} == {4, 5, 6, 7}


def test_bad_settings() -> None:
    for make, message in (
        (lambda: ProgressiveResolution((0.5, 1.0), (1.0,)), "one value for each stage"),
        (lambda: ProgressiveResolution((1.0, 0.5)), "expected 1 and 1"),
        (lambda: ProgressiveResolution((0.5, 0.75, 1.0), (0.5, 0.3, 1.0), (1.0, 1.0, 1.0)), "shares that rise"),
        (lambda: ProgressiveResolution(amplify=1), "amplify is 1"),  # pyright: ignore
        (lambda: BottleneckSampling(strengths=(1.0, 1.0, 0.4)), "strengths"),
        (lambda: BottleneckSampling(scales=(1.0, 0.5, 0.5)), "last scale"),
        (lambda: RALU((5, 6)), "three values"),
        (lambda: RALU(ends=(0.45, 0.3, 1.0)), "rise to 1"),
        (lambda: RALU(z=3.0), "belong together"),
        (lambda: RALU(shifts=(3.0, 3.0, 3.0), z=1.5), "z is 1.5"),
    ):
        with pytest.raises(DitaError, match=message):
            make()


@pytest.mark.parametrize(
    ("method", "tiny", "message"),
    [
        (ProgressiveResolution(), "dit", "this pipeline has DDIMScheduler"),
        (BottleneckSampling(), "sd3-heun", "this pipeline has FlowMatchHeunDiscreteScheduler"),
        (ProgressiveResolution(), "flux-img2img", "takes image, strength"),
        (ProgressiveResolution(amplify=True), "wan", "leave amplify out"),
        (RALU(), "hunyuan", "numbers its tokens by a full grid"),
    ],
)
def test_unsuitable_pipelines_are_refused(method: Any, tiny: str, message: str) -> None:
    pipe = TINY[tiny].build()
    before = snapshot(pipe)
    with pytest.raises(DitaError, match=message):
        dita.accelerate_pipeline(pipe, method)
    assert_same_snapshot(before, snapshot(pipe))


def test_runs_that_cannot_be_staged_are_refused() -> None:
    for method, call, message in (
        (RALU(), {"height": 48}, "even numbers"),
        (ProgressiveResolution(), {"steps": 1}, "do not fill"),
        (BottleneckSampling(), {"steps": 2}, "3 stages need"),
        (BottleneckSampling(strengths=(1.0, 0.9, 0.2)), {}, "starts at strength 0.2"),
    ):
        pipe = dita.accelerate_pipeline(TINY["flux"].build(), method)
        with pytest.raises(DitaError, match=message):
            TINY["flux"].call(pipe, **call)
        dita.restore_pipeline(pipe)
        assert torch.equal(TINY["flux"].call(pipe), plain("flux"))


def test_conditions_of_full_size_are_refused() -> None:
    model = SimpleNamespace(config=SimpleNamespace(patch_size=2))
    anatomy: Any = SimpleNamespace(name="Model", model=model)

    def request(**arguments: Any) -> Request:
        position = Position(0, 8, 0, "all", 0, 8, 0)
        return Request(position, ("all",), ("hidden_states",), (), arguments, anatomy)

    latents = torch.zeros(1, 4, 8, 8)
    assert Layout.of(request(hidden_states=latents), latents).full == (4, 4)
    with pytest.raises(DitaError, match="controlnet_block_samples"):
        Layout.of(request(hidden_states=latents, controlnet_block_samples=[latents]))
    with pytest.raises(DitaError, match="a condition of full size is joined"):
        Layout.of(request(hidden_states=torch.zeros(1, 8, 8, 8)), latents)
