"""ProfilingDiT and Q&C against their papers' algorithms written out by hand; see `handwritten`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from handwritten import STEPS, HandBlock, HandWritten, Trunk, assert_same, by_dita
from pipelines import TINY

import dita
from dita.caching import ProfilingDiT, QandC, Table
from dita.caching.profilingdit import PUBLISHED_ANCHORS, WAN_14B, Anchored, anchor_steps, runs_of
from dita.caching.qandc import variance_scale
from dita.errors import DitaError

Array = np.ndarray


def received_by_hand(block: HandBlock, h: torch.Tensor) -> Array:
    """Columns of the attention map, averaged: [B, N]."""
    module, normed = block.block.attn1, block.entry(h)[0]
    query, key = (p(normed).unflatten(-1, (module.heads, -1)).double().numpy() for p in (module.to_q, module.to_k))
    scores = np.einsum("bnhd,bmhd->bhnm", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores)
    return (weights / weights.sum(-1, keepdims=True)).mean((1, 2))


def mask_by_hand(noise: Array) -> Array:
    """[C, 8, 8] of patches of 2 -> [4, 4]: the best of all cuts of the first component, and its inner side."""
    tokens = noise.reshape(len(noise), 4, 2, 4, 2).mean((2, 4)).reshape(len(noise), 16).T
    score = (tokens - tokens.mean(0)) @ np.linalg.svd(tokens - tokens.mean(0))[2][0]

    def between(cut: float) -> float:
        low, high = score[score <= cut], score[score > cut]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    mask = (score > max(sorted(score)[:-1], key=between)).reshape(4, 4)
    inner = np.zeros((4, 4), bool)
    inner[1:3, 1:3] = True
    outside = mask[~inner].sum()
    if outside != 6:
        return mask if outside < 6 else ~mask
    smaller = mask.sum() < 8 or (mask.sum() == 8 and not mask[0, 0])
    return mask if smaller else ~mask


def shares_by_hand() -> list[float]:
    """R of every block, from steps 0, 5 and 10 of a full run."""
    pipe, shares, steps = TINY["dit"].build(), {}, []
    maps: list[Array] = []

    def trunk(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
        maps.clear()
        for block in blocks:
            maps.append(received_by_hand(block, h))
            h = block(h)
        return h

    hand = HandWritten(pipe, trunk)

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = hand(*args, **kwargs)
        if len(steps) % 5 == 0:
            masks = [mask_by_hand(noise) for noise in out.sample[:, :4].double().numpy()]
            for number, received in enumerate(maps):
                for row, mask in zip(received.reshape(-1, 4, 4), masks, strict=True):
                    high = row > np.median(row)
                    shares.setdefault(number, []).append((high & mask).sum() / mask.sum())
        steps.append(len(steps))
        return out

    vars(pipe.transformer)["forward"] = forward
    TINY["dit"].call(pipe, steps=STEPS, batch=2)
    return [float(np.mean(shares[number])) for number in sorted(shares)]


def calibrated(config: Any) -> Any:
    return config.calibrated(TINY["dit"].build(), lambda p: TINY["dit"].call(p, steps=STEPS, batch=2))


def test_shares() -> None:
    wanted = shares_by_hand()
    assert len(wanted) == 4 and len(set(wanted)) == 4, "guard: the blocks differ"
    assert calibrated(ProfilingDiT()).table.values["share"] == pytest.approx(wanted, abs=1e-6)


def reuse_blocks(sets: list[list[tuple[int, int]]], turn: Callable[[int], int], anchors: list[int]) -> Any:
    """A trunk that adds residuals of the runs of blocks `sets[turn(step)]` between anchors."""

    def make(computed: list[int]) -> Trunk:
        state: dict[str, Any] = {"step": -1, "residuals": {}}

        def trunk(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
            state["step"] += 1
            step, full, entries = state["step"], state["step"] in anchors, {}
            if full:
                computed.append(step)
            for block in blocks:
                entries[block.number] = h
                run = next((r for r in sets[turn(step)] if r[0] <= block.number <= r[1]), None)
                if full or run is None:
                    h = block(h)
                elif block.number == run[1]:
                    h = h + state["residuals"][run]
                if full:
                    for first, last in (r for runs in sets for r in runs if r[1] == block.number):
                        state["residuals"][first, last] = h - entries[first]
            return h

        return trunk

    return make


@pytest.mark.parametrize("reuse", ["background", "foreground", "split", "alternate"])
def test_profilingdit(reuse: str) -> None:
    order = np.argsort(shares_by_hand())
    background, foreground = runs_of(order[:3].tolist()), runs_of(order[3:].tolist())
    anchors = [2, 5, 7, 11]
    full = [0, 1, *anchors]
    turns: dict[str, Callable[[int], int]] = {
        "split": lambda step: int(step >= 7),
        "alternate": lambda step: (sum(a <= step for a in anchors) - 1) % 2,
    }
    sets = {"background": [background], "foreground": [foreground]}.get(reuse, [foreground, background])
    config = ProfilingDiT(reuse=reuse, warmup=2, anchors=tuple(anchors), fraction=0.75, switch=0.5)
    assert_same(config, reuse_blocks(sets, turns.get(reuse, lambda step: 0), full), full)


def test_consecutive_blocks_share_one_residual() -> None:
    """Two runs and a block that runs between them, from a table of lists."""
    table = Table({"background": (0, 2, 3), "foreground": (1,)})
    pipe = dita.accelerate_pipeline(TINY["dit"].build(), ProfilingDiT(warmup=1, longest=3, shortest=3, table=table))
    assert len(dita.session.session_of(pipe).runtimes[0].handlers[0].sites) == 2
    config = ProfilingDiT(warmup=1, longest=3, shortest=3, table=table)
    pipe = dita.accelerate_pipeline(TINY["dit"].build(), config)
    output = TINY["dit"].call(pipe, steps=STEPS, batch=2)
    hand = reuse_blocks([[(0, 0), (2, 3)]], lambda step: 0, [0, 1, 4, 7, 10, 13])
    other = TINY["dit"].build()
    vars(other.transformer)["forward"] = HandWritten(other, hand([])).__call__
    torch.testing.assert_close(output, TINY["dit"].call(other, steps=STEPS, batch=2), rtol=1e-4, atol=1e-5)


def test_published_lists_and_steps() -> None:
    """Wan2.1-14B: 28 of 40 blocks in five runs; anchors every six steps, or those of HunyuanVideo."""
    background, foreground = WAN_14B.values["background"], WAN_14B.values["foreground"]
    assert runs_of(background) == [(0, 0), (2, 7), (10, 20), (25, 32), (37, 38)] and len(background) == 28
    assert foreground == (1, 3, 8, 9, 22, 24, 28, 29, 30, 32, 34, 35, 36, 37, 38, 39)
    from test_policies import view

    for config, anchors in (
        (ProfilingDiT(), [6, 12, 18, 24, 30, 36, 42, 48]),
        (ProfilingDiT(anchors=PUBLISHED_ANCHORS), [6, 18, 26, 32, 38, 42, 46, 48]),
        (ProfilingDiT(reuse="split", anchors=PUBLISHED_ANCHORS), [6, 18, 26, 32, 38, 42, 46, 48]),
    ):
        verdicts = [Anchored([()], config).decide(view(step, 50)) for step in range(50)]
        assert [step for step, v in enumerate(verdicts) if v.compute] == [*range(6), *anchors]
    split = Anchored([(), ()], config)
    assert [split.decide(view(step, 50)).reason for step in (31, 33)] == ["set 0 of split", "set 1 of split"]


def test_anchors_come_closer_by_equation_15() -> None:
    for longest, shortest in ((12, 2), (8, 3), (5, 5)):
        steps = [6]
        while steps[-1] < 50:
            steps.append(steps[-1] + round(longest - (longest - shortest) * (steps[-1] - 6) / 44))
        assert anchor_steps(50, 6, longest, shortest) == [s for s in steps if s < 50]


def test_profiles_that_do_not_fit_are_refused() -> None:
    pipe = TINY["dit"].build()
    with pytest.raises(DitaError, match="4 blocks"):
        dita.accelerate_pipeline(pipe, ProfilingDiT(table=WAN_14B))
    with pytest.raises(DitaError, match="nothing to skip"):
        dita.accelerate_pipeline(
            pipe, ProfilingDiT(reuse="foreground", table=Table({"share": (0.1,) * 4}), fraction=1.0)
        )


class Solver:
    """DiT's pipeline with modules reused and the latents of every step passed through `after(step, latents)`."""

    def __init__(self, interval: int, after: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        self.interval, self.after, self.step, self.kept = interval, after, -1, {}

    def trunk(self, h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
        self.step += 1

        def module(key: Any, run: Callable[[], torch.Tensor]) -> torch.Tensor:
            if self.step % self.interval == 0:
                self.kept[key] = run()
            return self.kept[key]

        for block in blocks:
            h = block(h, module)
        return h

    def output(self) -> torch.Tensor:
        pipe = TINY["dit"].build()
        vars(pipe.transformer)["forward"] = HandWritten(pipe, self.trunk).__call__
        step = pipe.scheduler.step

        def corrected(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            result.prev_sample = self.after(self.step, result.prev_sample)
            return result

        vars(pipe.scheduler)["step"] = corrected
        return TINY["dit"].call(pipe, steps=STEPS, batch=2)


def factors_by_hand(x: Array, goal: Array, scale: str, floor: float) -> tuple[Array, Array]:
    """mu and K of channel-last samples, by NumPy's least squares or by the printed formula."""
    mean = x.mean(0)
    factors = []
    for d, g, m in zip((x - mean).T, goal.T, mean, strict=True):
        inverse = 1 / (np.sign(g) * np.maximum(np.abs(g), floor * g.std()))
        if scale == "ratio":
            factors.append(g.std() / d.std())
        elif scale == "published":
            above = (g - m) @ d + (d * inverse).sum()
            factors.append(above / ((d**2).sum() + ((d * inverse) ** 2).sum()))
        else:  # both errors at once: plain, and divided by the goal
            rows, wanted = np.concatenate([d, d * inverse]), np.concatenate([g - m, (g - m) * inverse])
            factors.append(np.linalg.lstsq(rows[:, None], wanted, rcond=None)[0][0])
    return mean, np.array(factors)


@pytest.mark.parametrize(("scale", "floor"), [("least-squares", 1.0), ("ratio", 1.0), ("published", 2.0)])
def test_qandc(scale: str, floor: float) -> None:
    full: list[torch.Tensor] = []

    def record(step: int, latents: torch.Tensor) -> torch.Tensor:
        full.append(latents)
        return latents

    def correct(step: int, latents: torch.Tensor) -> torch.Tensor:
        x, goal = (t.movedim(1, -1).reshape(-1, 4).double().numpy() for t in (latents, full[step]))
        mean, factor = (torch.from_numpy(v).float()[:, None, None] for v in factors_by_hand(x, goal, scale, floor))
        return mean + factor * (latents - mean)

    Solver(1, record).output()
    expected = Solver(3, correct).output()
    output, run = by_dita(QandC(interval=3, scale=scale, floor=floor))
    assert list(run.computed_steps) == list(range(0, STEPS, 3))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    plain, _ = by_dita(QandC(interval=3, scale="none"))
    torch.testing.assert_close(plain, Solver(3, lambda step, latents: latents).output(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, output, rtol=1e-3, atol=1e-3), "guard: the correction does something"


def test_a_run_without_error_is_left_alone_but_by_the_printed_formula() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) + 1
    for scale in ("least-squares", "ratio"):
        torch.testing.assert_close(variance_scale(x, x, scale)[1], torch.ones(3).double())
    assert (variance_scale(x, x, "published")[1] - 1).abs().min() > 0.01
    assert variance_scale(torch.ones(5, 1), torch.ones(5, 1))[1].item() == 1, "a constant channel"


def variances(pipe: Any) -> torch.Tensor:
    """Variance per channel of the latents after each step but the last, on another seed: [steps - 1, C]."""
    seen: list[torch.Tensor] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    TINY["dit"].call(pipe, steps=STEPS, batch=8, seed=1)
    handle.remove()
    return torch.stack([latents.transpose(0, 1).flatten(1).var(1) for latents in seen[1:]])


def test_variance_of_another_seed_comes_closer() -> None:
    """With 16 images to calibrate on; 4 are too few, and a Flux of random weights gains nothing."""
    pipe = TINY["dit"].build()
    config = QandC(interval=4).calibrated(pipe, lambda p: TINY["dit"].call(p, steps=STEPS, batch=16))
    wanted = variances(pipe)
    gaps = []
    for method in (QandC(interval=4, scale="none"), config):
        with dita.accelerated(pipe, method):
            gaps.append((variances(pipe) / wanted).log().abs().mean().item())
    assert gaps[1] < 0.75 * gaps[0], gaps


def test_qandc_refuses() -> None:
    pipe, seeds = TINY["dit"].build(), iter(range(9))
    with pytest.raises(DitaError, match="same noise"):
        QandC().calibrated(pipe, lambda p: TINY["dit"].call(p, seed=next(seeds)))
    config = calibrated(QandC(interval=2))
    with pytest.raises(DitaError, match="'interval': 2.*'interval': 4"):
        dita.accelerate_pipeline(pipe, config.replace(interval=4))
    with pytest.raises(DitaError, match="dita.calibrate"):
        dita.accelerate_pipeline(pipe, "qandc")
    narrow = dataclasses.replace(config.table, values={**config.table.values, "rows": (((0.0,), (1.0,)),) * STEPS})
    dita.accelerate_pipeline(pipe, config.replace(table=narrow))
    with pytest.raises(DitaError, match="1 channels"):
        TINY["dit"].call(pipe, steps=STEPS)
