from __future__ import annotations

import io
import json
import math
from collections import Counter
from dataclasses import replace

import pytest

from dita import registry
from dita.errors import DitaError
from dita.eval import best_at
from dita.eval.columns import METRICS
from dita.eval.rows import COLUMNS, append_row, origin_of, psnr_of, read_rows, table, to_markdown, to_rich
from dita.eval.sampling import Sampling
from dita.eval.settings import FEWER_STEPS, PLAIN, QUICK, Setting, context, plan, source_digest, thin
from dita.eval.winners import best_at_semantic, comparable, winners, winners_to_markdown


def row(method: str = "a", **values):
    base = {"key": f"{method}{values.get('label', '')}", "method": method, "label": "x", "samples": 4, "identical": 0}
    return {**base, "speedup": 2.0, "psnr": 31.0, "fd_garment": 5.0, "class_accuracy": 0.9, **values}


def test_rows_survive_a_line_cut_short(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    append_row(path, row(label="one"))
    with path.open("a") as file:
        file.write('{"key": "half')
    append_row(path, row(label="two"))
    assert [kept["label"] for kept in read_rows(path)] == ["one", "two"]


def test_values_that_json_lacks_are_refused(tmp_path):
    with pytest.raises(DitaError, match="cannot be written"):
        append_row(tmp_path / "results.jsonl", row(psnr=math.inf))
    assert not (tmp_path / "results.jsonl").exists()


def test_best_at_takes_the_fastest_that_is_good_enough():
    rows = [
        row(label="slow", speedup=1.5, psnr=40.0),
        row(label="right", speedup=2.5, psnr=30.0),
        row(label="bad", speedup=4.0, psnr=29.99),
        row(label="broken", speedup=9.0, psnr=50.0, error="no"),
        row("b", psnr=12.0),
        row("c", psnr=None, identical=4, speedup=1.1),
        row("d", psnr=None, identical=3, speedup=1.1),
        row(PLAIN, psnr=None),
        row("data", psnr=None),
    ]
    best = best_at(rows)
    assert list(best) == ["a", "b", "c", "d"]
    assert best["a"] == rows[1]
    assert best["b"] is None
    assert best["c"] == rows[5]
    assert best["d"] is None
    assert best_at(rows, psnr=10)["b"] == rows[4]


def test_psnr_of_a_row():
    assert psnr_of(row(psnr=33.0)) == 33.0
    assert psnr_of(row(psnr=None, identical=4)) == math.inf
    assert psnr_of({"method": PLAIN}) == -math.inf


def test_tables_show_errors_and_drop_empty_columns():
    rows = [row(label="a|b", ssim=0.5), {"key": "e", "method": "m", "label": "l", "error": "ValueError: [x]\nboom"}]
    head, cells = table(rows)
    assert "LPIPS" not in head
    assert {"method", "setting", "PSNR dB", "SSIM"} <= set(head)
    assert "failed: ValueError" in cells[1][1]
    lines = to_markdown(rows).splitlines()
    assert len(lines) == 4
    assert "a\\|b" in lines[2]
    assert to_rich(rows).row_count == 2
    assert len({column.title for column in COLUMNS}) == len(COLUMNS)


MEASURED = {
    "origin": "peer", "task": "fashion-wan", "media": "video", "frames": 13, "semantic_accuracy": 0.8125,
    "accuracy_change": -0.01,
    "garment_accuracy": 0.9, "colour_accuracy": 1.0, "place_accuracy": 0.7, "motion_accuracy": 0.85, "fd_world": 12.5,
    "perceptual": 0.0123, "kid": 0.01, "fid": 20.0, "lpips": 0.2, "clip_score": 31.0, "flicker_difference": -0.001,
    "motion_consistency": 0.9, "latent_l1": 0.1, "latent_l2": 0.2,
    "peak_memory_bytes": 3 << 20, "peak_resident_bytes": 5 << 20, "ssim": 0.9,
    "intervals": {"psnr": [29.94, 32.04], "semantic_accuracy": [0.7, 0.9]},
}  # fmt: skip


def test_every_measure_has_a_column_and_the_console_stays_narrow():
    from rich.console import Console

    rows = [row("diffusers firstblock", label="threshold=0.12", **MEASURED), row(label="y", media="image", frames=1)]
    head, cells = table(rows)
    assert {metric.title for metric in METRICS} - set(head) == set()
    shown = dict(zip(head, cells[0], strict=True))
    assert (shown["origin"], shown["peak MiB"], shown["RSS MiB"], shown["frames"]) == ("peer", "3", "5", "13")
    assert (shown["media"], shown["semantic acc."], shown["FD-world"]) == ("video", "81.2%", "12.50")
    console = Console(width=120, file=io.StringIO(), record=True)
    del rows[1]["class_accuracy"], rows[1]["fd_garment"], rows[0]["class_accuracy"], rows[0]["fd_garment"]
    console.print(to_rich(rows))
    lines = console.export_text().splitlines()
    assert sum("diffusers firstblock" in line and "threshold=0.12" in line for line in lines) == 1
    assert len(lines) == 3 + 2 + 1, "no cell is broken over two lines"


def test_columns_of_what_all_rows_share_vanish():
    alike = [row(label=label, task="fashion-flux", media="image", origin="dita") for label in "xy"]
    assert not {"task", "media", "origin"} & set(table(alike)[0])
    assert "task" in table([*alike, row(task="fashion-wan")])[0]


def test_intervals_stand_behind_their_values():
    rows = [row(**MEASURED), row("b", psnr=None, intervals={"psnr": [1.0, 2.0]})]
    assert "31.0 [29.9, 32.0]" in to_markdown(rows)
    assert "81.2% [70.0%, 90.0%]" in to_markdown(rows)
    assert "[1.0, 2.0]" not in to_markdown(rows), "no value, no interval"
    assert "[" not in to_markdown(rows, intervals=False)
    assert not any("[" in cell for line in table(rows)[1] for cell in line)


def test_origin_of_a_row():
    names = ["plain", "data", "fewer steps", "taylorseer"]
    assert [origin_of({"method": name}) for name in names] == ["baseline"] * 3 + ["dita"]
    assert origin_of({"method": "diffusers x", "origin": "peer"}) == "peer"


def contest() -> list[dict]:
    plain = {"semantic_accuracy": 0.90, "intervals": {"semantic_accuracy": [0.88, 0.92]}, "psnr": None}
    return [
        row(PLAIN, label="50 steps", speedup=1.0, samples=200, **plain),
        row("fewer steps", label="20 steps", speedup=2.5, psnr=31.0, semantic_accuracy=0.885),
        row("fewer steps", label="10 steps", speedup=5.0, psnr=20.0, semantic_accuracy=0.5),
        row("a", label="mild", speedup=2.0, psnr=35.0, semantic_accuracy=0.9),
        row("a", label="strong", speedup=4.0, psnr=29.9, semantic_accuracy=0.88),
        row("b", label="failed", speedup=9.0, psnr=99.0, semantic_accuracy=1.0, error="no"),
        row("peer x", label="mild", speedup=1.6, psnr=30.0, semantic_accuracy=0.879, origin="peer"),
    ]


def test_semantic_accuracy_may_fall_by_the_tolerance_or_stay_in_the_interval():
    best = best_at_semantic(contest())
    assert {name: found and found["label"] for name, found in best.items()} == {
        "fewer steps": "20 steps",
        "a": "strong",
        "peer x": None,
    }
    narrow = contest()
    narrow[0]["intervals"] = {}
    assert best_at_semantic(narrow)["a"] == narrow[3]
    assert best_at_semantic(narrow)["fewer steps"] is None
    assert best_at_semantic(narrow, tolerance=0.015)["fewer steps"] == narrow[1]
    with pytest.raises(DitaError, match="no row of the plain run"):
        best_at_semantic([row(PLAIN, error="no"), row()][:1])


def test_pairs_decide_where_there_are_enough():
    def paired(method: str, speedup: float, low: float, samples: int = 200) -> dict:
        change = {"accuracy_change": (low + 0.03) / 2, "intervals": {"accuracy_change": [low, 0.03]}}
        return row(method, speedup=speedup, semantic_accuracy=0.4, samples=samples, **change)

    plain = row(PLAIN, semantic_accuracy=0.5, samples=200, intervals={"semantic_accuracy": [0.45, 0.55]})
    rows = [plain, paired("a", 2.0, -0.01), paired("a", 3.0, -0.049), paired("a", 4.0, -0.051)]
    assert best_at_semantic(rows)["a"] == rows[2], "its accuracy alone would not pass: other samples were asked for"
    assert [each.criterion for each in winners(rows)] == ["PSNR >= 30 dB", "equal semantic accuracy"]
    few = [{**plain, "samples": 59}, paired("a", 2.0, 0.0, 59)]
    assert best_at_semantic(few)["a"] is None
    assert [each.criterion for each in winners(few)] == ["PSNR >= 30 dB"], "too few samples to tell"


def test_classes_stand_in_where_no_captions_are():
    rows = [row(PLAIN, class_accuracy=0.9), row(class_accuracy=0.895), row("b", class_accuracy=0.8)]
    best = best_at_semantic(rows)
    assert best["a"] == rows[1]
    assert best["b"] is None


def test_winners_compare_dita_with_peers_and_fewer_steps():
    close, semantic = winners(contest())
    assert (close.dita, close.peer, close.baseline) == (contest()[3], contest()[6], contest()[1])
    assert close.over(close.peer) == 1.25
    assert close.over(close.baseline) == 0.8
    assert (semantic.dita, semantic.peer) == (contest()[4], None)
    assert semantic.over(semantic.peer) is None
    text = winners_to_markdown(contest())
    assert "| PSNR >= 30 dB | a mild | 2.00 | peer x mild | 1.60 | fewer steps 20 steps | 2.50 | 1.25 | 0.80 |" in text
    assert "| equal semantic accuracy | a strong | 4.00 | - | - |" in text


@pytest.mark.parametrize("change", [{"samples": 59}, {"semantic_accuracy": 0.0}])
def test_semantic_accuracy_decides_nothing_where_it_cannot_be_seen_to_fall(change: dict) -> None:
    plain, *others = contest()
    assert comparable([plain, *others]) == ("semantic_accuracy", 0.90)
    rows = [{**plain, "intervals": {}, **change}, *({**other, "semantic_accuracy": 0.0} for other in others)]
    assert comparable(rows) is None and [each.criterion for each in winners(rows)] == ["PSNR >= 30 dB"]
    assert "semantic" not in winners_to_markdown(rows)


def test_winners_keep_pipelines_apart():
    rows = [row(task="one", speedup=3.0), row(task="two", speedup=2.0), row("data", psnr=None, task="two")]
    assert [(each.task, each.dita and each.dita["speedup"]) for each in winners(rows)] == [("one", 3.0), ("two", 2.0)]
    assert "two: PSNR >= 30 dB" in winners_to_markdown(rows)


def test_plan_has_plain_fewer_steps_and_every_ladder():
    settings = plan(50)
    assert settings[0] == Setting(PLAIN, "50 steps", 50)
    assert [s.steps for s in settings if s.method == FEWER_STEPS] == [40, 25, 20, 15, 12, 10, 8]
    for name in registry.names():
        rungs = [s for s in settings if s.method == name]
        assert tuple(rung.config for rung in rungs) == registry.get(name).ladder()
        assert len({rung.label for rung in rungs}) == len(rungs)
    quick = plan(50, quick=True)
    assert set(quick) < set(settings)
    assert {s.method for s in quick} == {PLAIN, FEWER_STEPS, *QUICK} <= {s.method for s in settings}
    assert len(quick) == 1 + 2 * (1 + len(QUICK))


def test_plan_by_name():
    assert {s.method for s in plan(20, ["taylorseer"])} == {PLAIN, "taylorseer"}
    assert [s.steps for s in plan(4, [FEWER_STEPS])] == [4, 3, 2, 1]
    with pytest.raises(DitaError, match="nonsense; known are fewer steps"):
        plan(20, ["nonsense"])


def test_thin_keeps_short_ladders():
    assert [thin(list(range(n))) for n in (0, 1, 2, 3, 9)] == [[], [0], [0, 1], [0, 1], [2, 4]]
    assert [thin(list(range(n)), 3) for n in (2, 3, 4, 5, 6, 9)] == [
        [0, 1], [0, 1, 2], [1, 2, 3], [1, 2, 3], [1, 2, 4], [2, 4, 6]
    ]  # fmt: skip
    assert all(len(thin(list(range(n)), k)) == min(n, k) for n in range(12) for k in range(1, 8))
    everything = Counter(s.method for s in plan(50, peers=True))
    three = Counter(s.method for s in plan(50, peers=True, strengths=3))
    assert set(three) == set(everything)
    assert all(three[name] == min(3, everything[name]) for name in registry.names())


def test_key_follows_everything_the_numbers_depend_on():
    sampling = Sampling(8, 4, 10, 3.0, 0)
    first = context(sampling, "weights", "judge", 1, "cpu")
    settings = plan(10)
    keys = {setting.key(first) for setting in settings}
    assert len(keys) == len(settings)
    changed = [
        context(replace(sampling, seed=1), "weights", "judge", 1, "cpu"),
        context(replace(sampling, guidance=2.0), "weights", "judge", 1, "cpu"),
        context(replace(sampling, steps=11), "weights", "judge", 1, "cpu"),
        context(sampling, "others", "judge", 1, "cpu"),
        context(sampling, "weights", "another", 1, "cpu"),
        context(sampling, "weights", "judge", 2, "cpu"),
        context(sampling, "weights", "judge", 1, "gpu"),
    ]
    assert len({settings[1].key(each) for each in [first, *changed]}) == 8
    assert settings[1].key(json.loads(json.dumps(first))) == settings[1].key(first)
    assert source_digest() == source_digest()
