"""Sweeps made at different times, put together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dita.errors import DitaError, DitaWarning
from dita.eval.embedded import pictures_in
from dita.eval.joining import join_sweeps
from dita.eval.rows import read_rows

CONTEXT = {
    "task": "tiny", "weights": "w", "samples": 4, "seed": 0, "guidance": 3.0, "plain_steps": 10, "prompts": None,
    "call": {}, "dtype": "fp32", "device": "cpu", "judge": "old", "media": "image", "steps": 10,
}  # fmt: skip


def row(method: str, label: str, **numbers: Any) -> dict[str, Any]:
    origin = "baseline" if method in ("plain", "fewer steps") else "peer" if " " in method else "dita"
    key = f"{method}-{label}-{numbers.get('judge', 'old')}".replace(" ", "_")
    defaults = {"speedup": 2.0, "psnr": 35.0, "class_accuracy": 0.5, "computed_fraction": 0.5, "identical": 0}
    return {**CONTEXT, "key": key, "method": method, "label": label, "origin": origin, **defaults, **numbers}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    for each in rows:
        (folder / "images" / f"{each['key']}.png").write_bytes(folder.name.encode())
    return folder


@pytest.fixture
def monday(tmp_path: Path) -> Path:
    plain = row("plain", "10 steps", speedup=1.0, psnr=None)
    rows = plain, row("fewer steps", "5 steps"), row("foca", "mild"), row("foca", "strong"), row("a peer", "only")
    return write(tmp_path / "monday", *rows)


def test_the_last_sweep_that_has_a_method_counts(monday: Path, tmp_path: Path) -> None:
    new = {"judge": "new", "intervals": {"psnr": [1, 2], "class_accuracy": [0, 1]}}
    plain = row("plain", "10 steps", speedup=1.0, psnr=None, **new)
    tuesday = write(
        tmp_path / "tuesday",
        plain,
        row("foca", "third", **new),
        row("bac", "one", **new),
        row("fewer steps", "2 steps"),
    )
    page = join_sweeps([monday, tuesday], tmp_path / "both")
    rows = read_rows(page.parent / "results.jsonl")
    assert [(r["method"], r["label"]) for r in rows] == [
        ("plain", "10 steps"), ("fewer steps", "5 steps"), ("bac", "one"), ("foca", "third"), ("a peer", "only"),
    ]  # fmt: skip
    by_name = {r["method"]: r for r in rows}
    # What the old network read is gone, what needs none stays.
    assert "class_accuracy" not in by_name["a peer"] and by_name["a peer"]["psnr"] == 35.0
    assert by_name["foca"]["class_accuracy"] == 0.5 and by_name["foca"]["intervals"] == new["intervals"]
    pictures = {r["method"]: (page.parent / "images" / f"{r['key']}.png").read_text() for r in rows}
    assert pictures["a peer"] == "monday" and pictures["foca"] == "tuesday"
    text = page.read_text()
    assert "third" in text and "mild" not in text and (page.parent / "pareto.png").stat().st_size > 1000
    assert "third" in (page.parent / "results.md").read_text()


def test_pictures_are_taken_out_of_a_page_whose_folder_has_none(monday: Path, tmp_path: Path) -> None:
    """A small strip, one that is embedded as JPEG, and a clip: what comes out of the page goes into the next."""
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8))
    for key, picture in {"plain-10_steps-old": Image.new("L", (8, 8)), "foca-mild-old": noisy}.items():
        picture.save(monday / "images" / f"{key}.png")
    Image.new("RGB", (8, 8), "red").save(monday / "images" / "foca-strong-old.png")
    Image.new("RGB", (8, 8), "blue").save(monday / "images" / "foca-strong-old.webp")
    for key in ("fewer_steps-5_steps-old", "a_peer-only-old"):
        (monday / "images" / f"{key}.png").unlink()
    tuesday = write(tmp_path / "tuesday", row("plain", "10 steps", psnr=None), row("bac", "one"))
    page = join_sweeps([monday, tuesday], tmp_path / "both")
    held = {path.name: path.read_bytes() for path in (page.parent / "images").iterdir()}
    shutil.rmtree(page.parent / "images")
    again = join_sweeps([page.parent], tmp_path / "again")
    found = {path.name: path.read_bytes() for path in (again.parent / "images").iterdir()}
    with Image.open(again.parent / "images" / "foca-mild-old.jpeg") as picture:
        assert picture.size == (160, 160)
    del held["foca-mild-old.png"], found["foca-mild-old.jpeg"]
    assert found == held and {name.rpartition(".")[2] for name in found} == {"png", "webp"}
    assert again.read_text().count("data:image/") == page.read_text().count("data:image/") >= 6


def test_a_picture_of_no_row_is_named() -> None:
    shots = [
        f'<img alt="foca, {label}: 2.00×, 35.0 dB" src="data:image/gif;base64,R0lGODlh">' for label in ("mild", "old")
    ]
    with pytest.warns(DitaWarning, match="1 of 2 pictures belong to no row by their captions, such as 'foca, old"):
        assert list(pictures_in("".join(shots), [row("foca", "mild"), row("foca", "strong")])) == ["foca-mild-old"]


def test_settings_can_be_added(monday: Path, tmp_path: Path) -> None:
    again, more = (row("foca", label, config={"interval": n}) for label, n in (("second", 3), ("third", 4)))
    sunday = write(tmp_path / "sunday", row("plain", "10 steps"), row("foca", "mild", config={"interval": 2}), again)
    older = again | {"psnr": 0.5, "key": "of-older-code"}
    tuesday = write(tmp_path / "tuesday", row("plain", "10 steps"), older, again | {"psnr": 1.0}, more)
    page = join_sweeps([sunday, tuesday], tmp_path / "all", by_setting=True)
    kept = [(r["label"], r["psnr"]) for r in read_rows(page.parent / "results.jsonl") if r["method"] == "foca"]
    assert kept == [("mild", 35.0), ("second", 1.0), ("third", 35.0)]
    page = join_sweeps([sunday, tuesday], tmp_path / "last")
    labels = [r["label"] for r in read_rows(page.parent / "results.jsonl") if r["method"] == "foca"]
    assert labels == ["second", "second", "third"]


def test_a_sweep_can_be_joined_into_its_own_folder(monday: Path, tmp_path: Path) -> None:
    tuesday = write(tmp_path / "tuesday", row("plain", "10 steps", psnr=None), row("bac", "one"))
    join_sweeps([monday, tuesday], monday)
    assert [r["method"] for r in read_rows(monday / "results.jsonl")][-3:] == ["foca", "foca", "a peer"]


def test_only_like_is_joined(monday: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", row("plain", "10 steps", psnr=None, samples=8, seed=1))
    with pytest.raises(DitaError, match="differ in samples, seed from the first"):
        join_sweeps([monday, other], tmp_path / "both")
    with pytest.raises(DitaError, match="no plain run"):
        join_sweeps([monday, write(tmp_path / "empty", row("bac", "one"))], tmp_path / "both")
    assert not (tmp_path / "both").exists()
