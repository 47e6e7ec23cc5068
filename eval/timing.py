"""Wall-clock time measured so that two numbers can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dita.errors import DitaError


@contextmanager
def pinned_threads(threads: int | None) -> Iterator[int]:
    """Fix the number of intra-op CPU threads inside the block and put the old number back afterwards.

    Args:
        threads: how many; None or 0 keeps the present number.

    Yields:
        The number in force.

    Raises:
        DitaError: the number is negative.

    Example:
        >>> with pinned_threads(1) as threads:
        ...     threads
        1
    """
    if threads is not None and threads < 0:
        raise DitaError(f"threads is {threads}; expected a positive number, or 0 to keep torch's own")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def synchronize(device: str | torch.device) -> None:
    """Wait until a GPU has done what it was given; nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Time one call in seconds: between two CUDA events on a GPU, with the process clock otherwise.

    Example:
        >>> timed(lambda: time.sleep(0.01)) >= 0.01
        True
    """
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(device)
        start.record()
        call()
        end.record()
        synchronize(device)
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Timing:
    """Seconds of each kept repeat, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(
    *calls: Callable[[], object], repeats: int = 5, warmup: int = 1, device: str | torch.device = "cpu"
) -> tuple[Timing, ...]:
    """Time calls in turn (first, second, ..., first, second, ...), so that a drift of the machine strikes all alike.

    Args:
        calls: functions without arguments.
        repeats: kept rounds.
        warmup: rounds run before them and dropped.
        device: where they compute.

    Returns:
        One `Timing` per call, each of `repeats` values.

    Raises:
        DitaError: there is no call, or `repeats` is below 1, or `warmup` below 0.

    Example:
        >>> fast, slow = measure(lambda: None, lambda: time.sleep(0.001), repeats=3)
        >>> fast.median < slow.median
        True
    """
    if not calls or repeats < 1 or warmup < 0:
        raise DitaError(f"got {len(calls)} calls, repeats={repeats}, warmup={warmup}; expected >= 1, >= 1, >= 0")
    kept: list[list[float]] = [[] for _ in calls]
    for turn in range(warmup + repeats):
        for times, call in zip(kept, calls, strict=True):
            seconds = timed(call, device)
            if turn >= warmup:
                times.append(seconds)
    return tuple(Timing(tuple(times)) for times in kept)
