"""The page of a sweep, as one file and, where there is a Chromium, as a reader sees and uses it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import chromium, needs_browser, probe
from PIL import Image

from dita.eval.films import animation, film
from dita.eval.htmlreport import sample_note, write_report
from dita.eval.looks import looks
from dita.eval.plots import plot_sweep, strip
from dita.eval.rows import table

PAINT = {"plain": (0.0, 0.6, 0.4), "other": (1.0, 0.0, 1.0)}  # of the samples in the pictures


def sweep(task: str, media: str) -> list[dict]:
    """Rows of a made-up sweep: the plain run, the data, fewer steps, two methods of dita's, two peers, a failure."""
    base = {"task": task, "media": media, "samples": 60, "seed": 0, "plain_steps": 12, "device": "cpu", "identical": 0}
    base |= {"frames": 13} if media == "video" else {}
    plain = {"speedup": 1.0, "semantic_accuracy": 0.92, "fd_world": 11.0, "computed_fraction": 1.0}
    rows = [{"method": "plain", "label": "12 steps", **plain}, {"method": "data", "label": "8 real", "fd_world": 9.0}]
    ladders = {"fewer steps": "baseline", "taylorseer": "dita", "magcache": "dita"}
    ladders |= {"diffusers taylorseer": "peer", "cache-dit dbcache": "peer"}
    for number, (method, origin) in enumerate(ladders.items()):
        for rung in range(4):
            loss = rung + number / 5
            letters = "".join("C" if step % (rung + 2) == 0 else "FR"[number % 2] for step in range(12))
            row = {"method": method, "label": f"interval={rung + 2}", "origin": origin, "speedup": 1.3 + 0.6 * loss}
            row |= {"psnr": 42.0 - 5 * loss, "ssim": 0.99 - 0.05 * loss, "perceptual": 0.001 * 4**loss}
            row |= {
                "semantic_accuracy": 0.92 - 0.04 * rung,
                "fd_world": 11.0 + loss,
                "computed_fraction": 1 / (rung + 2),
            }
            row |= {"intervals": {"psnr": [41.0 - 5 * loss, 43.0 - 5 * loss]}} if number else {}
            row |= {"timeline": {"cond": letters, "uncond": letters}} if origin == "dita" else {}
            rows.append(row)
    rows[6] |= {"psnr": None, "identical": 60, "notes": ["0 of 12 steps were reused"]}
    rows.append({"method": "magcache", "label": "broken", "origin": "dita", "error": "ValueError: <i>bad</i>"})
    return [{**base, "key": f"{task} {row['method']} {row['label']}", **row} for row in rows]


ROWS = sweep("fashion-flux", "image") + sweep("fashion-wan", "video")
DRAWN = 20  # points of one pipeline


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    strips, animations = {}, {}
    colours = {name: torch.tensor(value)[:, None, None] for name, value in PAINT.items()}
    for row in ROWS:
        sample = colours["plain" if row["method"] == "plain" else "other"].expand(3, 16, 16)
        if row["media"] == "image":
            strips[row["key"]] = strip(sample.expand(6, 3, 16, 16))
        else:
            strips[row["key"]] = film(sample.expand(2, 13, 3, 16, 16))
            animations[row["key"]] = animation(sample.expand(2, 13, 3, 16, 16))
    plot = plot_sweep(ROWS, folder / "pareto.png")
    return write_report(folder / "report.html", ROWS, plot, strips, "made-up", animations, ["a red coat", "a bag"])


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.open, self.cells = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.cells += tag == "td"
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_one_well_formed_file_without_links(tmp_path):
    rows: list[dict] = [
        {"key": "p", "method": "plain", "label": "50 steps", "speedup": 1.0, "class_accuracy": 0.9},
        {"key": "a", "method": "a", "label": "<b>&", "speedup": 2.0, "psnr": 31.0, "notes": ["0 of 50"]},
        {"key": "m", "method": "m", "label": "x", "error": "bad <i>"},
    ]
    strips = {row["key"]: strip(torch.zeros(2, 1, 8, 8)) for row in rows[:2]}
    path = write_report(tmp_path / "report.html", rows, plot_sweep(rows, tmp_path / "p.png"), strips, "<model>")
    text = path.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.sources
    assert all(source.startswith("data:image/") for source in reader.sources)
    assert "http" not in text
    assert "<b>&" not in text
    assert "&lt;model&gt;" in text
    assert "0 of 50" in text
    assert reader.cells >= 3 * len(table(rows)[0])


