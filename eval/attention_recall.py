"""How much of the true attention a sparse method keeps, on queries, keys and values of a real pipeline."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import dita
from dita.anatomy import Anatomy, describe
from dita.attention_view import Attended
from dita.config import Method
from dita.errors import DitaError
from dita.kernels.block_sparse import dense_attention
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.handler import SparseHandler
from dita.kernels.sparse.layout import Layout
from dita.kernels.sparse.policy import Asked, Policy
from dita.seams import Handler


@dataclass(frozen=True)
class Captured:
    """One attention of a run.

    Attributes:
        layer, layers: which of the model's attentions.
        step, steps: of the run.
        seen: what it was given.
        layout: how its tokens lie.
    """

    layer: int
    layers: int
    step: int
    steps: int
    seen: Attended
    layout: Layout


class _Enough(Exception):
    """All that was wanted has been seen."""


class _Keep(Policy):
    """Dense everywhere; what is asked is kept."""

    def __init__(self, steps: Sequence[int], layers: Sequence[int], stop: bool) -> None:
        self.wanted_steps, self.wanted_layers, self.stop = steps, layers, stop
        self.kept: dict[tuple[int, int], Captured] = {}

    def attend(self, asked: Asked) -> torch.Tensor:
        key = (asked.layer, asked.step)
        if asked.step in self.wanted_steps and asked.layer in self.wanted_layers and key not in self.kept:
            mask = None if asked.key_mask is None else asked.key_mask[:, None, None]
            seen = Attended(asked.q.clone(), asked.k.clone(), asked.v.clone(), mask, asked.scale)
            self.kept[key] = Captured(asked.layer, asked.layers, asked.step, asked.steps, seen, asked.layout)
            if self.stop and len(self.kept) == len(self.wanted_steps) * len(self.wanted_layers):
                raise _Enough
        return asked.dense()


@dataclass(frozen=True)
class _Capture(Method):
    """Attaches `_Keep`; not in the registry."""

    policy: Any = field(default=None)

    name = "capture"

    def handler(self, anatomy: Anatomy) -> Handler:
        """See `Method.handler`."""
        return SparseHandler(self.policy, anatomy.attention_sites, anatomy.text_at)

    @classmethod
    def disabled(cls) -> _Capture:
        """Never warns of having changed nothing: it is meant to."""
        return cls()


def capture(
    pipe: Any, call: Callable[[Any], Any], steps: Sequence[int], layers: Sequence[int], stop: bool = False
) -> dict[tuple[int, int], Captured]:
    """Run a pipeline and keep what some of its attentions were given, of the first branch of each step.

    Args:
        pipe: a diffusers pipeline.
        call: runs it once.
        steps, layers: which solver steps and which attentions.
        stop: leave the run once all of them were seen.

    Returns:
        By (layer, step).

    Raises:
        DitaError: none of them was seen.

    Example:
        >>> capture(pipe, lambda p: p("a red bag", num_inference_steps=20), [5, 6], [0])  # doctest: +SKIP
    """
    import warnings

    keep = _Keep(steps, layers, stop)
    with warnings.catch_warnings(), dita.accelerated(pipe, _Capture(policy=keep)), contextlib.suppress(_Enough):
        warnings.simplefilter("ignore", dita.DitaWarning)  # nothing is skipped, and nothing is meant to be
        call(pipe)
    if not keep.kept:
        raise DitaError(f"no attention of layers {list(layers)} at steps {list(steps)} was seen; ask for others")
    return keep.kept


def recall(captured: Captured, lse: torch.Tensor) -> float:
    """The part of the attention's mass that was computed, averaged over queries.

    Args:
        captured: the attention.
        lse: log-sum-exp of the logits that were computed, float32 [B, H, N].

    Example:
        >>> q = torch.zeros(1, 1, 4, 8)
        >>> recall(Captured(0, 1, 0, 1, Attended(q, q, q), Layout((1, 1, 4))), torch.full((1, 1, 4), math.log(2)))
        0.5
    """
    seen = captured.seen
    scale = 1 / math.sqrt(seen.q.shape[-1]) if seen.scale is None else seen.scale
    _, dense = dense_attention(seen.q, seen.k, seen.v, scale, seen.key_mask)
    return float((lse - dense).exp().mean())


def judge(
    method: SparseMethod, pipe: Any, captured: Mapping[tuple[int, int], Captured], component: str = "transformer"
) -> dict[str, float | None]:
    """Let a method answer captured attentions, step after step, and compare with dense attention.

    The method's own guards are off: what is measured is the pattern. The first step of each layer lets methods look
    that need to; the last one counts.

    Args:
        method: with its settings.
        pipe: the pipeline that was captured.
        captured: from `capture`, at least two steps of each layer.
        component: which transformer.

    Returns:
        density, the share of the mass of what was computed (None for a method that tells no log-sum-exp; a method with
        a second branch or a correction is judged by its blocks), and the relative L1 error of the output; means over
        layers.

    Raises:
        DitaError: a layer was captured at one step only.

    Example:
        >>> judge(AdaSpa(density=0.2), pipe, captured)["recall"]  # doctest: +SKIP
        0.83
    """
    layers = sorted({layer for layer, _ in captured})
    bare = method.replace(dense_steps=0.0, dense_layers=0, cutoff=1.0)
    handler: Any = bare.handler(describe(getattr(pipe, component)))
    policy: Policy = handler.policy
    densities, recalls, errors = [], [], []
    for layer in layers:
        steps = sorted(step for other, step in captured if other == layer)
        if len(steps) < 2:
            raise DitaError(
                f"layer {layer} was captured at step {steps} only; capture two steps that follow each other"
            )
        state: dict[str, Any] = {}
        for number, step in enumerate(steps):
            one = captured[layer, step]
            seen = one.seen
            scale = 1 / math.sqrt(seen.q.shape[-1]) if seen.scale is None else seen.scale
            asked = Asked(
                seen.q, seen.k, seen.v, scale, seen.key_mask, one.layout, one.layer, one.layers, number, len(steps),
                state, seen.attend,
            )  # fmt: skip
            out = policy.attend(asked)
        exact = seen.attend()  # pyright: ignore[reportPossiblyUnbound]
        errors.append(float((out - exact).abs().sum() / exact.abs().sum()))  # pyright: ignore[reportPossiblyUnbound]
        densities.append(asked.density)  # pyright: ignore[reportPossiblyUnbound]
        if asked.lse is not None:  # pyright: ignore[reportPossiblyUnbound]
            recalls.append(recall(one, asked.lse))  # pyright: ignore[reportPossiblyUnbound]
        elif asked.density >= 1:  # pyright: ignore[reportPossiblyUnbound]
            recalls.append(1.0)
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "density": mean(densities),
        "recall": mean(recalls) if len(recalls) == len(layers) else None,
        "error": mean(errors),
    }
