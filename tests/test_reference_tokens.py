"""ToCa, DuCa and ClusCa against their papers' algorithms written out by hand, token by token; see `handwritten`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from handwritten import STEPS, HandBlock, assert_same, by_dita

from dita.caching import ClusCa, DuCa, ToCa
from dita.caching.tokenwise import SPREADS, plan_steps, token_share

SIDE = 4


def released(steps: int, interval: int) -> list[str]:
    """The step types of the released DiT code in all blocks but the first; its steps count down to 0."""
    kinds, threshold = [], interval
    for left in reversed(range(steps)):
        first = left == steps - 1
        if first or left % threshold == 0:
            sensitive = left in range(int(steps * 0.2), int(steps * 0.4))
            threshold = 2 if sensitive else round(interval / (1 + 0.4 - 0.8 * left / steps))
        full = first or left % threshold == 0
        kinds.append("full" if full else "some" if left % threshold % 2 == 1 else "none")
    return kinds


@pytest.mark.parametrize(("steps", "interval"), [(50, 3), (50, 5), (250, 4), (20, 3), (14, 3), (14, 1)])
def test_modulated_schedule(steps: int, interval: int) -> None:
    assert interval == 1 or list(plan_steps(steps, interval, SPREADS["dit"])) == released(steps, interval)
    assert interval > 1 or set(plan_steps(steps, interval, SPREADS["dit"])) == {"full"}


def test_published_schedules() -> None:
    def computed(preset: str, steps: int, interval: int) -> list[int]:
        return [s for s, kind in enumerate(plan_steps(steps, interval, SPREADS[preset])) if kind == "full"]

    dit = computed("dit", 50, 3)
    assert dit == [0, 5, 9, 13, 19, 22, 25, 28, 31, *range(33, 50, 2)]
    assert computed("flux", 50, 5) == [0, 1, 2, *range(7, 50, 5)]
    assert computed("pixart", 20, 3) == [0, 6, 9, 12, 15, 18]
    # Between full steps FLUX's DuCa begins with some tokens.
    assert plan_steps(7, 4, SPREADS["flux"])[2:] == ("full", "some", "none", "some", "full")


def test_published_ratios() -> None:
    """The factors of the released code, with its numbers: 28 blocks, 50 steps counted down; 20 counted up."""
    for layer in (0, 10, 27):
        for left in (49, 20, 0):
            hand = 0.07 * (1 - 0.2 + 2 * 0.2 * layer / 27) * (1 + 2.0 - 4.0 * left / 50) * (1 + 0.6 * 2.5)
            assert token_share(0.07, SPREADS["dit"], 49 - left, 50, layer / 27) == pytest.approx(max(0, hand))
        for step in (0, 9, 19):
            hand = 0.3 * (1 + 0.6 - 1.2 * layer / 27) * (1 + 0.9 - 1.8 * step / 20) * (1 + 0.6 * 1.0)
            assert token_share(0.3, SPREADS["pixart"], step, 20, layer / 27) == pytest.approx(min(1, hand))
    assert token_share(0.1, SPREADS["flux"], 5, 50, 0.5, beside=True) == pytest.approx(0.16)
    assert token_share(0.1, SPREADS["flux"], 5, 50, 0.0) == pytest.approx(0.06)


class TokenTrunk:
    """DiT's blocks with ToCa's and DuCa's steps, choosing tokens one by one."""

    def __init__(self, computed: list[int], interval: int, ratio: float, bonus: float, dual: bool) -> None:
        self.computed, self.ratio, self.bonus, self.interval, self.dual = computed, ratio, bonus, interval, dual
        self.kinds = [k if dual or k != "none" else "some" for k in released(STEPS, interval)]
        self.step, self.kept, self.score, self.stale, self.last = -1, {}, {}, {}, torch.empty(0)
        self.run_on: list[int] = []

    def __call__(self, h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
        self.step += 1
        kind = self.kinds[self.step]
        if kind == "none":
            return self.last
        if kind == "full":
            self.computed.append(self.step)
        for block in blocks:
            h = self.block(h, block, len(blocks), kind == "full")
        self.last = h
        return h

    def block(self, h: torch.Tensor, block: HandBlock, count: int, full: bool) -> torch.Tensor:
        normed, gate, shift, scale, gate_mlp = block.entry(h)
        n, parts = block.number, block.block
        if full:
            self.kept[n, "attention"] = parts.attn1(normed)
            self.score[n] = self.rank(parts.attn1, normed)
            self.stale[n] = torch.zeros(normed.shape[:2])
        h = h + gate[:, None] * self.kept[n, "attention"]
        modulated = parts.norm3(h) * (1 + scale[:, None]) + shift[:, None]
        if full:
            self.kept[n, "mlp"] = parts.ff(modulated)
        else:
            left = STEPS - 1 - self.step
            share = self.ratio * (1 - 0.2 + 0.4 * n / (count - 1)) * (1 + 2.0 - 4.0 * left / STEPS) * 2.5
            tokens = int(min(1.0, max(0.0, share)) * SIDE**2)
            self.run_on.append(tokens)
            for sample in range(len(h)):
                for token in self.choose(n, sample, tokens):
                    self.kept[n, "mlp"][sample, token] = parts.ff(modulated[sample : sample + 1, token])[0]
        return h + gate_mlp[:, None] * self.kept[n, "mlp"]

    def rank(self, attention: Any, normed: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(normed).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        maps = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        mass = (1 - v.norm(dim=-1)).sum(1) if self.dual else maps.mean(1).sum(1)
        return mass / mass.norm(dim=1, keepdim=True)

    def choose(self, n: int, sample: int, count: int) -> list[int]:
        stale = self.stale[n][sample]
        score = (self.score[n][sample] + 0.25 * stale / self.interval).tolist()
        for row in range(0, SIDE, 2):
            for column in range(0, SIDE, 2):
                cell = [SIDE * (row + r) + column + c for r in (0, 1) for c in (0, 1)]
                best = max(cell, key=lambda token: score[token])
                score[best] += self.bonus * abs(score[best])
        chosen = sorted(range(len(score)), key=lambda token: -score[token])[:count]
        stale += 1
        stale[chosen] = 0
        return chosen


def test_toca() -> None:
    trunks: list[TokenTrunk] = []

    def make(computed: list[int]) -> TokenTrunk:
        trunks.append(TokenTrunk(computed, 3, 0.12, 0.6, dual=False))
        return trunks[0]

    assert_same(ToCa(interval=3, ratio=0.12), make)
    assert len(set(trunks[0].run_on)) > 3 and 0 in trunks[0].run_on, "guard: ratios differ from step to step"
    _, run = by_dita(ToCa(interval=3, ratio=0.12))
    # On the first skipped steps DiT's factors leave no token to compute.
    assert {record.action for record in run.records} == {"computed", "partial", "reused"}


def test_duca() -> None:
    trunks: list[TokenTrunk] = []

    def make(computed: list[int]) -> TokenTrunk:
        trunks.append(TokenTrunk(computed, 4, 0.12, 0.8, dual=True))
        return trunks[0]

    assert_same(DuCa(interval=4, ratio=0.12), make)
    assert set(trunks[0].kinds) == {"full", "some", "none"} and max(trunks[0].run_on) > 1
    _, run = by_dita(DuCa(interval=4, ratio=0.12))
    names = {"full": "computed", "some": "partial", "none": "reused"}
    assert [record.action for record in run.records] == [names[kind] for kind in trunks[0].kinds]


class ClusterTrunk:
    """TaylorSeer's recursion on every module; MLPs also run on the last token of every cluster."""

    def __init__(self, computed: list[int], interval: int, order: int, clusters: int, share: float) -> None:
        self.computed, self.interval, self.order, self.count, self.share = computed, interval, order, clusters, share
        self.step, self.full, self.ladders, self.centroids = -1, True, {}, None
        self.labels: list[list[int]] = []

    def __call__(self, h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
        self.step += 1
        self.full = self.step < 3 or (self.step - 2) % self.interval == 0
        if self.full:
            self.computed.append(self.step)
        for block in blocks:
            normed, gate, shift, scale, gate_mlp = block.entry(h)
            h = h + gate[:, None] * self.module((block.number, "attention"), lambda x: block.block.attn1(x), normed)  # noqa: B023
            modulated = block.block.norm3(h) * (1 + scale[:, None]) + shift[:, None]
            h = h + gate_mlp[:, None] * self.module((block.number, "mlp"), lambda x: block.block.ff(x), modulated)  # noqa: B023
        if self.full:
            self.cluster(h)
        return h

    def module(self, key: tuple[int, str], run: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if self.full:
            old_step, old = self.ladders.get(key, (0, []))
            new = [run(x).clone()]
            if self.step > 1:  # differences begin with the last warm-up step
                for rung in old[: self.order]:
                    new.append((new[-1] - rung) / (self.step - old_step))
            self.ladders[key] = (self.step, new)
            return new[0]
        computed, ladder = self.ladders[key]
        if key[1] == "mlp":
            for sample, labels in enumerate(self.labels):
                drawn = {label: max(t for t, other in enumerate(labels) if other == label) for label in set(labels)}
                for token in drawn.values():
                    ladder[0][sample, token] = run(x[sample : sample + 1, token : token + 1])[0, 0]
                fresh = {label: ladder[0][sample, token].clone() for label, token in drawn.items()}
                for token, label in enumerate(labels):
                    ladder[0][sample, token] = (1 - self.share) * ladder[0][sample, token] + self.share * fresh[label]
        k = self.step - computed
        return sum(rung * k**j / math.factorial(j) for j, rung in enumerate(ladder))  # pyright: ignore

    def cluster(self, h: torch.Tensor) -> None:
        if self.centroids is None:
            first = torch.randperm(h.shape[1], generator=torch.Generator().manual_seed(0))[: self.count]
            self.centroids = h[:, first].clone()
        for _ in range(10):
            self.labels = [
                [int((row - means).abs().sum(1).argmin()) for row in rows]
                for rows, means in zip(h, self.centroids, strict=True)
            ]
            means = self.centroids.clone()
            for sample, labels in enumerate(self.labels):
                for label in set(labels):
                    members = [token for token, other in enumerate(labels) if other == label]
                    means[sample, label] = h[sample, members].mean(0)
            if torch.allclose(self.centroids, means, rtol=1e-4):
                break
            self.centroids = means


@pytest.mark.parametrize("order", [1, 2])
def test_clusca(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draw is made the last token of each cluster, so that nothing hangs on random numbers."""

    def last(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
        members = labels[:, None] == torch.arange(count)[None, :, None]
        found = torch.where(members, torch.arange(labels.shape[1]), -1).amax(-1)
        return found.where(found >= 0, labels.shape[1] - 1)  # an empty cluster runs what another has drawn

    monkeypatch.setattr("dita.caching.clusca.draw_per_cluster", last)
    config = ClusCa(interval=4, order=order, clusters=5, share=0.3)
    assert_same(config, lambda c: ClusterTrunk(c, 4, order, 5, 0.3), [0, 1, 2, 6, 10])
    plain, _ = by_dita(ClusCa(interval=4, order=order, clusters=5, share=0.0))
    assert not torch.allclose(by_dita(config)[0], plain, rtol=1e-3), "guard: the share matters"