def test_report_of_everything_is_well_formed_and_small(page):
    reader = Reader()
    reader.feed(page.read_text())
    assert reader.open == []
    assert len(page.read_bytes()) < 400_000
    assert "<i>bad" not in page.read_text()


def test_report_without_rows(tmp_path):
    assert "dita sweep of nothing" in write_report(tmp_path / "r.html", [], b"", {}, "nothing").read_text()


def test_note_names_the_distance_that_was_measured():
    assert "FD-garment was computed from 64 images" in sample_note(64, {"class_accuracy": 0.9})
    assert sample_note(64, {"fd_garment": 290.123}).endswith("As many real training images score 290.12.")
    assert sample_note(64, {"fd_world": 9.0}).startswith("FD-world was computed from 64 samples")
    assert sample_note(64, None) == sample_note(64, {}) == ""


USE = """
seen.ready = document.documentElement.dataset.ready;
seen.points = count();
seen.fronts = all(".canvas .front").length;
seen.spreads = all(".panel:first-child .spread").length;
seen.metrics = [...one(".panel select").options].map(option => option.value);
seen.order = order();
seen.uncached = all("img.uncached").every(image => image.src.startsWith("data:image/png"));
const method = name => all(".legend button").find(button => button.textContent === name);
method("magcache").click();
seen.without = count();
seen.pressed = method("magcache").getAttribute("aria-pressed");
method("other libraries").click();
seen.ours = count();
method("other libraries").click();
method("magcache").click();
one(".panel select").value = "perceptual";
one(".panel select").dispatchEvent(new Event("change"));
seen.label = one(".panel svg").getAttribute("aria-label");
seen.logarithmic = one(".panel svg").textContent.includes("logarithmic");
press("ArrowRight");
press("ArrowRight");
seen.tip = one(".panel .tip").innerText;
const row = one(".panel .current").dataset.row;
press("Enter");
seen.found = one("tr.found").id === `row-${row}`;
press("Escape");
seen.closed = one(".panel .tip").hidden;
one(".chart-task").value = "1";
one(".chart-task").dispatchEvent(new Event("change"));
seen.second = count();
all("table.sortable th button").find(button => button.textContent === "speedup").click();
seen.sorted = order();
one("select.origin").value = "peer";
one("select.origin").dispatchEvent(new Event("input"));
one(".find").value = "dbcache =4";
one(".find").dispatchEvent(new Event("input"));
seen.filtered = order();
seen.count = one(".count").textContent;
one(".motion").click();
seen.still = getComputedStyle(one(".moving")).display;
"""


