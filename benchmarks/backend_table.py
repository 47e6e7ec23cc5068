"""Gather against compiled FlexAttention on a CPU: the table of kernels/README.md, from committed measurements.

    dita bench attention --model none --block 128 --out runs/backends      # measures
    python benchmarks/backend_table.py                                     # writes what was committed into the page

Measurements are eval/results/attention/attention.json and, beside it, any backends-*.json, as `dita bench attention`
writes them. The newest of a cell counts. `block_sparse_attention` follows them: what "auto" takes is the backend of the
higher mean (geometric) over all cells, and a test says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from dita.eval.rows import markdown_table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "eval" / "results" / "attention"
BACKENDS = ("gather", "flex")
Cell = tuple[str, int, int, float]  # dtype, tokens, block, density


def cells(folder: Path = FOLDER) -> dict[Cell, dict[str, Mapping[str, Any]]]:
    """The newest row of each backend, by cell, with the measurement it is of."""
    files = [folder / "attention.json", *folder.glob("backends-*.json")]
    runs = sorted((json.loads(file.read_text(encoding="utf-8")) for file in files), key=lambda run: run["measured"])
    found: dict[Cell, dict[str, Mapping[str, Any]]] = {}
    for run in runs:
        for row in run["timing"]:
            cell = (row["dtype"], row["tokens"], row["block"], round(row["density"], 3))
            found.setdefault(cell, {})[row["backend"]] = {**row, "run": run}
    return {cell: rows for cell, rows in sorted(found.items(), reverse=True) if set(BACKENDS) <= rows.keys()}


def means(found: Mapping[Cell, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """Mean speedup over dense attention of each backend, over all cells.

    Example:
        >>> means({("fp32", 8, 4, 0.5): {"gather": {"speedup": 2.0}, "flex": {"speedup": 1.0}}})
        {'gather': 2.0, 'flex': 1.0}
    """
    return {name: geometric_mean(rows[name]["speedup"] for rows in found.values()) for name in BACKENDS}


def table(found: Mapping[Cell, Mapping[str, Mapping[str, Any]]]) -> str:
    """A line for each cell, speedups over dense attention; who was faster, in words."""
    lines = []
    for (dtype, tokens, block, density), rows in found.items():
        one = rows["gather"]
        speeds = [f"{rows[n]['speedup']:.2f} [{rows[n]['slowest']:.2f}, {rows[n]['fastest']:.2f}]" for n in BACKENDS]
        run = one["run"]
        place = f"{run['threads']} x {run['device'].removeprefix('cpu: ')}, {run['measured'][:10]}"
        lines.append([dtype, str(tokens), str(block), f"{density:.3f}", *speeds, f"{one['target']:.2f}", place])
    won = sum(rows["gather"]["speedup"] >= rows["flex"]["speedup"] for rows in found.values())
    mean = means(found)
    head = ["dtype", "tokens", "block", "density", *BACKENDS, "0.75 / density", "threads and machine, measured"]
    said = f"Gathering was the faster in {won} of {len(found)} cells; its mean is {mean['gather']:.2f}, that of"
    return f"{markdown_table(head, lines, left=(head[0], head[-1]))}\n{said} FlexAttention {mean['flex']:.2f}.\n"


def written(page: str, block: str) -> str:
    """The page with the table anew.

    Example:
        >>> written("a <!-- backends:start -->b<!-- backends:end -->", "c")
        'a <!-- backends:start -->\\nc<!-- backends:end -->'
    """
    start, end = "<!-- backends:start -->", "<!-- backends:end -->"
    page, count = re.subn(rf"{start}.*?{end}", lambda _: f"{start}\n{block}{end}", page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"kernels/README.md has {count} places for the table; expected one")
    return page


if __name__ == "__main__":
    path = ROOT / "kernels" / "README.md"
    path.write_text(written(path.read_text(encoding="utf-8"), table(cells())), encoding="utf-8")
