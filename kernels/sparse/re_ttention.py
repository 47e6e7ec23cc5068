"""Re-ttention: a static window, rescaled by what dense steps say the window leaves out.

Chen et al., "Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape", NeurIPS 2025,
arXiv 2505.22918.

Selection: a window over the place within a frame, the same in every frame, and all text. When: the first part of the
run and every `every`th step are dense. Those compute the window too and keep, for every query, the share of its softmax
sum that the window holds, rho = exp(LSE_window - LSE_dense), and the residual R = O_dense - rho O_window. A step in
between answers rho O_window + R; then rho grows by `growth`, and stays at most 1.

R is large: as many numbers as the attention's output, of every layer and branch. A dense step that no sparse one
follows keeps nothing.

Differs from the paper: R is kept before the out-projection, not after it; that is linear, so both give the same. The
window is cut to whole blocks: tokens are put in order of their place, then of their frame, and a block of queries sees
the blocks at most `reach` away, the largest reach whose density is not above `density`. The authors let rho grow past
1. Their code computes the whole map and masks it, and the mask of their video runs is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.kernels.block_sparse import dense_attention
from dita.kernels.plan import BlockPlan
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Cut, Layout
from dita.kernels.sparse.policy import Asked, Policy
from dita.registry import register


def band(blocks: int, density: float) -> torch.Tensor:
    """A band around the diagonal that keeps at most a part of all pairs, and the diagonal in any case.

    Args:
        blocks: T.
        density: from 0 to 1.

    Returns:
        bool [T, T].

    Example:
        >>> band(4, 0.7).int()
        tensor([[1, 1, 0, 0],
                [1, 1, 1, 0],
                [0, 1, 1, 1],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    most = density * blocks**2 + 1e-6
    reach = max((r for r in range(blocks) if (2 * r + 1) * blocks - r * (r + 1) <= most), default=0)
    place = torch.arange(blocks)
    return (place[:, None] - place).abs() <= reach


class Reshaped(Policy):
    """Stand in for what a window misses with what it missed at the last dense step.

    Args:
        density: of the window, among image tokens.
        block: tokens of a block.
        every: each step whose number it divides is dense.
        growth: of rho, with every sparse step.
    """

    def __init__(self, density: float, block: int, every: int, growth: float) -> None:
        self.density, self.block, self.every, self.growth = density, block, every, growth
        self._plans: dict[Layout, tuple[BlockPlan, float]] = {}

    def begin_run(self) -> None:
        """Forget the windows."""
        self._plans.clear()

    def plan(self, asked: Asked) -> BlockPlan:
        """The window."""
        frames, rows, columns = asked.layout.grid
        order = torch.arange(asked.layout.visual).view(frames, rows * columns).T.flatten() if frames > 1 else None
        cut = Cut(asked.layout, self.block, self.block, order)
        return cut.plan(band(cut.rows, self.density)[None, None]).to(asked.q.device)

    def attend(self, asked: Asked) -> torch.Tensor:
        """Dense now and then; the window with its correction in between."""
        if asked.layer < self.dense_layers or self.density >= 1:
            asked.reason = self.stays_dense(asked) or self.not_worth(1.0)
            return asked.dense()
        if asked.layout not in self._plans:
            plan = self.plan(asked)
            self._plans[asked.layout] = plan, plan.kept(asked.layout.tokens, asked.layout.tokens)
        plan, kept = self._plans[asked.layout]
        asked.reason = self.not_worth(kept)
        if asked.reason:
            return asked.dense()
        busy = self._busy(asked)
        if busy or "rho" not in asked.state:
            asked.reason = busy or "nothing is known of this layer yet"
            last = asked.step + 1 >= asked.steps
            return asked.dense() if last or self._busy(asked, 1) else self._renew(asked, plan)
        asked.density = kept
        out, asked.lse = self.attention(asked, plan)
        rho = asked.state["rho"]
        asked.state["rho"] = (rho + self.growth).clamp_max(1)
        return (rho[..., None] * out.float() + asked.state["residual"].float()).to(out.dtype)

    def _busy(self, asked: Asked, ahead: int = 0) -> str:
        """Why this step, or one so many later, is dense; "" if it is not."""
        every = f"every {self.every} steps are dense" if (asked.step + ahead) % self.every == 0 else ""
        return self.stays_dense(asked, ahead) or every

    def _renew(self, asked: Asked, plan: BlockPlan) -> torch.Tensor:
        """The dense output; keeps what the window would miss of it."""
        whole, lse = dense_attention(asked.q, asked.k, asked.v, asked.scale, asked.key_mask)
        out, window = self.attention(asked, plan)
        rho = (window - lse).exp().nan_to_num(0.0).clamp_max(1)
        asked.state["rho"] = rho
        asked.state["residual"] = (whole.float() - rho[..., None] * out.float()).to(whole.dtype)
        return whole


@register
@dataclass(frozen=True)
class ReTtention(SparseMethod):
    """Re-ttention's settings.

    Attributes:
        density: share of the pairs of image tokens that the window keeps; published down to 0.031.
        block: tokens of a block.
        every: each step whose number it divides is dense.
        growth: what a sparse step adds to rho, lambda in the paper.

    Raises:
        DitaError: a setting out of range; on attaching, a model without attention inside its blocks.

    Example:
        >>> ReTtention(density=0.05).label()
        'density=0.05'
    """

    density: float = 0.1
    block: int = 64
    every: int = 5
    growth: float = 0.04

    name: ClassVar[str] = "re-ttention"
    title: ClassVar[str] = "Re-ttention"
    arxiv: ClassVar[str] = "2505.22918"
    axes: ClassVar[str] = "static window; rescaled by the softmax share and the residual of the last dense step"
    citation: ClassVar[str] = """@inproceedings{chen2025rettention,
  title={Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape},
  author={Chen, Ruichen and Mills, Keith G. and Jiang, Liyao and Gao, Chao and Niu, Di},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("density", self.density, 0, 1)
        check_whole("block", self.block, 1)
        check_whole("every", self.every, 1)
        check_number("growth", self.growth, 0, 1)

    def policy(self, anatomy: Anatomy) -> Policy:
        """See `SparseMethod.policy`."""
        return Reshaped(self.density, self.block, self.every, self.growth)

    @classmethod
    def forced(cls) -> ReTtention:
        """Small blocks, so that few tokens suffice."""
        return cls(density=0.3, block=4, every=3, cutoff=1.0)

    @classmethod
    def ladder(cls) -> tuple[ReTtention, ...]:
        """Windows from wide to narrow."""
        return tuple(cls(density=density) for density in (0.3, 0.2, 0.1, 0.05))