@needs_browser
def test_a_reader_can_choose_hide_point_sort_and_filter(page, tmp_path):
    seen = probe(page, tmp_path, USE, "--window-size=1300,2400")
    assert seen["ready"] == "yes"
    assert seen["points"] == [DRAWN, DRAWN]
    assert seen["fronts"] == 2
    assert seen["spreads"] == DRAWN - 4, "fewer steps has no intervals"
    assert seen["metrics"] == ["psnr", "ssim", "perceptual", "fd_world", "semantic_accuracy"]
    assert seen["order"] == [f"row-{number}" for number in range(len(ROWS))]
    assert seen["uncached"]
    assert seen["without"] == [DRAWN - 4] * 2
    assert seen["pressed"] == "false"
    assert seen["ours"] == [DRAWN - 12] * 2
    assert seen["label"].startswith("perceptual dist. against speedup, 20 settings")
    assert seen["logarithmic"]
    assert "fewer steps" not in seen["tip"] and "taylorseer" in seen["tip"] and "speedup" in seen["tip"]
    assert seen["found"] and seen["closed"]
    assert seen["second"] == [DRAWN] * 2
    speeds = [row.get("speedup") for row in ROWS]
    sorted_speeds = [speeds[int(name[4:])] for name in seen["sorted"]]
    present = [speed for speed in sorted_speeds if speed is not None]
    assert present == sorted(present, reverse=True)
    assert sorted_speeds[len(present) :] == [None] * 4
    assert [ROWS[int(name[4:])]["key"] for name in seen["filtered"]] == [
        f"fashion-{kind} cache-dit dbcache interval=4" for kind in ("flux", "wan")
    ]
    assert seen["count"] == f"2 of {len(ROWS)} rows"
    assert seen["still"] == "none"


@needs_browser
def test_an_address_can_carry_a_view(page, tmp_path):
    script = "seen.points = count(); seen.order = order(); seen.metric = one('.panel select').value;"
    view = "#sort=PSNR%20dB:ascending&origin=dita&task=fashion-wan&metric=ssim&hide=magcache,taylorseer"
    seen = probe(page, tmp_path, script, after=view)
    assert seen["points"] == [DRAWN - 8] * 2
    assert seen["metric"] == "ssim"
    shown = [ROWS[int(name[4:])] for name in seen["order"]]
    assert {(row["task"], row["origin"]) for row in shown} == {("fashion-wan", "dita")}
    values: list[Any] = [row.get("psnr") for row in shown]
    assert values[:-2] == sorted(values[:-2])
    assert values[-2:] == [None, None], "identical, then the failure"
    assert shown[-2]["identical"] == 60


@needs_browser
def test_it_fits_a_telephone(page, tmp_path):
    script = "seen.width = innerWidth; seen.needed = document.documentElement.scrollWidth; seen.points = count();"
    opened = "all('details').forEach(part => { part.open = true; });"
    seen = probe(page, tmp_path, opened + script, "--window-size=390,900")
    assert seen["width"] <= 500
    assert seen["needed"] <= seen["width"]
    assert seen["points"] == [DRAWN, DRAWN]


def packed(colour: str) -> int:
    return int(colour[1:], 16)


@needs_browser
@pytest.mark.parametrize(
    ("scheme", "ground", "cells"),
    [(1, "#ffffff", ("#1d5f9e", "#e08a1e", "#9aa5af")), (0, "#14181c", ("#4d9fe6", "#f0a742", "#66717b"))],
    ids=["light", "dark"],
)
def test_what_is_seen(page, tmp_path, scheme, ground, cells):
    shot = tmp_path / "page.png"
    options = ("--window-size=1300,6000", f"--blink-settings=preferredColorScheme={scheme}")
    chromium(page, tmp_path / "profile", f"--screenshot={shot}", *options)
    red, green, blue = np.asarray(Image.open(shot).convert("RGB")).astype(np.int32).transpose(2, 0, 1)
    picture = (red << 16) + (green << 8) + blue
    assert picture.shape == (6000, 1300)
    assert 0.5 < (picture == packed(ground)).mean() < 0.97

    def count(colour: str, part: slice = slice(None)) -> int:
        return int((picture[part] == packed(colour)).sum())

    charts = slice(0, 1600)
    styles = looks(ROWS)
    for name in ("taylorseer", "magcache"):
        assert count(styles[name].colour, charts) > 4 * 30, f"markers of {name}"
    assert count(styles["cache-dit dbcache"].colour, charts) > 10, "outlines of hollow markers"
    for colour in cells:
        assert count(colour) > 100, "cells of the timelines"
    for value in PAINT.values():
        assert count("#" + "".join(f"{round(255 * part):02x}" for part in value)) > 20_000
