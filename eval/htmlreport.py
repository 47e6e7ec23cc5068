"""One self-contained HTML page of a sweep."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dita.eval.rows import COLUMNS, Row, best_at, psnr_of, table

_TEMPLATE = Path(__file__).resolve().parent / "templates" / "report.html"


def sample_note(samples: int, data: Mapping[str, Any] | None) -> str:
    """Say in a sentence what the Frechet distance of so few samples is worth."""
    text = (
        f"FD-garment was computed from {samples} images against all 10,000 test images; with so few it is biased "
        "upwards, so compare it only with the other rows of this table."
    )
    floor = (data or {}).get("fd_garment")
    return text if floor is None else f"{text} As many real training images score {floor:.2f}."


def write_report(path: str | Path, rows: list[Row], plot: bytes, strips: Mapping[str, bytes], model: str) -> Path:
    """Write the page. It holds its pictures, needs no network and opens in any browser.

    Args:
        path: of the HTML file.
        rows: of the sweep, in the order of the table.
        plot: PNG from `plot_sweep`.
        strips: PNGs from `strip` by row key; that of the plain row is the baseline.
        model: what was sampled.

    Returns:
        The path.

    Example:
        >>> write_report("report.html", rows, plot, strips, "fashion-dit")  # doctest: +SKIP
    """
    from jinja2 import Environment

    head, cells = table(rows)
    meanings = {column.title: column.meaning for column in COLUMNS}
    first = rows[0] if rows else {}
    by_name = {row["method"]: row for row in rows if row["method"] in ("plain", "data")}
    plain = by_name.get("plain", {})
    page = (
        Environment(autoescape=True)
        .from_string(_TEMPLATE.read_text(encoding="utf-8"))
        .render(
            title=f"dita sweep of {model}",
            subtitle=_subtitle(first),
            plot=_base64(plot),
            best=_best_lines(rows),
            head=[(title, meanings[title]) for title in head],
            lines=[(line, bool(row.get("error"))) for line, row in zip(cells, rows, strict=True)],
            sample_note=sample_note(first.get("samples", 0), by_name.get("data")),
            notes=[(f"{row['method']} {row['label']}", note) for row in rows for note in row.get("notes", ())],
            strips=_strip_groups(rows, strips),
            plain_strip=_base64(strips.get(plain.get("key", ""), b"")),
            facts=_facts(first),
        )
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _subtitle(row: Mapping[str, Any]) -> str:
    return (
        f"{row.get('samples')} images per setting, {row.get('plain_steps')} steps, guidance {row.get('guidance')}, "
        f"batches of {row.get('batch')}, {row.get('device')}, {row.get('threads')} threads"
    )


def _best_lines(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    lines = []
    for method, row in best_at(rows).items():
        if row is None:
            lines.append((method, "no setting reaches 30 dB", "", ""))
        else:
            value = psnr_of(row)
            shown = "identical" if value == float("inf") else f"{value:.1f}"
            lines.append((method, row["label"], f"{row['speedup']:.2f}", shown))
    return lines


def _strip_groups(rows: list[Row], strips: Mapping[str, bytes]) -> list[tuple[str, list[tuple[str, str]]]]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        if row["method"] in ("plain", "data") or row["key"] not in strips or row.get("error"):
            continue
        value = psnr_of(row)
        quality = "identical" if value == float("inf") else f"{value:.1f} dB"
        caption = f"{row['label']}: {row['speedup']:.2f}x, {quality}"
        groups.setdefault(row["method"], []).append((caption, _base64(strips[row["key"]])))
    return list(groups.items())


def _facts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {number}" for name, number in row.get("versions", {}).items())
    facts = {
        "code": row.get("code"),
        "libraries": versions,
        "device": row.get("device"),
        "threads": row.get("threads"),
        "weights": row.get("weights"),
        "seed": f"{row.get('seed')}; image i has a generator of its own, its number is seed * 1,000,000 + i",
        "time": "the first batch warms up and is not timed; some later batches are followed at once by the plain run "
        "of the same batch; speedup is the median of these ratios",
        "operations": "matrix products, convolutions and attention of the first batch",
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]
