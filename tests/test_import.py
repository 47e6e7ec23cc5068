"""Importing dita is cheap and has no side effects, and its public names are pinned."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import dita

ROOT = Path(__file__).resolve().parents[1]

PUBLIC = {
    "DitaError",
    "DitaWarning",
    "Method",
    "Report",
    "RunReport",
    "StepRecord",
    "SupportReport",
    "accelerate_model",
    "accelerate_pipeline",
    "accelerated",
    "calibrate",
    "cite",
    "load_method",
    "methods",
    "report",
    "restore_pipeline",
    "share_decisions",
    "supports",
}

_WATCH = """
import socket, sys

def refuse(*args, **kwargs):
    raise RuntimeError(f"a connection was opened: {args!r}")

socket.socket.connect = refuse
socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
socket.create_connection = refuse
"""

_NOTHING_STARTED = """
torch = sys.modules.get("torch")
assert torch is None or not torch.cuda.is_initialized(), "CUDA was initialised"
compiler = sorted(name for name in sys.modules if name.startswith("triton.compiler.c"))
assert not compiler, f"Triton's compiler was imported: {compiler}"
"""


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def seconds_to_run(program: str) -> float:
    start = time.perf_counter()
    python(program)
    return time.perf_counter() - start


def test_public_names_are_pinned() -> None:
    assert set(dita.__all__) == PUBLIC
    assert len(dita.__all__) == len(PUBLIC)


def test_public_names_stay_what_they_are_after_everything_is_imported() -> None:
    program = """
import dita, importlib, pathlib, types
for file in sorted(pathlib.Path("dita").glob("*.py")):
    if file.stem not in ("__init__", "__main__"):
        importlib.import_module(f"dita.{file.stem}")
hidden = [name for name in dita.__all__ if isinstance(getattr(dita, name), types.ModuleType)]
assert not hidden, f"hidden by a module of the same name: {hidden}"
assert all(name in dir(dita) for name in dita.__all__)
"""
    python(program)


def test_parts_of_the_harness_load_what_they_need() -> None:
    program = """
import sys, dita.eval.peers
assert not {"diffusers", "cache_dit"} & set(sys.modules), "peers load what they name when they run"
import dita.eval.metrics
assert "transformers" not in sys.modules, "only the CLIP score needs it"
"""
    python(program)


def test_import_starts_nothing() -> None:
    python(f"{_WATCH}\nimport dita\n{_NOTHING_STARTED}")


def test_using_the_api_opens_no_connection_and_compiles_nothing() -> None:
    python(f"{_WATCH}\nimport dita\nfor name in dita.__all__: getattr(dita, name)\ndita.methods()\n{_NOTHING_STARTED}")


def test_import_takes_less_than_twice_the_time_of_diffusers() -> None:
    # A busy machine can only lengthen a run, so the shortest of several is the fairest estimate of each.
    pairs = [(seconds_to_run("import diffusers"), seconds_to_run("import dita")) for _ in range(2)]
    theirs, ours = (min(column) for column in zip(*pairs, strict=True))
    assert ours < 2 * theirs


def test_a_misspelt_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="acelerate_pipeline"):
        getattr(dita, "acelerate_pipeline")  # noqa: B009
