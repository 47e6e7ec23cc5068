"""The fitted forecast taken apart: what tracking, the search, anchors and calibration runs are each worth.

    python benchmarks/fitted.py --model fashion-dit --threads 1 --out runs/fitted-dit

PSNR to the plain run of the same seeds, on samples (and captions) that no calibration saw, with a 95 % bootstrap
interval. First a gate: with every step computed the output is the plain run's, bit for bit. Then, chosen by `--parts`:

budgets       for each number of computed steps: fitted; its weights on the best of several even schedules; weights of
              the least error of each output ("local") on its schedule and on an even one; Taylor of order 1 and 2 on
              the even one; all of these on the model's output; the plain sampler with as many steps
anchors       1 to 6 anchors
warm-up       1 to 5 first steps computed in any case
trajectories  1 to `--most` calibration runs
other runs    other numbers of steps and guidance scales than those of the calibration
another size  the fit, and one made there, at the size that `--size` gives
granularity   the same weights on the trunk, its halves and all modules, in place of the model's output
weights       a weight for each channel or guidance branch, drawn towards the shared one by shares of 0, 0.5 and 1
rounds        moments of accelerated runs in place of full ones, made anew once or twice
caution       1 to 4 times the measured unrest, in place of 3
seen          the samples of the calibration itself, beside others
solvers       calibrated with the pipeline's own solver, run with others, and calibrated with those
guidance      beside a guidance method, calibrated with it and without
gate          limits of the gate, on samples that run one by one and on whole batches

The table of one part is written as results.json and results.md under `--out`. Times are not measured here: what a
computed and a skipped step take is in the calibration, see `dita sweep` for speedups.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fitted_variants import OnPolicy, Variant, branch_weights, channel_weights, outputs_of, shared_weights, shrunk

import dita
from dita.caching.anchors import as_mask, spread
from dita.caching.fitted import Fitted
from dita.caching.fitted_plan import schedule_for
from dita.caching.fitted_table import FittedTable
from dita.caching.fitting import CAUTION, expected_error
from dita.eval import load_pipeline
from dita.eval.environment import code_version, device_name, library_versions
from dita.eval.metrics import bootstrap_interval, psnr
from dita.eval.pipelines import pipeline_folder
from dita.eval.sampling import Sampling, draw
from dita.eval.task import task_of
from dita.table import frozen
from dita.watching import watched

CALIBRATION_SEED = 7
Row = dict[str, Any]
PARTS = ("budgets", "anchors", "warm-up", "trajectories", "other runs", "another size", "granularity")
PARTS += ("weights", "gate", "rounds", "caution", "seen", "solvers", "guidance")


class Lab:
    """One pipeline, the samples that are compared, and its calibrations."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.pipe: Any = load_pipeline(arguments.model)
        self.pipe.set_progress_bar_config(disable=True)
        self.task = task_of(pipeline_folder(arguments.model))
        self.call = {**self.task.call, **json.loads(arguments.call)}
        self.steps = arguments.steps or self.task.steps
        self.samples, self.batch, self.runs = arguments.samples, arguments.batch, arguments.calibration
        self._plain: dict[Any, torch.Tensor] = {}
        self.seed = 777
        self.seconds = 0.0
        self.fitted = self.calibrate(self.runs)

    def sampling(self, samples: int, seed: int, guidance: float | None = None) -> Sampling:
        guided = self.task.guidance if guidance is None else guidance
        return Sampling(samples, self.batch, self.steps, guided, seed, self.task.prompts(samples, seed), self.call)

    def calls(self, runs: int) -> list[Callable[[Any], Any]]:
        known = self.sampling(runs, CALIBRATION_SEED)
        return [lambda pipe, part=part: draw(pipe, known, part).media for part in known.batches()]

    def calibrate(self, runs: int, beside: tuple[str, ...] = ()) -> Fitted:
        began = time.perf_counter()
        fitted = dita.calibrate(self.pipe, calls=self.calls(runs), beside=beside)
        self.seconds = time.perf_counter() - began
        assert isinstance(fitted, Fitted)
        return fitted

    def drawn(self, steps: int, guidance: float | None = None) -> torch.Tensor:
        sampling = self.sampling(self.samples, self.seed, guidance)
        return torch.cat([draw(self.pipe, sampling, part, steps).media for part in sampling.batches()])

    def plain(self, steps: int, guidance: float | None = None) -> torch.Tensor:
        key = (steps, guidance, type(self.pipe.scheduler).__name__, json.dumps(self.call))
        if key not in self._plain:
            self._plain[key] = self.drawn(steps, guidance)
        return self._plain[key]

    def measure(
        self,
        method: Any,
        steps: int = 0,
        guidance: float | None = None,
        against: int = 0,
        beside: tuple[str, ...] = (),
        wanted: torch.Tensor | None = None,
        **options: Any,
    ) -> Row:
        steps = steps or self.steps
        wanted = self.plain(against or steps, guidance) if wanted is None else wanted
        if method is None:
            return {"computed": steps, **closeness(self.drawn(steps, guidance), wanted)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dita.DitaWarning)
            with dita.accelerated(self.pipe, method, *beside, **options):
                found = self.drawn(steps, guidance)
                shares = [run.computed_fraction for run in dita.report(self.pipe).runs]
        return {"computed": round(steps * float(np.mean(shares)), 2), **closeness(found, wanted)}


