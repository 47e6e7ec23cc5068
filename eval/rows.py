"""The rows of a sweep: kept as JSON lines, read back, compared and printed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dita.errors import DitaError

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]


def append_row(path: str | Path, row: Mapping[str, Any]) -> None:
    """Add one row to a JSON-lines file at once, so that an interruption loses nothing that was measured.

    Raises:
        DitaError: the row holds a value that JSON lacks, such as infinity.

    Example:
        >>> append_row("results.jsonl", {"key": "a"})  # doctest: +SKIP
    """
    try:
        line = json.dumps(row, allow_nan=False)
    except ValueError as error:
        raise DitaError(f"row {row.get('method')} {row.get('label')} cannot be written as JSON: {error}") from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write(("\n" if cut else "") + line + "\n")


def read_rows(path: str | Path) -> list[Row]:
    """Read the rows of a file, oldest first; a line cut short by an interruption is left out.

    Returns:
        The rows; none if there is no file.

    Example:
        >>> read_rows("no such file")
        []
    """
    path = Path(path)
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "key" in row:
            rows.append(row)
    return rows


def psnr_of(row: Mapping[str, Any]) -> float:
    """Mean PSNR of a row in dB; inf if every image was identical, -inf if there is none.

    Example:
        >>> psnr_of({"psnr": None, "identical": 16, "samples": 16})
        inf
    """
    if row.get("psnr") is not None:
        return float(row["psnr"])
    return math.inf if row.get("samples") and row.get("identical") == row.get("samples") else -math.inf


def best_at(rows: Iterable[Mapping[str, Any]], psnr: float = 30.0) -> dict[str, Mapping[str, Any] | None]:
    """Find each method's fastest setting whose mean PSNR to the uncached run is high enough.

    Args:
        rows: from `read_rows`; errors and the rows of the data and of the plain run are passed over.
        psnr: lowest mean PSNR that counts, in dB.

    Returns:
        By method, in the order of appearance: the row, or None if no setting reaches the PSNR.

    Example:
        >>> rows = [{"method": "a", "speedup": 2.0, "psnr": 31.0}, {"method": "a", "speedup": 3.0, "psnr": 22.0}]
        >>> best_at(rows)["a"]["speedup"]
        2.0
    """
    best: dict[str, Mapping[str, Any] | None] = {}
    for row in rows:
        if row.get("error") or row.get("speedup") is None or row["method"] in ("plain", "data"):
            continue
        held = best.setdefault(row["method"], None)
        if psnr_of(row) >= psnr and (held is None or row["speedup"] > held["speedup"]):
            best[row["method"]] = row
    return best


class Column(NamedTuple):
    """One column of the table: heading, how a row becomes text, and what the heading means."""

    title: str
    text: Callable[[Mapping[str, Any]], str]
    meaning: str


def _number(name: str, form: str, factor: float = 1.0) -> Callable[[Mapping[str, Any]], str]:
    def text(row: Mapping[str, Any]) -> str:
        value = row.get(name)
        return "" if value is None else format(value if factor == 1 else value * factor, form)

    return text


def _psnr_text(row: Mapping[str, Any]) -> str:
    value = psnr_of(row)
    return "" if value == -math.inf else "identical" if value == math.inf else f"{value:.1f}"


COLUMNS: tuple[Column, ...] = (
    Column("method", lambda row: row["method"], "registry name"),
    Column("setting", lambda row: row["label"], "what varies along the method's ladder"),
    Column(
        "speedup",
        _number("speedup", ".2f"),
        "plain seconds / own seconds, the same batch one after the other; median",
    ),
    Column("ms/image", _number("seconds_per_image", ".1f", 1000), "wall-clock time of a whole run, per image"),
    Column("FLOPs", _number("flops_ratio", ".1%"), "operations counted, of the plain run's"),
    Column("computed", _number("computed_fraction", ".1%"), "transformer steps computed, of the plain run's"),
    Column("cache MiB", _number("peak_cache_bytes", ".2f", 2**-20), "largest extra memory held, for one batch"),
    Column("PSNR dB", _psnr_text, "to the plain run, same seeds; mean over images that differ"),
    Column("SSIM", _number("ssim", ".3f"), "to the plain run, same seeds"),
    Column("garment dist.", _number("perceptual", ".4f"), "perceptual distance to the plain run, bundled classifier"),
    Column("LPIPS", _number("lpips", ".4f"), "to the plain run, AlexNet"),
    Column("FD-garment", _number("fd_garment", ".2f"), "Frechet distance to the test set, bundled classifier"),
    Column("FID", _number("fid", ".2f"), "Frechet distance to the test set, Inception-v3"),
    Column("class acc.", _number("class_accuracy", ".1%"), "images recognised as the class asked for"),
    Column("samples", _number("samples", "d"), "images drawn"),
)


_LEFT_OUT_ON_CONSOLE = ("ms/image", "FLOPs", "cache MiB", "SSIM", "LPIPS", "FID", "samples")


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Lay rows out as headings and cells of text, without columns that are empty throughout; an error fills its row.

    Example:
        >>> table([{"method": "plain", "label": "50 steps", "samples": 16}])
        (['method', 'setting', 'samples'], [['plain', '50 steps', '16']])
    """
    cells = [[column.text(row) for column in COLUMNS] for row in rows]
    for row, line in zip(rows, cells, strict=True):
        if row.get("error"):
            line[1] = f"{line[1]}: failed: {row['error']}"
    used = [index for index in range(len(COLUMNS)) if any(line[index] for line in cells)]
    return [COLUMNS[index].title for index in used], [[line[index] for index in used] for line in cells]


def to_markdown(rows: list[Row]) -> str:
    """Write rows as a GitHub table, ending in a newline.

    Example:
        >>> print(to_markdown([{"method": "plain", "label": "50 steps", "samples": 16}]), end="")
        | method | setting | samples |
        |---|---|---:|
        | plain | 50 steps | 16 |
    """
    head, cells = table(rows)
    rule = "|".join("---" if title in ("method", "setting") else "---:" for title in head)
    lines = [head, *([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in cells)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], f"|{rule}|", *text[1:]]) + "\n"


def to_rich(rows: list[Row], title: str | None = None) -> Table:
    """Build the console table of rows: the columns that fit a terminal; results.md has all."""
    from rich.markup import escape
    from rich.table import Table

    head, cells = table(rows)
    shown = [place for place, name in enumerate(head) if name not in _LEFT_OUT_ON_CONSOLE]
    result = Table(title=title)
    for place in shown:
        result.add_column(head[place], justify="left" if head[place] in ("method", "setting") else "right")
    for line in cells:
        result.add_row(*(escape(line[place]) for place in shown))
    return result
