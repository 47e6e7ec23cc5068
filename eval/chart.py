"""The numbers behind the page's charts, as one JSON value that its script draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dita.eval.columns import METRICS, Metric, interval_of
from dita.eval.looks import looks
from dita.eval.plots import WIDE

_THRESHOLDS = {"psnr": (30.0, "30 dB")}
_FIRST = ("psnr", "semantic_accuracy", "fd_world", "fd_garment", "perceptual", "lpips", "ssim")


def chart_data(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collect what the charts of a page need.

    Args:
        rows: in the order of the page's table; `row` of a point is its number there.

    Returns:
        "tasks": names of the pipelines, [""] if the rows name none; "shown": names of the two metrics to begin with;
        "wide": see `plots.WIDE`; "metrics", "methods", "points" and "levels" (horizontal lines). Values are plain JSON;
        "identical" stands for the PSNR of identical images. A point has a value only for what was measured.

    Example:
        >>> data = chart_data([{"method": "a", "label": "x", "speedup": 2.0, "psnr": 31.234567}])
        >>> data["points"][0]["values"], data["methods"][0]["name"]
        ({'psnr': 31.2346}, 'a')
    """
    styles = looks(row for row in rows if not row.get("error"))
    names = list(styles)
    tasks = list(dict.fromkeys(row.get("task") or "" for row in rows)) or [""]
    present = [each for each in METRICS if any(each.value(row) is not None for row in _drawn(rows))]
    points = []
    for number, row in enumerate(rows):
        if row["method"] not in styles or row.get("error") or row.get("speedup") is None:
            continue
        measured = [(each, each.value(row)) for each in present]
        spreads = [(each, interval_of(row, each.name)) for each in present]
        points.append(
            {
                "row": number,
                "method": names.index(row["method"]),
                "task": tasks.index(row.get("task") or ""),
                "label": row["label"],
                "speedup": _rounded(row["speedup"]),
                "computed": _rounded(row.get("computed_fraction")),
                "values": {each.name: _finite(value) for each, value in measured if value is not None},
                "spreads": {each.name: [_rounded(end) for end in ends] for each, ends in spreads if ends is not None},
            }
        )
    return {
        "tasks": tasks,
        "wide": WIDE,
        "shown": _shown(present),
        "metrics": [_metric(each) for each in present],
        "methods": [
            {"name": name, "colour": look.colour, "marker": look.marker, "origin": look.origin}
            for name, look in styles.items()
        ],
        "points": points,
        "levels": _levels(rows, present, tasks),
    }


def _drawn(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    skipped = ("plain", "data")
    return [r for r in rows if r["method"] not in skipped and not r.get("error") and r.get("speedup") is not None]


def _metric(metric: Metric) -> dict[str, Any]:
    digits = int(metric.form.strip("+.%f"))
    return {
        "name": metric.name,
        "title": metric.title,
        "meaning": metric.meaning,
        "better": metric.better,
        "digits": digits,
        "share": metric.form.endswith("%"),
    }


def _shown(present: Sequence[Metric]) -> list[str]:
    names = [each.name for each in present]
    liked = [name for name in _FIRST if name in names]
    return list(dict.fromkeys([*liked, *names]))[:2]


def _levels(rows: Sequence[Mapping[str, Any]], present: Sequence[Metric], tasks: Sequence[str]) -> list[dict[str, Any]]:
    levels = []
    for metric in present:
        if metric.name in _THRESHOLDS:
            value, text = _THRESHOLDS[metric.name]
            levels.append({"metric": metric.name, "task": None, "value": value, "text": text, "kind": "threshold"})
        for row in rows:
            value = metric.value(row)
            if row["method"] in ("plain", "data") and not row.get("error") and value is not None:
                text = {"plain": "plain run", "data": "real data"}[row["method"]]
                place = tasks.index(row.get("task") or "")
                kind = row["method"]
                levels.append(
                    {"metric": metric.name, "task": place, "value": _rounded(value), "text": text, "kind": kind}
                )
    return levels


def _finite(value: float) -> float | str | None:
    return "identical" if value == math.inf else _rounded(value)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