def closeness(found: torch.Tensor, wanted: torch.Tensor) -> Row:
    """Mean PSNR in dB over samples, of which identical ones count as 120, and its 95 % bootstrap interval."""
    each = psnr(found, wanted).clamp(max=120)
    mean, low, high, _ = bootstrap_interval(each)
    return {"psnr": mean, "low": low, "high": high, "worst": each.min().item()}


def even_schedules(steps: int, full: int) -> Iterator[tuple[int, ...]]:
    """An even interval after a warm-up of 1, 2, 3 or 5 steps."""
    for warmup in (1, 2, 3, 5):
        if warmup < full:
            rest = spread(steps - warmup + 1, full - warmup + 1)
            yield (*range(warmup - 1), *(warmup - 1 + step for step in rest))


def budgets(lab: Lab, counts: list[int]) -> Iterator[Row]:
    fitted, table = lab.fitted, lab.fitted.table
    assert table is not None
    for full in counts:
        yield {"variant": "fitted", "full": full, **lab.measure(replace(fitted, full=full))}
        chosen = tuple(sorted(lab_schedule(lab, full)))
        even = sorted(set(even_schedules(lab.steps, full)))
        rows = [lab.measure(variant(fitted, schedule)) for schedule in even]
        best = max(rows, key=lambda row: row["psnr"])
        yield {"variant": "tracking weights, best even schedule", "full": full, **best}
        row = lab.measure(variant(fitted, chosen, "local"))
        yield {"variant": "local weights, fitted schedule", "full": full, **row}
        masks = np.stack([as_mask(schedule, lab.steps) for schedule in even])
        likely = even[int(expected_error(table.moments, masks, fitted.anchors).argmin())]
        for kind in ("local", "taylor 1", "taylor 2"):
            label = f"{kind}, even schedule"
            yield {"variant": label, "full": full, **lab.measure(variant(fitted, likely, kind))}
        yield {"variant": "plain sampler", "full": full, **lab.measure(None, full, against=lab.steps)}


def lab_schedule(lab: Lab, full: int) -> frozenset[int]:
    """The schedule that the fit chooses."""
    assert lab.fitted.table is not None
    return frozenset(schedule_for(lab.fitted.table.moments, full, lab.fitted.anchors, lab.fitted.warmup))


def variant(fitted: Fitted, schedule: tuple[int, ...], kind: str = "tracking", what: str = "model") -> Variant:
    """A setting with a schedule and weights of its own."""
    return Variant(anchors=fitted.anchors, table=fitted.table, schedule=schedule, kind=kind, what=what)


def anchors(lab: Lab, counts: list[int]) -> Iterator[Row]:
    for full in counts:
        for most in range(1, 7):
            row = lab.measure(replace(lab.fitted, full=full, anchors=most))
            yield {"variant": f"{most} anchors", "full": full, **row}


def warmups(lab: Lab, counts: list[int]) -> Iterator[Row]:
    for full in counts:
        for warmup in (1, 2, 3, 4, 5):
            row = lab.measure(replace(lab.fitted, full=full, warmup=warmup))
            yield {"variant": f"warm-up {warmup}", "full": full, **row}


