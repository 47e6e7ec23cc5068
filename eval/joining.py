"""Putting sweeps of one pipeline together that were made at different times or on different machines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dita.errors import DitaError
from dita.eval.embedded import Picture, pictures_in
from dita.eval.pipelines import BUNDLED
from dita.eval.rows import Row, append_row, read_rows
from dita.eval.settings import FEWER_STEPS, PLAIN, digest
from dita.eval.sweeping import publish
from dita.eval.task import task_of

_SAME = ("task", "weights", "samples", "seed", "guidance", "plain_steps", "prompts", "call", "dtype")
_PICTURES = ("png", "jpeg", "webp")
_JUDGED = ("perceptual", "fd_garment", "fd_world")


def join_sweeps(folders: Sequence[str | Path], out: str | Path, by_setting: bool = False) -> Path:
    """Write one table, plot and report from the rows of several sweeps.

    A method is taken from the last sweep that has it, with all its settings, for an older one knows another code; the
    plain run, fewer steps and what the report says of the machine from the first one that has them. Every row keeps its
    own date, code version and device.
    Pictures are those in the sweeps' images/, and where one is not there, that in the sweep's report.html, if it is.
    Columns read off a bundled network are left out of sweeps whose network was another than the last sweep's.

    Args:
        folders: of sweeps, each with a results.jsonl, in the order of their making.
        out: folder to write to; may be one of them.
        by_setting: settings that later sweeps do not have are kept too, as where those only added some.

    Returns:
        The path of report.html.

    Raises:
        DitaError: a folder has no rows, or the sweeps did not draw the same samples from the same weights.

    Example:
        >>> join_sweeps(["runs/monday", "runs/tuesday"], "runs/both")  # doctest: +SKIP
        PosixPath('runs/both/report.html')
    """
    paths, out = [Path(folder) for folder in folders], Path(out)
    sweeps = [_rows(path) for path in paths]
    _check(paths, sweeps)
    judge = sweeps[-1][0]["judge"]
    chosen: dict[str, list[Row]] = {}
    places: dict[str, Path] = {}
    for path, rows in zip(paths, sweeps, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            old = chosen.get(method, [])
            if old and (method == PLAIN or (method == FEWER_STEPS and not by_setting)):
                continue
            new = [_judged_by(judge, row) for row in rows if row["method"] == method]
            if by_setting:
                newest = {_setting(row): row for row in new}  # a folder that was resumed with newer code has two
                new = [row for row in old if _setting(row) not in newest] + list(newest.values())
            chosen[method] = new
            places |= {row["key"]: path for row in new if row not in old}
    first = [row for name in (PLAIN, "data", FEWER_STEPS) for row in chosen.pop(name, ())]
    ours = sorted(name for name in chosen if chosen[name][0]["origin"] == "dita")
    rows = [*first, *(row for name in (*ours, *(n for n in chosen if n not in ours)) for row in chosen[name])]
    _write(rows, places, dict(zip(paths, sweeps, strict=True)), out)
    return publish(out, rows, str(rows[0]["task"]), _prompts(rows[0]))


def _setting(row: Row) -> str:
    return digest({"config": row.get("config"), "steps": row.get("steps")})


def _rows(folder: Path) -> list[Row]:
    """The newest row of each setting, the plain one first."""
    rows = list({row["key"]: row for row in read_rows(folder / "results.jsonl")}.values())
    if not any(row["method"] == PLAIN and not row.get("error") for row in rows):
        raise DitaError(f"{folder / 'results.jsonl'} holds no plain run; expected the rows of a sweep")
    return sorted(rows, key=lambda row: row["method"] != PLAIN)


def _check(paths: Sequence[Path], sweeps: Sequence[list[Row]]) -> None:
    for path, rows in zip(paths, sweeps, strict=True):
        odd = [n for row in rows for n in _SAME if row.get(n) != sweeps[0][0].get(n)]
        if odd:
            raise DitaError(
                f"the rows in {path} differ in {', '.join(dict.fromkeys(odd))} from the first sweep's; only sweeps "
                "that drew the same samples from the same weights can be put together"
            )


def _prompts(plain: Row) -> tuple[str, ...]:
    """The captions of a bundled pipeline, if rows were drawn from them; rows themselves hold a digest."""
    if plain["prompts"] is None or plain["task"] not in BUNDLED:
        return ()
    prompts = task_of(BUNDLED[plain["task"]]).prompts(plain["samples"], plain["seed"])
    return prompts if digest(prompts) == plain["prompts"] else ()


def _judged_by(judge: str, row: Row) -> Row:
    if row["judge"] == judge:
        return row
    gone = {name for name in row if name in _JUDGED or name.endswith("_accuracy")}
    kept = {name: value for name, value in row.items() if name not in gone}
    kept["intervals"] = {name: ends for name, ends in (row.get("intervals") or {}).items() if name not in gone}
    return kept


def _write(rows: Sequence[Row], places: dict[str, Path], sweeps: dict[Path, list[Row]], out: Path) -> None:
    (out / "images").mkdir(parents=True, exist_ok=True)
    fresh = out / "results.jsonl.part"
    fresh.unlink(missing_ok=True)
    pages: dict[Path, dict[str, list[Picture]]] = {}
    for row in rows:
        append_row(fresh, row)
        place, key = places[row["key"]], row["key"]
        files = [path for suffix in _PICTURES if (path := place / "images" / f"{key}.{suffix}").is_file()]
        if not files and place not in pages:
            pages[place] = _embedded(place / "report.html", sweeps[place])
        pictures = [(path.suffix[1:], path.read_bytes()) for path in files] or pages[place].get(key, ())
        for suffix, data in pictures:
            (out / "images" / f"{key}.{suffix}").write_bytes(data)
    fresh.replace(out / "results.jsonl")


def _embedded(page: Path, rows: Sequence[Row]) -> dict[str, list[Picture]]:
    return pictures_in(page.read_text(encoding="utf-8"), rows) if page.is_file() else {}
