"""Guidance methods beside a third branch, against loops written by hand.

Skip-layer guidance makes a call of its own, perturbed-attention guidance has a third row in the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3PAGPipeline
from guided_loops import STEPS, W, computed
from pipelines import TINY

import dita
from dita.config import Method
from dita.errors import DitaWarning
from dita.schedulers.guidance import CFGCache, CFGZero, GuidanceInterval
from dita.schedulers.guidance.cfg_cache import low_frequencies

SKIPPING = {
    "skip_guidance_layers": [1],
    "skip_layer_guidance_scale": 2.0,
    "skip_layer_guidance_start": 0.2,
    "skip_layer_guidance_stop": 0.9,
}
PERTURBING = {"pag_scale": 2.0}
THIRD = {"skip-layer": range(2, STEPS), "perturbed": range(STEPS)}
"""Steps at which the third branch runs."""
CONFIGS = (GuidanceInterval(stop=0.5), CFGCache(interval=4, below=1001.0, form="corrected"), CFGZero(zero_steps=3))
_PARTS = inspect.signature(StableDiffusion3PAGPipeline).parameters
Policy = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def build(kind: str) -> Any:
    pipe: Any = TINY["sd3"].build()
    if kind == "perturbed":
        parts = {name: part for name, part in pipe.components.items() if name in _PARTS}
        pipe = StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.2"])
        pipe.set_progress_bar_config(disable=True)
    return pipe


def call(kind: str, pipe: Any) -> torch.Tensor:
    return TINY["sd3"].call(pipe, **(SKIPPING if kind == "skip-layer" else PERTURBING))


def stand_in(config: Method) -> Policy:
    """What the method makes of u at each step, given both branches."""
    kept: list[torch.Tensor] = []

    def interval(i: int, c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u if i < STEPS / 2 else c

    def cached(i: int, c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        if i % 4 == 0:
            low = low_frequencies(u - c)
            kept[:] = [low, u - c - low]
            return u
        t = timesteps[i]
        return c + (1.1 if 99 < t < 901 else 1.0) * kept[0] + (1.1 if t < 301 else 1.0) * kept[1]

    def zero(i: int, c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return (c * u).sum() / (u * u).sum() * u

    scheduler: Any = TINY["sd3"].build().scheduler
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps.tolist()
    return {"guidance-interval": interval, "cfg-cache": cached, "cfg-zero": zero}[config.name]


@torch.no_grad()
def by_hand(kind: str, policy: Policy, zero: float = 0) -> torch.Tensor:
    """The pipeline's loop without dita; the first `zero` steps have an output of zero."""
    pipe, calls = build(kind), []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    hook = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    call(kind, pipe)
    hook.remove()
    if kind == "perturbed":
        pipe._set_pag_attn_processor(pag_applied_layers=["blocks.2"], do_classifier_free_guidance=True)
    pipe.scheduler.set_timesteps(STEPS)
    x, rest = calls[0]["hidden_states"][:1], iter(calls)
    for i, t in enumerate(pipe.scheduler.timesteps):
        given = next(rest)
        rows = len(given["hidden_states"])
        assert rows == (3 if kind == "perturbed" else 2), "guard: unconditional and conditional rows, and the third's"
        u, c, *third = pipe.transformer(**{**given, "hidden_states": x.repeat(rows, 1, 1, 1)})[0].split(1)
        if kind == "skip-layer" and i in THIRD[kind]:
            third = [pipe.transformer(**{**next(rest), "hidden_states": x})[0]]
        output = torch.zeros_like(x)
        if i >= zero:
            u = policy(i, c, u)
            output = u + W * (c - u) + (2.0 * (c - third[0]) if third else 0.0)
        x = pipe.scheduler.step(output, t, x, return_dict=False)[0]
    assert next(rest, None) is None
    return x


@pytest.mark.parametrize("kind", THIRD)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_beside_a_third_branch(kind: str, config: Method) -> None:
    plain = call(kind, build(kind))
    torch.testing.assert_close(plain, by_hand(kind, lambda i, c, u: u), atol=1e-5, rtol=1e-5)
    zero = config.zero_steps if isinstance(config, CFGZero) else 0
    expected = by_hand(kind, stand_in(config), zero)
    pipe = dita.accelerate_pipeline(build(kind), config)
    if kind == "perturbed":
        with pytest.warns(DitaWarning, match="perturbed-attention"):
            output = call(kind, pipe)
    else:
        output = call(kind, pipe)
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(output, plain, atol=1e-3)
    run = dita.report(pipe).last.settle()
    third = computed(run, "third")
    assert third == [step for step in THIRD[kind] if step >= zero or kind == "perturbed"]
    left = {"guidance-interval": [0, 1, 2, 3], "cfg-cache": [0, 4], "cfg-zero": [3, 4, 5, 6, 7]}[config.name]
    assert computed(run, "uncond") == (list(range(STEPS)) if kind == "perturbed" else left)
    dita.restore_pipeline(pipe)
    assert torch.equal(call(kind, pipe), plain)
