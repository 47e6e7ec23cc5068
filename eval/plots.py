"""Pictures of a sweep: quality against speed, and strips of images."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dita.eval.columns import METRICS, Metric
from dita.eval.films import join, shrink
from dita.eval.looks import Look, looks

WIDE = 30.0  # largest over smallest value of a distance, above which its axis is logarithmic
_DISTANCES = ("fd_world", "fd_garment", "fid")
_FRONT = "Pareto front"


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Find the points that no other beats in both coordinates, both counted as the larger the better.

    Args:
        points: pairs such as (speedup, PSNR).

    Returns:
        Their indices, by rising first coordinate.

    Example:
        >>> pareto([(1.0, 40.0), (2.0, 30.0), (1.5, 25.0), (3.0, 20.0)])
        [0, 1, 3]
    """
    best, kept = -math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            kept.append(index)
    return kept[::-1]


def plot_sweep(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> bytes:
    """Draw quality against speedup; every point is one setting.

    The panels: PSNR to the uncached run, the Frechet distance to the data, and the semantic accuracy if there is any.
    Markers are filled for dita's methods, hollow for other libraries', grey crosses for fewer steps.

    Args:
        rows: of one pipeline, from `read_rows`; rows with errors are left out.
        path: where the PNG goes.
        title: above the picture.

    Returns:
        The bytes of the PNG.

    Example:
        >>> plot_sweep(read_rows("runs/sweep/results.jsonl"), "pareto.png")  # doctest: +SKIP
    """
    import matplotlib

    matplotlib.use("agg", force=False)
    from matplotlib.figure import Figure

    sound = [row for row in rows if not row.get("error")]
    shown = [row for row in sound if row["method"] not in ("plain", "data") and row.get("speedup") is not None]
    styles = looks(shown)
    metrics = _panels(sound)
    figure = Figure(figsize=(6.2 * len(metrics), 4.9 + 0.22 * math.ceil((len(styles) + 1) / 6)), layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(metrics)), metrics, strict=True):
        _draw(panel, metric, shown, styles)
        _compare(panel, metric, sound)
    handles = {label: handle for panel in figure.axes for handle, label in zip(*_legend(panel), strict=True)}
    order = [name for name in (*styles, _FRONT) if name in handles]
    if order:
        columns = min(len(order), 3 * len(metrics))
        figure.legend(
            [handles[name] for name in order], order, loc="outside lower center", ncols=columns, frameon=False
        )
    figure.suptitle(title, fontsize=11)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    small = _palette(stream)
    Path(path).write_bytes(small)
    return small


def _panels(rows: Sequence[Mapping[str, Any]]) -> list[Metric]:
    by_name = {metric.name: metric for metric in METRICS}
    present = [name for name in _DISTANCES if any(row.get(name) is not None for row in rows)]
    names = ["psnr", present[0] if present else "fd_garment", "semantic_accuracy"]
    return [by_name[name] for name in names if name != names[-1] or any(row.get(name) is not None for row in rows)]


def _draw(panel: Any, metric: Metric, rows: Sequence[Mapping[str, Any]], styles: Mapping[str, Look]) -> None:
    measured = [(row, metric.value(row)) for row in rows]
    usable = [(row, value) for row, value in measured if value is not None and math.isfinite(value)]
    for name, look in styles.items():
        line = sorted((row["speedup"], value) for row, value in usable if row["method"] == name)
        if line:
            inside = "none" if look.origin == "peer" else look.colour
            panel.plot(
                *zip(*line, strict=True), label=name, color=(look.colour, 0.5), linestyle=look.line, linewidth=1.3,
                marker=look.marker, markerfacecolor=inside, markeredgecolor=look.colour, markersize=6,
                markeredgewidth=1.3,
            )  # fmt: skip
    front = pareto([(row["speedup"], metric.rank(value)) for row, value in usable])
    panel.plot(
        [usable[index][0]["speedup"] for index in front], [usable[index][1] for index in front], drawstyle="steps-pre",
        color="#000000", alpha=0.16, linewidth=6, solid_capstyle="round", zorder=0, label=_FRONT,
    )  # fmt: skip
    values = [value for _, value in usable]
    if values and metric.better == "lower" and min(values) > 0 and max(values) > WIDE * min(values):
        panel.set_yscale("log")
    panel.set_xlabel("speedup, wall clock")
    panel.set_ylabel(f"{metric.title} ({metric.better} is better)")
    panel.grid(color="#e4e4e4", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    if metric.form.endswith("%"):
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _compare(panel: Any, metric: Metric, rows: Sequence[Mapping[str, Any]]) -> None:
    levels = [(30.0, ":", "")] if metric.name == "psnr" else []
    for name, style, text in (("plain", "--", "uncached run"), ("data", ":", "real data")):
        found = next((metric.value(row) for row in rows if row["method"] == name), None)
        if found is not None:
            levels.append((found, style, text))
    for value, style, text in levels:
        panel.axhline(value, color="#444444", linewidth=0.9, linestyle=style)
        right = panel.get_yaxis_transform()
        panel.text(1.0, value, text, transform=right, ha="right", va="bottom", fontsize=8, color="#444444")


def _legend(panel: Any) -> tuple[list[Any], list[str]]:
    return panel.get_legend_handles_labels()


def _palette(stream: io.BytesIO) -> bytes:
    from PIL import Image

    result = io.BytesIO()
    Image.open(stream).convert("RGB").quantize(192, dither=Image.Dither.NONE).save(result, format="png", optimize=True)
    return result.getvalue()


def strip(images: torch.Tensor, gap: int = 2, limit: int = 128) -> bytes:
    """Lay images side by side in one PNG.

    Args:
        images: float [N, 1 or 3, H, W] in [0, 1].
        gap: white pixels between them.
        limit: longest side of an image in the picture, in pixels; larger ones are averaged down.

    Returns:
        The bytes of an 8-bit PNG of H x (N W + (N - 1) gap) pixels.

    Example:
        >>> strip(torch.zeros(3, 1, 8, 8))[1:4]
        b'PNG'
    """
    from PIL import Image

    pixels = (shrink(images, limit).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    joined = join(list(pixels), gap, axis=1)
    stream = io.BytesIO()
    Image.fromarray(joined.squeeze(-1) if joined.shape[-1] == 1 else joined).save(stream, format="png", optimize=True)
    return stream.getvalue()
