"""The sweep files under benchmarks/sweeps remake the rows under eval/results: all of them, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dita import registry
from dita.eval.composition import JOINT
from dita.eval.peers import peers
from dita.eval.recipes import expand, read_recipes
from dita.eval.rows import read_rows
from dita.eval.settings import FEWER_STEPS

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "benchmarks" / "sweeps").glob("*.yaml"))
MEASURED_FILES = [path for path in FILES if (ROOT / "eval" / "results" / path.stem).is_dir()]
MEASURED = ("table", "ratios", "weights")  # found on the pipeline, not chosen
KINDS: dict[str, Any] = {peer.name: peer for peer in peers()}


def identity(method: str, steps: int, settings: Mapping[str, Any] | None) -> str:
    """A setting as today's code knows it, in one line: what came to a method later than its row has its default."""
    names = [name for name in ([method] if method in KINDS else method.split(JOINT)) if name != FEWER_STEPS]
    parts = []
    for name in names if settings else ():
        assert settings
        own = settings[name] if len(names) > 1 else settings
        chosen = {key: value for key, value in own.items() if key not in MEASURED}
        if name in KINDS:
            known = KINDS[name](**chosen).settings
        else:
            known = registry.get(name).decode(chosen)
            known = registry.get(name)(**known).to_dict()["settings"]
        parts.append({key: value for key, value in known.items() if key not in MEASURED})
    return json.dumps([method, steps, parts], sort_keys=True)


@pytest.mark.parametrize("path", MEASURED_FILES, ids=lambda path: path.stem)
def test_a_sweep_file_remakes_its_rows(path: Path) -> None:
    recipes = read_recipes(path)
    rows = [
        row for row in read_rows(ROOT / "eval" / "results" / path.stem / "results.jsonl") if row["method"] != "data"
    ]
    plain = rows[0]
    assert plain["task"] == Path(recipes["model"]).name and plain["method"] == "plain"
    for key in ("samples", "batch", "guidance"):
        assert {row[key] for row in rows} == {recipes.get(key, plain[key])}, key
    assert plain["plain_steps"] == recipes.get("steps", plain["plain_steps"])
    assert recipes.get("call", {}).items() <= plain["call"].items()
    listed = {
        identity(setting.method, setting.steps, setting.config and setting.config.to_dict()["settings"])
        for setting in expand(recipes["settings"], plain["plain_steps"])
    }
    measured = {identity(row["method"], row["steps"], (row["config"] or {}).get("settings")) for row in rows}
    assert not measured - listed, "rows that the file does not remake:\n" + "\n".join(measured - listed)
    assert not listed - measured, "settings without a row:\n" + "\n".join(sorted(listed - measured))


def test_every_committed_sweep_has_its_file() -> None:
    assert {path.parent.name for path in (ROOT / "eval" / "results").glob("*/results.jsonl")} <= {
        path.stem for path in FILES
    }
