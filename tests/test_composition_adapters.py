"""LoRA, ControlNet and IP-Adapter on accelerated pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FluxControlNetModel,
    FluxControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
)
from helpers import plain
from pipelines import TINY
from pipelines_base import POOLED_WIDTH, TEXT_WIDTH, noise, seed_weights
from torch import nn

import dita
from dita.caching import DBCache, EasyCache, TaylorSeer
from dita.kernels.sparse import AdaSpa

FLUX = TINY["flux"]
STEPS = 4
MODULES = TaylorSeer(interval=2, warmup=1)


def lora(seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on an attention projection, and on both sides of the joining projection of single blocks."""
    shapes = {
        "transformer_blocks.0.attn.to_q": (32, 32),
        "single_transformer_blocks.1.proj_mlp": (32, 128),
        "single_transformer_blocks.1.proj_out": (160, 32),
    }
    weights = {}
    for n, (path, (inputs, outputs)) in enumerate(shapes.items()):
        weights[f"transformer.{path}.lora_A.weight"] = noise(10 * seed + n, 2, inputs) / inputs**0.5
        weights[f"transformer.{path}.lora_B.weight"] = noise(10 * seed + n + 5, outputs, 2)
    return weights


def load(pipe: Any, name: str, seed: int) -> Any:
    pipe.load_lora_weights(lora(seed), adapter_name=name)
    return pipe


def run(pipe: Any) -> torch.Tensor:
    return FLUX.call(pipe, steps=STEPS)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize("method", [MODULES, AdaSpa.forced()], ids=lambda method: method.name)
def test_lora_loaded_switched_fused_and_unloaded_while_accelerated(method: Any) -> None:
    """Each state gives what the method gives on a pipeline that was in that state from the start."""
    pytest.importorskip("peft", reason="peft loads LoRA")
    plainly, expected = {}, {}
    for name, seed in (("first", 1), ("second", 2)):
        pipe = load(FLUX.build(), name, seed)
        plainly[name] = run(pipe)
        expected[name] = run(dita.accelerate_pipeline(pipe, method))
    bare = run(dita.accelerate_pipeline(FLUX.build(), method))
    assert not torch.equal(plainly["first"], plainly["second"]) and not torch.equal(expected["first"], bare)

    pipe = dita.accelerate_pipeline(FLUX.build(), method)
    assert torch.equal(run(pipe), bare)
    load(pipe, "first", 1)
    assert torch.equal(run(pipe), expected["first"]) and dita.report(pipe).last.reused > 0
    load(pipe, "second", 2)
    pipe.set_adapters("second")
    assert torch.equal(run(pipe), expected["second"])
    pipe.set_adapters("first")
    pipe.fuse_lora(adapter_names=["first"])
    torch.testing.assert_close(run(pipe), expected["first"], rtol=1e-3, atol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(run(pipe), bare, rtol=1e-3, atol=1e-3)  # unfusing rounds
    assert dita.report(pipe).last.reused > 0
    dita.restore_pipeline(pipe)
    torch.testing.assert_close(run(pipe), plain("flux", steps=STEPS), rtol=1e-3, atol=1e-3)
    assert not any("_compiled_call_impl" in vars(module) for module in pipe.transformer.modules())


def seeded(model: nn.Module, seed: int) -> nn.Module:
    """Every zero projection of a control network is given weights, so that it has something to say."""
    seed_weights(model, seed)
    return model.eval()


def vae(channels: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        sizes: Any = {"block_out_channels": (4,) * 4, "latent_channels": channels, "norm_num_groups": 2}
        sizes |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        return AutoencoderKL(mid_block_add_attention=False, shift_factor=0.0, scaling_factor=1.0, **sizes).eval()


def flux_control(cls: Any) -> Any:
    control = FluxControlNetModel(
        in_channels=64, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=POOLED_WIDTH, guidance_embeds=True,
        axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    return cls.from_pipe(FLUX.build(), controlnet=seeded(control, 7), vae=vae(16))


def sd3_control(cls: Any) -> Any:
    control = SD3ControlNetModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, out_channels=4,
        joint_attention_dim=TEXT_WIDTH, caption_projection_dim=32, pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=16, extra_conditioning_channels=0,
    )  # fmt: skip
    return cls.from_pipe(TINY["sd3"].build(), controlnet=seeded(control, 8), vae=vae(4))


CONTROLLED = {
    "flux": (lambda: flux_control(FluxControlNetPipeline), "flux", "control_image"),
    "sd3": (lambda: sd3_control(StableDiffusion3ControlNetPipeline), "sd3", "control_image"),
}


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("flux", DBCache(fn=1, bn=1, warmup=0, threshold=1e9)),
        ("flux", MODULES),
        ("sd3", DBCache(fn=1, warmup=0, threshold=1e9)),
        ("sd3", EasyCache.forced()),
    ],
    ids=["flux-span", "flux-modules", "sd3-span", "sd3-model"],
)
def test_the_control_signal_is_kept_in_what_is_cached(name: str, method: Any) -> None:
    build, tiny, argument = CONTROLLED[name]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    image = noise(9, 1, 3, 64, 64).clamp(-1, 1)

    def call(scale: float) -> torch.Tensor:
        named = {argument: image, "controlnet_conditioning_scale": scale}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the latents of the control image are drawn
            return TINY[tiny].call(pipe, steps=6, **named)

    with_control, without = call(1.0), call(0.0)
    dita.accelerate_pipeline(pipe, method)
    fast, fast_without = call(1.0), call(0.0)
    assert dita.report(pipe).last.reused > 0
    effect, fast_effect = (with_control - without).flatten(), (fast - fast_without).flatten()
    assert effect.norm() > 0.1 * without.norm()
    assert torch.cosine_similarity(effect, fast_effect, dim=0) > 0.7
    assert 0.6 < fast_effect.norm() / effect.norm() < 1.6
    dita.restore_pipeline(pipe)
    assert torch.equal(call(1.0), with_control)


