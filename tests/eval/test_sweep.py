from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dita
from dita import registry
from dita.caching import TaylorSeer
from dita.caching.fitted import Fitted
from dita.caching.fitted_table import FittedTable
from dita.errors import DitaError
from dita.eval import bench as bench_module
from dita.eval import run_sweep
from dita.eval.bench import Bench, Cost, merge
from dita.eval.composition import Composition
from dita.eval.evaluate import evaluate_pipeline
from dita.eval.rows import read_rows
from dita.eval.sampling import Sampling, check_pipeline, draw
from dita.eval.settings import FEWER_STEPS, PLAIN, Setting
from dita.eval.sweeping import Sweep
from dita.schedulers.timesteps import OptimalSteps

SAMPLING = Sampling(samples=8, batch=2, steps=6, guidance=3.0, seed=0)
SETTINGS = [
    Setting(PLAIN, "6 steps", 6),
    Setting(FEWER_STEPS, "3 steps", 3),
    Setting("taylorseer", "interval=1", 6, TaylorSeer(interval=1)),
    Setting("taylorseer", "interval=3", 6, TaylorSeer(interval=3)),
]


def ignore(drawn, indices) -> None:
    pass


def broken(uncalibrated: bool = False) -> Setting:
    config = SimpleNamespace(name="broken", uncalibrated=uncalibrated, to_dict=lambda: {"method": "broken"})
    return Setting("broken", "always", 6, config)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def make(tiny, judge, tmp_path):
    def build(**changes) -> Sweep:
        return Sweep(tmp_path, Bench(tiny, SAMPLING), judge, {"samples": 8, "device": "cpu", **changes})

    return build


def by_label(sweep: Sweep) -> dict[str, dict]:
    return {row["label"]: row for row in read_rows(sweep.results)}


def test_rows_say_what_was_measured(make):
    sweep = make()
    sweep.run(SETTINGS)
    rows = by_label(sweep)
    assert list(rows) == [setting.label for setting in SETTINGS]
    assert not any("error" in row for row in rows.values())
    plain, fewer, idle, taylor = rows.values()
    assert plain["speedup"] == 1
    assert plain["flops_ratio"] == 1
    assert plain["computed_fraction"] == 1
    assert "psnr" not in plain
    assert fewer["computed_fraction"] == 0.5
    assert 0.5 < fewer["flops_ratio"] < 0.8, "decoding costs the same"
    assert math.isfinite(fewer["psnr"])
    assert idle["psnr"] is None
    assert idle["identical"] == 8
    assert idle["ssim"] == pytest.approx(1)
    assert idle["flops_ratio"] == 1
    assert idle["computed_fraction"] == 1
    assert taylor["computed_fraction"] < 1
    assert taylor["flops_ratio"] < 1
    assert taylor["identical"] == 0
    assert taylor["peak_cache_bytes"] > 0
    for row in rows.values():
        assert 0 <= row["peak_resident_bytes"] < 1 << 32 and "peak_memory_bytes" not in row
        assert len(row["seconds"]) == 3, "four batches, of which the first warms up"
        assert len(row["plain_seconds"]) == 2
        assert row["fd_garment"] > 0
        assert 0 <= row["class_accuracy"] <= 1
        assert {"code", "versions", "measured", "key", "steps", "origin", "media", "intervals"} <= set(row)
    assert [row["origin"] for row in rows.values()] == ["baseline", "baseline", "dita", "dita"]
    assert taylor["timeline"] == {"all": "CCCFFC"}, "warm-up, then each third step"
    low, high = taylor["intervals"]["psnr"]
    assert low <= taylor["psnr"] <= high


def test_steps_that_a_method_leaves_out_count_once(make):
    sweep = make()
    chosen = Setting("optimal-steps", "steps=3", 6, OptimalSteps(steps=3))
    shorter = Setting("fewer steps + taylorseer", "3 steps", 3, TaylorSeer(interval=1))
    sweep.run([*SETTINGS[:2], chosen, shorter])
    rows = {row["method"]: row for row in read_rows(sweep.results)}
    assert rows["optimal-steps"]["timeline"] == {"cond": "CNCNCN", "uncond": "CNCNCN"}
    for method in ("optimal-steps", "fewer steps + taylorseer"):
        assert rows[method]["computed_fraction"] == 0.5
        assert rows[method]["flops_ratio"] == pytest.approx(rows[FEWER_STEPS]["flops_ratio"])


