"""Pyramid attention broadcast on a model whose attention over space and over time are modules apart."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import dita
from dita.anatomy import describe
from dita.caching import PAB

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
TINY_PIPELINES: dict[str, Any] = import_module("tiny_pipelines").TINY_PIPELINES


def test_lattes_three_kinds_of_attention_have_intervals_of_their_own() -> None:
    tiny = TINY_PIPELINES["LattePipeline"]
    pipe = tiny.build()
    seen: dict[str, list[str]] = {"attention": [], "temporal": [], "cross-attention": []}
    ran: list[str] = []
    for part in describe(pipe.transformer).attentions():
        kind = "temporal" if part.site.name.startswith("temporal_") else part.site.role
        seen[kind].append(part.site.name)
        assert part.site.temporal is (kind == "temporal")
        part.module.to_q.register_forward_hook(lambda *_, kind=kind: ran.append(kind))  # pyright: ignore
    assert {kind: len(names) for kind, names in seen.items()} == {"attention": 2, "temporal": 2, "cross-attention": 2}
    dita.accelerate_pipeline(pipe, PAB(self_interval=2, temporal_interval=3, cross_interval=6, low=-1, high=1001))
    tiny.call(pipe, steps=9)
    counts = {kind: ran.count(kind) for kind in seen}
    assert counts == {"attention": 2 * 5, "temporal": 2 * 3, "cross-attention": 2 * 2}
