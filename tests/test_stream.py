"""StreamDiffusion: the stream batch and residual guidance against plain loops written by hand, the filter, refusals."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from helpers import assert_same_snapshot, snapshot
from pipelines import TINY
from pipelines_base import pooled, rows_of_noise, text
from pipelines_image import FLUX_CHANNELS, build_flux, call_img2img

import dita
from dita.caching import TaylorSeer
from dita.errors import DitaError
from dita.schedulers import Stream
from dita.schedulers.flight import skip_probability
from dita.schedulers.guidance import RCFG
from dita.schedulers.levels import Level

STEPS, STRENGTH, INDICES = 5, 0.8, 4
BATCH = Stream(threshold=1.0)


def picture(number: int, batch: int = 1) -> torch.Tensor:
    """Latents of an input image, [batch, 16, 8, 8]."""
    return rows_of_noise(range(batch), 50 + number, FLUX_CHANNELS, 8, 8)


def guided_img2img() -> Any:
    """Flux image-to-image with two guidance branches."""
    return build_flux(FluxImg2ImgPipeline, distilled=False)


def frame(pipe: Any, number: int, batch: int = 1, guided: bool = False, **extra: Any) -> torch.Tensor:
    """One frame of a stream: another picture, the same noise."""
    arguments = {"strength": STRENGTH, "image": picture(number, batch)} | ({"true_cfg_scale": 3.0} if guided else {})
    return call_img2img(pipe, steps=STEPS, batch=batch, **(arguments | extra))


def calls(pipe: Any) -> int:
    """Branches that the transformer computed in the last run."""
    return sum(record.action == "computed" for record in dita.report(pipe).last.records)


def close(new: torch.Tensor, old: torch.Tensor) -> bool:
    return bool((new - old).abs().max() <= 2e-5 * old.abs().max())


class ByHand:
    """Flux image-to-image without a pipeline's loop: its transformer, its levels, its packed latents."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.ids = pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
        # 16 tokens, and the shift of FluxPipeline for as many
        mu = 0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256)
        flat = torch.linspace(1, 1 / STEPS, STEPS, dtype=torch.float64)
        shifted = torch.exp(torch.tensor(mu, dtype=torch.float64)) / (
            torch.exp(torch.tensor(mu, dtype=torch.float64)) + (1 / flat - 1)
        )
        self.sigmas = [*shifted.float().tolist()[STEPS - INDICES :], 0.0]
        self.noise = self.pack(torch.randn(1, FLUX_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0)))

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        return self.pipe._pack_latents(latents, 1, FLUX_CHANNELS, 8, 8)

    @torch.no_grad()
    def flow(self, x: torch.Tensor, sigmas: list[float], negative: bool = False) -> torch.Tensor:
        rows = len(sigmas)
        salts = (2, 4) if negative else (1, 3)
        guidance = torch.full([rows], 3.5) if self.pipe.transformer.config.guidance_embeds else None
        return self.pipe.transformer(
            hidden_states=x,
            timestep=torch.tensor(sigmas),
            guidance=guidance,
            encoder_hidden_states=text(range(1), salts[0]).repeat(rows, 1, 1),
            pooled_projections=pooled(range(1), salts[1]).repeat(rows, 1),
            txt_ids=torch.zeros(6, 3),
            img_ids=self.ids,
            return_dict=False,
        )[0]

    def start(self, number: int) -> torch.Tensor:
        s = self.sigmas[0]
        return s * self.noise + (1 - s) * self.pack(picture(number))


# Residual guidance


