"""Who is fastest at equal quality: dita's methods, other libraries' or the plain sampler with fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dita.errors import DitaError
from dita.eval.columns import interval_of, psnr_of
from dita.eval.rows import markdown_table, origin_of

_SEMANTIC = ("semantic_accuracy", "class_accuracy")
MARGIN = 0.05  # of the samples, which may be lost unseen at equal semantic accuracy
LEAST = round(3 / MARGIN)  # samples: of fewer, a change in a share MARGIN of them strikes none in 1 of 20 draws


class Winner(NamedTuple):
    """The fastest rows that pass one criterion; None where no setting of that origin passes.

    Attributes:
        criterion: what they pass, in words.
        meaning: the same in full.
        dita, peer, baseline: the rows.
        task: the pipeline, if the rows name one.
    """

    criterion: str
    meaning: str
    dita: Mapping[str, Any] | None
    peer: Mapping[str, Any] | None
    baseline: Mapping[str, Any] | None
    task: str = ""

    def over(self, other: Mapping[str, Any] | None) -> float | None:
        """Speedup of dita's row divided by that of another; None if either is missing.

        Example:
            >>> Winner("", "", {"speedup": 3.0}, {"speedup": 2.0}, None).over({"speedup": 2.0})
            1.5
        """
        return None if self.dita is None or other is None else self.dita["speedup"] / other["speedup"]


def semantic_of(row: Mapping[str, Any]) -> tuple[str, float] | None:
    """The share of samples that are what was asked for, with its field: captions if there are any, else classes.

    Example:
        >>> semantic_of({"class_accuracy": 0.9})
        ('class_accuracy', 0.9)
    """
    return next(((name, float(row[name])) for name in _SEMANTIC if row.get(name) is not None), None)


def comparable(rows: Iterable[Mapping[str, Any]]) -> tuple[str, float] | None:
    """What `semantic_of` gives of the plain run among the rows, if it can be lost and seen to be.

    None without a plain run, if nothing it draws is what was asked for, or of fewer samples than 60 (`LEAST`).

    Example:
        >>> comparable([{"method": "plain", "class_accuracy": 0.9, "samples": 60}])
        ('class_accuracy', 0.9)
        >>> comparable([{"method": "plain", "class_accuracy": 0.9, "samples": 6}])
    """
    plain = next((row for row in rows if row["method"] == "plain" and not row.get("error")), {})
    held = semantic_of(plain)
    return None if held is None or held[1] <= 0 or plain.get("samples", 0) < LEAST else held


def best_at_semantic(rows: Iterable[Mapping[str, Any]], tolerance: float = 0.01) -> dict[str, Mapping[str, Any] | None]:
    """Find each method's fastest setting that draws what was asked for as reliably as the plain run.

    Where a row says how its accuracy differs from the plain run's sample by sample (`accuracy_change`), the setting
    does if the 95 % interval of that difference lies above -5 points and there are at least 60 samples. Where it does
    not, the setting does if its semantic accuracy (`class_accuracy` where classes are asked for) is not below the plain
    run's by more than the tolerance, or lies within the plain run's 95 % interval.

    Args:
        rows: of one pipeline, from `read_rows`, the plain run among them.
        tolerance: largest loss that counts as equal without pairs, as a share of the samples.

    Returns:
        By method, in the order of appearance: the row, or None if no setting passes.

    Raises:
        DitaError: there is no plain run with such an accuracy to compare with.

    Example:
        >>> rows = [{"method": "plain", "semantic_accuracy": 0.9}]
        >>> rows += [{"method": "a", "speedup": s, "semantic_accuracy": v} for s, v in [(2.0, 0.9), (3.0, 0.5)]]
        >>> best_at_semantic(rows)["a"]["speedup"]
        2.0
    """
    rows = list(rows)
    plain = next((row for row in rows if row["method"] == "plain" and not row.get("error")), {})
    held = semantic_of(plain)
    if held is None:
        raise DitaError("no row of the plain run has a semantic or class accuracy; expected one to compare with")
    name, value = held
    lowest = min(value - tolerance, (interval_of(plain, name) or (value, value))[0])

    def passes(row: Mapping[str, Any]) -> bool:
        change = interval_of(row, "accuracy_change")
        if change is not None:
            return row["samples"] >= LEAST and change[0] >= -MARGIN
        return row.get(name) is not None and row[name] >= lowest - 1e-12

    return _fastest(rows, passes)


def winners(rows: Iterable[Mapping[str, Any]], psnr: float = 30.0, tolerance: float = 0.01) -> list[Winner]:
    """Find the fastest setting of dita, of its peers and of the plain sampler, for each pipeline and criterion.

    Args:
        rows: from `read_rows`; errors are passed over.
        psnr: lowest mean PSNR to the plain run that counts, in dB.
        tolerance: see `best_at_semantic`; that criterion is left out where the plain run has no such accuracy, or
            one of 0, or where the samples are too few to tell.

    Returns:
        One for each pipeline and criterion, PSNR first.

    Example:
        >>> rows = [{"method": "a", "speedup": 3.0, "psnr": 31.0}]
        >>> rows += [{"method": "fewer steps", "speedup": 2.0, "psnr": 35.0}]
        >>> [(each.criterion, each.over(each.baseline)) for each in winners(rows)]
        [('PSNR >= 30 dB', 1.5)]
    """
    rows, found = list(rows), []
    for task in dict.fromkeys(row.get("task") or "" for row in rows):
        own = [row for row in rows if (row.get("task") or "") == task]
        close = _fastest(own, lambda row: psnr_of(row) >= psnr)
        meaning = f"mean PSNR to the plain run of the same seeds at least {psnr:g} dB"
        found.append(_winner(f"PSNR >= {psnr:g} dB", meaning, close, task))
        if comparable(own) is not None:
            paired = any("accuracy_change" in row for row in own)
            meaning = (
                f"the 95 % interval of the samples lost, of those drawn as asked, ends below {100 * MARGIN:g} points"
            )
            if not paired:
                meaning = (
                    f"as many samples as asked for as in the plain run: at most {100 * tolerance:g} point fewer, "
                    "or within the plain run's 95 % interval"
                )
            found.append(_winner("equal semantic accuracy", meaning, best_at_semantic(own, tolerance), task))
    return found


def winners_to_markdown(rows: Iterable[Mapping[str, Any]], psnr: float = 30.0, tolerance: float = 0.01) -> str:
    """Write `winners` as a GitHub table, ending in a newline; a dash where no setting passes.

    Example:
        >>> print(winners_to_markdown([{"method": "a", "label": "x=1", "speedup": 3.0, "psnr": 31.0}]), end="")
        | fastest at | dita | speedup | peer | speedup | fewer steps | speedup | dita / peer | dita / fewer steps |
        |---|---|---:|---|---:|---|---:|---:|---:|
        | PSNR >= 30 dB | a x=1 | 3.00 | - | - | - | - | - | - |
    """
    found = winners(rows, psnr, tolerance)
    several = len({each.task for each in found}) > 1
    head = ["fastest at", "dita", "speedup", "peer", "speedup", "fewer steps", "speedup"]
    lines = []
    for each in found:
        line = [f"{each.task}: {each.criterion}" if several and each.task else each.criterion]
        for row in (each.dita, each.peer, each.baseline):
            line += ["-", "-"] if row is None else [f"{row['method']} {row['label']}", f"{row['speedup']:.2f}"]
        ratios = [each.over(each.peer), each.over(each.baseline)]
        lines.append(line + ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios])
    return markdown_table([*head, "dita / peer", "dita / fewer steps"], lines, left=("fastest at", *head[1::2]))


def _fastest(
    rows: Sequence[Mapping[str, Any]], passes: Callable[[Mapping[str, Any]], bool]
) -> dict[str, Mapping[str, Any] | None]:
    best: dict[str, Mapping[str, Any] | None] = {}
    for row in rows:
        if row.get("error") or row.get("speedup") is None or row["method"] in ("plain", "data"):
            continue
        held = best.setdefault(row["method"], None)
        if passes(row) and (held is None or row["speedup"] > held["speedup"]):
            best[row["method"]] = row
    return best


def _winner(criterion: str, meaning: str, best: Mapping[str, Mapping[str, Any] | None], task: str) -> Winner:
    found: dict[str, Mapping[str, Any] | None] = {"dita": None, "peer": None, "baseline": None}
    for row in sorted((row for row in best.values() if row is not None), key=lambda row: row["speedup"]):
        found[origin_of(row)] = row
    return Winner(criterion, meaning, found["dita"], found["peer"], found["baseline"], task)
