"""Solvers on problems whose exact solution is known: order of convergence, and error at equal model calls.

    python benchmarks/solvers.py --out runs/solvers

The problems are those of tests/exact_problems.py: a Gaussian and a mixture of Gaussians, as DDPM and as flow matching.
The error is the root mean square distance to the exact solution of the probability-flow ODE, from the same noise, over
data of standard deviation about 1. First a gate: the reference solution against the closed form, every method's
disabled setting against the plain run, and the orders of the plain solvers. Then two tables:

order   the power of the step length with which the error falls, fitted over `--steps`, on noise levels that fall evenly
        in their logarithm (DDPM's own levels hide the order of multistep solvers behind the end of the schedule)
calls   error of each method beside that of the plain solver with as many calls, on DDPM's own levels or flow matching's

Methods that measure numbers do so on other noise than they are tested on. Methods come through dita's registry; those
that are not there, or refuse a scheduler, are passed over.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dita
from dita import registry
from dita.config import Method
from dita.errors import DitaError
from dita.eval.environment import code_version, device_name, library_versions

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import exact_problems as exact  # noqa: E402

SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "sada": ({}, {"lagrange": 0.2, "interval": 2}, {"lagrange": 0.2, "interval": 3}, {"lagrange": 0.2}),
    "dualfast": ({}, {"c0": 0.5, "decay": 0.0}),
    "timestep-aligner": ({},),
    "optimal-steps": ({},),
    "autodiffusion": ({},),
    "picard": ({},),
}
"""What is tried of each method."""
FINE = {"optimal-steps": 100, "autodiffusion": 100}
"""Steps of a calibration, for methods that choose from a run with many."""
SIZED = ("autodiffusion",)
"""Methods that are told for how many steps they choose."""
GATE = 1e-8
"""Largest error of the reference solution."""
Row = dict[str, Any]


class Outcome(NamedTuple):
    """A run: what it gave [B, ...], and how many calls of the model of how many rows a sample it took."""

    result: torch.Tensor
    calls: int
    rows: int


def outcome(pipe: Any, steps: int, noise: torch.Tensor) -> Outcome:
    """Run the pipeline as it is."""
    model = pipe.transformer
    model.calls = model.rows = 0
    result = pipe(steps, latents=noise)
    return Outcome(result, model.calls, model.rows // len(noise))


def ready(name: str, options: dict[str, Any], problem: exact.Problem, pipe: Any, steps: int) -> Method:
    """The method's setting, with numbers measured on noise of its own."""
    method = registry.resolve(name, **({**options, "steps": steps} if name in SIZED else options))
    if not method.needs_calibration:
        return method
    noise = problem.noise(batch=8, seed=99)
    return dita.calibrate(pipe, method, lambda p: p(FINE.get(name, steps), latents=noise))


def gate(orders: Sequence[Row], names: Sequence[str]) -> list[str]:
    """What is wrong before any method is measured; nothing, if all is well."""
    wrong = []
    for process, solver in (("vp", "ddim"), ("flow", "flow-euler")):
        problem = exact.gaussian(process)
        pipe, noise = problem.pipeline(solver), problem.noise()
        pipe.scheduler.set_timesteps(20)
        ends = exact.ends(pipe.scheduler)
        error = exact.distance(exact.integrate(pipe.transformer, noise, *ends, exact.FINE), pipe.exact(20, noise))
        if error > GATE:
            wrong.append(f"the reference of {process} is off by {error:.1e}")
        plain = pipe(10, latents=noise)
        for name in names:
            with dita.accelerated(pipe, registry.get(name).disabled()):
                if not torch.equal(pipe(10, latents=noise), plain):
                    wrong.append(f"{name} changes {solver} though it is disabled")
    for row in orders:
        if row["method"] == "plain" and row["order"] < row["expected"] - 0.2:
            wrong.append(f"{row['solver']} has order {row['order']:.2f}, expected {row['expected']}")
    return wrong


def convergence(names: Sequence[str], steps: Sequence[int], batch: int) -> list[Row]:
    """Orders of the plain solvers and of methods without a calibration, on the Gaussian."""
    rows: list[Row] = []
    for solver, entry in exact.SCHEDULERS.items():
        problem = exact.gaussian(entry.process)
        noise = problem.noise(batch)
        variants: list[tuple[str, str, Method | None]] = [("plain", "", None)]
        for name in names:
            for options in SETTINGS[name]:
                method = registry.resolve(name, **options)
                if not method.needs_calibration or options.get("c0"):
                    variants.append((name, method.label(), method))
        for name, label, method in variants:
            pipe = problem.pipeline(entry.build(even=True))
            row: Row = {"solver": solver, "method": name, "setting": label, "expected": entry.order}
            try:
                if method is not None:
                    dita.accelerate_pipeline(pipe, method)
            except DitaError as error:
                rows.append({**row, "refused": str(error)})
                continue
            runs = [outcome(pipe, n, noise) for n in steps]
            errors = [exact.distance(run.result, pipe.exact(n, noise)) for n, run in zip(steps, runs, strict=True)]
            calls = [run.calls for run in runs]
            row |= {"steps": list(steps), "calls": calls, "errors": errors, "order": exact.slope(steps, errors)}
            rows.append(row)
    return rows


