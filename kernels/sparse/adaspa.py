"""AdaSpa: exact block masses, searched a few times in a run, and heads that differ in density.

Xia et al., "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation", ICCV 2025,
arXiv 2502.21079.

Score: the attention that each pair of blocks holds, exactly, W_pq = sum of exp(q_i k_j / sqrt(D) - LSE_i) over the
pair (the paper's pseudocode prints log where exp is meant). Selection: every row of blocks of a head keeps equally
many, and all text. A head of which these hold more than `recall` of its mass counts as easy: the n easy ones with the
most get sparsity (1 + s) / 2, the n with the least (3 s - 1) / 2, so that the mean stays s. When: the first search ends
the dense steps; a plan is used until the next search. Later searches reuse the log-sum-exp of the first.

Differs from the paper: blocks on the diagonal are always kept; the paper does not say what happens where more than
half of the heads are easy: n is at most half of them. There is no public code. At the first search the dense output,
which that search computes anyway, is the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.kernels.block_mass import block_mass
from dita.kernels.block_sparse import dense_attention
from dita.kernels.guards import steps_of
from dita.kernels.plan import BlockPlan
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Cut
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.select import top_per_row
from dita.registry import register


class MassSearch(Policy):
    """Keep the blocks of most mass, found at a few steps.

    Args:
        density: mean share of blocks kept.
        block: tokens of a block.
        search: parts of the run at which the mass is measured again.
        recall: share of its mass that an easy head keeps; above 1 for no difference between heads.
    """

    def __init__(self, density: float, block: int, search: tuple[float, ...], recall: float) -> None:
        self.density, self.block, self.search, self.recall = density, block, search, recall

    def attend(self, asked: Asked) -> torch.Tensor:
        """The first attention after the warm-up is dense and gives the log-sum-exp."""
        if self.stays_dense(asked) or self.density >= 1 or "lse" in asked.state:
            return super().attend(asked)
        out, asked.state["lse"] = dense_attention(asked.q, asked.k, asked.v, asked.scale, asked.key_mask)
        self._current(asked)
        asked.reason = "first search"
        return out

    def plan(self, asked: Asked) -> BlockPlan | None:
        """Measure the mass and keep the most."""
        if self.density >= 1:
            return None
        cut = Cut(asked.layout, self.block, self.block, device=asked.q.device)
        queries, present = cut.blocks(asked.q, self.block)
        keys, _ = cut.blocks(asked.k, self.block)
        lse, _ = cut.blocks(asked.state["lse"][..., None], self.block)
        mass = block_mass(queries, keys, present, cut.valid(asked.key_mask, present), lse[..., 0], asked.scale)
        keep = self._keep(mass, present.sum((2, 3)))
        searches = [steps_of(part, asked.steps) for part in self.search]
        following = min((step for step in searches if step > asked.step), default=asked.steps)
        return cut.plan(top_per_row(mass, keep[..., None]), lifetime=following - asked.step - 1)

    def _keep(self, mass: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """How many blocks of a row each head keeps: int64 [B, H].

        Args:
            mass: [B, H, Tq, Tk]; what is missing to `queries`, the number of queries, is on text, which is kept.
            queries: [B', H'].
        """
        columns = mass.shape[-1]

        def count(density: float) -> int:
            return min(columns, max(1, round(density * columns)))

        base = count(self.density)
        kept = mass.masked_fill(~top_per_row(mass, base), 0).sum((-2, -1))
        recall = 1 - (mass.sum((-2, -1)) - kept) / queries
        easy = (recall > self.recall).sum(-1, keepdim=True).clamp_max(mass.shape[1] // 2)
        rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        sparsity = 1 - self.density
        keep = torch.full_like(rank, base)
        keep = torch.where(rank < easy, count(1 - (1 + sparsity) / 2), keep)
        return torch.where(rank >= mass.shape[1] - easy, count(min(1.0, 1 - (3 * sparsity - 1) / 2)), keep)


@register
@dataclass(frozen=True)
class AdaSpa(SparseMethod):
    """AdaSpa's settings.

    Attributes:
        density: mean share of blocks kept; the paper's sparsity of 0.8 is a density of 0.2.
        block: tokens of a block.
        search: parts of the run, ascending, at which blocks are searched. The first search is at the end of the dense
            steps, so that parts before or at it stand for that one.
        recall: share of its mass that an easy head keeps; 2 makes all heads alike.

    Raises:
        DitaError: a setting out of range; on attaching, a model without attention inside its blocks.

    Example:
        >>> AdaSpa(density=0.3).label()
        'density=0.3'
    """

    density: float = 0.2
    block: int = 64
    search: tuple[float, ...] = (0.2, 0.6)
    recall: float = 0.8

    name: ClassVar[str] = "adaspa"
    title: ClassVar[str] = "AdaSpa"
    arxiv: ClassVar[str] = "2502.21079"
    axes: ClassVar[str] = "exact block mass; top-k per row, density per head; searched twice a run"
    citation: ClassVar[str] = """@inproceedings{xia2025adaspa,
  title={Training-free and Adaptive Sparse Attention for Efficient Long Video Generation},
  author={Xia, Yifei and Ling, Suhan and Fu, Fangcheng and Wang, Yujie and Li, Huixia and Xiao, Xuefeng and Cui, Bin},
  booktitle={International Conference on Computer Vision},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("density", self.density, 0, 1)
        check_whole("block", self.block, 1)
        check_number("recall", self.recall, 0, 2)
        if list(self.search) != sorted(self.search) or not all(0 <= part <= 1 for part in self.search):
            raise DitaError(f"search is {self.search!r}; expected ascending parts of the run, from 0 to 1")

    def policy(self, anatomy: Anatomy) -> Policy:
        """See `SparseMethod.policy`."""
        return MassSearch(self.density, self.block, self.search, self.recall)

    @classmethod
    def forced(cls) -> AdaSpa:
        """Small blocks, so that few tokens suffice."""
        return cls(density=0.3, block=4, cutoff=1.0)

    @classmethod
    def ladder(cls) -> tuple[AdaSpa, ...]:
        """Densities around the published one."""
        return tuple(cls(density=density) for density in (0.4, 0.3, 0.2, 0.1))
