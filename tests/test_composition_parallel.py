"""Two ranks on one sample: diffusers' context parallelism, and one guidance branch each. See `two_ranks`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import plain
from pipelines import TINY
from torch import nn

import dita
from dita.agreement import Agreement
from dita.caching import TaylorSeer
from dita.errors import DitaError

TESTS = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join(filter(None, (str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, str(TESTS / "two_ranks.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def alike(ranks: list[dict[str, Any]], name: str) -> tuple[torch.Tensor, list[str]]:
    """What both ranks did and got, which must be the same."""
    one, two = (rank[name] for rank in ranks)
    assert one["actions"] == two["actions"] and torch.equal(one["output"], two["output"])
    return one["output"], one["actions"]


def test_context_parallel_gives_what_one_process_gives(ranks: Any) -> None:
    """A gate sees a part of the tokens on each rank: it may decide otherwise than in one process, but alike on both."""
    output, actions = alike(ranks, "interval")
    alone = dita.accelerate_pipeline(TINY["flux"].build(), TaylorSeer(interval=2, warmup=1))
    torch.testing.assert_close(output, TINY["flux"].call(alone, steps=5), rtol=1e-4, atol=1e-4)
    assert actions == [record.action for record in dita.report(alone).last.records]
    for name in ("interval", "gate"):
        assert 0 < alike(ranks, name)[1].count("computed") < 5
        for rank in ranks:
            torch.testing.assert_close(rank[name]["plain"], plain("flux", steps=5), rtol=1e-4, atol=1e-4)
            assert torch.equal(rank[name]["after"], rank[name]["plain"])


def test_ranks_that_disagree_take_the_same_branch(ranks: Any) -> None:
    """Else the rank that computes waits in its first attention for the one that skips, and the run never ends."""
    assert alike(ranks, "contrary")[1] == ["computed"] * 4 + ["reused"]
    assert alike(ranks, "guidance")[1] == ["computed"] * 4 + ["reused"]
    assert ranks[0]["guidance-alone"]["actions"] != ranks[1]["guidance-alone"]["actions"]


def test_deciding_together_needs_process_groups() -> None:
    pipe = TINY["dit"].build()
    with pytest.raises(DitaError, match="not accelerated"):
        dita.share_decisions(pipe)
    dita.accelerate_pipeline(pipe, TaylorSeer())
    with pytest.raises(DitaError, match="init_process_group; it was not called"):
        dita.share_decisions(pipe)
    assert Agreement(None)(False, True) == (False, True) and dita.agreement.group_of(nn.Identity()) is None
