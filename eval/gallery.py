"""Which pictures a page holds, how they are embedded, and what stands above them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dita.eval.columns import psnr_of
from dita.eval.rows import origin_of

MOST_PICTURES, MOST_ANIMATIONS = 40, 16
_ORDER = ("dita", "peer", "baseline")
_LARGE = 40_000  # bytes of a PNG above which a JPEG is embedded in its place
_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


def gallery(rows: Sequence[Mapping[str, Any]], strips: Mapping[str, bytes], animations: Mapping[str, bytes]) -> dict:
    """Choose and encode the pictures of a page.

    Args:
        rows: of the sweep.
        strips: PNGs by row key; that of a pipeline's plain row is its baseline.
        animations: by row key.

    Returns:
        "plain": data URI of the baseline by pipeline; "groups": pairs of a method and its pictures, each with
        "caption", "task", "media", "image" and "moving" (data URIs, "" if there is none); "moving": whether any moves;
        "words": what the reader sees.

    Example:
        >>> gallery([], {}, {})["groups"]
        []
    """
    skipped = ("plain", "data")
    usable = [r for r in rows if r["method"] not in skipped and r["key"] in strips and not r.get("error")]
    usable.sort(key=lambda row: _ORDER.index(origin_of(row)))
    shown = spread_over_methods(usable, MOST_PICTURES)
    moving = {id(row) for row in spread_over_methods([r for r in shown if r["key"] in animations], MOST_ANIMATIONS)}
    several = len({row.get("task") or "" for row in rows}) > 1
    groups: dict[str, list[dict[str, str]]] = {}
    for row in shown:
        name = f"{row.get('task')}: {row['method']}" if several else row["method"]
        groups.setdefault(name, []).append(
            {
                "caption": caption_of(row),
                "task": row.get("task") or "",
                "media": row.get("media") or "image",
                "image": picture_uri(strips[row["key"]]),
                "moving": picture_uri(animations[row["key"]]) if id(row) in moving else "",
            }
        )
    plain = [row for row in rows if row["method"] == "plain" and row["key"] in strips]
    words = (
        "Accelerated runs next to the plain run with the same seeds: below it, or on its right in the case of videos."
    )
    if len(shown) < len(usable):
        words += f" {len(shown)} of {len(usable)} settings are shown."
    if any(len(strips[row["key"]]) > _LARGE for row in [*shown, *plain]):
        words += " Large pictures are compressed as JPEG."
    return {
        "plain": {row.get("task") or "": picture_uri(strips[row["key"]]) for row in plain},
        "groups": list(groups.items()),
        "moving": bool(moving),
        "words": words,
    }


def spread_over_methods(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Keep at most so many rows: every method gets as many as the others, evenly along its ladder.

    Args:
        rows: in the order of the ladders.
        most: how many may stay, at least one.

    Returns:
        The rows that stay, in their order.

    Example:
        >>> rows = [{"method": "a", "n": n} for n in range(5)] + [{"method": "b", "n": 9}]
        >>> [(row["method"], row["n"]) for row in spread_over_methods(rows, 4)]
        [('a', 0), ('a', 2), ('a', 4), ('b', 9)]
    """
    ladders: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(rows):
        ladders.setdefault((row.get("task") or "", row["method"]), []).append(place)
    shares = dict.fromkeys(ladders, 0)
    left = min(most, len(rows))
    while left:
        for name, ladder in ladders.items():
            if left and shares[name] < len(ladder):
                shares[name] += 1
                left -= 1
    kept = []
    for name, ladder in ladders.items():
        count, last = shares[name], len(ladder) - 1
        kept += [ladder[last // 2]] if count == 1 else [ladder[round(i * last / (count - 1))] for i in range(count)]
    return [rows[place] for place in sorted(kept)]


def picture_uri(data: bytes) -> str:
    """Write a picture as a data URI; a PNG of more than 40,000 bytes becomes a JPEG of quality 90 if that is smaller.

    Example:
        >>> picture_uri(b"GIF89a")
        'data:image/gif;base64,R0lGODlh'
    """
    kind = next((kind for head, kind in _KINDS.items() if data.startswith(head)), "png")
    if kind == "png" and len(data) > _LARGE:
        small = _jpeg(data)
        if len(small) < len(data):
            kind, data = "jpeg", small
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _jpeg(data: bytes) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(stream, format="jpeg", quality=90, subsampling=0)
    return stream.getvalue()


def caption_of(row: Mapping[str, Any]) -> str:
    """What stands above a row's picture: its label, speedup and PSNR.

    Example:
        >>> caption_of({"label": "interval=3", "speedup": 2.0, "psnr": 31.0})
        'interval=3: 2.00×, 31.0 dB'
    """
    value = psnr_of(row)
    quality = "identical" if value == math.inf else f"{value:.1f} dB" if value > -math.inf else ""
    return f"{row['label']}: " + ", ".join(part for part in (f"{row['speedup']:.2f}\u00d7", quality) if part)
