"""Settings in words: what a reader has to set to run a row again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from dita.errors import DitaError
from dita.eval.composition import JOINT

_SHORTER = re.compile(r"\d+ steps, ")  # what a method on a shorter run has in front


def words(kind: type[Any], settings: Mapping[str, Any], named: Collection[str] = ()) -> str:
    """Name the settings that differ from a method's defaults, and those that are to be named anyway.

    Args:
        kind: class of a method or peer; what it does not print (`repr=False`), such as a table, is left out.
        settings: plain values, from `to_dict`. One that the class no longer has is named too.
        named: settings to name even at their default.

    Returns:
        "name=value" in the order of the class; "default" if there is nothing to name.

    Example:
        >>> from dita.caching import TaylorSeer
        >>> words(TaylorSeer, {"interval": 6, "order": 2, "warmup": 5}, named=["interval"])
        'interval=6 order=2 warmup=5'
    """
    own = {field.name: field for field in dataclasses.fields(kind)}
    parts = []
    for name in [*(name for name in own if name in settings), *(name for name in settings if name not in own)]:
        value = _plain(settings[name])
        if name in own and not own[name].repr:
            continue
        if name in named or name not in own or value != _default(own[name]):
            parts.append((own[name].kw_only if name in own else True, f"{name}={_text(value)}"))
    return " ".join(text for _, text in sorted(parts, key=lambda part: part[0])) or "default"


def setting_of(row: Mapping[str, Any]) -> str:
    """A row's setting: what its own label names, and all else in its config that differs from today's defaults.

    Rows keep the label that they were measured under, which names what varied in their sweep. Other settings of it may
    differ from the defaults, or the defaults may have changed since.

    Example:
        >>> config = {"method": "taylorseer", "settings": {"interval": 6, "order": 1, "warmup": 5}}
        >>> setting_of({"method": "taylorseer", "label": "interval=6", "config": config})
        'interval=6 warmup=5'
    """
    label, config = str(row["label"]), row.get("config") or {}
    if not isinstance(config.get("settings"), Mapping):
        return label
    shorter = _SHORTER.match(label)
    front = shorter[0] if shorter else ""
    try:
        if JOINT in config["method"]:
            each = (f"{name} {words(_kind(name), own)}" for name, own in config["settings"].items())
            return front + ", ".join(each)
        named = re.findall(r"(\w+)=", label)
        return front + words(_kind(config["method"]), config["settings"], named)
    except DitaError:  # a method that dita no longer has
        return label


def _kind(name: str) -> type[Any]:
    from dita import registry
    from dita.eval.peers import get_peer

    return registry.get(name) if name in registry.names() else get_peer(name)


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory is not dataclasses.MISSING
    return _plain(field.default_factory() if made else field.default)  # pyright: ignore[reportCallIssue]


def _plain(value: Any) -> Any:
    value = value.to_dict() if hasattr(value, "to_dict") else value
    return tuple(_plain(each) for each in value) if isinstance(value, (list, tuple)) else value


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(", ", ",")
