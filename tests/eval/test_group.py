"""Two processes measure what one measures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dita.cli import app
from dita.errors import DitaError
from dita.eval.bench import Bench
from dita.eval.group import Group, join_group
from dita.eval.rows import read_rows
from dita.eval.sampling import Sampling

ROOT = Path(__file__).resolve().parents[2]
TIMES = {
    "speedup", "seconds_per_image", "plain_seconds_per_image", "seconds", "plain_seconds", "measured", "processes",
    "notes", "calibration_seconds", "peak_resident_bytes",
}  # fmt: skip


def sweep(folder: Path, out: Path, processes: int) -> list[dict]:
    asked = ["sweep", "--model", str(folder), "--samples", "7", "--batch", "2", "--steps", "4", "--threads", "1"]
    asked += ["-m", "fewer steps,taylorseer", "--quick", "--out", str(out)]
    printed = in_this_process(asked) if processes == 1 else launched(asked, processes)
    assert printed.count("wrote ") == 1
    return read_rows(out / "results.jsonl")


def in_this_process(asked: list[str]) -> str:
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output[-3000:]
    return done.stdout


def launched(asked: list[str], processes: int) -> str:
    # With --cpu it would start one process, or want MPI; what --multi_gpu starts does not need a GPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, "-m", "dita", *asked], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_give_the_numbers_of_one(tiny_folder, tmp_path):
    one, two = (sweep(tiny_folder, tmp_path / str(count), count) for count in (1, 2))
    assert [row["label"] for row in one] == [row["label"] for row in two]
    assert len(one) == 6
    for alone, shared in zip(one, two, strict=True):
        assert "error" not in alone
        assert {name: value for name, value in alone.items() if name not in TIMES} == {
            name: value for name, value in shared.items() if name not in TIMES
        }
        if alone["method"] != "data":
            assert (alone["processes"], shared["processes"]) == (1, 2)
            assert len(shared["seconds"]) > 0


def test_batches_are_dealt_out():
    sampling = Sampling(samples=7, batch=2, steps=4, guidance=1.0, seed=0)
    shares = [Bench(None, sampling, group=Group(rank, 3)).batches for rank in range(3)]
    assert shares == [[range(0, 2), range(6, 7)], [range(2, 4)], [range(4, 6)]]
    with pytest.raises(DitaError, match="4 calls, too few for 5 processes"):
        _ = Bench(None, sampling, group=Group(0, 5)).batches


def test_alone_there_is_nothing_to_join(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_group("cpu") == (Group(), "cpu")
    assert Group().leads
    assert Group().from_lead({"a": 1}) == {"a": 1}