def test_an_ip_adapter_loaded_while_accelerated() -> None:
    state: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    shapes = {"proj.weight": (4 * TEXT_WIDTH, 24), "proj.bias": (4 * TEXT_WIDTH,)}
    shapes |= {"norm.weight": (TEXT_WIDTH,), "norm.bias": (TEXT_WIDTH,)}
    state["image_proj"] = {key: noise(n, *shape) for n, (key, shape) in enumerate(shapes.items())}
    for block in range(3):
        for n, key in enumerate(("to_k_ip", "to_v_ip")):
            state["ip_adapter"][f"{block}.{key}.weight"] = noise(20 + 2 * block + n, 32, TEXT_WIDTH) / 5
            state["ip_adapter"][f"{block}.{key}.bias"] = torch.zeros(32)

    def adapted(pipe: Any) -> Any:
        pipe.transformer._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
        return pipe

    def call(pipe: Any, seed: int) -> torch.Tensor:
        embeds = {f"{sign}ip_adapter_image_embeds": [noise(seed, 1, 1, 24)] for sign in ("", "negative_")}
        return FLUX.call(pipe, steps=STEPS, **embeds)

    first, second = (call(adapted(FLUX.build()), seed) for seed in (1, 2))
    assert not torch.allclose(first, second, atol=1e-2)
    for method in (MODULES, DBCache(fn=1, warmup=0, threshold=1e9)):
        expected = call(dita.accelerate_pipeline(adapted(FLUX.build()), method), 1)
        pipe = dita.accelerate_pipeline(FLUX.build(), method)
        FLUX.call(pipe, steps=STEPS)
        adapted(pipe)
        assert torch.equal(call(pipe, 1), expected) and dita.report(pipe).last.reused > 0
        other = call(pipe, 2)
        assert (expected - first).norm() < (expected - second).norm() and not torch.equal(other, expected)
        dita.restore_pipeline(pipe)
        assert torch.equal(call(pipe, 1), first)
