"""What a table calls a setting is enough to set it again."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from dita import registry
from dita.eval.labels import setting_of, words
from dita.eval.peers import get_peer, peers
from dita.eval.recipes import expand
from dita.eval.rows import read_rows
from dita.eval.settings import plan

RESULTS = Path(__file__).resolve().parents[2] / "eval" / "results"


def rebuilt(method: str, label: str) -> dict[str, Any]:
    """The settings that a reader gets who sets what the label names."""
    kind = registry.get(method) if method in registry.names() else get_peer(method)
    given = {}
    for part in [] if label == "default" else label.split(" "):
        name, value = part.split("=", 1)
        try:
            given[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given[name] = value
    return json.loads(json.dumps(kind(**given).to_dict()["settings"]))


def test_labels_of_committed_rows_rebuild_their_configs() -> None:
    checked = 0
    for file in sorted(RESULTS.glob("*/results.jsonl")):
        for row in read_rows(file):
            config = row.get("config")
            if config and " + " not in row["method"]:
                want = {name: value for name, value in config["settings"].items() if name != "table"}
                got = rebuilt(row["method"], setting_of(row))
                assert {name: got[name] for name in want} == want, (file.parent.name, row["method"], row["label"])
                checked += 1
    assert checked > 500


def test_a_label_names_what_differs_and_what_it_named_before() -> None:
    settings = {"interval": 6, "order": 1, "warmup": 5, "keep_on": "host"}
    row = {"method": "taylorseer", "label": "interval=6", "config": {"method": "taylorseer", "settings": settings}}
    assert setting_of(row) == "interval=6 warmup=5 keep_on=host"
    assert words(registry.get("taylorseer"), {"interval": 6}) == "default"
    assert words(registry.get("taylorseer"), {"gone": 2.0}) == "gone=2"
    assert setting_of({**row, "config": {"method": "no such method", "settings": {}}}) == "interval=6"
    assert setting_of({"method": "fewer steps", "label": "5 steps"}) == "5 steps"


def test_labels_of_compositions_and_shorter_runs() -> None:
    parts = {"sada": {"interval": 5}, "taylorseer": {"interval": 3, "warmup": 5}}
    config = {"method": "sada + taylorseer", "settings": parts}
    label = "sada interval=5, taylorseer " + "interval=3 warmup=5"
    assert setting_of({"method": "sada + taylorseer", "label": "old", "config": config}) == label
    short = {"method": "fewer steps + sada + taylorseer", "label": "9 steps, old", "config": config}
    assert setting_of(short) == f"9 steps, {label}"


def test_two_entries_of_a_sweep_that_vary_in_the_same_name_are_both_measured() -> None:
    settings = expand(
        [{"taylorseer": {"interval": [3, 4]}}, {"taylorseer": {"interval": [3, 4], "order": 2}}, "taylorseer"], 28
    )
    labels = [setting.label for setting in settings[1:]]
    assert len(set(labels)) == len(labels) and {"interval=3", "interval=3 order=2"} <= set(labels)


def test_ladders_have_labels_of_their_own() -> None:
    for name in [*registry.names(), *(peer.name for peer in peers())]:
        labels = [setting.label for setting in plan(50, [name])[1:]]
        assert len(set(labels)) == len(labels)
        assert not any(re.search(r"\btable=", label) for label in labels)