class Yardstick:
    """The plain solver and the truth on the mixture, for any number of steps; each is worked out once.

    Args:
        solver: a name in `exact.SCHEDULERS`.
        batch: samples.
    """

    def __init__(self, solver: str, batch: int) -> None:
        self.solver, self.problem = solver, exact.mixture(exact.SCHEDULERS[solver].process)
        self.noise = self.problem.noise(batch)
        self._truths: dict[int, torch.Tensor] = {}
        self._plain: dict[int, Row] = {}

    def error(self, run: Outcome, steps: int) -> float:
        """Distance of a run of so many steps from the truth."""
        if steps not in self._truths:
            self._truths[steps] = self.problem.pipeline(self.solver).exact(steps, self.noise)
        return exact.distance(run.result, self._truths[steps])

    def plain(self, calls: int) -> Row:
        """The plain solver with so many calls, or one more."""
        steps = calls // 2 + 1 if exact.SCHEDULERS[self.solver].build().order > 1 else calls
        if steps not in self._plain:
            run = outcome(self.problem.pipeline(self.solver), steps, self.noise)
            row = {"steps": steps, "calls": run.calls, "rows": run.rows, "error": self.error(run, steps)}
            self._plain[steps] = {"solver": self.solver, "method": "plain", "setting": "", **row}
        return self._plain[steps]


def at_equal_calls(names: Sequence[str], steps: Sequence[int], batch: int) -> list[Row]:
    """Errors of plain solvers and methods on the mixture, and of the plain solver with as many calls."""
    rows: list[Row] = []
    for solver in exact.SCHEDULERS:
        yardstick = Yardstick(solver, batch)
        rows += [yardstick.plain(n) for n in steps]
        for name, options, n in [(m, options, n) for m in names for options in SETTINGS[m] for n in steps]:
            pipe = yardstick.problem.pipeline(solver)
            row: Row = {"solver": solver, "method": name, "setting": str(options), "steps": n}
            try:
                method = ready(name, options, yardstick.problem, pipe, n)
                with dita.accelerated(pipe, method):
                    run = outcome(pipe, n, yardstick.noise)
            except DitaError as error:
                rows.append({**row, "refused": str(error)})
                continue
            row |= {"setting": method.label(), "calls": run.calls, "rows": run.rows, "error": yardstick.error(run, n)}
            rows.append({**row, "plain_error": yardstick.plain(run.calls)["error"]})
    return rows


def markdown(title: str, rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A table of the rows that were not refused."""
    lines = [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        if "refused" not in row:
            lines.append("| " + " | ".join(shown(row.get(column, "")) for column in columns) + " |")
    return "\n".join([*lines, ""])


def heading(setup: Row) -> str:
    """Where and with what the tables were measured.

    Example:
        >>> heading({"device": "cpu: X", "threads": 1, "code": "0.1", "versions": {"torch": "2.9"}, "batch": 8})
        'cpu: X, 1 threads, dita 0.1, torch 2.9; float64, 8 samples.'
    """
    versions = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    machine = f"{setup['device']}, {setup['threads']} threads, dita {setup['code']}"
    return f"{machine}, {versions}; float64, {setup['batch']} samples."


def shown(value: Any) -> str:
    """A value as a table shows it.

    Example:
        >>> shown(0.012345), shown([0.5, 0.25]), shown("sada")
        ('0.01235', '0.5, 0.25', 'sada')
    """
    if isinstance(value, list):
        return ", ".join(shown(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, check the gate, print the tables and write them; 1 if the gate is not passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(SETTINGS), help="registry names")
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 50, 100, 200], help="for orders; divisors of 1000")
    parser.add_argument("--calls", type=int, nargs="+", default=[10, 20, 50], help="steps for errors at equal calls")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None, help="folder for solvers.md and solvers.json")
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.methods) - set(SETTINGS))
    if unknown:
        parser.error(f"no settings to try of {', '.join(unknown)}; known: {', '.join(SETTINGS)}")
    names = [name for name in args.methods if name in registry.names()]
    warnings.filterwarnings("ignore", category=dita.DitaWarning)
    orders = convergence(names, args.steps, args.batch)
    wrong = gate(orders, names)
    if wrong:
        print("gate not passed:", *wrong, sep="\n  ")
        return 1
    errors = at_equal_calls(names, args.calls, args.batch)
    setup = {
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "code": code_version(),
        "versions": library_versions(),
        "batch": args.batch,
    }
    text = f"# Solvers on problems with a known solution\n\n{heading(setup)}\n\n"
    text += markdown(
        "Order of convergence", orders, ("solver", "method", "setting", "expected", "order", "steps", "errors")
    )
    columns = ("solver", "method", "setting", "steps", "calls", "rows", "error", "plain_error")
    text += "\n" + markdown("Error at equal calls", errors, columns)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "solvers.md").write_text(text)
        found = {**setup, "order": orders, "calls": errors}
        (args.out / "solvers.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
