"""What methods on the sampling loop save, at what quality, and which beat taking fewer steps: tables made of rows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dita import registry
from dita.eval.columns import METRICS, interval_of, psnr_of
from dita.eval.labels import setting_of
from dita.eval.rows import Row, markdown_table
from dita.eval.settings import FEWER_STEPS
from dita.eval.winners import LEAST, semantic_of

_TEXT = {metric.name: metric.text for metric in METRICS}
_EQUAL = 1e-3  # of the plain run's operations, by which two counts may differ and be equal
_ENOUGH = 16  # samples, of which a share says something
_DISTANCES = ("fd_garment", "fd_world")
_HEAD = (
    "method", "setting", "speedup", "calls", "FLOPs", "PSNR dB", "drawn as asked", "change, points", "FD-garment",
    "FD-world", "beats fewer steps",
)  # fmt: skip


def over_fewer_steps(row: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> float | None:
    """By how much a row is closer to the plain run than the plain sampler with fewer steps, for no more operations.

    It is compared with the cheapest plain run of fewer steps that costs at least as much, and with all cheaper ones.

    Args:
        row: of a method.
        rows: of the same sweep, the plain runs of fewer steps among them.

    Returns:
        Its mean PSNR less the highest of theirs, in dB; -inf if it costs as much as the whole plain run; None if it is
        ahead of the cheaper ones, and none costs as much.

    Example:
        >>> rows = [{"method": "fewer steps", "flops_ratio": f, "psnr": p} for f, p in [(0.25, 25.0), (0.5, 35.0)]]
        >>> [over_fewer_steps({"flops_ratio": f, "psnr": p}, rows) for f, p in [(0.4, 36.0), (0.4, 34.0), (0.6, 36.0)]]
        [1.0, -1.0, None]
    """
    if row["flops_ratio"] >= 1 - _EQUAL:
        return -math.inf
    plain = sorted((each for each in rows if each["method"] == FEWER_STEPS), key=lambda each: each["flops_ratio"])
    cheaper = [each for each in plain if each["flops_ratio"] < row["flops_ratio"] - _EQUAL]
    rivals = plain[: len(cheaper) + 1]
    ahead = psnr_of(row) - max(map(psnr_of, rivals), default=-math.inf)
    return None if rivals == cheaper and ahead > 0 else ahead


def settled(rows: Iterable[Row]) -> list[Row]:
    """Rows that were measured, the newest of each method and setting: code that was mended may have left an older one.

    Example:
        >>> settled([{"method": "a", "label": "x", "psnr": p} for p in (3.5, 30.1)])[0]["psnr"]
        30.1
    """
    own = (row for row in rows if row["method"] != "data" and not row.get("error"))
    return list({(row["method"], setting_of(row)): row for row in own}.values())


def loop_table(rows: Sequence[Row]) -> str:
    """Every row of a sweep, the dearest first; columns in which no row has something are left out.

    Where there are fewer than 16 samples nothing is said of what they show, and nothing of the Frechet distance
    where there are fewer than 60.

    Example:
        >>> rows = [{"method": "fewer steps", "label": "5 steps", "flops_ratio": 0.5, "psnr": 30.0}]
        >>> rows += [{"method": "sada", "label": "default", "flops_ratio": 0.4, "psnr": 40.0}]
        >>> print(loop_table([{**row, "speedup": 2.0, "computed_fraction": 0.5, "samples": 2} for row in rows]), end="")
        | method | setting | speedup | calls | FLOPs | PSNR dB | beats fewer steps |
        |---|---|---:|---:|---:|---:|---:|
        | fewer steps | 5 steps | 2.00 | 50% | 50% | 30.0 |  |
        | sada | default | 2.00 | 50% | 40% | 40.0 | yes +10.0 |
    """
    shown = settled(rows)
    shown.sort(key=lambda row: (-round(row["flops_ratio"], 3), row["method"] != FEWER_STEPS, -psnr_of(row)))
    cells = [_line(row, shown) for row in shown]
    used = [place for place in range(len(_HEAD)) if any(line[place] for line in cells)]
    lines = [[line[place] for place in used] for line in cells]
    return markdown_table([_HEAD[place] for place in used], lines, left=_HEAD[:2])


def tally(sweeps: Mapping[str, Sequence[Sequence[Row]]]) -> str:
    """How many settings of each method on the loop beat fewer steps, of those that can be compared with them.

    Args:
        sweeps: by pipeline, the rows of each of its sweeps.

    Example:
        >>> rows = [{"method": "fewer steps", "label": "5 steps", "flops_ratio": 0.5, "psnr": 30.0}]
        >>> rows += [{"method": "sada", "label": "default", "flops_ratio": 0.4, "psnr": 40.0}]
        >>> print(tally({"a": [rows], "b": [rows[1:]], "c": []}), end="")
        | method | a | b | c |
        |---|---:|---:|---:|
        | sada | 1 of 1 | - |  |
    """
    found: dict[str, dict[str, list[float | None]]] = {}
    for pipeline, several in sweeps.items():
        for rows in map(settled, several):
            for row in rows:
                name = row["method"].removeprefix(f"{FEWER_STEPS} + ")
                if name in registry.names() and ".schedulers." in registry.get(name).__module__:
                    own = found.setdefault(name, {}).setdefault(pipeline, [])
                    own.append(over_fewer_steps(row, rows))

    def cell(answers: Sequence[float | None]) -> str:
        known = [answer > 0 for answer in answers if answer is not None]
        return f"{sum(known)} of {len(known)}" if known else "-" if answers else ""

    def rank(name: str) -> tuple[float, str]:
        known = [answer > 0 for each in found[name].values() for answer in each if answer is not None]
        return (-sum(known) / max(len(known), 1), name)

    lines = [[name, *(cell(found[name].get(each, [])) for each in sweeps)] for name in sorted(found, key=rank)]
    return markdown_table(["method", *sweeps], lines, left=("method",))


def change(row: Mapping[str, Any]) -> str:
    """By how many points of the samples a row's accuracy differs from the plain run's, with the 95 % interval.

    Example:
        >>> change({"accuracy_change": -0.015, "intervals": {"accuracy_change": [-0.04, 0.01]}})
        '-1.5 (-4.0 to +1.0)'
    """
    ends = interval_of(row, "accuracy_change")
    spread = "" if ends is None else f" ({100 * ends[0]:+.1f} to {100 * ends[1]:+.1f})"
    return f"{100 * row['accuracy_change']:+.1f}{spread}"


def _line(row: Row, rows: Sequence[Row]) -> list[str]:
    samples, held = row.get("samples", 0), semantic_of(row)
    asked = moved = ""
    if samples >= _ENOUGH and held is not None:
        ends = interval_of(row, held[0])
        asked = f"{held[1]:.0%}" + ("" if ends is None else f" ({ends[0]:.0%} to {ends[1]:.0%})")
        moved = change(row) if row.get("accuracy_change") is not None and row["method"] != "plain" else ""
    known = samples >= LEAST
    distances = [f"{row[name]:.1f}" if known and row.get(name) is not None else "" for name in _DISTANCES]
    beats = "" if row["method"] in ("plain", FEWER_STEPS) else _answer(over_fewer_steps(row, rows))
    setting = re.sub(r"\bweights=\S*/", "weights=", setting_of(row))
    cost = [f"{row['speedup']:.2f}", f"{row['computed_fraction']:.0%}", f"{row['flops_ratio']:.0%}"]
    return [row["method"], setting, *cost, _TEXT["psnr"](row), asked, moved, *distances, beats]


def _answer(ahead: float | None) -> str:
    if ahead is None:
        return "-"
    return ("yes" if ahead > 0 else "no") + (f" {ahead:+.1f}" if math.isfinite(ahead) else "")
