"""The rows of a sweep: kept as JSON lines, read back, compared and printed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dita.errors import DitaError
from dita.eval.columns import COLUMNS, Column, psnr_of

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]
_BASELINES = ("plain", "data", "fewer steps")
_ON_CONSOLE = (
    "method", "setting", "speedup", "computed", "PSNR dB", "perceptual dist.", "FD-garment", "FD-world",
    "class acc.", "semantic acc.",
)  # fmt: skip


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


def origin_of(row: Mapping[str, Any]) -> str:
    """Whose method a row is: "dita", "peer", or "baseline" for the plain sampler and the data.

    Example:
        >>> origin_of({"method": "fewer steps"}), origin_of({"method": "taylorseer"})
        ('baseline', 'dita')
    """
    return row.get("origin") or ("baseline" if row["method"] in _BASELINES else "dita")


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


def used_columns(rows: Iterable[Mapping[str, Any]]) -> list[Column]:
    """The columns in which some row has something; task, media and frames only where the rows differ in them.

    Example:
        >>> [column.title for column in used_columns([{"method": "plain", "label": "50 steps", "media": "image"}])]
        ['method', 'setting']
    """
    rows, used = list(rows), []
    for column in COLUMNS:
        texts = {column.text(row) for row in rows} - {""}
        if len(texts) > (1 if column.context else 0):
            used.append(column)
    return used


def table(rows: list[Row], intervals: bool = False) -> tuple[list[str], list[list[str]]]:
    """Lay rows out as headings and cells of text, without columns that are empty throughout; an error fills its row.

    Args:
        rows: from `read_rows`.
        intervals: write the 95 % interval behind a value that has one, as "33.8 [32.9, 34.7]".

    Example:
        >>> table([{"method": "plain", "label": "50 steps", "samples": 16}])
        (['method', 'setting', 'samples'], [['plain', '50 steps', '16']])
    """
    columns = used_columns(rows)
    cells = []
    for row in rows:
        spreads = [column.spread(row) if intervals else "" for column in columns]
        texts = [column.text(row) for column in columns]
        line = [f"{text} {spread}" if text and spread else text for text, spread in zip(texts, spreads, strict=True)]
        if row.get("error"):
            line[1] = f"{line[1]}: failed: {row['error']}"
        cells.append(line)
    return [column.title for column in columns], cells


def to_markdown(rows: list[Row], intervals: bool = True) -> str:
    """Write rows as a GitHub table, ending in a newline; `intervals` as in `table`.

    Example:
        >>> print(to_markdown([{"method": "plain", "label": "50 steps", "samples": 16}]), end="")
        | method | setting | samples |
        |---|---|---:|
        | plain | 50 steps | 16 |
    """
    head, cells = table(rows, intervals)
    return markdown_table(head, cells, left=("method", "setting", "origin", "task", "media"))


def markdown_table(head: Sequence[str], cells: Iterable[Sequence[str]], left: Collection[str] = ()) -> str:
    """Write headings and cells of text as a GitHub table; the columns named in `left` are set left, the rest right.

    Example:
        >>> print(markdown_table(["a", "b"], [["x|y", "1"]], left=["a"]), end="")
        | a | b |
        |---|---:|
        | x\\|y | 1 |
    """
    rule = "|".join("---" if title in left else "---:" for title in head)
    lines = [head, *([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in cells)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], f"|{rule}|", *text[1:]]) + "\n"


def to_rich(rows: list[Row], title: str | None = None) -> Table:
    """Build the console table of rows: the columns that fit a terminal; results.md has all."""
    from rich.markup import escape
    from rich.table import Table

    head, cells = table(rows)
    shown = [place for place, name in enumerate(head) if name in _ON_CONSOLE]
    result = Table(title=title)
    for place in shown:
        result.add_column(head[place], justify="left" if head[place] in ("method", "setting") else "right")
    for line in cells:
        result.add_row(*(escape(line[place]) for place in shown))
    return result
