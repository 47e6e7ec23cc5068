"""What a block-sparse attention method decides, and what it is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dita.kernels.block_sparse import block_sparse_attention
from dita.kernels.guards import steps_of
from dita.kernels.plan import BlockPlan
from dita.kernels.sparse.layout import Layout


@dataclass
class Asked:
    """One attention of one layer, to be answered.

    Attributes:
        q: [B, H, N, D], after rotary positions and normalisation.
        k, v: [B, Hk, N, D].
        scale: of the logits.
        key_mask: bool [B, N], False for keys that no query sees (padded text); None for none.
        layout: how the tokens lie.
        layer, layers: which of the model's attentions this is.
        step, steps: solver steps since the run began, and of the run.
        state: what the policy keeps from step to step, of this layer, branch and stage alone.
        dense: computes the attention as the model would.
        timestep: of the training schedule, from 0 to 1000.
        density: share of the pairs of tokens that were computed; the policy's `attend` sets it.
        reason: why, in words.
        lse: log-sum-exp of the logits that were computed, float32 [B, H, N]; None where that was all of them, or where
            the answer has none.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    key_mask: torch.Tensor | None
    layout: Layout
    layer: int
    layers: int
    step: int
    steps: int
    state: dict[str, Any]
    dense: Callable[[], torch.Tensor]
    timestep: float = 0.0
    density: float = field(default=1.0)
    reason: str = ""
    lse: torch.Tensor | None = field(default=None, repr=False)


class Policy:
    """Plans the attention of every layer; one object serves one transformer.

    Subclasses define `plan`. Those whose output is more than the plan's attention define `finish`, those that need to
    look while attention is dense define `watch`, and those that are no plan at all define `attend`.

    Attributes:
        dense_steps: first part of the run, from 0 to 1, that stays dense.
        dense_layers: how many of the first layers stay dense.
        cutoff: a plan of a density above this is not worth its overhead: dense attention then.
        qk: how a plan's queries and keys are multiplied: "same" as their dtype, or "int8".
        fleeting: plans are used once and not kept, for methods that make a large one at every step.
    """

    dense_steps: float = 0.0
    dense_layers: int = 0
    cutoff: float = 1.0
    qk: str = "same"
    fleeting: bool = False

    def begin_run(self) -> None:
        """Forget what is kept beside the states."""

    def plan(self, asked: Asked) -> BlockPlan | None:
        """Say which blocks to compute; None for all.

        Asked again once the last plan's lifetime is over.
        """
        raise NotImplementedError(f"{type(self).__name__} must define plan()")

    def finish(self, asked: Asked, plan: BlockPlan, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """Turn the plan's output [B, H, N, D] and its log-sum-exp [B, H, N] into the answer."""
        return out

    def watch(self, asked: Asked) -> torch.Tensor:
        """Answer an attention that is to be dense."""
        return asked.dense()

    def stays_dense(self, asked: Asked, ahead: int = 0) -> str:
        """Why this attention is dense whatever a plan would say, in words; "" if it is not.

        Args:
            asked: the attention.
            ahead: the same so many steps later.
        """
        if asked.step + ahead < steps_of(self.dense_steps, asked.steps):
            return "dense warm-up step"
        return "dense first layers" if asked.layer < self.dense_layers else ""

    def not_worth(self, kept: float) -> str:
        """Why computing so much of the attention, a density, is left to dense attention; "" if it is not."""
        if kept >= 1:
            return "the plan keeps everything"
        return f"density {kept:.2f} is above the cut-off" if kept > self.cutoff else ""

    def attend(self, asked: Asked) -> torch.Tensor:
        """Answer an attention; sets `density` and `reason`."""
        asked.reason = self.stays_dense(asked)
        if asked.reason:
            return self.watch(asked)
        plan, kept = self._current(asked)
        asked.reason = self.not_worth(1.0 if plan is None else kept)
        if plan is None or asked.reason:
            return self.watch(asked)
        asked.density = kept
        out, asked.lse = self.attention(asked, plan)
        return self.finish(asked, plan, out, asked.lse)

    def attention(self, asked: Asked, plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute what a plan keeps, as `qk` says: output [B, H, N, D] and log-sum-exp, float32 [B, H, N]."""
        backend = "auto" if self.qk == "same" else self.qk
        return block_sparse_attention(asked.q, asked.k, asked.v, plan, asked.scale, asked.key_mask, backend)

    def _current(self, asked: Asked) -> tuple[BlockPlan | None, float]:
        """The plan in force and its density; a new one if there is none, or its lifetime is over."""
        until, plan, kept = asked.state.get("plan", (-1, None, 1.0))
        if asked.step > until:
            plan = self.plan(asked)
            kept = 1.0 if plan is None else plan.kept(asked.q.shape[2], asked.k.shape[2])
            if not self.fleeting:
                asked.state["plan"] = (asked.step + (0 if plan is None else plan.lifetime), plan, kept)
        return plan, kept
