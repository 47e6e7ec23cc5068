"""The tables of README.md and docs/ that are made of committed rows: who wins, and what each method does where.

    python benchmarks/readme_tables.py            # writes them into the documents

Each stands between two comments that name it, in whichever document has them. Settings are told as
`dita.eval.labels.setting_of` tells them, so that a reader who sets what is named runs that row again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loop_tables import change, loop_table, tally

from dita.eval.columns import METRICS, interval_of
from dita.eval.labels import setting_of
from dita.eval.rows import Row, best_at, markdown_table, origin_of, read_rows
from dita.eval.winners import Winner, best_at_semantic, winners

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval" / "results"
PIPELINES = ("fashion-dit", "fashion-flux", "fashion-wan")
LOOPS = {
    "fashion-dit": ("fashion-dit-loop", "fashion-dit-loop-more", "fashion-dit-loop-search", "fashion-dit-loop-100"),
    "fashion-flux": ("fashion-flux-loop", "fashion-flux-loop-60", "fashion-flux-loop-more"),
    "fashion-wan": ("fashion-wan-loop", "fashion-wan-loop-more", "fashion-wan-picard"),
}
"""The sweeps of the sampling loop; those that are not measured yet are passed over."""
SIZES = ("fashion-flux-size", "fashion-flux-size-128")
_WHOSE = {"dita": "dita", "peer": "peer", "baseline": "plain sampler"}
_TEXT = {metric.name: metric.text for metric in METRICS}


def newest(sweep: str) -> list[Row]:
    """The rows of a committed sweep, the newest of each setting."""
    return list({row["key"]: row for row in read_rows(RESULTS / sweep / "results.jsonl")}.values())


def closest(sweep: str) -> str:
    """Each method's fastest setting at 30 dB or more, and the names of those that have none.

    Example:
        >>> closest("fashion-wan").splitlines()[2].split(" | ")[1:4]
        ['peer', 'threshold=0.24 max_skip=6 retention=0.1', '4.28']
    """
    best = best_at(newest(sweep))
    rows = sorted((row for row in best.values() if row), key=lambda row: -row["speedup"])
    cells = [
        [row["method"], _WHOSE[origin_of(row)], setting_of(row), *_cost(row), _TEXT["psnr"](row), _TEXT["ssim"](row)]
        for row in rows
    ]
    head = ["method", "whose", "setting", "speedup", "computed", "PSNR dB", "SSIM"]
    table = markdown_table(head, cells, left=("method", "whose", "setting"))
    return f"{table}\nNo setting at 30 dB: {', '.join(name for name, row in best.items() if not row) or 'none'}.\n"


def semantic(pipeline: str) -> str:
    """Each method's fastest setting at equal semantic accuracy, and the names of those that have none.

    Example:
        >>> semantic("fashion-dit").splitlines()[2].split(" | ")[2:4]
        ['4 steps', '11.49']
    """
    best = best_at_semantic(newest(f"{pipeline}-semantic"))
    rows = sorted((row for row in best.values() if row), key=lambda row: -row["speedup"])
    cells = [
        [row["method"], _WHOSE[origin_of(row)], setting_of(row), *_cost(row), _TEXT["psnr"](row), change(row)]
        for row in rows
    ]
    head = ["method", "whose", "setting", "speedup", "computed", "PSNR dB", "change, points"]
    table = markdown_table(head, cells, left=("method", "whose", "setting"))
    missing = ", ".join(name for name, row in best.items() if not row) or "none"
    return f"{table}\nNo setting at equal accuracy: {missing}.\n"


def best(pipelines: Sequence[str] = PIPELINES, margin: float = 1.05) -> str:
    """The fastest of dita, of other libraries and of fewer steps, by pipeline and criterion, each with its intervals.

    The largest speedup of a line is bold if it is `margin` times each other.

    Example:
        >>> best().splitlines()[2].split(" | ")[1]
        'PSNR at least 30 dB'
    """
    cells = []
    for pipeline in pipelines:
        for sweep in (f"{pipeline}-semantic", f"{pipeline}-fitted"):
            rows = newest(sweep)
            plain = next(row for row in rows if row["method"] == "plain")
            for each in winners(rows):
                close = "PSNR" in each.criterion
                title = "PSNR at least 30 dB" if close else each.criterion
                line = [f"{pipeline}, {_samples(plain)}", title]
                cells.append(line + _contest(each, close, margin))
    head = ["pipeline", "fastest at", "dita", "best of other libraries", "fewer steps"]
    return markdown_table(head, cells, left=head)


def inside(sweep: str = "fashion-wan-attention", cache: str = "freqca") -> str:
    """Methods inside a layer, the closest to the plain run first, each beside exactly its settings with the cache.

    What a calibration found may differ between the two. The plain sampler and the cache alone come last.

    Example:
        >>> inside().splitlines()[4].split(" | ")[1:6]
        ['density=0.4', '0.58', '75%', '1.00', '32.7']
    """
    rows = [row for row in newest(sweep) if row["method"] not in ("plain", "data") and not row.get("error")]
    both = [row for row in rows if row["method"].endswith(f" + {cache}")]
    alone = [row for row in rows if row["method"] in (cache, "fewer steps")]
    own = sorted((row for row in rows if row not in both and row not in alone), key=lambda row: -row["psnr"])
    cells = []
    for row in (*own, *sorted(alone, key=lambda row: (row["method"] == cache, -row["psnr"]))):
        settings = None if row in alone else _given(row["config"]["settings"])
        beside = [o for o in both if settings and _given(o["config"]["settings"].get(row["method"], {})) == settings]
        line = [row["method"], setting_of(row), f"{row['density']:.2f}" if row.get("density") else ""]
        line += [f"{row['flops_ratio']:.0%}", *_fast_and_close(row)]
        cells.append(line + (_fast_and_close(beside[0]) if beside else ["", ""]))
    head = ["method", "setting", "density", "FLOPs", "speedup", "PSNR dB", "with FreqCa: speedup", "PSNR dB"]
    return markdown_table(head, cells, left=head[:2])


def loops(sweeps: Sequence[str]) -> str:
    """The tables of some sweeps of the sampling loop, each under its name; a sweep without a folder is passed over.

    Example:
        >>> loops(["fashion-wan-picard", "not measured"]).splitlines()[0][:22]
        '**fashion-wan-picard**'
    """
    parts = []
    for sweep in measured(sweeps):
        rows = newest(sweep)
        plain = next(row for row in rows if row["method"] == "plain")
        report = f"[report](../../eval/results/{sweep}/report.html)"
        title = f"**{sweep}**: {plain['plain_steps']} steps, {_samples(plain)}{_size(plain)} a setting; {report}."
        failed = ", ".join(f"{row['method']} {setting_of(row)}" for row in rows if row.get("error"))
        parts.append(f"{title}\n\n{loop_table(rows)}" + (f"\nRefused: {failed}.\n" if failed else ""))
    return "\n".join(parts)


def beaten() -> str:
    """Which methods on the loop beat fewer steps, by pipeline.

    Example:
        >>> beaten().splitlines()[0]
        '| method | fashion-dit | fashion-flux | fashion-wan |'
    """
    return tally({name: [newest(sweep) for sweep in measured(sweeps)] for name, sweeps in LOOPS.items()})


def measured(sweeps: Sequence[str]) -> list[str]:
    """Those sweeps that have committed rows.

    Example:
        >>> measured(["fashion-dit", "not measured"])
        ['fashion-dit']
    """
    return [sweep for sweep in sweeps if (RESULTS / sweep / "results.jsonl").is_file()]


BLOCKS: dict[str, Callable[[], str]] = {
    "winners": best,
    **{f"{pipeline} at 30 dB": partial(closest, pipeline) for pipeline in PIPELINES},
    **{f"{pipeline} at equal accuracy": partial(semantic, pipeline) for pipeline in PIPELINES},
    "attention": inside,
    "beats fewer steps": beaten,
    **{f"{pipeline} loop": partial(loops, sweeps) for pipeline, sweeps in LOOPS.items()},
    "sizes": partial(loops, SIZES),
}
"""What makes each block, by the name in its comments."""


def documents() -> dict[Path, str]:
    """The text of every document that may hold a block.

    Example:
        >>> ROOT / "README.md" in documents()
        True
    """
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {path: path.read_text(encoding="utf-8") for path in paths}


def written(texts: Mapping[Path, str]) -> dict[Path, str]:
    """The documents with their tables made anew.

    Raises:
        SystemExit: a block has no place, or several.

    Example:
        >>> written(documents()) == documents()
        True
    """
    texts = dict(texts)
    for name, make in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)}:start -->\n).*?(<!-- {re.escape(name)}:end -->)", re.DOTALL)
        places = [path for path, text in texts.items() for _ in pattern.finditer(text)]
        if len(places) != 1:
            raise SystemExit(f"README.md and docs/ have {len(places)} places for the table {name!r}; expected one")
        table = make()
        texts[places[0]] = pattern.sub(lambda found, table=table: found[1] + table + found[2], texts[places[0]])
    return texts


def _samples(row: Mapping[str, Any]) -> str:
    return f"{row['samples']} clips" if row.get("media") == "video" else f"{row['samples']} images"


def _size(row: Mapping[str, Any]) -> str:
    call = row.get("call") or {}
    size = f" of {call['height']}x{call['width']}" if {"height", "width"} <= call.keys() else ""
    return f" of {row['frames']} frames" if row.get("frames") else size


def _contest(each: Winner, close: bool, margin: float) -> list[str]:
    rows = (each.dita, each.peer, each.baseline)
    speedups = sorted((row["speedup"] for row in rows if row is not None), reverse=True)
    cells = []
    for row in rows:
        if row is None:
            cells.append("none")
            continue
        first = row["speedup"] == speedups[0] and (len(speedups) < 2 or speedups[0] >= margin * speedups[1])
        speedup = f"**{row['speedup']:.2f}x**" if first else f"{row['speedup']:.2f}x"
        ends = interval_of(row, "psnr")
        spread = f" ({ends[0]:.1f} to {ends[1]:.1f})" if close and ends is not None else ""
        moved = "" if close else f", {change(row)} points"
        cells.append(f"{speedup}: {row['method']} {setting_of(row)}; {_TEXT['psnr'](row)} dB{spread}{moved}")
    return cells


def _cost(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['speedup']:.2f}", f"{row['computed_fraction']:.0%}"]


def _fast_and_close(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['speedup']:.2f}", _TEXT["psnr"](row)]


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "table"}


if __name__ == "__main__":
    for path, text in written(documents()).items():
        path.write_text(text, encoding="utf-8")
