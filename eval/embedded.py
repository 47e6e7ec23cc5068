"""The pictures of a sweep, read back out of its page, which holds them where the folder no longer does."""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

from dita.errors import DitaWarning
from dita.eval.gallery import caption_of
from dita.eval.labels import setting_of

Picture = tuple[str, bytes]
"""Its format, such as "png", and the file's content."""


def pictures_in(page: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Picture]]:
    """Find the pictures of rows in a page that `dita.eval.htmlreport.write_report` wrote of them.

    A picture belongs to the row of its caption. Where no row has it, the page was written in other words for settings,
    or of other rows: a warning names it.

    Args:
        page: the HTML.
        rows: of the sweep, as they were measured.

    Returns:
        by row key: its strip and, if the page has one, its animation. Rows that the page does not show are left out.

    Example:
        >>> row = {"key": "k", "method": "foca", "label": "interval=3", "speedup": 2.0, "psnr": 31.0}
        >>> page = '<img alt="foca, interval=3: 2.00×, 31.0 dB" src="data:image/gif;base64,R0lGODlh">'
        >>> pictures_in(page, [row])
        {'k': [('gif', b'GIF89a')]}
    """
    reader = _Reader()
    reader.feed(page)
    reader.close()
    known = [row for row in rows if row["method"] not in ("plain", "data") and not row.get("error")]
    keys = {f"{row['method']}, {caption_of({**row, 'label': setting_of(row)})}": row["key"] for row in known}
    found = {keys[name]: pictures for name, pictures in reader.shots.items() if name in keys}
    lost = [name for name in reader.shots if name not in keys]
    if lost:
        text = f"{len(lost)} of {len(reader.shots)} pictures belong to no row by their captions, such as {lost[0]!r}"
        warnings.warn(f"{text}; they are left out", DitaWarning, stacklevel=2)
    once = json.loads("".join(reader.once) or "{}")
    for row in rows:
        if row["method"] == "plain" and (row.get("task") or "") in once:
            found[row["key"]] = [_decoded(once[row.get("task") or ""])]
    return found


def _decoded(uri: str) -> Picture:
    head, _, data = uri.partition(";base64,")
    return head.removeprefix("data:image/"), base64.b64decode(data)


class _Reader(HTMLParser):
    """Collects the pictures of a page.

    Attributes:
        shots: what the strip of a run is called -> it, and its animation.
        once: pieces of the JSON that holds what the page shows several times.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shots: dict[str, list[Picture]] = {}
        self.once: list[str] = []
        self._last: list[Picture] = []
        self._reads = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See `HTMLParser`."""
        said = dict(attrs)
        self._reads = tag == "script" and said.get("id") == "pictures"
        source = said.get("src") or ""
        if tag != "img" or said.get("class") == "plot" or not source.startswith("data:image/"):
            return
        if said.get("class") == "moving":
            self._last.append(_decoded(source))
        else:
            self._last = self.shots.setdefault(said.get("alt") or "", [])
            self._last.append(_decoded(source))

    def handle_endtag(self, tag: str) -> None:
        """See `HTMLParser`."""
        self._reads = False

    def handle_data(self, data: str) -> None:
        """See `HTMLParser`."""
        if self._reads:
            self.once.append(data)