def trajectories(lab: Lab, counts: list[int], most: int) -> Iterator[Row]:
    runs = 1
    while runs <= most:
        fitted = lab.calibrate(runs)
        for full in counts:
            row = lab.measure(replace(fitted, full=full))
            yield {"variant": f"{runs} trajectories", "full": full, "calibration seconds": lab.seconds, **row}
        runs *= 2


def other_runs(lab: Lab, counts: list[int]) -> Iterator[Row]:
    for share in (0.5, 0.6, 0.8, 1.0, 1.5):
        steps = round(lab.steps * share)
        for full in [count for count in counts if count < steps]:
            row = lab.measure(replace(lab.fitted, full=full), steps)
            yield {"variant": f"{steps} steps, calibrated at {lab.steps}", "full": full, **row}
    for scale in (1.0, 0.5, 1.5, 2.0):
        guidance = lab.task.guidance * scale
        for full in counts:
            row = lab.measure(replace(lab.fitted, full=full), 0, guidance)
            yield {"variant": f"guidance {guidance:g}, calibrated at {lab.task.guidance:g}", "full": full, **row}


def another_size(lab: Lab, counts: list[int], size: Row) -> Iterator[Row]:
    own, call = lab.fitted, lab.call
    lab.call = {**call, **size}
    there, said = lab.calibrate(lab.runs), " x ".join(map(str, size.values()))
    for full in counts:
        for label, fitted in (("calibrated at the first size", own), ("calibrated there", there)):
            yield {"variant": f"{said}, {label}", "full": full, **lab.measure(replace(fitted, full=full))}
        yield {"variant": f"{said}, plain sampler", "full": full, **lab.measure(None, full, against=lab.steps)}
    lab.call = call


PLACES = {
    "output of the model": ("model", "output"),
    "output of the trunk": ("trunk", "output"),
    "residual of the trunk": ("trunk", "residual"),
    "residuals of the trunk's halves": ("halves", "residual"),
    "outputs of attention and MLP modules": ("module", "output"),
}


def granularity(lab: Lab, counts: list[int]) -> Iterator[Row]:
    for full in counts:
        chosen = tuple(sorted(lab_schedule(lab, full)))
        for label, (what, kept) in PLACES.items():
            row = lab.measure(replace(variant(lab.fitted, chosen, what=what), kept=kept))
            yield {"variant": label, "full": full, **row}


def weights(lab: Lab, counts: list[int]) -> Iterator[Row]:
    assert lab.fitted.table is not None
    moments, most = lab.fitted.table.moments, lab.fitted.anchors
    calls = lab.calls(lab.runs)
    outputs = {what: outputs_of(lab.pipe, calls, what) for what in ("model", "trunk")}
    guided = len(outputs["model"][0][0]) == 2 * lab.runs
    for full in counts:
        chosen = tuple(sorted(lab_schedule(lab, full)))
        shared, fits = shared_weights(moments, chosen, most), {}
        if guided:
            own = branch_weights(*outputs["model"], lab.task.guidance, moments, chosen, most)
            fits["branch of the model's output"] = ("model", own)
        for what in ("trunk",) if guided else ("model", "trunk"):
            for kind in ("tracking", "local"):
                own = channel_weights(*outputs[what], moments, chosen, most, kind)
                fits[f"channel of the {what}'s output, {kind}"] = (what, own)
        for label, (what, own) in fits.items():
            for share in (0.0, 0.5, 1.0):
                method = replace(
                    variant(lab.fitted, chosen, what=what),
                    weights=shrunk(own, shared, share),
                    branches=label.startswith("branch"),
                )
                yield {"variant": f"each {label}; shared by {share:g}", "full": full, **lab.measure(method)}


