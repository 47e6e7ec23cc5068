"""Sliding Tile Attention: every tile of tokens attends to the tiles in a window around it.

Zhang et al., "Fast Video Generation with Sliding Tile Attention", ICML 2025, arXiv 2502.04507.

Selection: the tokens are put tile by tile; a tile sees those in a window of tiles of which it is the middle, pushed
inwards at the borders so that all windows are of one size. Text sees and is seen by all. Windows may differ from head
to head: `dita.calibrate` searches them as the authors do, in one run with dense attention, for every part of the run,
layer and head the window of the smallest mean squared error among those that keep at most `budget` of the tiles. When:
the windows are fixed; the first steps are dense.

Differs from the paper: the grid need not be divisible. Each axis is cut into as many tiles of nearly equal length as
tiles of the given size cover it, or into four where fewer than three whole ones fit; empty places fill the last block
of each. (30, 48, 80) tokens in tiles of (6, 8, 8) are 5 x 6 x 10 tiles, as published; (13, 16, 16) are 4 x 4 x 4 of up
to (4, 4, 4). The authors' search covers every step, a few prompts and a fixed list of windows; this one covers `parts`
of the run, whatever `call` generates, and all windows of odd or whole extents that use up the budget.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError, DitaWarning
from dita.fingerprint import fingerprint
from dita.kernels.plan import BlockPlan
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Cut, Layout
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.tiles import Triple, cells, crossed, grouped, tile_counts, window_mask
from dita.kernels.sparse.window_search import Found, WindowSearch, WindowTable, search_windows, window_choices
from dita.registry import register


class SlidingTiles(Policy):
    """Keep windows of tiles.

    Args:
        window, tile, block, table: as of the method.
    """

    def __init__(self, window: Triple, tile: Triple, block: int, table: WindowTable | None) -> None:
        self.window, self.tile, self.block, self.table = window, tile, block, table
        # Plans with a list for every head of every layer would be large; those of single windows are few.
        self.fleeting = table is not None
        self._plans: dict[tuple[Layout, Triple], BlockPlan] = {}
        self._warned = False

    def begin_run(self) -> None:
        """Forget the plans."""
        self._plans.clear()
        self._warned = False

    def plan(self, asked: Asked) -> BlockPlan | None:
        """The windows of this layer and part of the run."""
        layout, device = asked.layout, asked.q.device
        if self.table is None:
            return self.planned(layout, self.window, device, asked.steps)
        if self.table.grid != layout.grid and not self._warned:
            self._warned = True
            text = f"the windows were searched for {self.table.grid} tokens (now {layout.grid})"
            warnings.warn(f"{text}; calibrate again for best quality", DitaWarning, stacklevel=2)
        plans = [self.planned(layout, window, device) for window in self.table.of(asked)]
        widest = max(plan.indices.shape[-1] for plan in plans)
        indices = [torch.nn.functional.pad(p.indices, (0, widest - p.indices.shape[-1])) for p in plans]
        counts = torch.cat([plan.counts for plan in plans], 1)
        return dataclasses.replace(plans[0], counts=counts, indices=torch.cat(indices, 1))

    def planned(self, layout: Layout, window: Triple, device: torch.device | str, lifetime: int = 0) -> BlockPlan:
        """The plan of a window for all heads; made once a run."""
        key = layout, window
        if key not in self._plans:
            counts = tile_counts(layout.grid, self.tile)
            largest = math.prod(-(-size // count) for size, count in zip(layout.grid, counts, strict=True))
            block = min(self.block, -(-largest // 16) * 16)
            order, owner = grouped(cells(layout.grid, counts), math.prod(counts), block)
            cut = Cut(layout, block, block, order.to(device))
            mask = window_mask(counts, window)[owner][:, owner].to(device)
            self._plans[key] = crossed(cut, cut, mask[None, None], lifetime)
        return self._plans[key]


@register
@dataclass(frozen=True)
class SlidingTile(SparseMethod):
    """Sliding Tile Attention's settings.

    Attributes:
        window: tiles that a tile sees along frames, rows and columns, itself included.
        tile: tokens of a tile along these axes, fewer where the grid is small.
        block: tokens of a block at most; a tile is one or more.
        budget: of the search, the largest share of the tiles that a head may see.
        parts: of the search, of how many parts of the run each has windows of its own.
        table: windows from `dita.calibrate`, in the place of `window`.
        dense_steps: 15 of 50 steps.

    Raises:
        DitaError: a setting out of range; on attaching, a table of another model, or a model without attention inside
            its blocks.

    Example:
        >>> SlidingTile(window=(5, 3, 3)).label()
        'window=(5, 3, 3)'
    """

    window: tuple[int, int, int] = (3, 3, 3)
    tile: tuple[int, int, int] = (6, 8, 8)
    block: int = 128
    budget: float = 0.3
    parts: int = 4
    table: WindowTable | None = field(default=None, repr=False)
    dense_steps: float = field(default=0.3, kw_only=True)

    name: ClassVar[str] = "sliding-tile"
    table_kind: ClassVar[type[Any] | None] = WindowTable
    title: ClassVar[str] = "Sliding Tile Attention"
    arxiv: ClassVar[str] = "2502.04507"
    axes: ClassVar[str] = "no score; windows of tiles, per head if calibrated; fixed for the run"
    citation: ClassVar[str] = """@inproceedings{zhang2025fast,
  title={Fast Video Generation with Sliding Tile Attention},
  author={Zhang, Peiyuan and Chen, Yongqi and Su, Runlong and Ding, Hangliang and Stoica, Ion and Liu, Zhengzhong and
    Zhang, Hao},
  booktitle={International Conference on Machine Learning},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        for name in ("window", "tile"):
            extents = getattr(self, name)
            if not isinstance(extents, tuple) or len(extents) != 3:
                raise DitaError(f"{name} is {extents!r}; expected three whole numbers, of frames, rows and columns")
            for extent in extents:
                check_whole(f"an extent of {name}", extent, 1)
        check_whole("block", self.block, 1)
        check_number("budget", self.budget, 0, 1)
        check_whole("parts", self.parts, 1)

    def policy(self, anatomy: Anatomy) -> Policy:
        """See `SparseMethod.policy`."""
        if self.table is not None and self.table.model != (model := fingerprint(anatomy.model)):
            raise DitaError(f"these windows were searched for {self.table.model}, not for {model}: calibrate again")
        return SlidingTiles(self.window, self.tile, self.block, self.table)

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> SlidingTile:
        """Search the windows in one run with dense attention; the pipeline comes back as it was."""

        def build(found: Found) -> WindowSearch:
            plans = SlidingTiles(self.window, self.tile, self.block, None)
            return WindowSearch(
                lambda layout: window_choices(tile_counts(layout.grid, self.tile), self.budget),
                plans.planned, self.parts, self.dense_steps, self.dense_layers, found,
            )  # fmt: skip

        return self.replace(table=search_windows(pipe, call, build, self.parts))

    @classmethod
    def forced(cls) -> SlidingTile:
        """Small tiles, so that few tokens suffice."""
        return cls(window=(1, 2, 2), tile=(2, 2, 2), block=4, cutoff=1.0)

    @classmethod
    def ladder(cls) -> tuple[SlidingTile, ...]:
        """Windows that at 4 x 4 x 4 tiles see 56, 42, 25 and 14 % of them."""
        return tuple(cls(window=window) for window in ((5, 3, 3), (3, 3, 3), (1, 5, 5), (1, 3, 3)))
