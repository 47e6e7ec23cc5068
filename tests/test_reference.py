"""Each method against its paper's algorithm written out by hand on DiT's own forward, without the engine.

The hand-written loops below use nothing of dita. They drive the same transformer through the same scheduler.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from handwritten import STEPS, Trunk, assert_same, by_dita, by_hand, relative, run_all
from pipelines import TINY

from dita.caching import BWCache, DBCache, FirstBlockCache, MagCache, TaylorSeer


def test_the_hand_written_forward_is_the_models() -> None:
    expected = TINY["dit"].call(TINY["dit"].build(), steps=STEPS, batch=2)
    torch.testing.assert_close(by_hand(run_all), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylorseer_last_block(order: int) -> None:
    """The authors' ladder: D'[0] = F, D'[j+1] = (D'[j] - D[j]) / gap, with differences from step first - 1 on."""
    interval, first = 3, 3
    state: dict[str, Any] = {"step": -1, "last": None, "ladder": []}

    def make(computed: list[int]) -> Trunk:
        return lambda h, blocks: trunk(h, blocks, computed)

    def trunk(h: torch.Tensor, blocks: Any, computed: list[int]) -> torch.Tensor:
        state["step"] += 1
        step = state["step"]
        if step < first or (step - first + 1) % interval == 0:
            computed.append(step)
            feature = run_all(h, blocks)
            ladder = [feature]
            if step > first - 2:
                for j in range(order):
                    if len(state["ladder"]) > j:
                        ladder.append((ladder[j] - state["ladder"][j]) / (step - state["last"]))
            state["ladder"], state["last"] = ladder, step
            return feature
        k = step - state["last"]
        factors = [1.0, k, k**2 / 2, k**3 / 6]
        return sum(factors[j] * d for j, d in enumerate(state["ladder"]))  # pyright: ignore[reportReturnType]

    config = TaylorSeer(interval=interval, order=order, warmup=first, granularity="last-block")
    assert_same(config, make, [0, 1, 2, 5, 8, 11])


@pytest.mark.parametrize(("fn", "bn", "order"), [(1, 0, 0), (2, 1, 0), (1, 1, 1)])
def test_dbcache(fn: int, bn: int, order: int) -> None:
    """ParaAttention's gate and cache-dit's split, one decision for the batch by its worst sample."""
    threshold, warmup = 0.25, 3
    state: dict[str, Any] = {"step": -1, "anchors": []}

    def make(computed: list[int]) -> Trunk:
        return lambda h, blocks: trunk(h, blocks, computed)

    def trunk(h: torch.Tensor, blocks: Any, computed: list[int]) -> torch.Tensor:
        state["step"] += 1
        step = state["step"]
        front = run_all(h, blocks[:fn])
        probe = front - h
        if step >= warmup and relative(probe, state["probe"]) < threshold:
            (s0, r0), *rest = state["anchors"]
            residual = r0
            if order and rest:
                s1, r1 = rest[0]
                residual = r0 + (step - s0) * (r0 - r1) / (s0 - s1)
            middle = front + residual
        else:
            computed.append(step)
            middle = run_all(front, blocks[fn : len(blocks) - bn])
            state["probe"] = probe
            state["anchors"] = [(step, middle - front), *state["anchors"]][: order + 1]
        return run_all(middle, blocks[len(blocks) - bn :])

    assert_same(DBCache(fn=fn, bn=bn, threshold=threshold, warmup=warmup, order=order), make)


def test_first_block_cache_is_dbcache_with_one_block() -> None:
    one, run_one = by_dita(FirstBlockCache(threshold=0.3))
    two, run_two = by_dita(DBCache(fn=1, warmup=0, threshold=0.3))
    assert torch.equal(one, two) and run_one.computed_steps == run_two.computed_steps and run_one.reused > 0


def test_magcache() -> None:
    """The authors' accumulated magnitude error, with ratios measured on a full run of the same inputs."""
    threshold, most, retention = 0.25, 2, 0.2
    ratios: list[float] = []
    norms: list[torch.Tensor] = []

    def measuring(h: torch.Tensor, blocks: Any) -> torch.Tensor:
        out = run_all(h, blocks)
        norms.append((out - h).norm(dim=-1))
        ratios.append((norms[-1] / norms[-2]).mean().item() if len(norms) > 1 else 1.0)
        return out

    by_hand(measuring)
    state: dict[str, Any] = {"step": -1, "ratio": 1.0, "error": 0.0, "skips": 0}

    def make(computed: list[int]) -> Trunk:
        return lambda h, blocks: trunk(h, blocks, computed)

    def trunk(h: torch.Tensor, blocks: Any, computed: list[int]) -> torch.Tensor:
        state["step"] += 1
        step = state["step"]
        if step >= int(retention * STEPS):
            state["ratio"] *= ratios[step]
            state["error"] += abs(1 - state["ratio"])
            state["skips"] += 1
            if state["skips"] <= most and state["error"] < threshold:
                return h + state["residual"]
        state.update(ratio=1.0, error=0.0, skips=0)
        computed.append(step)
        out = run_all(h, blocks)
        state["residual"] = out - h
        return out

    assert_same(MagCache(threshold=threshold, max_skip=most, retention=retention), make)


def test_bwcache() -> None:
    """Mean block change at computed steps; a trigger freezes the trunk for R steps; the last K // 2 are computed."""
    threshold, reuse = 0.6, 0.1
    state: dict[str, Any] = {"step": -1, "left": 0, "outputs": None, "tail": None}

    def make(computed: list[int]) -> Trunk:
        return lambda h, blocks: trunk(h, blocks, computed)

    def trunk(h: torch.Tensor, blocks: Any, computed: list[int]) -> torch.Tensor:
        state["step"] += 1
        step = state["step"]
        in_tail = state["tail"] is not None and step >= state["tail"]
        if state["left"] > 0 and not in_tail:
            state["left"] -= 1
            return state["outputs"][-1]
        computed.append(step)
        outputs = []
        for block in blocks:
            h = block(h)
            outputs.append(h)
        if state["outputs"] is not None:
            per_sample = [
                sum(
                    (n[i] - o[i]).abs().sum() / o[i].abs().sum() for n, o in zip(outputs, state["outputs"], strict=True)
                )
                / len(blocks)
                for i in range(h.shape[0])
            ]
            if max(per_sample) < threshold:
                if state["tail"] is None:
                    state["tail"] = STEPS - (STEPS - 1 - step) // 2
                state["left"] = max(1, round(reuse * STEPS))
        state["outputs"] = outputs
        return h

    assert_same(BWCache(threshold=threshold, reuse=reuse), make)