@pytest.mark.parametrize(("kind", "delta"), [("self", 1.0), ("self", 0.7), ("initialize", 1.0)])
def test_residual_flow_by_hand(kind: str, delta: float) -> None:
    """The virtual flow is carried from step to step; no step looks back at the picture."""
    pipe, w = guided_img2img(), 1.2
    hand = ByHand(pipe)
    x, sigmas = hand.start(3), hand.sigmas
    virtual = hand.noise - hand.pack(picture(3))
    if kind == "initialize":
        virtual = hand.flow(x, sigmas[:1], negative=True)
    for s, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        cond = hand.flow(x, [s])
        flow = delta * virtual + w * (cond - delta * virtual)
        x = x + (after - s) * flow
        virtual = flow + s / after * (virtual - flow) if after else virtual
    dita.accelerate_pipeline(pipe, RCFG(kind=kind, delta=delta))
    assert close(frame(pipe, 3, guided=True), x)
    ran = {
        branch: sum(r.action == "computed" for r in rs)
        for (_, branch, _), rs in dita.report(pipe).last.streams().items()
    }
    assert ran == {"cond": INDICES, "uncond": 1 if kind == "initialize" else 0}


def test_residual_noise_by_hand_on_ddim() -> None:
    """Text-to-image, where the latents are the noise: the paper's recursion with DDIM's step in place of the LCM's."""
    pipe, w, steps = TINY["dit"].build(), 1.2, 6
    kept: list[torch.Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, *args, **kwargs: kept.append(z) or decode(z, *args, **kwargs)
    dita.accelerate_pipeline(pipe, RCFG(scale=w))
    TINY["dit"].call(pipe, steps=steps)
    scheduler: Any = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    bars = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps] + [float(scheduler.final_alpha_cumprod)]
    ratios = [((1 - bar) / bar) ** 0.5 for bar in bars]
    noise = x / (1 - bars[0]) ** 0.5
    dita.restore_pipeline(pipe)
    for n, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            cond = pipe.transformer(x, timestep=t[None], class_labels=torch.tensor([3])).sample[:, :4]
        eps = noise + w * (cond - noise)
        x = scheduler.step(eps, t, x).prev_sample
        noise = eps + ratios[n] / ratios[n + 1] * (noise - eps) if ratios[n + 1] else noise
    assert close(kept[0] * pipe.vae.config.scaling_factor, x)


