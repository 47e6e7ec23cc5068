"""How a pipeline is sampled and judged if nobody says otherwise; bundled pipelines carry it in `sampling.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dita.errors import DitaError

FILE = "sampling.json"
JUDGES = ("garment", "scene", "clip", "none")


@dataclass(frozen=True)
class Task:
    """Defaults of one pipeline.

    Attributes:
        judge: who reads the samples: "garment" (grey garments by class), "scene" or "clip" (the world of
            `dita.eval.world`), or "none": comparison with the plain run only.
        steps: solver steps of the plain run.
        guidance: `guidance_scale`.
        batch: samples in one call.
        samples: of a sweep.
        quick_samples: of a quick sweep.
        call: further arguments of the call.
    """

    judge: str = "none"
    steps: int = 50
    guidance: float = 3.0
    batch: int = 8
    samples: int = 64
    quick_samples: int = 6
    call: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.judge not in JUDGES:
            raise DitaError(f"judge is {self.judge!r}; expected one of {', '.join(JUDGES)}")

    def prompts(self, samples: int, seed: int = 0) -> tuple[str, ...]:
        """Captions of the world for this many samples; none for other judges."""
        if self.judge not in ("scene", "clip"):
            return ()
        from dita.eval.world import captions

        return tuple(captions(self.judge, samples, seed))

    def sized(self, call: Mapping[str, Any]) -> Task:
        """This task as it can be judged with these arguments of the pipeline's call.

        The network that reads scenes and clips knows one size. Samples of another are compared with the plain run only.

        Example:
            >>> Task("scene", call={"height": 32, "width": 64}).sized({"height": 48, "width": 96}).judge
            'none'
        """
        same = all(call.get(name, own) == own for name, own in self.call.items() if name in ("height", "width"))
        return self if same else replace(self, judge="none")


def task_of(folder: str | Path) -> Task:
    """Read the defaults that lie in a pipeline's folder; those of `Task` if there are none.

    Raises:
        DitaError: the file does not fit.

    Example:
        >>> task_of("no such folder").judge
        'none'
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return Task()
    try:
        return Task(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise DitaError(f"{path} does not fit: {error}") from error
