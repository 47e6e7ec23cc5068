"""What a skipped transformer step costs, as a share of a full one.

    python benchmarks/step_cost.py --model fashion-dit --batch 16 --repeats 5 --threads 1

For every method: first a gate, that the disabled setting gives the plain run's images bit for bit; then, in one
process, plain runs and runs of the method's forced setting in turn, with a clock around each call of the transformer.
Medians over all calls; the first round is dropped. One JSON line per method.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import dita
from dita import registry
from dita.eval.environment import code_version, device_name, library_versions
from dita.eval.pipelines import load_pipeline, pipeline_folder
from dita.eval.sampling import Sampling, check_pipeline, draw
from dita.eval.task import task_of
from dita.eval.timing import pinned_threads, synchronize
from dita.patch import CallPatch


@contextmanager
def clock(
    transformer: torch.nn.Module, device: torch.device, now: Callable[[], float] = time.perf_counter
) -> Iterator[list[float]]:
    """Collect the seconds of each call of `transformer`, everything hooked to it included."""
    seconds: list[float] = []

    def timed(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        synchronize(device)
        started = now()
        result = original(*args, **kwargs)
        synchronize(device)
        seconds.append(now() - started)
        return result

    patch = CallPatch(transformer, timed)  # forward hooks would be within what dita has put around the call
    patch.apply()
    try:
        yield seconds
    finally:
        patch.remove()


def timed_run(pipe: Any, sampling: Sampling, config: Any) -> tuple[list[float], list[float]]:
    """Run once; seconds of the computed calls, and of the skipped ones."""
    indices = range(sampling.samples)
    if config is None:
        with clock(pipe.transformer, pipe.device) as seconds:
            draw(pipe, sampling, indices)
        return seconds, []
    with dita.accelerated(pipe, config), clock(pipe.transformer, pipe.device) as seconds:
        draw(pipe, sampling, indices)
        records = dita.report(pipe).last.records
    split: tuple[list[float], list[float]] = ([], [])
    for record, value in zip(records, seconds, strict=True):
        split[record.action != "computed"].append(value)
    return split


def bench(pipe: Any, name: str, sampling: Sampling, repeats: int) -> dict[str, Any]:
    """Gate and time one method; milliseconds."""
    cls = registry.get(name)
    indices = range(sampling.samples)
    plain = draw(pipe, sampling, indices).media
    with dita.accelerated(pipe, cls.disabled()):
        disabled = draw(pipe, sampling, indices).media
    if not torch.equal(plain, disabled):
        return {"method": name, "error": "gate failed: the disabled setting differs from the plain run; not timed"}
    config = cls.forced()
    if config.needs_calibration:
        config = config.calibrated(pipe, lambda p: draw(p, sampling, range(1)))
    full: list[float] = []
    computed: list[float] = []
    skipped: list[float] = []
    for turn in range(repeats + 1):
        plain_calls, _ = timed_run(pipe, sampling, None)
        computed_calls, skipped_calls = timed_run(pipe, sampling, config)
        if turn:
            full, computed, skipped = full + plain_calls, computed + computed_calls, skipped + skipped_calls
    row: dict[str, Any] = {"method": name, "setting": config.label(), "gate": "disabled is bit-identical"}
    whole = statistics.median(full)
    row["plain_step_ms"] = 1000 * whole
    for kind, seconds in (("computed", computed), ("skipped", skipped)):
        middle = statistics.median(seconds) if seconds else None
        row[f"{kind}_step_ms"] = None if middle is None else 1000 * middle
        row[f"{kind}_over_plain"] = None if middle is None else middle / whole
    row["calls"] = {"plain": len(full), "computed": len(computed), "skipped": len(skipped)}
    return row


def main() -> None:
    """Parse the command line and print one JSON line for the machine and one per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-dit", help="bundled pipeline by name, or a folder")
    parser.add_argument("--methods", nargs="*", default=None, help="registry names; all if left out")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pipe: Any = load_pipeline(args.model, device=args.device)
    task = task_of(pipeline_folder(args.model))
    guidance = task.guidance if args.guidance is None else args.guidance
    sampling = Sampling(args.batch, args.batch, args.steps, guidance, 0, task.prompts(args.batch), task.call)
    check_pipeline(pipe, sampling)
    with pinned_threads(args.threads) as threads:
        machine = {"device": device_name(args.device), "threads": threads, "code": code_version()}
        machine |= {"versions": library_versions(), **{k: getattr(args, k) for k in ("batch", "steps", "repeats")}}
        print(json.dumps(machine), flush=True)
        for name in args.methods or registry.names():
            print(json.dumps(bench(pipe, name, sampling, args.repeats)), flush=True)


if __name__ == "__main__":
    main()
