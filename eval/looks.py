"""Colour and marker of each method, the same in every picture of a sweep."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dita.eval.rows import origin_of

COLOURS = (
    "#2f7fc1", "#d9630d", "#2a9560", "#c05fae", "#a8801a", "#cf3f52", "#7d6bd6", "#1592a3", "#6f9020", "#99685a",
)  # fmt: skip
MARKERS = "osD^vPph*"
GREY = "#808890"
_PLAIN_MARKERS = "x+1"
_SAME = {"firstblock": "fbcache", "firstblockcache": "fbcache"}


class Look(NamedTuple):
    """How a method is drawn.

    Attributes:
        colour: "#rrggbb", with a contrast of at least 3 to a white and to a nearly black ground.
        marker: matplotlib's letter.
        origin: "dita" (filled markers, full lines), "peer" (hollow, dotted) or "baseline" (grey crosses, dashed).
    """

    colour: str
    marker: str
    origin: str

    @property
    def line(self) -> str:
        """matplotlib's line style."""
        return {"dita": "-", "peer": ":"}.get(self.origin, "--")


def looks(rows: Iterable[Mapping[str, Any]]) -> dict[str, Look]:
    """Give each method a look of its own: dita's methods first, then the peers', in the order of appearance.

    A peer that is the same technique as a method of dita's, such as "diffusers taylorseer", gets that method's colour.

    Args:
        rows: from `read_rows`; the plain run and the data have no look.

    Returns:
        By method.

    Example:
        >>> found = looks([{"method": "taylorseer"}, {"method": "diffusers taylorseer", "origin": "peer"}])
        >>> found["taylorseer"].colour == found["diffusers taylorseer"].colour
        True
    """
    origins = {row["method"]: origin_of(row) for row in rows if row["method"] not in ("plain", "data")}
    order = [name for kind in ("dita", "peer") for name, origin in origins.items() if origin == kind]
    places: dict[str, int] = {}
    taken: set[Look] = set()
    result: dict[str, Look] = {}
    for name in order:
        place = places.setdefault(_technique(name, origins[name]), len(places))
        colour = COLOURS[place % len(COLOURS)]
        offset = place + place // len(COLOURS)
        options = (Look(colour, MARKERS[(offset + turn) % len(MARKERS)], origins[name]) for turn in range(len(MARKERS)))
        look = next((each for each in options if each not in taken), Look(colour, MARKERS[0], origins[name]))
        taken.add(look)
        result[name] = look
    for name in (name for name, origin in origins.items() if origin == "baseline"):
        number = sum(look.origin == "baseline" for look in result.values())
        result[name] = Look(GREY, _PLAIN_MARKERS[number % len(_PLAIN_MARKERS)], "baseline")
    return {name: result[name] for name in [*order, *result] if name in result}


def _technique(name: str, origin: str) -> str:
    own = name.split(" ", 1)[-1] if origin == "peer" else name
    plain = re.sub(r"[^a-z0-9]", "", own.lower())
    return _SAME.get(plain, plain)