def table_of(method: Any) -> FittedTable:
    return method.table


@pytest.mark.parametrize("method", ["adaptive-guidance", "guidance-interval"])
def test_a_composition_calibrates_fitted_with_the_others_at_work(make, method):
    bench = make().bench
    config = Composition((Fitted(speedup=2.0), registry.get(method)()))
    found = bench._calibrated(Setting(config.name, "both", 6, config))[0].config
    assert isinstance(found, Composition) and not found.uncalibrated
    fitted, guidance = found.parts
    other = replace(SAMPLING, samples=Fitted.trajectories, seed=SAMPLING.seed + 1)
    calls = [lambda pipe: draw(pipe, other, range(4), 6)]
    with_it = dita.calibrate(bench.pipe, Fitted(speedup=2.0), calls=calls, beside=[guidance])
    alone = dita.calibrate(bench.pipe, Fitted(speedup=2.0), calls=calls)
    grams = [table_of(part).values["gram"] for part in (fitted, with_it, alone)]
    assert grams[0] == grams[1] != grams[2]


def test_a_finished_sweep_draws_nothing_again(make, monkeypatch):
    make().run(SETTINGS)
    before = make().results.read_bytes()
    monkeypatch.setattr(bench_module, "draw", lambda *args, **kwargs: pytest.fail("drew again"))
    make().run(SETTINGS)
    assert make().results.read_bytes() == before


def test_an_interrupted_sweep_goes_on_where_it_stopped(make, monkeypatch):
    sweep = make()
    original = sweep.bench.run

    def interrupted(setting, observe):
        if setting.label == "interval=1":
            raise KeyboardInterrupt
        return original(setting, observe)

    sweep.bench.run = interrupted
    with pytest.raises(KeyboardInterrupt):
        sweep.run(SETTINGS)
    assert list(by_label(sweep)) == ["6 steps", "3 steps"]
    resumed, ran = make(), []
    again = resumed.bench.run
    resumed.bench.run = lambda setting, observe: ran.append(setting.label) or again(setting, observe)
    resumed.run(SETTINGS)
    assert ran == ["interval=1", "interval=3"]
    rows = by_label(resumed)
    assert rows["interval=1"]["identical"] == 8, "compared with the reference images kept on disk"
    assert rows["interval=3"]["flops_ratio"] < 1
    assert len(rows["interval=1"]["plain_seconds"]) == 2


def test_changed_surroundings_run_again(make):
    make().run(SETTINGS[:2])
    make(seed=1).run(SETTINGS[:2])
    assert len(read_rows(make().results)) == 4


@pytest.mark.parametrize("uncalibrated", [False, True], ids=["attach", "calibrate"])
def test_a_failing_setting_is_a_row_and_is_tried_again(make, uncalibrated):
    sweep = make()
    settings = [*SETTINGS[:2], broken(uncalibrated), SETTINGS[3]]
    sweep.run(settings)
    rows = by_label(sweep)
    assert "Error: " in rows["always"]["error"]
    assert "error" not in rows["interval=3"]
    sweep.run(settings)
    labels = [row["label"] for row in read_rows(sweep.results)]
    assert labels == ["6 steps", "3 steps", "always", "interval=3", "always"]
    page = sweep.write(settings, "tiny").read_text()
    assert "failed: " in page