def test_the_virtual_noise_is_that_of_the_paper_after_an_lcm_step() -> None:
    x0, eps, fresh, start = (rows_of_noise(range(1), salt, 4, 8, 8) for salt in range(4))
    now, after = Level("noise", 0.6, 0.8), Level("noise", 0.8, 0.6)
    x = now.alpha * x0 + now.sigma * start
    assert close(now.output(x, x0), start)
    seen = now.clean(x, eps)
    x = after.alpha * seen + after.sigma * fresh
    # F of the authors applied to sigma n, times alpha' / sigma', on top of the next step's own noise
    expected = fresh + after.alpha / after.sigma * ((now.sigma * start - now.sigma * eps) / now.alpha)
    torch.testing.assert_close(after.output(x, x0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("level", "output"),
    [
        (Level("noise", 0.6, 0.8), lambda x0, n: n),
        (Level("velocity", 0.6, 0.8), lambda x0, n: 0.6 * n - 0.8 * x0),
        (Level("flow", 0.3, 0.7), lambda x0, n: n - x0),
        (Level("flow", 0.3, 0.7, -1.0), lambda x0, n: x0 - n),
        (Level("clean", 0.6, 0.8), lambda x0, n: x0),
    ],
)
def test_what_a_model_would_put_out(level: Level, output: Any) -> None:
    x0, n = rows_of_noise(range(2), 7, 4, 8, 8).split(1)
    x = level.alpha * x0 + level.sigma * n
    torch.testing.assert_close(level.output(x, x0), output(x0, n), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(level.clean(x, output(x0, n)), x0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tiny", ["sd3", "flux-cfg"])
def test_the_scale_is_ours_or_the_pipelines(tiny: str) -> None:
    """Batched and sequential guidance: w = 1.2 comes out whatever formula the pipeline has at its own scale."""
    name = "guidance_scale" if tiny == "sd3" else "true_cfg_scale"
    pipe = dita.accelerate_pipeline(TINY[tiny].build(), RCFG())
    at_three = TINY[tiny].call(pipe, steps=4)
    dita.accelerate_pipeline(pipe, RCFG(scale=None))
    assert close(TINY[tiny].call(pipe, steps=4, **{name: 1.2}), at_three)
    two = TINY[tiny].call(pipe, steps=4, batch=2)
    assert close(two[1:], TINY[tiny].call(pipe, steps=4, first=1)), "an image depends on its batch mate"


def test_rcfg_with_a_cache_and_exact_restore() -> None:
    pipe = TINY["wan"].build()
    plain = TINY["wan"].call(pipe, steps=6)
    before = snapshot(pipe)
    dita.accelerate_pipeline(pipe, RCFG(), TaylorSeer(interval=2, warmup=1))
    assert TINY["wan"].call(pipe, steps=6).isfinite().all()
    streams = {branch: [r.action for r in rs] for (_, branch, _), rs in dita.report(pipe).last.streams().items()}
    assert streams["uncond"] == ["skipped"] * 6 and 0 < streams["cond"].count("computed") < 6
    dita.restore_pipeline(pipe)
    assert_same_snapshot(before, snapshot(pipe))
    assert torch.equal(TINY["wan"].call(pipe, steps=6), plain)


def test_rcfg_refuses_what_it_cannot_know() -> None:
    wrong: tuple[dict[str, Any], ...] = ({"kind": "other"}, {"scale": 0.5}, {"delta": -1.0})
    for settings in wrong:
        with pytest.raises(DitaError, match="expected"):
            RCFG(**settings)
    pipe = TINY["dit"].build()
    pipe.scheduler = EDMEulerScheduler()
    before = snapshot(pipe)
    with pytest.raises(DitaError, match="EDMEulerScheduler with prediction_type"):
        dita.accelerate_pipeline(pipe, RCFG())
    assert_same_snapshot(before, snapshot(pipe))
    pipe = dita.accelerate_pipeline(guided_img2img(), RCFG())
    with pytest.raises(DitaError, match="begins in the middle"):
        frame(pipe, 0, guided=True, latents=torch.zeros(1, 16, 64))
    dita.accelerate_pipeline(pipe, RCFG(kind="initialize"))
    assert frame(pipe, 0, guided=True, latents=torch.zeros(1, 16, 64)).isfinite().all()


# Stream batch


def test_stream_batch_by_hand() -> None:
    """Row j is the frame before the last j; all rows move by one step, the last one is shown."""
    pipe = build_flux(FluxImg2ImgPipeline)
    hand = ByHand(pipe)
    sigmas, x = hand.sigmas, hand.start(0)
    rows = [x]
    for s, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (after - s) * hand.flow(x, [s])
        rows.append(x)
    shown = [rows.pop()]
    for number in range(1, 7):
        rows = [hand.start(number), *rows[1:]]
        flows = hand.flow(torch.cat(rows), sigmas[:-1]).split(1)
        moved = [x + (t - s) * v for x, v, s, t in zip(rows, flows, sigmas[:-1], sigmas[1:], strict=True)]
        rows = [moved[0], *moved[:-1]]
        shown.append(moved[-1])
    dita.accelerate_pipeline(pipe, BATCH)
    for number, expected in enumerate(shown):
        assert close(frame(pipe, number), expected), number
        assert calls(pipe) == (1 if number else INDICES)
        assert len(dita.report(pipe).last.records) == INDICES and dita.report(pipe).last.finished


@pytest.mark.parametrize(("tiny", "batch"), [("dit", 2), ("sd3", 1), ("flux-cfg", 2), ("cogvideox", 1)])
def test_each_frame_is_the_plain_one_some_calls_later(tiny: str, batch: int) -> None:
    """Text-to-image, with both branches of guidance, batched and sequential, under DDIM and flow matching."""
    spec, steps = TINY[tiny], 3
    pipe = spec.build()
    plain = [spec.call(pipe, steps=steps, seed=n, batch=batch) for n in range(3)]
    dita.accelerate_pipeline(pipe, BATCH)
    for n in range(5):
        output = spec.call(pipe, steps=steps, seed=n, batch=batch)
        assert close(output, plain[max(0, n - steps + 1)]), n
        assert calls(pipe) == (2 if n else 2 * steps)


def test_a_still_scene_stays() -> None:
    pipe = build_flux(FluxImg2ImgPipeline)
    plain = frame(pipe, 0)
    dita.accelerate_pipeline(pipe, BATCH)
    assert torch.equal(frame(pipe, 0), plain), "the first frame is run as always"
    assert all(close(frame(pipe, 0), plain) for _ in range(INDICES + 2))


def test_residual_guidance_in_a_stream_batch() -> None:
    """Every row is guided by the picture of its own frame, at its own noise level."""
    alone = dita.accelerate_pipeline(guided_img2img(), RCFG())
    plain = [frame(alone, n, batch=2, guided=True) for n in range(3)]
    pipe = dita.accelerate_pipeline(guided_img2img(), BATCH, RCFG())
    for n in range(INDICES + 2):
        output = frame(pipe, n, batch=2, guided=True)
        assert close(output, plain[max(0, n - INDICES + 1)]), n
        assert calls(pipe) == (1 if n else INDICES)
    pipe = dita.accelerate_pipeline(guided_img2img(), RCFG(), BATCH)
    frame(pipe, 0, guided=True)
    with pytest.raises(DitaError, match="Name stream before rcfg"):
        frame(pipe, 1, guided=True)
    dita.accelerate_pipeline(pipe, BATCH, RCFG(kind="initialize"))
    frame(pipe, 0, guided=True)
    with pytest.raises(DitaError, match='kind="self" with stream'):
        frame(pipe, 1, guided=True)


def test_a_cache_in_a_stream_batch_changes_the_first_frame_alone() -> None:
    pipe = build_flux(FluxImg2ImgPipeline)
    plain = frame(pipe, 5)
    before = snapshot(pipe)
    dita.accelerate_pipeline(pipe, BATCH, TaylorSeer(interval=2, warmup=1))
    frame(pipe, 0)
    assert calls(pipe) < INDICES
    for n in range(5, 5 + INDICES):
        output = frame(pipe, n)
        assert calls(pipe) == 1 and len(dita.report(pipe).last.records) == INDICES
    assert close(output, plain)
    dita.restore_pipeline(pipe)
    assert_same_snapshot(before, snapshot(pipe))
    assert torch.equal(frame(pipe, 5), plain)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"steps": 6}, "timesteps"),
        ({"strength": 0.5}, "first timestep"),
        ({"size": "large"}, "timesteps|latents"),
        ({"prompt_embeds": text(range(1), 9)}, "encoder_hidden_states"),
        ({"negative_prompt_embeds": text(range(1), 9)}, "negative_prompt_embeds"),
        ({"true_cfg_scale": 2.0}, "guidance scale"),
        ({"true_cfg_scale": 1.0}, "guidance"),
    ],
)
def test_any_change_begins_anew(change: dict[str, Any], word: str) -> None:
    def asked(pipe: Any, n: int) -> torch.Tensor:
        arguments = {"strength": STRENGTH, "true_cfg_scale": 3.0, "image": picture(n)} | change
        if "size" in change:
            arguments["image"] = torch.cat([picture(n), picture(n)[..., :4]], -1)
        return call_img2img(pipe, **({"steps": STEPS} | arguments))

    pipe = guided_img2img()
    plain = asked(pipe, 7)
    dita.accelerate_pipeline(pipe, BATCH)
    for n in range(2):
        frame(pipe, n, guided=True)
    assert torch.equal(asked(pipe, 7), plain)
    first = dita.report(pipe).last.records[0].reason
    assert first.startswith("begun anew with another") and any(part in first for part in word.split("|")), first
    asked(pipe, 8)
    assert "in one batch" in dita.report(pipe).last.records[0].reason


