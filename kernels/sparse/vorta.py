"""VORTA: every head of every layer goes dense, to half of the tokens, or to a sliding window of tiles.

Sun et al., "VORTA: Efficient Video Diffusion via Routing Sparse Attention", NeurIPS 2025, arXiv 2505.18809.

Branches: (0) dense; (1) coreset: of windows of 2 x 3 x 2 tokens the centre stays and the 5 of 11 margins whose queries
are least like it; these attend to each other, and a dropped token copies its centre's output; (2) every tile sees the
3 x 3 x 3 tiles around it, the window pushed back inside at the rim. Text stays and sees and is seen by all. Heads of
one branch are computed together.

Routing, one of two. By `dita.calibrate`: one dense run measures for every layer, head and part of the run how far the
two sparse branches are from dense attention (squared error relative to the dense output's square); of all, the choice
of least summed error is taken whose mean density is at most `budget`. Or by the authors' trained router, a file with
"blocks.3.router.linear.weight" [3 H, C] and ".bias" for every layer: softmax(SiLU(temb) W^T + b), the likeliest branch
of a head, dense if its probability is below `tau`. It reads the embedding of the time step, which is computed here by
Wan's own `condition_embedder`. HunyuanVideo's embedding holds the prompt and the guidance too, which attention does not
show: its router is refused.

Differs from the paper: routing by calibration is not in it. Grids need not be multiples of windows and tiles: short
windows keep half of what they have, and short tiles have empty places. Tiles shrink until an axis has about four of
them, at most `tile`, so that a window of three is not the whole. Two experts (Wan 2.2) share one calibration. The first
steps are dense by default, as with the other methods here; the authors leave that to their router (`dense_steps=0`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.attention_view import Attended
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.fingerprint import fingerprint
from dita.kernels.plan import BlockPlan
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.coreset import Windows, coreset_attention, windows
from dita.kernels.sparse.handler import SparseHandler
from dita.kernels.sparse.layout import Cut, Layout
from dita.kernels.sparse.orders import tiles
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.tiles import window_mask
from dita.kernels.sparse.vorta_routing import Route, by_router, by_table, range_key
from dita.registry import register
from dita.seams import Handler, Site
from dita.table import Table, table_for

Grid = tuple[int, int, int]
WINDOW: Grid = (2, 3, 2)
AROUND: Grid = (3, 3, 3)  # tiles of a sliding window


def sliding_plan(layout: Layout, tile: Grid) -> BlockPlan:
    """Every tile sees the 3 x 3 x 3 tiles around it, all of them inside the grid.

    Args:
        layout: of the tokens.
        tile: the most a tile may have of each axis.

    Example:
        >>> plan = sliding_plan(Layout((1, 1, 10)), (1, 1, 2))
        >>> plan.mask(5)[0, 0].int()
        tensor([[1, 1, 1, 0, 0],
                [1, 1, 1, 0, 0],
                [0, 1, 1, 1, 0],
                [0, 0, 1, 1, 1],
                [0, 0, 1, 1, 1]], dtype=torch.int32)
    """
    most: Grid = tuple(min(side, max(1, cells // 4)) for side, cells in zip(tile, layout.grid, strict=True))  # pyright: ignore[reportAssignmentType]
    order, places = tiles(layout.grid, most)
    cut = Cut(layout, places, places, order)
    counts: Grid = tuple(-(-cells // side) for cells, side in zip(layout.grid, most, strict=True))  # pyright: ignore[reportAssignmentType]
    return cut.plan(window_mask(counts, AROUND)[None, None])


class Routed(Policy):
    """Compute every head by its branch.

    Args:
        route: says which.
        tile: of the sliding branch.
    """

    def __init__(self, route: Route, tile: Grid) -> None:
        self.route, self.tile = route, tile
        self._plans: dict[Any, tuple[BlockPlan, float, Windows, float]] = {}

    def begin_run(self) -> None:
        """Forget plans and windows."""
        self._plans.clear()

    def parts(self, asked: Asked) -> tuple[BlockPlan, float, Windows, float]:
        """The sliding plan and the windows of a layout, and the density of each."""
        key = asked.layout, asked.q.device
        if key not in self._plans:
            layout = asked.layout
            plan, half = sliding_plan(layout, self.tile).to(asked.q.device), windows(layout.grid, WINDOW)
            share = ((half.tokens + layout.text) / layout.tokens) ** 2
            self._plans[key] = plan, plan.kept(layout.tokens, layout.tokens), half.to(asked.q.device), share
        return self._plans[key]

    def attend(self, asked: Asked) -> torch.Tensor:
        """Group the heads and compute the groups."""
        asked.reason = self.stays_dense(asked)
        if asked.reason:
            return asked.dense()
        branches = list(self.route(asked))
        if len(branches) != asked.q.shape[1]:
            raise DitaError(
                f"the routing is for {len(branches)} heads, and layer {asked.layer} has {asked.q.shape[1]}: "
                "calibrate on this model"
            )
        _, sliding, _, share = self.parts(asked)
        density = sum((1.0, share, sliding)[branch] for branch in branches) / len(branches)
        asked.reason = self.not_worth(density)
        if asked.reason:
            return asked.dense()
        asked.density = density
        out = torch.empty_like(asked.q)
        for branch in sorted(set(branches)):
            heads = [head for head, taken in enumerate(branches) if taken == branch]
            out[:, heads] = self.branch(asked, branch, heads)
        return out

    def branch(self, asked: Asked, branch: int, heads: list[int]) -> torch.Tensor:
        """The output of one branch for some heads: [B, len(heads), N, D]."""
        repeat = asked.q.shape[1] // asked.k.shape[1]
        owners = [head // repeat for head in heads]
        q, k, v = asked.q[:, heads], asked.k[:, owners], asked.v[:, owners]
        mask = None if asked.key_mask is None else asked.key_mask[:, None, None]
        seen = Attended(q, k, v, mask, asked.scale)
        if branch == 0:
            return seen.attend()
        plan, _, half, _ = self.parts(asked)
        if branch == 1:
            return coreset_attention(seen, asked.layout, half)
        return self.attention(replace(asked, q=q, k=k, v=v), plan)[0]


class Measuring(Routed):
    """Computes everything densely and, where that need not be, writes down how far off the sparse branches are.

    Args:
        tile: of the sliding branch.
        ranges: parts of the run that are told apart.
        sink: (layer, range) -> sums of relative squared errors [2, H], and how many they are of.
    """

    def __init__(self, tile: Grid, ranges: int, sink: dict[str, Any]) -> None:
        super().__init__(lambda asked: (), tile)
        self.ranges, self.sink = ranges, sink

    def attend(self, asked: Asked) -> torch.Tensor:
        """Dense."""
        exact = asked.dense()
        if self.stays_dense(asked):
            return exact
        heads, wide = list(range(asked.q.shape[1])), exact.double()
        size = wide.square().sum((0, 2, 3)).clamp_min(1e-30)
        errors = [(self.branch(asked, b, heads).double() - wide).square().sum((0, 2, 3)) / size for b in (1, 2)]
        entry = self.sink.setdefault(range_key(asked, self.ranges), [torch.zeros(2, len(heads)), 0])
        entry[0] += torch.stack(errors).float().cpu()
        entry[1] += 1
        _, sliding, _, share = self.parts(asked)
        self.sink["densities"] = [share, sliding]
        return exact


@register
@dataclass(frozen=True)
class VORTA(SparseMethod):
    """VORTA's settings.

    Attributes:
        budget: of a calibrated routing: largest mean density of the steps and layers that are not dense anyway.
        ranges: parts of the run with a routing of their own.
        tile: the most a tile may have of frames, rows and columns; published for Wan at 77 frames of 720p.
        tau: of a trained router: least probability of a branch that is not dense.
        router: file of a trained router; "" for a calibrated routing.
        table: the errors of the branches, from `dita.calibrate`.

    Raises:
        DitaError: a setting out of range; on attaching, neither router nor calibration, or one of another model.

    Example:
        >>> VORTA(budget=0.4).label()
        'budget=0.4'
    """

    budget: float = 0.5
    ranges: int = 4
    tile: tuple[int, int, int] = (5, 9, 8)
    tau: float = 0.3
    router: str = ""
    table: Table | None = field(default=None, repr=False)
    cutoff: float = field(default=1.0, kw_only=True)

    name: ClassVar[str] = "vorta"
    title: ClassVar[str] = "VORTA"
    arxiv: ClassVar[str] = "2505.18809"
    axes: ClassVar[str] = "heads routed to dense, coreset or sliding tiles; by calibration or a trained router"
    confidence: ClassVar[str] = "medium"
    table_kind: ClassVar[type[Table] | None] = Table
    needs_calibration: ClassVar[bool] = True
    citation: ClassVar[str] = """@inproceedings{sun2025vorta,
  title={VORTA: Efficient Video Diffusion via Routing Sparse Attention},
  author={Sun, Wenhao and Tu, Rong-Cheng and Ding, Yifu and Jin, Zhao and Liao, Jingyi and Liu, Shunyu and
    Tao, Dacheng},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("budget", self.budget, 0, 1)
        check_whole("ranges", self.ranges, 1)
        check_number("tau", self.tau, 0, 1)
        if len(self.tile) != 3:
            raise DitaError(f"tile is {self.tile!r}; expected frames, rows and columns")
        for side in self.tile:
            check_whole("a side of the tile", side, 1)

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """The method's sites; asking needs no table yet."""
        return type(self).disabled().handler(anatomy).sites

    def policy(self, anatomy: Anatomy) -> Policy:
        """See `SparseMethod.policy`."""
        if self.dense_steps >= 1:
            return Routed(lambda asked: (0,) * asked.q.shape[1], self.tile)
        if self.router:
            return Routed(by_router(self.router, anatomy.model, len(anatomy.attention_sites), self.tau), self.tile)
        return Routed(by_table(table_for(self.name, self.table, anatomy), self.budget, self.ranges), self.tile)

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> VORTA:
        """Measure the branches in one dense run; the pipeline comes back as it was."""
        from dita.session import accelerated, transformers_of

        sink: dict[str, Any] = {}
        with accelerated(pipe, _Calibration(method=self, sink=sink)):
            call(pipe)
        if not sink:
            raise DitaError("the calibration call ran no attention that VORTA can route: it must run the pipeline once")
        values = {key: (sums / count).tolist() for key, (sums, count) in sink.items() if key != "densities"}
        model = next(iter(transformers_of(pipe).values()))
        conditions = {"model": fingerprint(model), "scheduler": "", "shape": (), "steps": 0}
        return replace(
            self, table=Table.from_dict({"values": {**values, "densities": sink["densities"]}, **conditions})
        )

    @classmethod
    def forced(cls) -> VORTA:
        """No head stays dense."""
        return cls(budget=0.0)

    @classmethod
    def ladder(cls) -> tuple[VORTA, ...]:
        """Budgets around the default, all on one calibration."""
        return tuple(cls(budget=budget) for budget in (0.6, 0.5, 0.4, 0.3))


@dataclass(frozen=True)
class _Calibration(SparseMethod):
    """Watches, and leaves everything dense."""

    method: VORTA = field(default_factory=VORTA, compare=False, repr=False)
    sink: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    name: ClassVar[str] = "calibration"

    def handler(self, anatomy: Anatomy) -> Handler:
        """The recorder, where the method would not be dense."""
        policy = Measuring(self.method.tile, self.method.ranges, self.sink)
        policy.dense_steps, policy.dense_layers = self.method.dense_steps, self.method.dense_layers
        return SparseHandler(policy, super().handler(anatomy).sites, anatomy.text_at)

    def policy(self, anatomy: Anatomy) -> Policy:
        """Only asked for its sites."""
        return Policy()

    @classmethod
    def disabled(cls) -> _Calibration:
        """It never skips, so that no warning is due."""
        return cls()