def test_the_pipeline_is_plain_after_a_failure(make, tiny, monkeypatch):
    sweep, plain = make(), draw(tiny, SAMPLING, range(2))
    with monkeypatch.context() as patch:
        patch.setattr(bench_module, "count_flops", lambda call: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sweep.bench.run(SETTINGS[3], ignore)
    assert torch.equal(draw(tiny, SAMPLING, range(2)).media, plain.media)


def test_a_failing_plain_run_ends_the_sweep_with_its_reason(make, monkeypatch):
    monkeypatch.setattr(bench_module, "draw", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(DitaError, match="plain run failed.*ZeroDivisionError"):
        make().run(SETTINGS)


def test_warnings_of_the_methods_are_kept(make):
    sweep = make()
    never = TaylorSeer(interval=100, warmup=50)
    sweep.run([SETTINGS[0], Setting("taylorseer", "never", 6, never)])
    assert any("0 of 6 steps" in note for note in by_label(sweep)["never"]["notes"])


def test_speedup_is_the_median_over_pairs_whatever_the_machine_does_between(tiny, monkeypatch):
    slowness = iter([1, 1, 5, 5, 1, 1])
    pace = {"own": 2.0, "plain": 6.0}
    bench, order = Bench(tiny, SAMPLING, pairs=3), []

    def timed(call, device):
        kind = "plain" if order and order[-1] == "own" else "own"
        order.append(kind)
        call()
        return pace[kind] * next(slowness)

    monkeypatch.setattr(bench_module, "timed", timed)
    row = merge([bench.run(SETTINGS[1], ignore)], None)
    assert order == ["own", "plain"] * 3
    assert row["speedup"] == 3
    assert row["seconds"] == [2, 10, 2]
    assert row["plain_seconds"] == [6, 30, 6]
    assert row["seconds_per_image"] == 1
    assert "took 6.00 to 30.00 s" in row["notes"][0]


def test_too_few_batches_are_drawn_again(tiny):
    bench = Bench(tiny, Sampling(samples=3, batch=2, steps=2, guidance=3.0, seed=0))
    drawn = []
    cost = bench.run(
        Setting(FEWER_STEPS, "1 steps", 1), lambda media, indices: drawn.append((len(media.media), indices))
    )
    assert drawn == [(2, range(2)), (1, range(2, 3))]
    assert len(cost.seconds) == len(cost.plain_seconds) == 2
    assert merge([cost], None)["flops_ratio"] is None


def test_a_single_pair_is_enough_where_it_is_asked_for(tiny):
    cost = Bench(tiny, Sampling(2, 1, 2, 3.0, 0), pairs=1).run(Setting(FEWER_STEPS, "1 steps", 1), ignore)
    assert len(cost.seconds) == len(cost.plain_seconds) == 1


def test_the_costs_of_several_processes_make_one_row():
    def cost(own: float, plain: float) -> Cost:
        return Cost(800, 4, [own, own], [plain], [own], [0.5], [10], notes=["same"], timeline={"all": "CR"})

    row = merge([cost(1.0, 3.0), cost(2.0, 4.0), cost(1.0, 9.0)], 400.0)
    assert row["speedup"] == 3
    assert row["seconds"] == [1, 1, 2, 2, 1, 1]
    assert row["seconds_per_image"] == 0.25
    assert row["flops_ratio"] == 0.5
    assert (row["computed_fraction"], row["peak_cache_bytes"], row["processes"]) == (0.5, 10, 3)
    assert row["notes"] == ["same"]
    assert row["timeline"] == {"all": "CR"}


def test_run_sweep_writes_everything(tiny_folder, tmp_path):
    options = {"methods": [FEWER_STEPS, "magcache"], "samples": 4, "steps": 5, "quick": True, "threads": 1}
    page = run_sweep(str(tiny_folder), tmp_path, batch=64, guidance=2.0, seed=3, **options)
    assert page == tmp_path / "report.html"
    rows = read_rows(tmp_path / "results.jsonl")
    assert [row["method"] for row in rows] == [PLAIN, FEWER_STEPS, FEWER_STEPS, "magcache", "magcache", "data"]
    assert not [row["error"] for row in rows if "error" in row]
    assert all(row["calibration_seconds"] > 0 for row in rows if row["method"] == "magcache")
    assert rows[-1]["class_accuracy"] > 0.9
    table = (tmp_path / "results.md").read_text()
    assert table.split("\n\n")[0].count("\n| ") == len(rows)
    assert "| fastest at |" in table
    assert "real training images score" in table
    assert (tmp_path / "pareto.png").stat().st_size > 5000
    assert "data:image/png;base64," in page.read_text()
    run_sweep(str(tiny_folder), tmp_path, batch=64, guidance=2.0, seed=3, **options)
    assert len(read_rows(tmp_path / "results.jsonl")) == len(rows)


def test_images_do_not_depend_on_their_batch(tiny):
    together = draw(tiny, SAMPLING, range(8)).media
    apart = torch.cat([draw(tiny, SAMPLING, indices).media for indices in SAMPLING.batches()])
    torch.testing.assert_close(apart, together, rtol=0, atol=2e-4)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_unfit_arguments_are_refused(tiny, tiny_folder, tmp_path):
    with pytest.raises(DitaError, match="bundled are fashion-dit"):
        run_sweep("no such model", tmp_path)
    with pytest.raises(DitaError, match="batch is 0"):
        Sampling(samples=4, batch=0, steps=5, guidance=1.0, seed=0)
    with pytest.raises(DitaError, match="strengths has nothing to choose from"):
        run_sweep(out=tmp_path, settings=["fbcache"], strengths=2)
    with pytest.raises(DitaError, match="dtype is 'fp4'"):
        run_sweep(str(tiny_folder), tmp_path, dtype="fp4")
    with pytest.raises(DitaError, match="neither class_labels nor a prompt"):
        check_pipeline(SimpleNamespace(), SAMPLING)
    with pytest.raises(DitaError, match="DiTPipeline takes no argument hight"):
        check_pipeline(tiny, Sampling(4, 2, 5, 1.0, 0, call={"hight": 8}))
    assert not (tmp_path / "results.jsonl").exists()


def test_a_judge_that_cannot_read_the_samples_makes_a_row_with_its_reason(make, monkeypatch):
    sweep = make()
    monkeypatch.setattr(sweep.judge, "_against_data", lambda *args: 1 / 0)
    with pytest.raises(DitaError, match="plain run failed.*ZeroDivisionError"):
        sweep.run(SETTINGS)


def test_model_card_numbers(tiny_folder):
    card = evaluate_pipeline(tiny_folder, samples=12, steps=2, batch=5, threads=1)
    assert card["samples"] == 12
    assert len(card["by_word"]) == 10
    assert card["fd_garment"] > card["real"]["fd_garment"] > 0
    assert card["class_accuracy"] < card["real"]["class_accuracy"]
    low, high = card["intervals"]["class_accuracy"]
    assert low <= card["class_accuracy"] <= high


def test_peers_are_rows_like_others(tiny_folder, tmp_path):
    options: dict[str, Any] = {"samples": 4, "steps": 8, "threads": 1, "batch": 2}
    recipes = [{"diffusers firstblock": {"threshold": 10.0}}, {"diffusers magcache": {"threshold": 10.0}}]
    run_sweep(str(tiny_folder), tmp_path, settings=recipes, **options)
    plain, first_block, magcache, _ = read_rows(tmp_path / "results.jsonl")
    assert plain["computed_fraction"] == 1
    for row in (first_block, magcache):
        assert "error" not in row, row["error"]
        assert row["origin"] == "peer"
        assert row["computed_fraction"] < 1
        assert row["flops_ratio"] < 1
        assert math.isfinite(row["psnr"])
        assert row["config"]["package"] == "diffusers"
    assert magcache["calibration_seconds"] > 0


def test_a_peer_that_refuses_the_pipeline_is_a_row_with_its_reason(tiny_folder, tmp_path):
    recipes = [{"diffusers fastercache": {}}]
    run_sweep(str(tiny_folder), tmp_path, settings=recipes, samples=2, steps=4, threads=1, guidance=1.0)
    rows = read_rows(tmp_path / "results.jsonl")
    assert "DitaError" in rows[1]["error"]
    assert "failed" in (tmp_path / "report.html").read_text()
