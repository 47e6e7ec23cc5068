"""Increment-calibrated caching against its formula written out on the linear layers themselves, without dita."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from handwritten import STEPS
from pipelines import TINY

import dita
from dita.caching import ICC
from dita.caching.icc import low_rank, scales


def layers_of(pipe: Any) -> dict[str, torch.nn.Linear]:
    found = {}
    for number, block in enumerate(pipe.transformer.transformer_blocks):
        for part in ("attn1", "ff"):
            for name, module in getattr(block, part).named_modules():
                if isinstance(module, torch.nn.Linear):
                    found[f"transformer_blocks.{number}.{part}.{name}"] = module
    return found


def statistics(change: bool) -> dict[str, list[np.ndarray]]:
    """Mean magnitudes of outputs and inputs per channel over one full run."""
    pipe = TINY["dit"].build()
    seen: dict[str, list[Any]] = {}

    def hook(name: str) -> Any:
        return lambda module, args, out: seen.setdefault(name, []).append((out.double(), args[0].double()))

    for name, layer in layers_of(pipe).items():
        layer.register_forward_hook(hook(name))
    TINY["dit"].call(pipe, steps=STEPS, batch=2)
    result = {}
    for name, calls in seen.items():
        pairs = list(zip(*calls, strict=True))
        moved = [[b - a for a, b in zip(p, p[1:], strict=False)] for p in pairs] if change else pairs
        result[name] = [torch.stack([t.abs().mean((0, 1)) for t in tensors]).mean(0).numpy() for tensors in moved]
    return result


def by_hand(interval: int, rank: int, aware: str) -> torch.Tensor:
    known = {} if aware == "none" else statistics(aware == "change")
    pipe = TINY["dit"].build()
    state: dict[str, Any] = {"step": -1}
    original = pipe.transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        state["step"] += 1
        return original(*args, **kwargs)

    vars(pipe.transformer)["forward"] = forward

    def calibrated(name: str, layer: torch.nn.Linear) -> Any:
        run = layer.forward
        weight = layer.weight.detach().double().numpy()
        left, right = np.ones(weight.shape[0]), np.ones(weight.shape[1])
        if name in known:
            left, right = (np.sqrt((m - m.min()) / (m.max() - m.min())) + 1e-6 for m in known[name])
            left, right = (np.maximum(side, side.max() / 100) for side in (left, right))
        u, s, v = np.linalg.svd(left[:, None] * weight * right, full_matrices=False)
        image = torch.from_numpy((u[:, :rank] / left[:, None] * s[:rank]) @ (v[:rank] / right)).float()

        def step(x: torch.Tensor) -> torch.Tensor:
            if state["step"] % interval == 0:
                state[name] = (x.clone(), run(x))
                return state[name][1]
            before, kept = state[name]
            return kept + (x - before) @ image.T

        return step

    for name, layer in layers_of(pipe).items():
        vars(layer)["forward"] = calibrated(name, layer)
    return TINY["dit"].call(pipe, steps=STEPS, batch=2)


@pytest.mark.parametrize(("interval", "rank", "aware"), [(2, 4, "none"), (3, 8, "activation"), (2, 4, "change")])
def test_icc(interval: int, rank: int, aware: str) -> None:
    pipe = TINY["dit"].build()
    call = lambda p: TINY["dit"].call(p, steps=STEPS, batch=2)  # noqa: E731
    config: Any = ICC(interval=interval, rank=rank, aware=aware).calibrated(pipe, call)
    dita.accelerate_pipeline(pipe, config)
    output, run = call(pipe), dita.report(pipe).last
    assert run.computed_steps == tuple(range(0, STEPS, interval))
    torch.testing.assert_close(output, by_hand(interval, rank, aware), rtol=1e-3, atol=1e-4)


def test_full_rank_is_the_layer_itself() -> None:
    """Then a skipped step computes what a full one does, up to rounding."""
    pipe = TINY["dit"].build()
    plain = TINY["dit"].call(pipe)
    dita.accelerate_pipeline(pipe, ICC(interval=4, rank=10**6, aware="none"))
    torch.testing.assert_close(TINY["dit"].call(pipe), plain, rtol=1e-3, atol=1e-4)


def test_scaled_factors_are_best_where_it_counts() -> None:
    """The scaled decomposition minimises the scaled error, the plain one the plain error."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 20, generator=generator)
    left, right = (scales(torch.rand(n, generator=generator)) for n in (12, 20))
    plain, aware = low_rank(weight, 3), low_rank(weight, 3, left, right)

    def error(factors: tuple[torch.Tensor, torch.Tensor], scaled: bool) -> float:
        off = weight - factors[0] @ factors[1]
        return (left[:, None] * off * right if scaled else off).norm().item()

    assert error(aware, True) < error(plain, True) and error(plain, False) < error(aware, False)
