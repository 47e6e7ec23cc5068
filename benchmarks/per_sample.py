"""What a batch costs when its samples are decided for together, and when they run one by one (`per_sample=True`).

    python benchmarks/per_sample.py --model fashion-dit --method fbcache --settings '{"threshold": 0.15}' --threads 1

First a gate: with `per_sample=True` every image has to be that of its own run alone, bit for bit. Then, for every size
of the batch and in turn, the same samples plain, with the method deciding for the whole batch, and with it deciding for
each: process time per sample (medians of all rounds but the first), the share of the transformer's calls that was
computed, and the PSNR to the plain run. A batch takes a step from the cache only if all samples allow it, so its share
grows with the batch; one by one it stays, and what the device gains by batching is lost.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from step_ideal import CLOCKS

import dita
from dita import registry
from dita.config import Method
from dita.eval.environment import code_version, device_name, library_versions
from dita.eval.metrics import psnr, summarize_psnr
from dita.eval.pipelines import load_pipeline, pipeline_folder
from dita.eval.sampling import Sampling, check_pipeline, draw
from dita.eval.task import task_of
from dita.eval.timing import pinned_threads

MODES = ("plain", "together", "per sample")


def gate(pipe: Any, sampling: Sampling, config: Method, count: int) -> str:
    """Empty if each of the first samples is the same alone and in a batch, else what differs."""
    if getattr(pipe, "vae", None) is not None:
        pipe.vae.enable_slicing()
    with dita.accelerated(pipe, config, per_sample=True):
        both = draw(pipe, sampling, range(count)).media
        alone = torch.cat([draw(pipe, sampling, range(n, n + 1)).media for n in range(count)])
    unlike = [n for n in range(count) if not torch.equal(both[n], alone[n])]
    return f"samples {unlike} differ from their runs alone" if unlike else ""


def measure(pipe: Any, sampling: Sampling, config: Method, size: int, repeats: int, now: Any) -> dict[str, Any]:
    """Seconds per sample, computed share and PSNR for one size of the batch."""
    batches = [range(start, start + size) for start in range(0, sampling.samples, size)]
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    shares: dict[str, float] = {}
    media: dict[str, torch.Tensor] = {}
    for turn in range(repeats + 1):
        for mode in MODES:
            if mode != "plain":
                dita.accelerate_pipeline(pipe, config, per_sample=mode == "per sample")
            start, parts, computed = now(), [], []
            for indices in batches:
                parts.append(draw(pipe, sampling, indices).media)
                computed += [1.0] if mode == "plain" else [dita.report(pipe).last.computed_fraction]
            if turn:
                seconds[mode].append((now() - start) / sampling.samples)
            media[mode], shares[mode] = torch.cat(parts), statistics.fmean(computed)
            dita.restore_pipeline(pipe)
    plain = statistics.median(seconds["plain"])
    row: dict[str, Any] = {"batch": size, "plain_seconds_per_sample": plain}
    for mode in MODES[1:]:
        key = mode.replace(" ", "_")
        row[f"{key}_speedup"] = plain / statistics.median(seconds[mode])
        row[f"{key}_computed"] = shares[mode]
        row[f"{key}_psnr"] = summarize_psnr(psnr(media[mode], media["plain"])).mean
    return row


def main() -> None:
    """Parse the command line and print one JSON line for the machine and one per size of the batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-dit", help="bundled pipeline by name, or a folder")
    parser.add_argument("--method", default="fbcache", help="registry name")
    parser.add_argument("--settings", type=json.loads, default={}, help="of the method, as JSON")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="process")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pipe: Any = load_pipeline(args.model, device=args.device)
    task = task_of(pipeline_folder(args.model))
    steps = task.steps if args.steps is None else args.steps
    prompts = task.prompts(args.samples)
    sampling = Sampling(args.samples, max(args.batches), steps, task.guidance, 0, prompts, task.call)
    check_pipeline(pipe, sampling)
    config = registry.get(args.method)(**args.settings)
    with pinned_threads(args.threads) as threads:
        machine = {"device": device_name(args.device), "threads": threads, "code": code_version()}
        machine |= {"versions": library_versions(), "model": args.model, "method": args.method}
        print(json.dumps(machine | {"setting": config.label(), "steps": steps, "clock": args.clock}), flush=True)
        wrong = gate(pipe, sampling, config, min(args.samples, 3))
        if wrong:
            raise SystemExit(f"gate failed: {wrong}; not timed")
        for size in args.batches:
            print(json.dumps(measure(pipe, sampling, config, size, args.repeats, CLOCKS[args.clock])), flush=True)


if __name__ == "__main__":
    main()