def rounds(lab: Lab, counts: list[int]) -> Iterator[Row]:
    for full in counts:
        fitted = replace(lab.fitted, full=full)
        for number in range(3):
            yield {"variant": f"{number} rounds on accelerated runs", "full": full, **lab.measure(fitted)}
            assert fitted.table is not None
            moments = fitted.table.moments
            chosen = schedule_for(moments, full, fitted.anchors, fitted.warmup)
            watcher = OnPolicy(chosen, shared_weights(moments, chosen, fitted.anchors))
            with watched(lab.pipe, watcher):
                for call in lab.calls(lab.runs):
                    call(lab.pipe)
            runs = torch.cat(watcher.runs, 1)
            gram = (runs @ runs.T / runs.shape[1]).tolist()
            fitted = replace(fitted, table=with_values(fitted.table, gram=gram))


def caution(lab: Lab, counts: list[int]) -> Iterator[Row]:
    table = lab.fitted.table
    assert table is not None
    for full in counts:
        for times in (1.0, 2.0, 3.0, 4.0):
            unrest = [times / CAUTION * k for k in table.values["unrest"]]
            fitted = replace(lab.fitted, full=full, table=with_values(table, unrest=unrest))
            yield {"variant": f"{times:g} times the unrest", "full": full, **lab.measure(fitted)}


def with_values(table: FittedTable, **changes: Any) -> FittedTable:
    """A table with some of its numbers exchanged."""
    return FittedTable(frozen({**table.values, **changes}), table.model, table.scheduler, table.shape, table.steps)


def seen(lab: Lab, counts: list[int]) -> Iterator[Row]:
    fitted, plain, seed = lab.calibrate(lab.samples), lab._plain, lab.seed
    for lab.seed, label in ((seed, "unseen samples"), (CALIBRATION_SEED, "the samples of the calibration")):
        lab._plain = {}
        for full in counts:
            row = lab.measure(replace(fitted, full=full))
            yield {"variant": f"{label}, calibrated on {lab.samples}", "full": full, **row}
    lab.seed, lab._plain = seed, plain


def solvers(lab: Lab, counts: list[int]) -> Iterator[Row]:
    import diffusers

    own, first = lab.fitted, lab.pipe.scheduler
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        lab.pipe.scheduler = getattr(diffusers, name).from_config(first.config)
        there = lab.calibrate(lab.runs)
        for full in counts:
            for label, fitted in ((type(first).__name__, own), ("it", there)):
                row = lab.measure(replace(fitted, full=full))
                yield {"variant": f"{name}, calibrated with {label}", "full": full, **row}
            yield {"variant": f"{name}, plain sampler", "full": full, **lab.measure(None, full, against=lab.steps)}
    lab.pipe.scheduler = first


def guidance(lab: Lab, counts: list[int]) -> Iterator[Row]:
    beside = ("guidance-interval",)
    there = lab.calibrate(lab.runs, beside)
    with dita.accelerated(lab.pipe, *beside):
        wanted = lab.drawn(lab.steps)
    for full in counts:
        for label, fitted in (("without it", lab.fitted), ("with it", there)):
            row = lab.measure(replace(fitted, full=full), beside=beside, wanted=wanted)
            yield {"variant": f"beside {beside[0]}, calibrated {label}", "full": full, **row}


def gate(lab: Lab, counts: list[int]) -> Iterator[Row]:
    for full in counts:
        for limit in (0.0, 0.7, 1.0, 1.4, 2.0):
            for alone in (True, False) if limit else (False,):
                method = replace(lab.fitted, full=full, gate=limit)
                label = f"gate {limit:g}, {'each sample by itself' if alone else 'whole batches'}" if limit else "none"
                yield {"variant": label, "full": full, **lab.measure(method, per_sample=alone)}


def written(rows: list[Row]) -> str:
    """Rows as a table: variants down and computed steps across, or the other way where there are many of these."""
    counts, names = sorted({row["full"] for row in rows}), list(dict.fromkeys(row["variant"] for row in rows))
    cells = {(row["variant"], row["full"]): _cell(row) for row in rows}
    if len(counts) > 8:
        lines = [f"| computed steps | {' | '.join(names)} |", "|---:|" + "---:|" * len(names)]
        lines += [f"| {n} | {' | '.join(cells.get((name, n), '') for name in names)} |" for n in counts]
    else:
        lines = [f"| PSNR dB, computed steps: | {' | '.join(map(str, counts))} |", "|---|" + "---:|" * len(counts)]
        lines += [f"| {name} | {' | '.join(cells.get((name, n), '') for n in counts)} |" for name in names]
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    spent = "" if row["computed"] == row["full"] else f", {row['computed']:g} computed"
    return f"{row['psnr']:.1f} ({row['low']:.1f} to {row['high']:.1f}{spent})"


