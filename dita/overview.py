"""The list of methods, for people."""

from __future__ import annotations

import html
from dataclasses import dataclass

from dita import registry


@dataclass(frozen=True)
class MethodInfo:
    """One registered method: what `dita.config.Method` says of it."""

    name: str
    title: str
    axes: str
    arxiv: str
    seams: tuple[str, ...]
    confidence: str
    needs_calibration: bool


class MethodTable(tuple[MethodInfo, ...]):
    """A tuple of `MethodInfo` that prints as a table."""

    def __str__(self) -> str:
        return "\n".join(f"{m.name:<12} {m.title:<20} {m.arxiv:<22} {m.axes}" for m in self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(t)}</td>" for t in (m.name, m.title, m.arxiv, m.axes)) + "</tr>"
            for m in self
        )
        return f"<table><tr><th>name</th><th>method</th><th>paper</th><th>what, when, how</th></tr>{rows}</table>"


def methods() -> MethodTable:
    """All registered methods.

    Example:
        >>> "taylorseer" in [m.name for m in methods()]
        True
    """
    classes = [registry.get(name) for name in registry.names()]
    return MethodTable(
        MethodInfo(c.name, c.title, c.axes, c.arxiv, tuple(sorted(c.seams)), c.confidence, c.needs_calibration)
        for c in classes
    )
