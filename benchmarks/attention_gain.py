"""What a sparse policy gains over whole runs: on attention, on the transformer and from end to end, and at what PSNR.

    python benchmarks/attention_gain.py --model fashion-wan --method adaspa --settings '{"density": 0.3}' --threads 1

First a gate: a run with the method taken off again must be the plain run bit for bit, and the sparse run must come as
close to it as `--psnr` asks. Then plain and sparse runs of the same seeds in turn. The time of attention is that of the
self-attention modules without the modules inside of them (projections and norms): rotary positions, reordering and the
choice of blocks count as attention. Two ratios are printed for it: over whole runs, in which the first steps and layers
are dense, and over those calls alone that were sparse. A policy that needs it is calibrated first, on another seed and
other prompts unless `--calibration` is 0. Medians of all rounds; with the process clock and one thread, other work on
the machine counts little.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from step_ideal import CLOCKS
from torch import nn

import dita
from dita import registry
from dita.anatomy import describe
from dita.eval.environment import code_version, device_name, library_versions
from dita.eval.metrics import psnr
from dita.eval.pipelines import load_pipeline, pipeline_folder
from dita.eval.sampling import Sampling, draw
from dita.eval.task import task_of
from dita.eval.timing import pinned_threads

Calls = dict[str, list[float]]


@contextmanager
def stopwatch(model: nn.Module, layers: Sequence[nn.Module], now: Callable[[], float]) -> Iterator[Calls]:
    """Time every call of a transformer, and of modules in it without the projections and norms inside of these.

    Yields:
        seconds of each call as they come: "transformer", and "attention", that of all `layers` within the call.
    """
    calls: Calls = {"transformer": [], "attention": []}
    since: dict[nn.Module, float] = {}
    sign = {leaf: -1 for layer in layers for leaf in layer.modules() if not any(leaf.children())}
    sign |= dict.fromkeys(layers, 1)

    def begin(module: nn.Module, *_: Any) -> None:
        if module is model:
            calls["attention"].append(0.0)
        since[module] = now()

    def end(module: nn.Module, *_: Any) -> None:
        taken = now() - since.pop(module)
        if module is model:
            calls["transformer"].append(taken)
        else:
            calls["attention"][-1] += sign[module] * taken

    with ExitStack() as stack:
        for module in (model, *sign):
            stack.callback(module.register_forward_pre_hook(begin, prepend=True).remove)
            stack.callback(module.register_forward_hook(end).remove)
        yield calls


def measure(
    pipe: Any, sampling: Sampling, method: Any, least: float, rounds: int, now: Callable[[], float]
) -> dict[str, Any]:
    """Runs of the pipeline without and with the method in turn, what they take and how close they come.

    Args:
        pipe: the pipeline, plain.
        sampling: what each run draws, in one call.
        method: a sparse policy.
        least: PSNR to the plain run that it must come to, in dB.
        rounds: kept rounds; one before them is dropped.
        now: the clock.

    Raises:
        SystemExit: it does not come so close, or the pipeline does not come back as it was.
    """
    indices = range(sampling.samples)
    layers = [part.module for part in describe(pipe.transformer).modules if part.site.role == "attention"]
    taken: dict[str, list[float]] = {}

    def run(label: str) -> tuple[torch.Tensor, Calls]:
        with stopwatch(pipe.transformer, layers, now) as calls:
            began = now()
            media = draw(pipe, sampling, indices).media
            whole = now() - began
        for name, seconds in (("run", [whole]), *calls.items()):
            taken.setdefault(f"{label} {name}", []).append(sum(seconds))
        return media, calls

    pairs: list[tuple[Calls, Calls]] = []
    for number in range(1 + rounds):
        if number == 1:  # the round before warmed up
            taken.clear()
        plain, dense = run("plain")
        with dita.accelerated(pipe, method):
            sparse, thinned = run("sparse")
            report = dita.report(pipe).last
        pairs.append((dense, thinned))
        near = psnr(sparse, plain).mean().item()
        if near < least:
            raise SystemExit(f"{method.label()} comes to {near:.2f} dB, below {least:g}: no numbers")
    if not draw(pipe, sampling, indices).media.equal(plain):
        raise SystemExit("the pipeline does not come back as it was: no numbers")
    ratio = {
        name: statistics.median(p / s for p, s in zip(taken[f"plain {name}"], taken[f"sparse {name}"], strict=True))
        for name in ("attention", "transformer", "run")
    }
    thin = [number for number, record in enumerate(report.records) if record.density < 1]
    apart = [sum(p["attention"][n] for n in thin) / sum(s["attention"][n] for n in thin) for p, s in pairs[1:]]
    share = [sum(p["attention"]) / sum(p["transformer"]) for p, _ in pairs[1:]]
    return {
        "psnr": round(near, 2),
        "density": round(report.density, 3),
        "calls": len(report.records),
        "sparse_calls": len(thin),
        "attention_share_of_dense_transformer": round(statistics.median(share), 3),
        "speedup_of_attention_in_sparse_calls": round(statistics.median(apart), 2),
        **{f"speedup_of_{name}": round(value, 2) for name, value in ratio.items()},
        "seconds": {name: [round(s, 2) for s in seconds] for name, seconds in taken.items()},
    }


def main() -> None:
    """Parse the arguments, measure, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-wan", help="bundled name or folder of a pipeline with transformer")
    parser.add_argument("--method", default="adaspa")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="0 for the pipeline's own")
    parser.add_argument("--call", type=json.loads, default={}, help="more arguments of the call, JSON")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--psnr", type=float, default=30.0, help="least closeness to the plain run, dB")
    parser.add_argument("--calibration", type=int, default=1, help="seed to calibrate on; 0 for what is measured")
    parser.add_argument("--trajectories", type=int, default=1, help="samples to calibrate on, one after the other")
    parser.add_argument("--clock", choices=CLOCKS, default="process")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    with pinned_threads(asked.threads):
        task = task_of(pipeline_folder(asked.model))
        pipe: Any = load_pipeline(asked.model)
        sampling = Sampling(
            asked.samples, asked.samples, asked.steps or task.steps, task.guidance, 0,
            task.prompts(asked.samples, 0), {**task.call, **asked.call},
        )  # fmt: skip
        method = registry.resolve(asked.method, **asked.settings)
        if method.needs_calibration:
            count = asked.trajectories
            prompts = task.prompts(count, asked.calibration)
            other = dataclasses.replace(sampling, samples=count, seed=asked.calibration, prompts=prompts)
            method = dita.calibrate(
                pipe, method, lambda pipe: [draw(pipe, other, range(n, n + 1)) for n in range(count)]
            )
        found = measure(pipe, sampling, method, asked.psnr, asked.rounds, CLOCKS[asked.clock])
        about = {"model": asked.model, "method": asked.method, "setting": method.label(), "steps": sampling.steps}
        about |= {"clock": asked.clock, "threads": asked.threads, "device": device_name(pipe.device)}
        print(json.dumps({**about, **found, "code": code_version(), "versions": library_versions()}))


if __name__ == "__main__":
    main()
