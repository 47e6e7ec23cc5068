"""The tiny pipelines must be sound before anything is measured on them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from pipelines import TINY, TinyPipeline

TRANSFORMERS = ("transformer", "transformer_2")
BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks")
OUTPUT_PROJECTIONS = ("proj_out", "ff", "ffn", "img_mlp")

every = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY.keys())


@cache
def plain(tiny: TinyPipeline, **settings: Any) -> torch.Tensor:
    """The result of a fresh pipeline, computed once per setting."""
    return tiny.call(tiny.build(), **settings)


def transformers(pipe: Any) -> Iterator[torch.nn.Module]:
    for name in TRANSFORMERS:
        if getattr(pipe, name, None) is not None:
            yield getattr(pipe, name)


def blocks(pipe: Any) -> Iterator[torch.nn.Module]:
    for transformer in transformers(pipe):
        for name in BLOCK_LISTS:
            yield from getattr(transformer, name, ())


def output_projection(block: torch.nn.Module) -> torch.nn.Linear:
    """The last linear layer on the image side of a block."""
    owner = next(getattr(block, name) for name in OUTPUT_PROJECTIONS if hasattr(block, name))
    return [module for module in owner.modules() if isinstance(module, torch.nn.Linear)][-1]


def relative(new: torch.Tensor, old: torch.Tensor) -> float:
    return ((new - old).norm() / old.norm()).item()


def count_calls(pipe: Any) -> tuple[list[str], list[str]]:
    """Two lists that grow with each transformer call and each ``scheduler.step`` of ``pipe``."""
    calls: list[str] = []
    steps: list[str] = []
    for name in TRANSFORMERS:
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    step = pipe.scheduler.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append("step")
        return step(*args, **kwargs)

    pipe.scheduler.step = counted
    return calls, steps


@every
def test_two_builds_are_bit_identical(tiny):
    one, two = tiny.build(), tiny.build()
    for left, right in zip(transformers(one), transformers(two), strict=True):
        right_state = right.state_dict()
        assert all(torch.equal(value, right_state[name]) for name, value in left.state_dict().items())
    assert torch.equal(tiny.call(two, steps=3), plain(tiny, steps=3))


@every
def test_runs_are_finite_and_repeatable(tiny):
    pipe = tiny.build()
    first = tiny.call(pipe, steps=3)
    assert first.dtype == torch.float32 and first.isfinite().all() and first.std() > 0.1
    assert torch.equal(tiny.call(pipe, steps=3), first)


@every
def test_seeds_give_different_results(tiny):
    assert relative(plain(tiny, seed=1, steps=3), plain(tiny, steps=3)) > 0.05


@every
def test_a_row_does_not_depend_on_its_batch(tiny):
    pair, alone = plain(tiny, batch=2, steps=3), tiny.call(tiny.build(), first=1, steps=3)
    torch.testing.assert_close(pair[1:], alone, rtol=1e-3, atol=1e-3)
    assert relative(pair[1:], pair[:1]) > 0.05


@every
def test_conditioning_matters(tiny):
    same_noise = [torch.Generator().manual_seed(0)]
    other = tiny.call(tiny.build(), first=1, generator=same_noise, steps=3)
    assert relative(other, plain(tiny, steps=3)) > 0.01


@every
def test_large_has_another_token_count(tiny):
    same = plain(tiny, steps=2, size="large").shape == plain(tiny, steps=3).shape
    assert same == (tiny.name == "dit")


@every
def test_every_block_matters(tiny):
    pipe = tiny.build()
    reference = tiny.call(pipe, steps=2)
    listed = list(blocks(pipe))
    assert len(listed) >= 4
    for block in listed:
        saved = {name: value.clone() for name, value in block.state_dict().items()}
        with torch.no_grad():
            for parameter in output_projection(block).parameters():
                parameter.zero_()
        assert relative(tiny.call(pipe, steps=2), reference) > 1e-3
        block.load_state_dict(saved)
    assert torch.equal(tiny.call(pipe, steps=2), reference)


@every
def test_transformer_calls_per_step(tiny):
    pipe = tiny.build()
    calls, steps = count_calls(pipe)
    tiny.call(pipe)
    expected = {"sd3-heun": 15, "flux-img2img": 6}.get(tiny.name, 8)
    assert len(steps) == expected
    assert len(calls) == tiny.branches * expected


@every
def test_batched_guidance_doubles_the_rows(tiny):
    pipe = tiny.build()
    sizes: list[int] = []

    def record(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes.append(len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]))

    for transformer in transformers(pipe):
        transformer.register_forward_pre_hook(record, with_kwargs=True)
    tiny.call(pipe, steps=2, batch=3)
    assert set(sizes) == {6 if tiny.batched_cfg else 3}


@pytest.mark.parametrize(
    "tiny", [tiny for tiny in TINY.values() if tiny.name not in ("dit", "pixart")], ids=lambda tiny: tiny.name
)
def test_step_callback(tiny):
    seen: list[int] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(step)
        return tensors

    tiny.call(tiny.build(), steps=2, callback_on_step_end=callback)
    assert seen == list(range(3 if tiny.name == "sd3-heun" else 2))


def test_pixart_has_the_older_callback():
    seen: list[int] = []
    tiny = TINY["pixart"]
    tiny.call(tiny.build(), steps=2, callback=lambda step, timestep, latents: seen.append(step))
    assert seen == [0, 1]


@pytest.mark.parametrize(("strength", "expected"), [(0.3, 3), (0.7, 6), (1.0, 8)])
def test_img2img_starts_in_the_middle(strength, expected):
    tiny = TINY["flux-img2img"]
    pipe = tiny.build()
    calls, _ = count_calls(pipe)
    tiny.call(pipe, strength=strength)
    assert len(calls) == expected
    assert pipe.scheduler.begin_index == 8 - expected


def test_wan_2_hands_over_from_the_first_transformer_to_the_second():
    tiny = TINY["wan-2"]
    pipe = tiny.build()
    calls, _ = count_calls(pipe)
    tiny.call(pipe)
    handover = calls.index("transformer_2")
    assert 2 <= handover <= len(calls) - 2
    assert calls == ["transformer"] * handover + ["transformer_2"] * (len(calls) - handover)


@pytest.mark.parametrize("name", ["flux", "hunyuan", "flux-img2img"])
def test_true_guidance_adds_a_branch(name):
    tiny = TINY[name]
    pipe = tiny.build()
    calls, steps = count_calls(pipe)
    guided = tiny.call(pipe, steps=4, true_cfg_scale=3.0)
    assert len(calls) == 2 * len(steps)
    assert relative(guided, plain(tiny, steps=4)) > 0.01


@every
def test_building_and_running_leave_the_global_random_state(tiny):
    before = torch.get_rng_state()
    tiny.call(tiny.build(), steps=2)
    assert torch.equal(torch.get_rng_state(), before)
