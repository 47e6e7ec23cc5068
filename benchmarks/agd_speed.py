"""Frames a second of fashion-dit with guidance in two branches and with AGD's adapters in one.

    python benchmarks/agd_speed.py --rounds 5 --threads 1

First a gate: with `begin=1` the frames are the plain ones bit for bit, with the adapters every step ran the conditional
branch alone, and they are nearer to the plain frames than the conditional branch without adapters. Then rounds of the
same batch, one way after the other: plain, the conditional branch alone, AGD. One JSON line for the machine and the
gate, one for the medians: frames a second, and the median over the rounds of the plain seconds by each way's own. The
clock is the processor's time unless `--clock wall`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import dita
from dita.errors import DitaError
from dita.eval.calibrations import FOLDER
from dita.eval.environment import code_version, device_name, library_versions
from dita.eval.metrics import psnr, summarize_psnr
from dita.eval.pipelines import load_pipeline
from dita.eval.sampling import Drawn, Sampling, draw
from dita.eval.timing import pinned_threads
from dita.schedulers.guidance import AGD

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}
WAYS = {
    "plain": None,
    "conditional branch alone": AGD("untrained"),
    "agd": AGD(str(FOLDER / "fashion-dit" / "agd.safetensors")),
}


def drawn(pipe: Any, sampling: Sampling, method: AGD | None) -> tuple[Drawn, Any]:
    """The batch, drawn one way, and the report of its run."""
    if method is None:
        return draw(pipe, sampling, range(sampling.samples)), None
    with dita.accelerated(pipe, method):
        return draw(pipe, sampling, range(sampling.samples)), dita.report(pipe).last


def gate(pipe: Any, sampling: Sampling) -> dict[str, float]:
    """PSNR in dB of each way to the plain frames.

    Raises:
        DitaError: some way does not do what it should; nothing is timed then.
    """
    plain = drawn(pipe, sampling, None)[0].media
    found = {}
    if not drawn(pipe, sampling, AGD(begin=1.0))[0].media.equal(plain):
        raise DitaError("gate failed: agd with begin=1 changes the frames")
    for name, method in WAYS.items():
        if method is not None:
            frames, run = drawn(pipe, sampling, method)
            ran = [record.branch for record in run.records if record.action != "skipped"]
            if ran != ["cond"] * sampling.steps:
                raise DitaError(f"gate failed: {name} ran {len(ran)} branches in {sampling.steps} steps")
            found[name] = summarize_psnr(psnr(frames.media, plain)).mean
    if not found["agd"] > found["conditional branch alone"]:
        raise DitaError(f"gate failed: the adapters bring nothing, {found}")
    return found


def measure(pipe: Any, sampling: Sampling, rounds: int, now: Callable[[], float]) -> dict[str, dict[str, float]]:
    """Medians over rounds of each way after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, method in WAYS.items():
            start = now()
            drawn(pipe, sampling, method)
            seconds[name].append(now() - start)
    return {
        name: {
            "frames_per_second": sampling.samples / statistics.median(own),
            "speedup": statistics.median(plain / mine for plain, mine in zip(seconds["plain"], own, strict=True)),
        }
        for name, own in seconds.items()
    }


def main() -> None:
    """Parse the command line, check the gate and print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="process")
    args = parser.parse_args()
    pipe = load_pipeline("fashion-dit")
    sampling = Sampling(args.batch, args.batch, args.steps, args.guidance, 0)
    with pinned_threads(args.threads) as threads:
        machine = {"device": device_name("cpu"), "threads": threads, "code": code_version(), **vars(args)}
        print(json.dumps({**machine, "versions": library_versions(), "gate": gate(pipe, sampling)}), flush=True)
        print(json.dumps(measure(pipe, sampling, args.rounds, CLOCKS[args.clock])), flush=True)


if __name__ == "__main__":
    main()
