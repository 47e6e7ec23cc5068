"""Where the time of a sparse attention goes: choosing blocks, moving tokens, attending, the rest.

    python benchmarks/attention_breakdown.py --threads 1 --out eval/results/attention/breakdown

Queries, keys and values of some layers at two steps of a real run, as `dita bench attention` takes them. A policy
without its guards answers the first step, which lets it look, then the second, over and over, in turn with dense
attention. "choose" is what a plan takes, divided by the steps that one serves; "move" is putting tokens in order and
back, and the copies of kept keys; "attend" is torch's attention on them; "rest" is all else. The last columns are what
the speed-up would be if choosing cost nothing, if all but choosing cost density times dense attention, and if both.
More tokens are the same ones repeated along frames. Medians over layers and rounds; with the process clock and one
thread, other work counts little.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from step_ideal import CLOCKS

import dita
from dita import registry
from dita.anatomy import describe
from dita.eval.attention_recall import Captured, capture
from dita.eval.environment import code_version, device_name, library_versions
from dita.eval.pipelines import load_pipeline, pipeline_folder
from dita.eval.sampling import Sampling, draw
from dita.eval.task import task_of
from dita.eval.timing import pinned_threads
from dita.kernels import block_sparse_cpu
from dita.kernels.sparse import policy as policies
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Layout
from dita.kernels.sparse.policy import Asked, Policy

METHODS: dict[str, dict[str, Any]] = {
    "adaspa": {"density": 0.35},
    "draft-attention": {"density": 0.35, "patch": (8, 8)},
    "xattention": {"mass": 0.5},
    "sparge": {"keep": 0.35},
    "radial": {"block": 16, "adjacent": 0.5},
    "sliding-tile": {},
    "vorta": {"budget": 0.35},
}
COLUMNS = {
    "method": "method", "setting": "setting", "tokens": "tokens", "density": "density", "dense": "dense ms",
    "choose": "choose", "move": "move", "attend": "attend", "rest": "rest", "ms": "all ms", "speedup": "speed-up",
    "free_choice": "choosing free", "ideal_kernel": "kernel ideal", "ideal": "both",
}  # fmt: skip
PARTS = ("choose", "move", "attend", "rest")


class Ledger:
    """Seconds by part, each without the parts inside of it."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._inside: list[float] = []

    def charge(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, charged to a part."""

        def timed(*args: Any, **more: Any) -> Any:
            self._inside.append(0.0)
            began = self.now()
            try:
                return function(*args, **more)
            finally:
                taken = self.now() - began
                self.spent[part] += taken - self._inside.pop()
                if self._inside:
                    self._inside[-1] += taken

        return timed


@contextmanager
def charged(ledger: Ledger, policy: Policy) -> Iterator[Callable[[Asked], torch.Tensor]]:
    """Charge what a policy does to the ledger's parts, in the block."""
    with ExitStack() as stack:
        for owner, name, part in (
            (policies, "block_sparse_attention", "move"),
            (block_sparse_cpu, "flash_with_lse", "attend"),
            (torch.nn.functional, "scaled_dot_product_attention", "attend"),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, ledger.charge(part, getattr(owner, name)))
        policy.plan = ledger.charge("choose", policy.plan)  # pyright: ignore[reportAttributeAccessIssue]
        stack.callback(delattr, policy, "plan")
        yield ledger.charge("rest", policy.attend)


def repeated(captured: Captured, times: int) -> Captured:
    """The same attention over so many times the frames."""
    (frames, rows, columns), seen = captured.layout.grid, captured.seen
    if captured.layout.text:
        raise SystemExit("tokens can only be repeated where no text is among them")
    q, k, v = (x.repeat(1, 1, times, 1) for x in (seen.q, seen.k, seen.v))
    layout = Layout((times * frames, rows, columns))
    return replace(captured, seen=replace(seen, q=q, k=k, v=v), layout=layout)


def break_down(
    method: SparseMethod, pipe: Any, pairs: Sequence[tuple[Captured, Captured]], rounds: int, now: Callable[[], float]
) -> dict[str, float]:
    """Milliseconds of an attention in the parts of a method, and of the dense one.

    Args:
        method: with its settings; its guards are off.
        pipe: the pipeline.
        pairs: of each layer, what its attention was given at two steps that follow each other.
        rounds: for each layer.
        now: the clock.
    """
    bare = method.replace(dense_steps=0.0, dense_layers=0, cutoff=1.0)
    handler: Any = bare.handler(describe(pipe.transformer))
    policy: Policy = handler.policy
    rows: list[dict[str, float]] = []
    for pair in pairs:
        ledger = Ledger(now)
        state: dict[str, Any] = {}

        def ask(one: Captured, state: dict[str, Any] = state) -> Asked:
            return Asked(
                one.seen.q, one.seen.k, one.seen.v, one.seen.scale or one.seen.q.shape[-1] ** -0.5, None, one.layout,
                one.layer, one.layers, one.step, one.steps, state, one.seen.attend,
            )  # fmt: skip

        with charged(ledger, policy) as attend:
            attend(ask(pair[0]))
            for number in range(1 + rounds):
                state.pop("plan", None)
                ledger.spent = dict.fromkeys(PARTS, 0.0)
                asked = ask(pair[1])
                attend(asked)
                _, plan, _ = state.get("plan", (0, None, 0.0))
                row = {part: 1e3 * seconds for part, seconds in ledger.spent.items()}
                row["choose"] /= 1 + (0 if plan is None else plan.lifetime)
                began = now()
                pair[1].seen.attend()
                if number:
                    rows.append({**row, "dense": 1e3 * (now() - began), "density": asked.density})
    found = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    found["ms"] = sum(found[part] for part in PARTS)
    ideal = found["density"] * found["dense"]
    return found | {
        "speedup": found["dense"] / found["ms"],
        "free_choice": found["dense"] / (found["ms"] - found["choose"]),
        "ideal_kernel": found["dense"] / (ideal + found["choose"]),
        "ideal": 1 / found["density"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as markdown."""
    style = {"density": ".2f", "speedup": ".2f", "free_choice": ".2f", "ideal_kernel": ".2f", "ideal": ".2f"}
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    for row in rows:
        cells = (
            format(row[name], style.get(name, ".1f")) if isinstance(row[name], float) else f"{row[name]}"
            for name in COLUMNS
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments, capture, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-wan", help="bundled name or folder of a pipeline with transformer")
    parser.add_argument("--methods", type=json.loads, default=METHODS, help="settings by name, JSON")
    parser.add_argument("--layers", type=json.loads, default=[2, 5])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--at", type=int, default=3, help="the first of the two steps")
    parser.add_argument("--times", type=json.loads, default=[1, 2, 4], help="tokens, as multiples of the run's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="write this name with .json and .md")
    asked = parser.parse_args()
    about: dict[str, Any] = {"model": asked.model, "layers": asked.layers, "clock": asked.clock}
    about |= {"threads": asked.threads, "device": device_name("cpu"), "code": code_version()}
    about["versions"] = library_versions()
    with pinned_threads(asked.threads):
        task = task_of(pipeline_folder(asked.model))
        pipe: Any = load_pipeline(asked.model)
        sampling = Sampling(1, 1, asked.steps, task.guidance, 0, task.prompts(1, 0), task.call)

        def once(pipe: Any) -> None:
            draw(pipe, sampling, range(1))

        seen = capture(pipe, once, [asked.at, asked.at + 1], asked.layers, stop=True)
        rows = []
        for name, settings in asked.methods.items():
            method = registry.resolve(name, **settings)
            if not isinstance(method, SparseMethod):
                raise SystemExit(f"{name} is no sparse policy")
            label = method.label()
            if method.needs_calibration:
                found = dita.calibrate(pipe, method, once)  # routes, of which the time depends on how many are sparse
                assert isinstance(found, SparseMethod)
                method = found
            for times in asked.times:
                pairs = [
                    (repeated(seen[layer, asked.at], times), repeated(seen[layer, asked.at + 1], times))
                    for layer in asked.layers
                ]
                parts = break_down(method, pipe, pairs, asked.rounds, CLOCKS[asked.clock])
                rows.append({"method": name, "setting": label, "tokens": pairs[0][0].seen.q.shape[2], **parts})
                print(json.dumps(rows[-1]), flush=True)
    print(text := table(rows))
    if asked.out is not None:
        command = shlex.join(["python", "benchmarks/attention_breakdown.py", *sys.argv[1:]])
        whole = {"command": command, **about, "rows": rows}
        asked.out.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
        said = ", ".join(f"{name} {value}" for name, value in about.items() if name != "versions")
        said += ", torch " + about["versions"]["torch"]
        title = "# Where the time of a sparse attention goes"
        asked.out.with_suffix(".md").write_text(f"{title}\n\n    {command}\n\nMilliseconds; {said}.\n\n{text}\n")


if __name__ == "__main__":
    main()
