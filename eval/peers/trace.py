"""Putting a pipeline back after another project's code worked on it, attribute by attribute.

Nothing here trusts that code's own way of switching off: what was there before is written down first, and put back
whatever happened in between. The dictionaries of submodules count as well, and their order: a library that swaps a
block list during a call and swaps it back has moved it to the end.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_REGISTRY = "_diffusers_hook"
_REGISTRY_LISTS = ("hooks", "_hook_order", "_fn_refs")


class Kept:
    """The attributes of one object, and the contents of those that are lists or dictionaries and may be changed.

    Args:
        target: any object with a `__dict__`.
        containers: attributes of which the contents are kept too.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> kept = Kept(layer, "_modules")
        >>> layer.extra, layer.word = nn.Identity(), "trace"
        >>> kept.restore()
        >>> list(layer.named_children()), hasattr(layer, "word")
        ([], False)
    """

    def __init__(self, target: Any, *containers: str) -> None:
        self.target = target
        self.values = dict(vars(target))
        self.contents = {name: copy.copy(self.values[name]) for name in containers if name in self.values}

    def restore(self) -> None:
        """Remove what was added, put back what was replaced."""
        self.drop_added()
        vars(self.target).update(self.values)
        for name, content in self.contents.items():
            held = self.values[name]
            held.clear()
            held.update(content) if isinstance(held, dict) else held.extend(content)

    def drop_added(self) -> None:
        """Remove the attributes that were added, and leave the values of the others alone."""
        for name in vars(self.target).keys() - self.values.keys():
            del vars(self.target)[name]


class Trace:
    """All that a peer may change: attributes of the pipe, of every module of its transformer, and of their classes.

    Of the pipe itself only added attributes are removed, since a run changes the values of others.

    Args:
        pipe: a diffusers pipeline.
        model: its transformer.
    """

    def __init__(self, pipe: Any, model: nn.Module) -> None:
        modules = list(model.modules())
        self._pipe = Kept(pipe)
        self._kept = [Kept(module, "_modules") for module in modules]
        self._kept += [Kept(vars(m)[_REGISTRY], *_REGISTRY_LISTS) for m in modules if _REGISTRY in vars(m)]
        self._classes = {cls: dict(vars(cls)) for cls in {type(pipe), *map(type, modules)}}

    def restore(self) -> None:
        """Put everything back."""
        for kept in self._kept:
            kept.restore()
        self._pipe.drop_added()
        for cls, before in self._classes.items():
            for name, value in dict(vars(cls)).items():
                if name.startswith("__annotations"):
                    continue  # Python itself adds these when someone looks
                if name not in before:
                    delattr(cls, name)
                elif before[name] is not value:
                    setattr(cls, name, before[name])


@contextmanager
def quiet(prefix: str, level: int = logging.WARNING) -> Iterator[None]:
    """Let the loggers whose names start with `prefix` say nothing below `level` inside the block.

    Example:
        >>> with quiet("example"):
        ...     logging.getLogger("example").info("not shown")
    """
    loggers = [log for name, log in logging.root.manager.loggerDict.items() if name.startswith(prefix)]
    talkative = [log for log in loggers if isinstance(log, logging.Logger) and log.getEffectiveLevel() < level]
    before = [(log, log.level) for log in talkative]
    for log, _ in before:
        log.setLevel(level)
    try:
        yield
    finally:
        for log, old in before:
            log.setLevel(old)
