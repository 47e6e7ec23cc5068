"""Our version of a method against another library's, at the same settings on the same tiny pipeline.

One sample a batch, because theirs average their indicators over the batch and ours do not. Where no test stands here,
the two differ on purpose: diffusers' TaylorSeer begins its intervals early ({0, 1, 2, 4, 9, ...} for interval 5 and
warm-up 3, where the paper has {0, 1, 2, 7, 12, ...}), which is the same at interval 2 alone; and its FasterCache keeps
extrapolated outputs as anchors, which the authors' code does not; cache-dit's FoCa does not divide slopes by the gap
between computed steps, as the paper does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from pipelines import TINY

import dita
from dita.caching import PAB, DBCache, FirstBlockCache, MagCache, MagnitudeTable, TaylorSeer
from dita.caching.policy import Policy, Verdict, View
from dita.errors import DitaError
from dita.eval.peers import Counter, cache_dit, diffusers_attention, diffusers_hooks, diffusers_taylorseer
from dita.eval.peers.base import Peer

STEPS = 16


def theirs(peer: Peer, tiny: str) -> tuple[torch.Tensor, Counter]:
    try:
        peer.version()
    except DitaError as error:
        pytest.skip(str(error))
    pipe = TINY[tiny].build()
    with peer.attached(pipe) as counter:
        return TINY[tiny].call(pipe, steps=STEPS), counter


def ours(method: Any, tiny: str) -> tuple[torch.Tensor, Any]:
    pipe = dita.accelerate_pipeline(TINY[tiny].build(), method)
    output = TINY[tiny].call(pipe, steps=STEPS)
    return output, dita.report(pipe).last


def assert_same(method: Any, peer: Peer, tiny: str) -> None:
    expected, _ = theirs(peer, tiny)
    output, run = ours(method, tiny)
    assert 0 < run.reused < len(run.records), "guard: some calls skipped, some not"
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tiny", ["flux", "wan"])
@pytest.mark.parametrize("threshold", [0.15, 0.3])
def test_first_block_cache_is_diffusers(tiny: str, threshold: float) -> None:
    assert_same(FirstBlockCache(threshold=threshold), diffusers_hooks.FirstBlock(threshold), tiny)


@pytest.mark.parametrize("tiny", ["dit", "flux"])
@pytest.mark.parametrize(("threshold", "skips", "retention"), [(0.1, 3, 0.25), (0.3, 6, 0.125)])
def test_magcache_is_diffusers(tiny: str, threshold: float, skips: int, retention: float) -> None:
    """Retentions of whole steps: diffusers rounds them, the authors' code and ours cut them off."""
    generator = torch.Generator().manual_seed(0)
    ratios = tuple((1 + 0.1 * torch.randn(STEPS, generator=generator)).tolist())
    table = MagnitudeTable({"": ratios}, steps=STEPS)
    mine = MagCache(threshold=threshold, max_skip=skips, retention=retention, table=table)
    assert_same(mine, diffusers_hooks.MagCache(threshold, skips, retention, ratios), tiny)


@pytest.mark.parametrize("tiny", ["dit", "flux", "wan"])
@pytest.mark.parametrize("interval", [2, 3])
def test_pab_is_diffusers(tiny: str, interval: int) -> None:
    peer = diffusers_attention.PyramidBroadcast(spatial=interval, temporal=interval, cross=4, window=(100, 800))
    assert_same(PAB(self_interval=interval, cross_interval=4, low=100, high=800), peer, tiny)


@pytest.mark.parametrize("tiny", ["flux", "wan"])
@pytest.mark.parametrize(("fn", "bn", "threshold"), [(1, 0, 0.2), (2, 1, 0.4)])
def test_dbcache_is_cache_dits(tiny: str, fn: int, bn: int, threshold: float) -> None:
    peer = cache_dit.DBCache(fn, threshold, bn, warmup=4, most=3)
    assert_same(DBCache(fn=fn, bn=bn, threshold=threshold, warmup=4, max_consecutive=3), peer, tiny)


@pytest.mark.parametrize("tiny", ["flux", "wan"])
@pytest.mark.parametrize(("order", "warmup"), [(1, 4), (2, 5)])
def test_dbcache_with_taylor_is_cache_dits(tiny: str, order: int, warmup: int) -> None:
    """cache-dit numbers a run's steps from -1 and takes no slope before its step 2, so order 2 wants one step more."""
    peer = cache_dit.DBCacheTaylor(1, 0.2, 0, warmup=warmup, most=3, order=order)
    assert_same(DBCache(fn=1, threshold=0.2, warmup=warmup, max_consecutive=3, order=order), peer, tiny)


@pytest.mark.parametrize("tiny", ["dit", "flux", "wan"])
@pytest.mark.parametrize(("order", "warmup"), [(0, 3), (1, 3), (2, 2)])
def test_taylorseer_on_the_models_output_is_diffusers_lite(tiny: str, order: int, warmup: int) -> None:
    """At interval 2, where the schedules agree. At order 2 ours leaves out the first of three warm-up steps."""
    mine = TaylorSeer(interval=2, order=order, warmup=warmup, granularity="model")
    assert_same(mine, diffusers_taylorseer.TaylorSeerLite(2, order=order, warmup=warmup), tiny)


class _Theirs(Policy):
    def decide(self, view: View) -> Verdict:
        step = view.position.step
        return Verdict(step < 3 or (step - 3 - 1) % 5 == 0, "as diffusers")


@dataclass(frozen=True)
class _Shifted(TaylorSeer):
    """Attributes: as TaylorSeer's, on diffusers' schedule of interval 5 and warm-up 3."""

    def recipe(self, anatomy: Any) -> Any:
        return replace(super().recipe(anatomy), when=_Theirs, oldest_anchor=0)


@pytest.mark.parametrize(("tiny", "order"), [("dit", 1), ("flux", 2), ("wan", 1)])
def test_taylorseers_modules_are_diffusers_on_diffusers_schedule(tiny: str, order: int) -> None:
    assert_same(_Shifted(order=order), diffusers_taylorseer.TaylorSeer(5, "all", order, warmup=3), tiny)


@pytest.mark.parametrize("tiny", ["dit", "flux"])
@pytest.mark.parametrize("order", [1, 2])
def test_taylorseers_forecast_is_diffusers_on_diffusers_schedule(tiny: str, order: int) -> None:
    mine = _Shifted(order=order, granularity="model")
    assert_same(mine, diffusers_taylorseer.TaylorSeerLite(5, order=order, warmup=3), tiny)