def test_a_new_scheduler_or_attaching_again_begins_anew() -> None:
    pipe = dita.accelerate_pipeline(build_flux(FluxImg2ImgPipeline), BATCH)
    frame(pipe, 0)
    frame(pipe, 1)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.4)
    # A new scheduler is noticed when the transformer is called: the noise was added unseen, the picture comes later.
    ran = []
    for n in range(4):
        frame(pipe, n)
        ran.append(calls(pipe))
    assert ran == [INDICES, INDICES, 1, 1]
    dita.accelerate_pipeline(pipe, BATCH)
    frame(pipe, 1)
    assert calls(pipe) == INDICES


def test_a_frame_that_raised_was_never_there() -> None:
    one, two = (dita.accelerate_pipeline(build_flux(FluxImg2ImgPipeline), "stream", threshold=0.9) for _ in range(2))

    def broken(*args: Any) -> dict[str, Any]:
        raise RuntimeError("the lamp went out")

    for n in range(6):
        expected = frame(one, n // 2)
        if n in (0, 2, 3):
            with pytest.raises(RuntimeError, match="lamp"):
                frame(two, 9, callback_on_step_end=broken)
        assert torch.equal(frame(two, n // 2), expected), n


# The filter


def test_skip_probability_is_the_papers() -> None:
    assert [round(skip_probability(c, 0.98), 6) for c in (1.0, 0.995, 0.98, 0.5)] == [1.0, 0.75, 0.0, 0.0]
    assert skip_probability(1.0, 1.0) == 0


@pytest.mark.parametrize("batch", [True, False])
def test_equal_frames_are_skipped_ten_times_in_a_row(batch: bool) -> None:
    pipe = dita.accelerate_pipeline(build_flux(FluxImg2ImgPipeline), Stream(batch=batch))
    ran: list[int] = []
    embedder = pipe.transformer.x_embedder
    embedder.register_forward_hook(lambda module, args, output: ran.append(output.shape[0]))
    outputs = []
    for _ in range(1 + 10 + 1 + 2):
        outputs.append(frame(pipe, 0))
    each = [INDICES] if batch else [1] * INDICES
    assert ran == [1] * INDICES + each
    assert all(torch.equal(output, outputs[0]) for output in outputs[:11])
    assert all(torch.equal(output, outputs[11]) for output in outputs[11:]) and close(outputs[11], outputs[0])
    run = dita.report(pipe).last
    assert run.finished and [r.action for r in run.records] == ["skipped"] * INDICES
    assert "too similar" in run.records[0].reason


def wandering(n: int) -> torch.Tensor:
    """Pictures that change a little from frame to frame: cosines of 0.993 to their neighbours."""
    return picture(0) + 0.12 * sum((picture(k) for k in range(1, n + 1)), torch.zeros(()))


def skipped(pipe: Any, frames: list[torch.Tensor]) -> list[bool]:
    done = []
    for image in frames:
        frame(pipe, 0, image=image, batch=image.shape[0])
        done.append(calls(pipe) == 0)
    return done


def test_the_filter_is_reproducible_and_knows_different_frames() -> None:
    pipe, film = build_flux(FluxImg2ImgPipeline), [wandering(n) for n in range(12)]
    drawn = [skipped(dita.accelerate_pipeline(pipe, Stream(seed=seed)), film) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and 2 < sum(drawn[0]) < 10
    dita.accelerate_pipeline(pipe, Stream())
    assert not any(skipped(pipe, [picture(n) for n in range(3)])), "cosines near 0"


@pytest.mark.parametrize("batch", [True, False])
def test_each_sample_is_filtered_by_itself(batch: bool) -> None:
    """One sample rests, the other moves: each is what it would be alone."""
    still, moving = [picture(0)] * 5, [picture(n) for n in range(5)]

    def shown(pipe: Any, images: list[torch.Tensor], first: int = 0) -> list[torch.Tensor]:
        size = images[0].shape[0]
        return [frame(pipe, 0, batch=size, image=image, first=first) for image in images]

    pipe = dita.accelerate_pipeline(build_flux(FluxImg2ImgPipeline), Stream(batch=batch))
    both = shown(pipe, [torch.cat(pair) for pair in zip(still, moving, strict=True)])
    assert "1 of 2 images" in dita.report(pipe).last.records[0].reason
    for place, images in enumerate((still, moving)):
        dita.accelerate_pipeline(pipe, Stream(batch=batch))
        for together, alone in zip(both, shown(pipe, images, first=place), strict=True):
            assert close(together[place : place + 1], alone)


# What it refuses


def test_pipelines_that_cannot_stream() -> None:
    wrong: tuple[dict[str, Any], ...] = ({"threshold": 1.5}, {"max_skips": -1}, {"seed": 0.5}, {"batch": 1})
    for settings in wrong:
        with pytest.raises(DitaError, match="expected"):
            Stream(**settings)
    wan = TINY["wan"].build()
    before = snapshot(wan)
    with pytest.raises(DitaError, match="UniPCMultistepScheduler"):
        dita.accelerate_pipeline(wan, "stream")
    assert_same_snapshot(before, snapshot(wan))
    dita.accelerate_pipeline(wan, Stream(batch=False, threshold=0.5))
    first = TINY["wan"].call(wan, steps=2)
    assert torch.equal(TINY["wan"].call(wan, steps=2), first) and calls(wan) == 0
    two = TINY["wan-2"].build()
    two.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(DitaError, match="shares them among"):
        dita.accelerate_pipeline(two, "stream")
    pipe = build_flux(FluxImg2ImgPipeline)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(DitaError, match="stochastic_sampling"):
        dita.accelerate_pipeline(pipe, "stream")


def test_latents_that_someone_else_changes_cannot_stream() -> None:
    pipe = dita.accelerate_pipeline(build_flux(FluxImg2ImgPipeline), "stream")
    with pytest.raises(DitaError, match="changed between two steps"):
        frame(pipe, 0, callback_on_step_end=lambda pipe, step, t, values: {"latents": values["latents"] * 0.5})
    with pytest.raises(DitaError, match="eta"):
        cog = dita.accelerate_pipeline(TINY["cogvideox"].build(), "stream")
        TINY["cogvideox"].call(cog, steps=2, eta=0.5)


def test_disabled_is_plain_and_needs_nothing() -> None:
    for tiny in ("sd3-heun", "wan-2"):
        pipe = TINY[tiny].build()
        plain = TINY[tiny].call(pipe, steps=2)
        dita.accelerate_pipeline(pipe, Stream.disabled())
        assert torch.equal(TINY[tiny].call(pipe, steps=2), plain)
        assert torch.equal(TINY[tiny].call(pipe, steps=2), plain)


def test_the_example_on_the_bundled_pipeline() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    example = import_module("stream_fashion_flux")
    frames = torch.full((3, 3, 32, 64), 0.1)
    for n in range(3):
        frames[n, :, 8:24, 4 + 8 * n : 20 + 8 * n] = 0.9
    drawing = example.Drawing("a red bag on the left", steps=4)
    lines = list(example.bench(example.image_to_image(), frames, drawing, 0.98))
    assert lines[0]["largest_difference"] <= example.ROUNDING
    assert [line["calls"] for line in lines[1:]] == [6, 6, 4, 4] and [line["rows"] for line in lines[1:]] == [6] * 4
    assert [line["delay"] for line in lines[1:]] == [0, 0, 1, 1]
    assert lines[3]["psnr"] is None or lines[3]["psnr"] > 80
    assert lines[3]["psnr_now"] < 40
