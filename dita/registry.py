"""The methods by name, filled by importing the rooms that define them."""

from __future__ import annotations

import difflib
import importlib
import re
from typing import Any, TypeVar

from dita.config import Method, _known
from dita.errors import DitaError

_METHODS: dict[str, type[Method]] = {}
_ROOMS = ("dita.caching", "dita.kernels.sparse", "dita.kernels.reduction", "dita.schedulers")

M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: make a method known by its `name`.

    Raises:
        DitaError: the name is not lower-case words joined by hyphens, or is taken, or a required attribute is missing.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", cls.name):
        raise DitaError(f"{cls.__name__}.name is {cls.name!r}; expected lower-case words joined by hyphens")
    missing = [key for key in ("title", "arxiv", "citation", "axes", "seams") if not getattr(cls, key)]
    if missing:
        raise DitaError(f"method {cls.name} lacks {', '.join(missing)}: set these class attributes")
    if cls.name in _METHODS:
        raise DitaError(f"the name {cls.name} is taken by {_METHODS[cls.name].__qualname__}: choose another")
    _METHODS[cls.name] = cls
    return cls


def _fill() -> None:
    for room in _ROOMS:
        importlib.import_module(room)


def names() -> tuple[str, ...]:
    """Names of all methods, sorted.

    Example:
        >>> "taylorseer" in names()
        True
    """
    _fill()
    return tuple(sorted(_METHODS))


def get(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        DitaError: no such method; the message names the nearest ones.
    """
    _fill()
    if name not in _METHODS:
        near = difflib.get_close_matches(name, _METHODS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise DitaError(f"there is no method {name!r}; {hint}known: {', '.join(sorted(_METHODS))}")
    return _METHODS[name]


def resolve(method: str | Method | type[Method], **options: Any) -> Method:
    """Turn a name or a config into a config.

    Args:
        method: registry name, config object, or method class (its defaults).
        options: settings for a name or class, changes for a config.

    Raises:
        DitaError: unknown name, unknown setting, or a value out of range.

    Example:
        >>> resolve("taylorseer", interval=4).interval
        4
    """
    if isinstance(method, str):
        method = get(method)
    if isinstance(method, type) and issubclass(method, Method):
        return method(**_known(method, options))
    if not isinstance(method, Method):
        raise DitaError(f"expected a method name or config, got {type(method).__name__}; names: {', '.join(names())}")
    return method.replace(**options) if options else method
