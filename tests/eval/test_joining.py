"""Sweeps made at different times, put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dita.errors import DitaError
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


def test_settings_can_be_added(monday: Path, tmp_path: Path) -> None:
    again, more = (row("foca", label, config={"interval": n}) for label, n in (("second", 3), ("third", 4)))
    sunday = write(tmp_path / "sunday", row("plain", "10 steps"), row("foca", "mild", config={"interval": 2}), again)
    tuesday = write(tmp_path / "tuesday", row("plain", "10 steps"), again | {"psnr": 1.0}, more)
    page = join_sweeps([sunday, tuesday], tmp_path / "all", by_setting=True)
    kept = [(r["label"], r["psnr"]) for r in read_rows(page.parent / "results.jsonl") if r["method"] == "foca"]
    assert kept == [("mild", 35.0), ("second", 1.0), ("third", 35.0)]
    page = join_sweeps([sunday, tuesday], tmp_path / "last")
    assert [r["label"] for r in read_rows(page.parent / "results.jsonl") if r["method"] == "foca"] == [
        "second",
        "third",
    ]


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
