"""Rules of single methods, against their formulas written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pipelines import TINY

import dita
from dita.caching import AdaCache, HyCa, LightCache
from dita.caching.adacache import FAST, CodebookRate
from dita.caching.dicache import OnlineProbe
from dita.caching.hyca import SOLVERS
from dita.caching.lightcache import sliced_decoding
from dita.caching.policy import View
from dita.seams import Position, Site

STEPS = 12


def view(step: int, gap: int = 1, steps: int = 30, **fields: Any) -> View:
    return View(Position(step, steps, 0, "cond", step, steps, step), gap=gap, **fields)


def test_dicache_extrapolates_a_batch_as_far_as_its_probes_went_together() -> None:
    def reach(rows: slice) -> tuple[float, ...]:
        probe = OnlineProbe(1, threshold=1e9, retention=0.0, most=10.0, minus_input=False)
        moved = torch.tensor([[1.0, 2.0, 5.0], [2.0, 4.0, 5.0]])[rows]  # each sample's residual at steps 0, 1 and 2
        verdict = None
        for step in range(3):
            start = torch.ones(len(moved), 3, 4)
            outputs = (start + moved[:, step, None, None],)
            probe.saw(Site("span", "probe", 0, 0), (start,), outputs, view(step))
            verdict = probe.decide(view(step))
            if step < 2:
                probe.computed(view(step))
        assert verdict is not None and not verdict.compute and verdict.weights is not None
        return verdict.weights

    assert reach(slice(0, 1)) == pytest.approx((4.0, -3.0))
    assert reach(slice(1, 2)) == pytest.approx((1.5, -0.5))
    assert reach(slice(0, 2)) == pytest.approx(((4 + 3) / (1 + 2), 1 - 7 / 3))


def moving(speed: float, seed: int) -> torch.Tensor:
    """Tokens [2, 3 frames of 4, 5] whose frames differ by `speed`."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.rand(2, 1, 4, 5, generator=generator) + 1
    drift = torch.rand(2, 3, 4, 5, generator=generator) - 0.5
    return (still + speed * drift).flatten(1, 2)


def test_adacaches_change_is_multiplied_by_motion_and_its_gradient() -> None:
    policy, kept, motion, rate = CodebookRate(FAST, motion=True), None, None, 0
    for step, gap, speed in ((1, 1, 2.0), (4, 3, 2.5), (6, 2, 3.0), (8, 2, 2.0), (28, 20, 2.0)):
        new = moving(speed, step)
        policy.saw(Site("module", "attn", role="attention"), (), (new,), view(step, gap, grid=(3, 2, 2)))
        x = new.double().numpy().reshape(2, 3, 4, 5)
        if kept is not None:
            change = np.abs(kept - x).sum((1, 2, 3)) / np.abs(kept).sum((1, 2, 3)) / gap
            if 3 <= step <= 27:  # between a tenth and nine tenths of the run
                apart = np.abs(x[:, 1:] - x[:, :-1]).sum((1, 2, 3))
                size = np.abs(x[:, 1:]).sum((1, 2, 3)) + np.abs(x[:, :-1]).sum((1, 2, 3))
                now = (apart / size / 0.385) ** 8
                change = change * (now + (0 if motion is None else np.abs(10 * (now - motion) / gap)))
                motion = now
            rate = next(skip for limit, skip in FAST if change.max() < limit)
            verdict = policy.decide(view(step + 1, grid=(3, 2, 2)))
            if step + 1 < 28:
                assert verdict.value == pytest.approx(change.max(), rel=1e-4)
                assert verdict.compute == (rate == 1)
        kept = x
    assert motion is not None and len(set(motion)) == 2


@pytest.mark.parametrize(("speed", "least", "most"), [(0.0, 6, 6), (50.0, 1, 1)])
def test_motion_saturates_at_the_ends_of_the_codebook(speed: float, least: int, most: int) -> None:
    policy = CodebookRate(FAST, motion=True)
    for step in range(4, 8):
        policy.saw(Site("module", "attn", role="attention"), (), (moving(speed, step),), view(step, grid=(3, 2, 2)))
    rate = next(n for n in range(1, 20) if policy.decide(view(7 + n, steps=100)).compute)
    assert least <= rate <= most


