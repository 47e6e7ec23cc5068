from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from dita import registry
from dita.errors import DitaError
from dita.eval import best_at
from dita.eval.htmlreport import write_report
from dita.eval.plots import pareto, plot_sweep, strip
from dita.eval.rows import COLUMNS, append_row, psnr_of, read_rows, table, to_markdown, to_rich
from dita.eval.sampling import Sampling
from dita.eval.settings import FEWER_STEPS, PLAIN, Setting, context, plan, source_digest, thin


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


def test_pareto_front():
    assert pareto([(1, 1), (2, 2), (3, 0), (2, 1), (0, 3)]) == [4, 1, 2]
    assert pareto([]) == []


@pytest.mark.parametrize("rows", [[], [row(error="no")], [row(), row(label="y", psnr=None), row("fewer steps")]])
def test_plot_is_a_png_whatever_the_rows(rows, tmp_path):
    data = plot_sweep(rows, tmp_path / "pareto.png", "title")
    assert (tmp_path / "pareto.png").read_bytes() == data
    assert data.startswith(b"\x89PNG")


def test_strip_keeps_the_pixels():
    import io

    import numpy as np
    from PIL import Image

    images = torch.linspace(0, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    pixels = np.asarray(Image.open(io.BytesIO(strip(images, gap=1))))
    assert pixels.shape == (8, 17, 3)
    assert (pixels[:, 8] == 255).all()
    second = torch.from_numpy(pixels[:, 9:].copy()).permute(2, 0, 1)
    assert torch.equal(second, (images[1] * 255).round().byte())


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.open, self.cells = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.cells += tag == "td"
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_one_well_formed_file_without_links(tmp_path):
    rows = [row(PLAIN, label="50 steps"), row(label="<b>&", notes=["0 of 50"]), row("m", error="bad <i>")]
    strips = {entry["key"]: strip(torch.zeros(2, 1, 8, 8)) for entry in rows[:2]}
    plot = plot_sweep(rows, tmp_path / "p.png")
    path = write_report(tmp_path / "report.html", rows, plot, strips, "<model>")
    text = path.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.sources
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert "http" not in text
    assert "<b>&" not in text
    assert "&lt;model&gt;" in text
    assert "0 of 50" in text
    assert reader.cells >= 3 * len(table(rows)[0])


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
    assert {s.method for s in quick} == {s.method for s in settings}
    assert len(quick) <= 1 + 2 * (1 + len(registry.names()))


def test_plan_by_name():
    assert {s.method for s in plan(20, ["taylorseer"])} == {PLAIN, "taylorseer"}
    assert [s.steps for s in plan(4, [FEWER_STEPS])] == [4, 3, 2, 1]
    with pytest.raises(DitaError, match="nonsense; known are fewer steps"):
        plan(20, ["nonsense"])


def test_thin_keeps_short_ladders():
    assert [thin(list(range(n))) for n in (0, 1, 2, 3, 9)] == [[], [0], [0, 1], [0, 1], [2, 4]]


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
