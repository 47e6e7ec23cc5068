"""Pictures of a sweep: quality against speed, and strips of images."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dita.eval.rows import psnr_of

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#44aa99")
_MARKERS = "osD^vPX*"


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
    """Draw PSNR to the uncached run and FD-garment to the data against speedup; every point is one setting.

    Args:
        rows: from `read_rows`; rows with errors are left out.
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

    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    panels = figure.subplots(1, 2)
    shown = [row for row in rows if not row.get("error") and row["method"] not in ("plain", "data")]
    by_name = {row["method"]: row for row in rows if row["method"] in ("plain", "data")}
    _panel(panels[0], [(row, psnr_of(row)) for row in shown], higher_is_better=True)
    _panel(panels[1], [(row, row.get("fd_garment")) for row in shown], higher_is_better=False)
    panels[0].axhline(30, color="#888888", linewidth=0.8, linestyle=":")
    panels[0].set_ylabel("PSNR to the uncached run, dB")
    for name, style, text in (("plain", "--", "uncached run"), ("data", ":", "real training images")):
        value = by_name.get(name, {}).get("fd_garment")
        if value is not None:
            panels[1].axhline(value, color="#444444", linewidth=0.9, linestyle=style, label=text)
    panels[1].set_ylabel("FD-garment to the test set (lower is better)")
    for panel in panels:
        panel.set_xlabel("speedup, wall clock")
        panel.grid(color="#e4e4e4", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    if panels[1].get_legend_handles_labels()[0]:
        panels[1].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    Path(path).write_bytes(stream.getvalue())
    return stream.getvalue()


def _panel(panel: Any, points: list[tuple[Mapping[str, Any], float | None]], higher_is_better: bool) -> None:
    usable = [(row, value) for row, value in points if value is not None and math.isfinite(value)]
    methods = list(dict.fromkeys(row["method"] for row, _ in usable))
    accelerators = [name for name in methods if name != "fewer steps"]
    for name in methods:
        line = sorted((row["speedup"], value) for row, value in usable if row["method"] == name)
        position = accelerators.index(name) if name in accelerators else 0
        look: dict[str, Any] = {
            "color": _COLOURS[position % len(_COLOURS)], "marker": _MARKERS[position % len(_MARKERS)],
        } if name in accelerators else {"color": "#777777", "marker": "x", "linestyle": "--"}  # fmt: skip
        panel.plot(*zip(*line, strict=True), label=name, linewidth=1.4, markersize=5.5, **look)
    sign = 1 if higher_is_better else -1
    pairs = [(row["speedup"], sign * value) for row, value in usable]
    front = pareto(pairs)
    panel.plot(
        [pairs[i][0] for i in front],
        [sign * pairs[i][1] for i in front],
        color="#000000", alpha=0.18, linewidth=6, solid_capstyle="round", zorder=0, label="Pareto front",
    )  # fmt: skip


def strip(images: torch.Tensor, gap: int = 2) -> bytes:
    """Lay images side by side in one PNG.

    Args:
        images: float [N, 1 or 3, H, W] in [0, 1].
        gap: white pixels between them.

    Returns:
        The bytes of an 8-bit PNG of H x (N W + (N - 1) gap) pixels.

    Example:
        >>> strip(torch.zeros(3, 1, 8, 8))[1:4]
        b'PNG'
    """
    from PIL import Image

    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    white = np.full((pixels.shape[1], gap, pixels.shape[3]), 255, np.uint8)
    parts = [part for image in pixels for part in (white, image)][1:]
    joined = np.concatenate(parts, axis=1)
    stream = io.BytesIO()
    Image.fromarray(joined.squeeze(-1) if joined.shape[-1] == 1 else joined).save(stream, format="png", optimize=True)
    return stream.getvalue()
