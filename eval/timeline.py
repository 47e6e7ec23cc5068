"""Timelines: which transformer calls of a run were computed, reused or forecast, as small pictures with their text."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import NamedTuple

from dita.errors import DitaError

ACTIONS = {
    "C": "computed",
    "L": "low-bit",
    "S": "sparse",
    "P": "partial",
    "F": "forecast",
    "R": "reused",
    "N": "skipped",
}
_HEIGHTS = {
    "C": 12,
    "L": 11.5,
    "S": 11,
    "P": 10,
    "F": 7,
    "R": 3,
    "N": 1,
}  # of cells that stand on one ground line, so that it reads without colours


class Lane(NamedTuple):
    """One line of a timeline: the branches that took the same decisions, as a picture and in words."""

    name: str
    svg: str
    text: str


def lanes(timeline: Mapping[str, str]) -> list[Lane]:
    """Draw the timeline of a run, one lane for each branch; branches that did the same share theirs.

    Args:
        timeline: by branch, one letter per transformer call in order: C computed, L computed with low-bit attention,
            S with sparse attention, P partly computed, R reused, F forecast, N not called. "cond/1" is the second model
            evaluation in a solver step of the branch "cond".

    Returns:
        Lanes in the order of the branches. `svg` is an element without colours: the class of each path is its letter,
        and the width of a cell is 1 of the view box.

    Raises:
        DitaError: a letter is unknown.

    Example:
        >>> (lane,) = lanes({"cond": "CCFRC", "uncond": "CCFRC"})
        >>> lane.name
        'cond, uncond'
        >>> lane.text
        '3 of 5 computed (0-1, 4), 1 forecast, 1 reused'
    """
    branches: dict[str, list[str]] = {}
    for branch, letters in timeline.items():
        wrong = sorted(set(letters) - set(ACTIONS))
        if wrong:
            raise DitaError(f"timeline of {branch} holds {', '.join(wrong)}; expected letters of {''.join(ACTIONS)}")
        if letters:
            branches.setdefault(letters, []).append(_spoken(branch))
    result = []
    for letters, names in branches.items():
        text = _describe(letters)
        result.append(Lane(", ".join(names), _svg(letters, f"{', '.join(names)}: {text}"), text))
    return result


def ranges(places: list[int]) -> str:
    """Write rising whole numbers with runs drawn together.

    Example:
        >>> ranges([0, 1, 2, 5, 8, 9])
        '0-2, 5, 8-9'
    """
    spans: list[list[int]] = []
    for place in places:
        if spans and place == spans[-1][1] + 1:
            spans[-1][1] = place
        else:
            spans.append([place, place])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in spans)


def _spoken(branch: str) -> str:
    name, _, stage = branch.partition("/")
    return f"{name} stage {stage}" if stage else name


def _describe(letters: str) -> str:
    computed = [place for place, letter in enumerate(letters) if letter == "C"]
    where = f" ({ranges(computed)})" if 0 < len(computed) < len(letters) else ""
    others = [f"{letters.count(letter)} {ACTIONS[letter]}" for letter in "LSPFRN" if letter in letters]
    return ", ".join([f"{len(computed)} of {len(letters)} computed{where}", *others])


def _svg(letters: str, text: str) -> str:
    paths = []
    for letter, height in _HEIGHTS.items():
        middle = 12 - height / 2
        cells = "".join(f"M{place} {middle:g}h.84" for place, own in enumerate(letters) if own == letter)
        if cells:
            paths.append(f'<path class="{letter}" stroke-width="{height}" d="{cells}"/>')
    return (
        f'<svg class="lane" role="img" viewBox="0 0 {len(letters)} 12" preserveAspectRatio="none" '
        f'style="--calls:{len(letters)}"><title>{escape(text)}</title>{"".join(paths)}</svg>'
    )
