"""On what machine and with which versions a number was measured."""

from __future__ import annotations

import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics", "numpy", "triton")


def device_name(device: str | torch.device) -> str:
    """Name the processor, such as "cpu: Intel(R) Xeon(R) Platinum 8481C, 2 cores"."""
    if torch.device(device).type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"cpu: {_cpu_model()}, {torch.multiprocessing.cpu_count()} cores"


@lru_cache
def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that matter."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@lru_cache
def code_version() -> str:
    """Version of dita, with the commit if it runs from a checkout: "0.1.0+g1a2b3c4", ".dirty" if files differ."""
    from dita import __version__

    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return __version__
    commit = _git(root, "rev-parse", "--short=7", "HEAD")
    if commit is None:
        return __version__
    dirty = ".dirty" if _git(root, "status", "--porcelain") else ""
    return f"{__version__}+g{commit}{dirty}"


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