def write(out: Path, head: Row, parts: dict[str, list[Row]]) -> None:
    """results.json and results.md."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps({**head, "parts": parts}, indent=1) + "\n")
    text = "".join(f"## {name}\n\n{written(rows)}\n" for name, rows in parts.items())
    (out / "results.md").write_text(f"# Fitted on {head['model']}\n\n{text}")


def join(folders: list[Path], out: Path) -> None:
    """Put runs of several parts together; of a variant measured twice the later folder's row counts."""
    parts: dict[str, dict[tuple[str, int], Row]] = {}
    heads = []
    for folder in folders:
        head = json.loads((folder / "results.json").read_text())
        for name, rows in head.pop("parts").items():
            parts.setdefault(name, {}).update({(row["variant"], row["full"]): row for row in rows})
        heads.append(head)
    if len({(head["model"], head["samples"], head["calibration"], head["steps"]) for head in heads}) > 1:
        raise SystemExit("these runs are of different models, samples or steps")
    for key in ("device", "code"):
        heads[0][key] = "; ".join(dict.fromkeys(head[key] for head in heads))
    write(out, heads[0], {name: list(rows.values()) for name, rows in parts.items()})


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-dit")
    usual = [part for part in PARTS if part != "another size"]  # which not every pipeline has
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=usual)
    parser.add_argument("--full", type=int, nargs="+", default=[6, 8, 10, 12, 14, 16, 20, 25], help="computed steps")
    parser.add_argument("--few", type=int, nargs="+", default=[8, 12, 16], help="the same, for all parts but `budgets`")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=4, help="calibration runs")
    parser.add_argument("--most", type=int, default=64, help="calibration runs, at most, for `trajectories`")
    parser.add_argument("--steps", type=int, default=0, help="of a run; 0 for the pipeline's own number")
    parser.add_argument("--call", default="{}", help="further arguments of the pipeline's call, as JSON")
    parser.add_argument("--size", default='{"height": 48, "width": 96}', help="for `another size`, as JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/fitted"))
    parser.add_argument("--join", type=Path, nargs="+", help="folders of results to put together; measures nothing")
    arguments = parser.parse_args()
    if arguments.join:
        join(arguments.join, arguments.out)
        return
    torch.set_num_threads(arguments.threads)
    lab = Lab(arguments)
    everything = lab.measure(replace(lab.fitted, full=lab.steps))
    if everything["psnr"] < 119 or everything["computed"] != lab.steps:
        raise SystemExit(f"gate: with every step computed the output differs from the plain run's: {everything}")
    counts = arguments.few
    makers: dict[str, Callable[[], Iterator[Row]]] = {
        "budgets": lambda: budgets(lab, arguments.full),
        "anchors": lambda: anchors(lab, counts),
        "warm-up": lambda: warmups(lab, counts),
        "trajectories": lambda: trajectories(lab, counts, arguments.most),
        "other runs": lambda: other_runs(lab, counts),
        "another size": lambda: another_size(lab, counts, json.loads(arguments.size)),
        "granularity": lambda: granularity(lab, counts),
        "weights": lambda: weights(lab, counts),
        "gate": lambda: gate(lab, counts),
        "rounds": lambda: rounds(lab, counts),
        "caution": lambda: caution(lab, counts),
        "seen": lambda: seen(lab, counts),
        "solvers": lambda: solvers(lab, counts),
        "guidance": lambda: guidance(lab, counts),
    }
    head = {"model": arguments.model, "steps": lab.steps, "samples": lab.samples, "calibration": lab.runs}
    head |= {"calibration seconds": lab.seconds, "call": lab.call, "threads": arguments.threads}
    head |= {"device": device_name(torch.device("cpu")), "code": code_version(), "versions": library_versions()}
    found: dict[str, list[Row]] = {}
    for part in arguments.parts:
        found[part] = []
        for row in makers[part]():
            print(part, row, flush=True)
            found[part].append(row)
            write(arguments.out, head, found)


if __name__ == "__main__":
    main()
