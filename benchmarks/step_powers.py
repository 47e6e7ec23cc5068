"""The power of a jump's error by which `optimal-steps` chooses: PSNR to the plain run, for several powers.

    python benchmarks/step_powers.py --model fashion-dit --out runs/step-powers

Every power chooses from the same calibration images, which are not among those that are measured, and this is repeated
with other ones: `--sets`. Beside it stand even steps, those of the plain sampler. A last column holds the mean
difference to `--against` over samples and sets, with its 95 % interval by bootstrap over samples.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import dita
from dita.eval.environment import code_version, device_name, library_versions
from dita.eval.metrics import bootstrap_interval, psnr
from dita.eval.pipelines import load_pipeline, pipeline_folder
from dita.eval.sampling import Sampling, draw
from dita.eval.task import task_of
from dita.eval.timing import pinned_threads
from dita.schedulers.timesteps import OptimalSteps

Row = dict[str, Any]


def drawn(pipe: Any, sampling: Sampling, steps: int | None = None) -> torch.Tensor:
    """Every sample of a sampling, in calls of its batch."""
    return torch.cat([draw(pipe, sampling, indices, steps).media for indices in sampling.batches()])


def measure(pipe: Any, sampling: Sampling, calibration: Sampling, args: argparse.Namespace) -> list[Row]:
    """PSNR [sets * samples] of each power at each number of steps, and of even steps."""
    plain = drawn(pipe, sampling)
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    for steps in args.steps:
        found["even", steps] = [psnr(drawn(pipe, sampling, steps), plain)]
    for number in range(args.sets):
        other = replace(calibration, seed=sampling.seed + 1 + number)
        for power in args.powers:
            method = dita.calibrate(
                pipe, OptimalSteps(power=power), lambda p, other=other: draw(p, other, range(other.samples))
            )
            for steps in args.steps:
                with dita.accelerated(pipe, method.replace(steps=steps)):
                    values = psnr(drawn(pipe, sampling), plain)
                found.setdefault((f"{power:g}", steps), []).append(values)
                print(f"set {number}, power {power:g}, {steps} steps: {values.mean():.2f} dB", flush=True)
    rows = []
    for (name, steps), sets in found.items():
        values = torch.stack(sets).mean(0)  # of each sample, over calibrations
        row: Row = {
            "power": name,
            "steps": steps,
            "psnr": values.mean().item(),
            "sets": [s.mean().item() for s in sets],
        }
        if name not in ("even", f"{args.against:g}"):
            less = values - torch.stack(found[f"{args.against:g}", steps]).mean(0)
            interval = bootstrap_interval(less)
            row["difference"] = [less.mean().item(), interval.low, interval.high]
        rows.append(row)
    return rows


def markdown(report: Row) -> str:
    """The table of one model."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    asked = report["asked"]
    lines = [
        f"# Powers of optimal-steps: {asked['model']}, {asked['plain_steps']} steps",
        "",
        f"{report['device']}, {report['threads']} threads, dita {report['code']}, {versions}; {asked['samples']} "
        f"samples, {asked['sets']} calibrations of {asked['calibration']} images each.",
        "",
        f"| steps | power | PSNR dB | by calibration | less power {asked['against']:g} |",
        "|---:|---|---:|---:|---:|",
    ]
    for row in sorted(report["rows"], key=lambda row: row["steps"]):
        by_set = ", ".join(f"{value:.2f}" for value in row["sets"])
        less = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*row["difference"]) if "difference" in row else ""
        lines.append(f"| {row['steps']} | {row['power']} | {row['psnr']:.2f} | {by_set} | {less} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Parse the command line, measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-dit")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 10, 15])
    parser.add_argument("--powers", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    parser.add_argument("--against", type=float, default=1.5, help="the power that the others are compared with")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=4, help="images of a calibration")
    parser.add_argument("--sets", type=int, default=2, help="calibrations")
    parser.add_argument("--call", type=json.loads, default={}, help="further arguments of the pipeline's call, as JSON")
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder for MODEL.md and MODEL.json")
    args = parser.parse_args()
    if args.against not in args.powers:
        parser.error(f"--against {args.against:g} is not among --powers")
    task, pipe = task_of(pipeline_folder(args.model)), load_pipeline(args.model)
    guidance = task.guidance if args.guidance is None else args.guidance
    prompts = task.prompts(args.samples + args.calibration, seed=0)
    call = {**task.call, **args.call}
    sampling = Sampling(args.samples, args.batch, task.steps, guidance, 0, prompts[: args.samples], call)
    calibration = replace(sampling, samples=args.calibration, batch=args.calibration, prompts=prompts[args.samples :])
    with pinned_threads(args.threads) as threads:
        asked = {"model": args.model, "plain_steps": task.steps, "guidance": guidance, "call": call}
        asked |= {name: getattr(args, name) for name in ("samples", "calibration", "sets", "against")}
        machine = {"device": device_name("cpu"), "threads": threads, "code": code_version()}
        rows = measure(pipe, sampling, calibration, args)
        report = {**machine, "versions": library_versions(), "asked": asked, "rows": rows}
    print(markdown(report))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        name = Path(args.model).name
        (args.out / f"{name}.md").write_text(markdown(report))
        (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
