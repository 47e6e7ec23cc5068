"""Windows of tiles for every part of a run, layer and head, chosen by their error against dense attention.

The search that Sliding Tile Attention's authors do offline: one run stays dense while windows of about equal cost are
tried beside it, and every head gets the one of the smallest mean squared error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.errors import DitaError
from dita.fingerprint import fingerprint
from dita.kernels.block_sparse import block_sparse_attention
from dita.kernels.plan import BlockPlan
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Layout
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.tiles import Triple

Windows = tuple[Triple, ...]
"""A window for every head."""


@dataclass(frozen=True)
class WindowTable:
    """Windows that a search found.

    Attributes:
        windows: of each part of the run, each layer and each head, in tiles.
        grid: frames, rows and columns it was searched for.
        model: fingerprint of the transformer.
    """

    windows: tuple[tuple[Windows, ...], ...]
    grid: Triple
    model: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"windows": self.windows, "grid": self.grid, "model": self.model}

    @classmethod
    def from_dict(cls, data: Any) -> WindowTable:
        """Read what `to_dict` wrote.

        Raises:
            DitaError: not such a table.

        Example:
            >>> table = WindowTable((((((3, 3, 3),),),)), (13, 16, 16), "Net:0")
            >>> WindowTable.from_dict(table.to_dict()) == table
            True
        """
        try:
            windows = tuple(tuple(tuple(map(_triple, heads)) for heads in layers) for layers in data["windows"])
            return cls(windows, _triple(data["grid"]), str(data["model"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DitaError(f"not a table of windows ({error!r}); dita.calibrate writes one") from None

    def of(self, asked: Asked) -> Windows:
        """The windows of a layer's heads at a step."""
        return self.windows[part_of(asked.step, asked.steps, len(self.windows))][asked.layer]


def _triple(values: Sequence[int]) -> Triple:
    one, two, three = map(int, values)
    return one, two, three


def part_of(step: int, steps: int, parts: int) -> int:
    """Which of a run's equal parts a step lies in.

    Example:
        >>> [part_of(step, 10, 4) for step in range(10)]
        [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    """
    return min(parts - 1, step * parts // steps)


def window_choices(counts: Triple, budget: float) -> tuple[Triple, ...]:
    """The windows that keep at most a share of all pairs of tiles, and of which none contains another.

    Args:
        counts: tiles along each axis.
        budget: largest share, from 0 to 1.

    Returns:
        windows whose extents are odd, so that they have a middle, or whole; a single tile if the budget allows no more.

    Example:
        >>> window_choices((5, 6, 10), 0.1)
        ((1, 3, 10), (1, 6, 5), (3, 1, 10), (3, 3, 3), (5, 1, 5), (5, 6, 1))
    """
    extents = [sorted({*range(1, count + 1, 2), count}) for count in counts]
    most = budget * counts[0] * counts[1] * counts[2] + 1e-9
    fits = [(t, h, w) for t, h, w in itertools.product(*extents) if t * h * w <= most] or [(1, 1, 1)]
    return tuple(a for a in fits if not any(a != b and all(x <= y for x, y in zip(a, b, strict=True)) for b in fits))


@dataclass
class Found:
    """What a search has seen so far.

    Attributes:
        errors: (part, layer) -> mean squared errors [windows, heads], summed over steps and branches.
        choices: the windows tried.
        grid: of the image tokens.
        layers, heads: of the model.
    """

    errors: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    choices: tuple[Triple, ...] = ()
    grid: Triple = (0, 0, 0)
    layers: int = 0
    heads: int = 1

    def table(self, parts: int, model: str) -> WindowTable:
        """The best windows; parts that were not measured get those of the next one that was.

        Raises:
            DitaError: nothing was measured.
        """
        measured = sorted({part for part, _ in self.errors})
        if not measured:
            raise DitaError("the calibration call ran no attention that could be measured: it must run the pipeline")
        rows = []
        for part in range(parts):
            source = next((other for other in measured if other >= part), measured[-1])
            rows.append(tuple(self._best(source, layer) for layer in range(self.layers)))
        return WindowTable(tuple(rows), self.grid, model)

    def _best(self, part: int, layer: int) -> Windows:
        if (part, layer) not in self.errors:
            return self.choices[:1] * self.heads  # an attention that stays dense
        return tuple(self.choices[place] for place in self.errors[part, layer].argmin(0).tolist())


class WindowSearch(Policy):
    """Answers with dense attention and measures how far each window is from it.

    Args:
        choices: layout -> the windows to try.
        plan: layout, window, device -> its plan.
        parts: of the run.
        dense_steps, dense_layers: of the method, which are not measured.
        found: where to write.
    """

    def __init__(
        self,
        choices: Callable[[Layout], tuple[Triple, ...]],
        plan: Callable[[Layout, Triple, torch.device], BlockPlan],
        parts: int,
        dense_steps: float,
        dense_layers: int,
        found: Found,
    ) -> None:
        self.choices, self.planned, self.parts, self.found = choices, plan, parts, found
        self._dense = dense_steps, dense_layers

    def attend(self, asked: Asked) -> torch.Tensor:
        """Dense, with the windows tried beside it."""
        self.dense_steps, self.dense_layers = self._dense
        exact = asked.dense()
        if self.stays_dense(asked):
            return exact
        found = self.found
        if found.grid != asked.layout.grid:
            found.errors.clear()
            found.choices, found.grid = self.choices(asked.layout), asked.layout.grid
            found.layers, found.heads = asked.layers, asked.q.shape[1]
        errors = []
        for window in found.choices:
            plan = self.planned(asked.layout, window, asked.q.device)
            out, _ = block_sparse_attention(asked.q, asked.k, asked.v, plan, asked.scale, asked.key_mask)
            errors.append((out.float() - exact.float()).square().mean((0, 2, 3)))
        key = part_of(asked.step, asked.steps, self.parts), asked.layer
        found.errors[key] = torch.stack(errors) + found.errors.get(key, 0)
        return exact


@dataclass(frozen=True)
class _Searching(SparseMethod):
    """Watches, and leaves nothing out."""

    build: Callable[[], Policy] = field(default=Policy, compare=False)

    name: ClassVar[str] = "window-search"

    def policy(self, anatomy: Anatomy) -> Policy:
        """See `SparseMethod.policy`."""
        return self.build()

    @classmethod
    def disabled(cls) -> _Searching:
        """It leaves nothing out, so that no warning is due."""
        return cls()


def search_windows(
    pipe: Any, call: Callable[[Any], Any], build: Callable[[Found], WindowSearch], parts: int
) -> WindowTable:
    """Run `call(pipe)` once with dense attention and return the best windows; the pipeline comes back as it was.

    Args:
        pipe: the pipeline.
        call: runs it once.
        build: makes the search of one transformer that writes into what it is given.
        parts: of the run.

    Raises:
        DitaError: the call ran no attention that could be measured.
    """
    from dita.session import accelerated, transformers_of

    found = Found()
    with accelerated(pipe, _Searching(build=lambda: build(found))):
        call(pipe)
    model = next(iter(transformers_of(pipe).values()))
    return found.table(parts, fingerprint(model))