def test_motion_changes_the_schedule_of_a_video() -> None:
    computed = []
    for motion in (False, True):
        pipe = TINY["wan"].build()
        dita.accelerate_pipeline(pipe, AdaCache(stretch=0.1, motion=motion))
        TINY["wan"].call(pipe, steps=STEPS)
        computed.append(dita.report(pipe).last.computed_steps)
    assert computed[0] != computed[1]
    for steps in computed:
        assert {0, STEPS - 2, STEPS - 1} <= set(steps)
        assert max(np.diff(steps)) <= 6, "the codebook's longest"


@pytest.mark.parametrize("tiles", [False, True])
def test_sliced_decoding_gives_the_same_images_and_comes_off(tiles: bool) -> None:
    tiny = TINY["dit"]
    pipe = dita.accelerate_pipeline(tiny.build(), LightCache())
    whole, before = tiny.call(pipe, steps=3, batch=2, output_type="pt"), dict(vars(pipe.vae))
    rows: list[int] = []
    hook = pipe.vae.decoder.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    with pytest.raises(ZeroDivisionError), sliced_decoding(pipe, tiles):
        sliced = tiny.call(pipe, steps=3, batch=2, output_type="pt")
        raise ZeroDivisionError
    assert rows == [1, 1]
    torch.testing.assert_close(sliced, whole, rtol=1e-5, atol=1e-5)
    assert vars(pipe.vae) == before
    assert torch.equal(tiny.call(pipe, steps=3, batch=2, output_type="pt"), whole) and rows == [1, 1, 2]
    hook.remove()
    with pytest.raises(dita.DitaError, match="no component named vae"), sliced_decoding(object()):
        pass


def by_hand(solver: str, k: int, f: list[torch.Tensor], gaps: tuple[int, int]) -> torch.Tensor:
    """Forecasts of the pool k steps behind f[0], from anchors with these gaps between them."""
    slope, before = (f[0] - f[1]) / gaps[0], (f[1] - f[2]) / gaps[1]
    bend = slope - before
    return {
        "reuse": f[0],
        "taylor 1": f[0] + k * slope,
        "taylor 2": f[0] + k * slope + k**2 / 2 * bend / gaps[0],
        "adams-bashforth": f[0] + k * (1.5 * slope - 0.5 * before),
        "bdf": f[0] + k / gaps[0] * ((4 * f[0] - f[1]) / 3 + 2 / 3 * gaps[0] * slope - f[0]),
        "runge-kutta": f[0] + k * (slope + k / (2 * gaps[0]) * bend),
        "adams-moulton": f[0] + k * (slope + (1.5 * slope - 0.5 * before)) / 2,
    }[solver]


def test_hycas_own_criterion_is_the_least_squared_error_over_all_places() -> None:
    tiny, interval = TINY["dit"], 3
    pipe = tiny.build()
    call = lambda p: tiny.call(p, steps=STEPS)  # noqa: E731
    config = HyCa(interval=interval, clusters=1).calibrated(pipe, call)
    chosen = {}
    for number in (0, 2):
        outputs: list[torch.Tensor] = []
        feed = pipe.transformer.transformer_blocks[number].ff
        hook = feed.register_forward_hook(lambda *given, outputs=outputs: outputs.append(given[-1].double()))
        call(pipe)
        hook.remove()
        errors = dict.fromkeys(SOLVERS, 0.0)
        for newest in range(2 * interval, STEPS):
            past = [outputs[newest - interval * place] for place in range(3)]
            for k in range(1, interval):
                for solver in SOLVERS if newest + k < STEPS else ():
                    made = by_hand(solver, k, past, (interval, interval))
                    errors[solver] += (made - outputs[newest + k]).square().sum().item()
        assert config.table is not None
        (chosen[number],) = {SOLVERS[solver] for solver in config.table.values[f"transformer_blocks.{number}.ff, 0"]}
        assert errors[chosen[number]] <= min(errors.values()) * (1 + 1e-4)
        assert max(errors.values()) > 1.5 * min(errors.values()), "guard: the choice must matter"
