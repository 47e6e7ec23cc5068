"""How much memory a run takes on a CPU, where torch keeps no count of it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc/self")
_RESET_PEAK = "5"  # what proc(5) gives for the high-water mark in clear_refs


@dataclass
class Growth:
    """What `resident_growth` found.

    Attributes:
        bytes: largest resident size inside the block less the one before it, at least 0; None where it cannot be told.
    """

    bytes: int | None = None


@contextmanager
def resident_growth() -> Iterator[Growth]:
    """Measure by how much the resident memory of this process grows at its peak inside a `with` block.

    The kernel's high-water mark is set back first, and the C library gives back what it keeps of freed memory, so that
    one block's peak does not hide the next one's. This is the process, not the tensors: activations, caches, buffers
    of the libraries and whatever other threads do, in whole pages; memory that was resident before and is used again
    does not count, so that it is a lower bound of what the block allocated. Exact to a few hundred KiB.

    Yields:
        A `Growth` whose `bytes` is set when the block ends. It stays None elsewhere than on Linux, or where the process
        may not write to /proc/self/clear_refs.

    Example:
        >>> import torch
        >>> with resident_growth() as growth:
        ...     block = torch.ones(1 << 22)
        >>> growth.bytes is None or growth.bytes >= 1 << 23
        True
    """
    growth = Growth()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        before = _field("VmRSS")
        (_PROC / "clear_refs").write_text(_RESET_PEAK)
    except (OSError, LookupError):
        before = None
    try:
        yield growth
    finally:
        if before is not None:
            growth.bytes = max(0, _field("VmHWM") - before)


def _field(name: str) -> int:
    """A size of this process in bytes.

    Raises:
        OSError: there is no such file.
        LookupError: there is no such line.
    """
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{_PROC / 'status'} has no {name}")
