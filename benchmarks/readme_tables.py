"""The tables of the README that are made of committed rows: fastest at 30 dB, at equal semantic accuracy, and
inside a layer.

    python benchmarks/readme_tables.py            # writes them into README.md

Each stands between two comments that name it. Settings are told as `dita.eval.labels.setting_of` tells them, so that a
reader who sets what is named runs that row again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dita.eval.columns import METRICS, interval_of
from dita.eval.labels import setting_of
from dita.eval.rows import Row, best_at, markdown_table, origin_of, read_rows
from dita.eval.winners import best_at_semantic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval" / "results"
_WHOSE = {"dita": "dita", "peer": "peer", "baseline": "plain sampler"}
_TEXT = {metric.name: metric.text for metric in METRICS}


def newest(sweep: str) -> list[Row]:
    """The rows of a committed sweep, the newest of each setting."""
    return list({row["key"]: row for row in read_rows(RESULTS / sweep / "results.jsonl")}.values())


def closest(sweep: str) -> str:
    """Each method's fastest setting at 30 dB or more, and the names of those that have none.

    Example:
        >>> closest("fashion-wan").splitlines()[2].split(" | ")[1:4]
        ['dita', 'interval=4 warmup=5', '3.23']
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


def semantic(sweeps: tuple[str, ...] = ("fashion-dit", "fashion-flux")) -> str:
    """Each method's fastest setting at equal semantic accuracy, the pipelines side by side; "none" if none has it.

    Example:
        >>> semantic().splitlines()[2].split(" | ")[1:3]
        ['4 steps', '11.49']
    """
    best = [best_at_semantic(newest(f"{sweep}-semantic")) for sweep in sweeps]
    names = list(dict.fromkeys(name for each in best for name in each))
    names.sort(key=lambda name: -next((row["speedup"] for each in best if (row := each.get(name))), 0.0))
    head, titles = ["", *(f"{sweep}: setting" for sweep in sweeps)], ["speedup", "computed", "PSNR dB", "change"]
    cells = []
    for name in names:
        line = [name]
        for each in best:
            row = each.get(name)
            missing = ["none" if name in each else "", "", "", "", ""]
            line += missing if row is None else [setting_of(row), *_cost(row), _TEXT["psnr"](row), _change(row)]
        cells.append(line)
    columns = [title for start in head[1:] for title in (start, *titles)]
    return markdown_table(["", *columns], cells, left=head)


def inside(sweep: str = "fashion-wan-attention", cache: str = "freqca") -> str:
    """Methods inside a layer, the closest to the plain run first, each beside exactly its settings with the cache.

    What a calibration found may differ between the two. The plain sampler and the cache alone come last.

    Example:
        >>> inside().splitlines()[4].split(" | ")[1:6]
        ['adjacent=0.5', '0.70', '76%', '0.79', '31.0']
    """
    rows = [row for row in newest(sweep) if row["method"] not in ("plain", "data") and not row.get("error")]
    both = [row for row in rows if row["method"].endswith(f" + {cache}")]
    alone = [row for row in rows if row["method"] in (cache, "fewer steps")]
    own = sorted((row for row in rows if row not in both and row not in alone), key=lambda row: -row["psnr"])
    cells = []
    for row in (*own, *sorted(alone, key=lambda row: row["method"] == cache)):
        settings = None if row in alone else _given(row["config"]["settings"])
        beside = [o for o in both if settings and _given(o["config"]["settings"].get(row["method"], {})) == settings]
        line = [row["method"], setting_of(row), f"{row['density']:.2f}" if row.get("density") else ""]
        line += [f"{row['flops_ratio']:.0%}", *_fast_and_close(row)]
        cells.append(line + (_fast_and_close(beside[0]) if beside else ["", ""]))
    head = ["method", "setting", "density", "FLOPs", "speedup", "PSNR dB", "with FreqCa: speedup", "PSNR dB"]
    return markdown_table(head, cells, left=head[:2])


def written(readme: str) -> str:
    """The README with its tables made anew.

    Example:
        >>> text = (ROOT / "README.md").read_text()
        >>> written(text) == text
        True
    """
    tables = {f"{sweep} at 30 dB": closest(sweep) for sweep in ("fashion-dit", "fashion-flux", "fashion-wan")}
    for name, table in {**tables, "semantic": semantic(), "attention": inside()}.items():
        pattern = rf"(<!-- {name}:start -->\n).*?(<!-- {name}:end -->)"
        readme, count = re.subn(pattern, lambda found, text=table: found[1] + text + found[2], readme, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md has {count} places for the table {name!r}; expected one")
    return readme


def _cost(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['speedup']:.2f}", f"{row['computed_fraction']:.0%}"]


def _fast_and_close(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['speedup']:.2f}", _TEXT["psnr"](row)]


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "table"}


def _change(row: Mapping[str, Any]) -> str:
    low, high = interval_of(row, "accuracy_change") or (0.0, 0.0)
    return f"{100 * row['accuracy_change']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
