"""One self-contained HTML page of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dita.eval.chart import chart_data
from dita.eval.columns import METRICS, interval_of
from dita.eval.gallery import gallery, picture_uri
from dita.eval.rows import Row, best_at, origin_of, used_columns
from dita.eval.timeline import lanes
from dita.eval.winners import Winner, best_at_semantic, comparable, winners

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_TEXTS = ("method", "setting", "origin", "task", "media")
_ORIGINS = {"dita": "dita", "peer": "other libraries", "baseline": "the plain sampler"}
_OPEN_TIMELINES = 24
_DISTANCES = {
    "fd_garment": ("FD-garment", "all 10,000 test images", "training images"),
    "fd_world": ("FD-world", "unseen real samples", "training samples"),
}
_PARTNERS = {"fd_world": "semantic_accuracy", "fd_garment": "class_accuracy"}


def sample_note(samples: int, data: Mapping[str, Any] | None, distance: str | None = None) -> str:
    """Say in a sentence what the Frechet distance of so few samples is worth.

    Args:
        samples: how many were drawn for each setting.
        data: row of the real data, if there is one.
        distance: "fd_garment" or "fd_world"; if None, the one that goes with what `data` has.

    Returns:
        The note; nothing if there is no such distance.

    Example:
        >>> sample_note(64, {"fd_world": 9.41}).split(". ")[1]
        'As many real training samples score 9.41.'
    """
    data = data or {}
    distance = distance or next((name for name, partner in _PARTNERS.items() if name in data or partner in data), None)
    if distance is None:
        return ""
    name, against, real = _DISTANCES[distance]
    kind = "images" if distance == "fd_garment" else "samples"
    text = (
        f"{name} was computed from {samples} {kind} against {against}; with so few it is biased "
        "upwards, so compare it only with the other rows of this table."
    )
    floor = data.get(distance)
    return text if floor is None else f"{text} As many real {real} score {floor:.2f}."


def write_report(
    path: str | Path,
    rows: list[Row],
    plot: bytes,
    strips: Mapping[str, bytes],
    model: str,
    animations: Mapping[str, bytes] | None = None,
    prompts: Sequence[str] = (),
) -> Path:
    """Write the page. It holds its pictures, needs no network and opens in any browser.

    Args:
        path: of the HTML file.
        rows: of the sweep, in the order of the table.
        plot: PNG from `plot_sweep`, for readers without scripts.
        strips: PNGs from `strip` or `film` by row key; that of a plain row is the baseline. At most 40 are shown.
        model: what was sampled.
        animations: from `animation` by row key. At most 16 are shown.
        prompts: what the samples in the pictures were asked to be, in their order.

    Returns:
        The path.

    Raises:
        DitaError: a timeline holds an unknown letter.

    Example:
        >>> write_report("report.html", rows, plot, strips, "fashion-dit")  # doctest: +SKIP
    """
    from jinja2 import Environment
    from markupsafe import Markup

    first = rows[0] if rows else {}
    timelines = _timelines(rows)
    page = (
        Environment(autoescape=True)
        .from_string(_read("report.html"))
        .render(
            css=Markup(_read("report.css")),
            chart_js=Markup(_read("chart.js")),
            table_js=Markup(_read("table.js")),
            title=f"dita sweep of {model}",
            subtitle=_subtitle(first),
            winners=_cards(rows),
            chart=chart_data(rows),
            spreads=any(interval_of(row, metric.name) for row in rows for metric in METRICS),
            plot=picture_uri(plot),
            best=_best(rows),
            columns=[
                {"title": column.title, "meaning": column.meaning, "text": column.title in _TEXTS}
                for column in used_columns(rows)
            ],
            lines=_lines(rows),
            origins=[(kind, words) for kind, words in _ORIGINS.items() if kind in set(map(origin_of, rows))],
            sample_note=_note(rows),
            notes=[(f"{row['method']} {row['label']}", note) for row in rows for note in row.get("notes", ())],
            timelines=timelines,
            open_timelines=sum(len(entries) for _, entries in timelines) <= _OPEN_TIMELINES,
            pictures=gallery(rows, strips, animations or {}),
            prompts=prompts,
            facts=_facts(first),
        )
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _subtitle(row: Mapping[str, Any]) -> str:
    kind = f"videos of {row.get('frames')} frames" if row.get("media") == "video" else "images"
    parts = {
        "samples": f"{row.get('samples')} {kind} per setting",
        "plain_steps": f"{row.get('plain_steps')} steps",
        "guidance": f"guidance {row.get('guidance')}",
        "batch": f"batches of {row.get('batch')}",
        "device": f"{row.get('device')}",
        "threads": f"{row.get('threads')} thread{'' if row.get('threads') == 1 else 's'}",
    }
    return ", ".join(text for name, text in parts.items() if row.get(name) is not None)


def _cards(rows: list[Row]) -> list[dict[str, Any]]:
    found = winners(rows)
    several = len({each.task for each in found}) > 1
    return [_card(each, f"{each.task}: {each.criterion}" if several else each.criterion) for each in found]


def _card(winner: Winner, title: str) -> dict[str, Any]:
    rows = {"dita": winner.dita, "peer": winner.peer, "baseline": winner.baseline}
    longest = max((row["speedup"] for row in rows.values() if row is not None), default=1.0)
    bars = []
    for origin, words in (("dita", "dita"), ("peer", "best peer"), ("baseline", "fewer steps")):
        row = rows[origin]
        if row is None and origin == "peer":
            continue
        bars.append(
            {
                "origin": origin,
                "who": words,
                "what": "no setting" if row is None else f"{row['method']} {row['label']}",
                "speedup": "" if row is None else f"{row['speedup']:.2f}\u00d7",
                "width": 0 if row is None else round(100 * row["speedup"] / longest, 1),
            }
        )
    ratios = (("the best peer", winner.over(winner.peer)), ("fewer steps", winner.over(winner.baseline)))
    said = [f"{ratio:.2f} times as fast as {words}" for words, ratio in ratios if ratio is not None]
    return {
        "title": title.replace(">=", "\u2265"),
        "bars": bars,
        "ratio": f"dita is {' and '.join(said)}." if said else "",
        "meaning": f"Criterion: {winner.meaning}.",
    }


def _best(rows: list[Row]) -> dict[str, Any]:
    by_name = {metric.name: metric for metric in METRICS}
    tasks = {task: [r for r in rows if (r.get("task") or "") == task] for task in _tasks(rows)}
    asked = {task: comparable(own) for task, own in tasks.items()}
    heads = [("30 dB or more", "PSNR dB")] + [("equal semantic accuracy", "accuracy")] * any(asked.values())
    found = []
    for task, own in tasks.items():
        held = asked[task]
        tables = [(best_at(own), by_name["psnr"], "no setting reaches 30 dB")]
        if held is not None:
            tables.append((best_at_semantic(own), by_name[held[0]], "no setting"))
        for method in tables[0][0]:
            line = [(f"{task}: {method}" if len(tasks) > 1 else method, True)]
            for best, metric, missing in tables:
                row = best[method]
                texts = (missing, "", "") if row is None else (row["label"], f"{row['speedup']:.2f}", metric.text(row))
                line += [(text, place == 0) for place, text in enumerate(texts)]
            found.append(line + [("", True)] * (1 + 3 * len(heads) - len(line)))
    return {"head": heads, "lines": found}


def _tasks(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.get("task") or "" for row in rows))


def _lines(rows: list[Row]) -> list[dict[str, Any]]:
    columns, lines = used_columns(rows), []
    for row in rows:
        cells = []
        for column in columns:
            text = column.text(row)
            style = " ".join(["text"] * (column.title in _TEXTS) + ["setting"] * (column.title == "setting"))
            if row.get("error") and column.title == "setting":
                text = f"{text}: failed: {row['error']}"
            cells.append({"text": text, "spread": column.spread(row) if text else "", "style": style})
        lines.append(
            {"cells": cells, "origin": origin_of(row), "task": row.get("task") or "", "failed": bool(row.get("error"))}
        )
    return lines


def _timelines(rows: list[Row]) -> list[tuple[str, list[tuple[str, list[dict[str, Any]]]]]]:
    from markupsafe import Markup

    several = len(_tasks(rows)) > 1
    groups: dict[str, list[tuple[str, list[dict[str, Any]]]]] = {}
    for row in rows:
        if row.get("timeline") and not row.get("error"):
            drawn = [{"name": lane.name, "svg": Markup(lane.svg), "text": lane.text} for lane in lanes(row["timeline"])]
            name = f"{row.get('task')}: {row['method']}" if several else row["method"]
            groups.setdefault(name, []).append((row["label"], drawn))
    return list(groups.items())


def _note(rows: list[Row]) -> str:
    distance = next((name for name in _PARTNERS if any(row.get(name) is not None for row in rows)), None)
    data = next((row for row in rows if row["method"] == "data"), None)
    return sample_note(rows[0].get("samples", 0), data, distance) if distance else ""


def _facts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {number}" for name, number in row.get("versions", {}).items())
    facts = {
        "code": row.get("code"),
        "libraries": versions,
        "device": row.get("device"),
        "threads": row.get("threads"),
        "weights": row.get("weights"),
        "seed": f"{row.get('seed')}; sample i has a generator of its own, its number is seed * 1,000,000 + i",
        "time": "the first batch warms up and is not timed; some later batches are followed at once by the plain run "
        "of the same batch; speedup is the median of these ratios",
        "operations": "matrix products, convolutions and attention of the first batch",
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]
