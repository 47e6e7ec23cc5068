"""LinearAG: the fit against least squares over trajectories, the method against a loop written by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from guided_loops import STEPS, by_hand, computed, ddim_run, moment, run
from helpers import assert_same_snapshot, plain, snapshot
from pipelines import TINY

import dita
from dita.config import Method
from dita.errors import DitaError, DitaWarning
from dita.schedulers.guidance import LinearAG
from dita.schedulers.guidance.linear_ag import Estimates
from dita.schedulers.guidance.linear_fit import LinearWeights, Trajectories, fit_row


def trajectories(count: int, steps: int, mix: bool) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Runs of random conditional outputs; with `mix` the unconditional ones are weighted sums of what came before."""
    generator, runs = torch.Generator().manual_seed(0), []
    for _ in range(count):
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(steps):
            c = torch.randn(1, 2, 6, 6, generator=generator)
            u = torch.randn(1, 2, 6, 6, generator=generator)
            if mix and step % 2:
                u = 0.5 * c + 0.3 * rows[0][0] - 0.2 * rows[step - 1][1]
            rows.append((c, u))
        runs.append(rows)
    return runs


def watch(runs: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> Trajectories:
    seen = Trajectories()
    for rows in runs:
        seen.begin_run(ddim_run(len(rows)))
        for step, (c, u) in enumerate(rows):
            assert seen.uncond(moment(step, len(rows)), c, u) is u
    assert seen.finish()
    return seen


def test_linear_ag_normal_equations_are_least_squares_over_all_trajectories() -> None:
    runs, own = trajectories(3, 6, mix=False), 5
    rows = watch(runs).weights(2, 0.0)["0"]
    columns = [*(("c", i) for i in range(own + 1)), *(("u", i) for i in (0, 2, 4))]
    matrix = torch.stack([torch.cat([r[i][k == "u"].flatten() for r in runs]) for k, i in columns], 1).double()
    target = torch.cat([r[own][1].flatten() for r in runs]).double()
    wanted = torch.linalg.lstsq(matrix, target[:, None]).solution.flatten().tolist()
    assert rows[own][0] == pytest.approx(wanted[: own + 1], abs=1e-6)
    assert [rows[own][1][i] for i in (0, 2, 4)] == pytest.approx(wanted[own + 1 :], abs=1e-6)
    assert [rows[own][1][i] for i in (1, 3)] == [0, 0], "what will itself be an estimate is no regressor"
    assert rows[0] == rows[2] == rows[4] == ()


def test_linear_ag_finds_the_weights_and_estimates_with_them() -> None:
    steps = 6
    values = watch(trajectories(2, steps, mix=True)).weights(2, 1e-12)
    policy = Estimates(LinearWeights({**values, "interval": 2}, steps=steps), 2, 1.0)
    policy.begin_run(ddim_run(steps))
    for step, (c, u) in enumerate(trajectories(3, steps, mix=True)[2]):
        assert policy.wants(moment(step, steps)).branches == ("cond" if step % 2 else "both")
        estimate = policy.uncond(moment(step, steps), c, None if step % 2 else u)
        torch.testing.assert_close(estimate, u, atol=1e-5, rtol=1e-5)
    assert policy.bytes_held() == (6 + 3) * 2 * 36 * 4


def test_linear_ag_prior_is_the_difference_held() -> None:
    gram = torch.randn(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c, u = fit_row(gram @ gram.T, 3, [0, 2], 0, 1e12)
    assert c == pytest.approx([0, 0, -1, 1], abs=1e-9) and u == pytest.approx([0, 0, 1], abs=1e-9)


def calibrated(tiny: str, **settings: Any) -> LinearAG:
    config = dita.calibrate(TINY[tiny].build(), "linear-ag", TINY[tiny].call, **settings)
    assert isinstance(config, LinearAG)
    return config


@pytest.mark.parametrize("tiny", ["dit", "wan"])
def test_linear_ag_by_hand(tiny: str) -> None:
    config = calibrated(tiny, stop=0.75)
    assert config.table is not None and Method.from_json(config.to_json()) == config
    rows = config.table.values["0"]
    cs: list[torch.Tensor] = []
    us: dict[int, torch.Tensor] = {}

    def stand_in(i: int, c: torch.Tensor, u: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        cs.append(c)
        if u is not None:
            us[i] = u
        if u is not None or i >= 6:
            return c if u is None else u
        a, b = rows[i]
        estimate = torch.zeros_like(c)
        for weight, output in (*zip(a, cs, strict=True), *((b[j], us[j]) for j in us)):
            estimate = estimate + weight * output
        return estimate

    expected = by_hand(tiny, lambda i, t: i < 6 and i % 2 == 0, stand_in)
    output, report = run(tiny, config)
    torch.testing.assert_close(output, expected.float(), atol=1e-5, rtol=1e-4)
    assert computed(report, "uncond") == [0, 2, 4] and computed(report, "cond") == list(range(STEPS))
    held = (output - plain(tiny)).norm() < (run(tiny, replace(config, stop=0.01))[0] - plain(tiny)).norm()
    assert held, "nearer to full guidance than without any"


def test_linear_ag_calibrates_on_several_runs() -> None:
    free = lambda pipe: TINY["wan"].call(pipe, generator=None)  # noqa: E731
    pipe = TINY["wan"].build()
    state = torch.get_rng_state()
    one, three = (dita.calibrate(pipe, LinearAG(runs=runs), free) for runs in (1, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.table != three.table and three == dita.calibrate(pipe, LinearAG(runs=3), free)  # pyright: ignore
    assert calibrated("wan", runs=1).table == calibrated("wan", runs=4).table, "a repeated run counts once"


def test_linear_ag_warns_and_refuses() -> None:
    pipe, call, config = TINY["wan"].build(), TINY["wan"].call, calibrated("wan")
    with dita.accelerated(pipe, config):
        with pytest.warns(DitaWarning, match="a guidance scale of 3 "):
            call(pipe, guidance_scale=4.0)
        with pytest.warns(DitaWarning, match=r"8 steps \(now 10; nothing is estimated\)"):
            call(pipe, steps=10)
        assert computed(dita.report(pipe).last, "uncond") == [0, 1, 2, 3, 4]
        with pytest.warns(DitaWarning, match="an input of"):
            call(pipe, size="large")
    before = snapshot(pipe)
    for method, message in (
        (LinearAG(), "has no numbers"),
        (replace(config, interval=3), "fitted for interval 2, not 3"),
        (calibrated("dit"), "measured on DiT"),
    ):
        with pytest.raises(DitaError, match=message):
            dita.accelerate_pipeline(pipe, method)
        assert_same_snapshot(before, snapshot(pipe))
    with pytest.raises(DitaError, match="no guided sampling loop"):
        calibrated("flux")
