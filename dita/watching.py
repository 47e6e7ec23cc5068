"""Watching a pipeline's loop for a while, for measuring."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dita.anatomy import Anatomy
from dita.config import Method
from dita.loop import Loop
from dita.seams import Handler


@dataclass(frozen=True)
class Watching(Method):
    """Lets an object take part in the loop, and does nothing else."""

    watcher: Loop = field(default_factory=Loop, compare=False)

    name: ClassVar[str] = "calibration"
    saves: ClassVar[bool] = False

    def handler(self, anatomy: Anatomy) -> Handler:
        """One that does nothing."""
        return Handler()

    def loop(self, anatomies: tuple[Anatomy, ...], pipe: Any = None) -> Loop:
        """The watcher."""
        return self.watcher

    @classmethod
    def disabled(cls) -> Watching:
        """It never skips, so that no warning is due."""
        return cls()


@contextlib.contextmanager
def watched(pipe: Any, watcher: Loop, *methods: Method) -> Iterator[Any]:
    """Let an object take part in the pipeline's loop for a while; then put back what was attached.

    Args:
        pipe: the pipeline, accelerated or not.
        watcher: a `Loop`, which may also change what happens; it is the outermost.
        methods: attached with it for that time.

    Example:
        >>> with watched(pipe, watcher):  # doctest: +SKIP
        ...     call(pipe)
    """
    from dita.session import accelerated

    with accelerated(pipe, Watching(watcher), *methods):
        yield pipe
