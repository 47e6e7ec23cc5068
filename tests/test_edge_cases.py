"""Cases of docs/edge_cases.md that no other file tests, and that every test named there exists."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import TINY

import dita
from dita.caching import TaylorSeer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
TINY_PIPELINES: dict[str, Any] = import_module("tiny_pipelines").TINY_PIPELINES


def test_every_case_names_tests_that_exist() -> None:
    rows = [line for line in (ROOT / "docs" / "edge_cases.md").read_text(encoding="utf-8").splitlines() if "::" in line]
    assert len(rows) >= 45
    for row in rows:
        assert row.count("|") == 5, row
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row.split(" | ")[-1])
        assert named, row
        for file, function in named:
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {function}\(", source, flags=re.MULTILINE), f"{file} has no {function}"


def test_a_run_of_one_step_is_the_plain_one() -> None:
    tiny = TINY["flux-img2img"]
    pipe = tiny.build()
    base = tiny.call(pipe, strength=0.2, steps=5)
    dita.accelerate_pipeline(pipe, TaylorSeer.forced())
    with pytest.warns(dita.DitaWarning, match="0 of 1 steps were reused"):
        assert torch.equal(tiny.call(pipe, strength=0.2, steps=5), base)
    assert dita.report(pipe).last.finished


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
def test_control_reaches_a_cached_run() -> None:
    """A forecast of the trunk holds what the control net added to it; another control image gives another picture."""
    tiny = TINY_PIPELINES["FluxControlNetPipeline"]
    pipe, picture = tiny.build(), import_module("tiny_pipelines.base").picture
    plain = [tiny.call(pipe, control_image=picture(seed=seed)) for seed in (5, 6)]
    dita.accelerate_pipeline(pipe, TaylorSeer(interval=2, warmup=1, granularity="last-block"))
    cached = [tiny.call(pipe, control_image=picture(seed=seed)) for seed in (5, 6)]
    assert dita.report(pipe).last.reused == tiny.steps // 2
    change, kept = plain[1] - plain[0], cached[1] - cached[0]
    assert torch.cosine_similarity(change.flatten(), kept.flatten(), 0) > 0.9
    assert (kept - change).norm() < 0.5 * change.norm()
