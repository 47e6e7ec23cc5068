"""When to compute: the protocol that every caching paper fills in, and the guards common to all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch

from dita.attention_view import Attended
from dita.config import check_whole
from dita.errors import DitaError
from dita.response import Schedule
from dita.seams import Features, Fresh, Position, Site


@dataclass
class View:
    """What a policy may look at before a step and after it.

    Attributes:
        position: where the call stands.
        shapes: shapes of the tensors that the transformer was called with.
        scheduler: fingerprint of the scheduler, see `dita.fingerprint`.
        grid: frames, rows and columns of image tokens, () where the model does not tell.
        latents: what the transformer denoises.
        kept: returns the newest features that are kept of a reused site, () if there are none.
        gap: steps since the newest computed one of this stream; 0 before there is one.
        skipped_in_row: skipped steps since then.
        probe: after the probe blocks ran, their residual of the image stream [B, N, C]; None without a probe.
        residual: after a computed step, the residual of the image stream over the reused span.
        block_change: after a computed step, the mean over blocks of the relative L1 change of each block's output since
            the last computed step, per sample [B]; None for the first.
        schedule: returns the run's timesteps, None where they are not known.
        computing: once it is decided, whether the whole step is computed, on the policy's word or not.
        due: whether the call is computed, as a method on the sampling loop says in place of a plan; None for no word.
    """

    position: Position
    shapes: tuple[tuple[int, ...], ...] = ()
    scheduler: str = ""
    grid: tuple[int, ...] = ()
    latents: torch.Tensor | None = None
    kept: Callable[[Site], Features] = lambda site: ()
    gap: int = 0
    skipped_in_row: int = 0
    probe: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    block_change: torch.Tensor | None = None
    schedule: Callable[[], Schedule | None] = lambda: None
    computing: bool = True
    due: bool | None = None


@dataclass(frozen=True)
class Verdict:
    """A decision about one call.

    Attributes:
        compute: all reused sites run.
        reason: in words.
        value: of the indicator, if there was one.
        computes: where `compute` is False, says which of the sites run all the same; None for none of them.
        weights: of the forecast, one per anchor, in place of the recipe's.
        verify: run the recipe's `verify` block for real too, and tell `Policy.verified`.
        fresh: where a row-wise module is skipped, says on which tokens of an input [B, N, C] it runs all the same, from
            the site and that shape; None for none of them.
    """

    compute: bool
    reason: str
    value: float | None = None
    computes: Callable[[Site], bool] | None = None
    weights: tuple[float, ...] | None = None
    verify: bool = False
    fresh: Callable[[Site, tuple[int, ...]], Fresh | None] | None = None


class Policy:
    """Decides for one stream (a guidance branch and solver stage) of one run, from its first step to its last.

    A fresh policy is made when a run starts, so that it needs no reset. It may assume that the first step of a run was
    computed before it is first asked.

    It sees every site that the recipe reuses or watches through `saw`.

    Class attributes:
        probe_blocks: blocks at the front that always run; it is asked after them.
        watch_blocks: wants `View.block_change`.
        wants_residual: wants `View.residual`.
    """

    probe_blocks: int = 0
    watch_blocks: bool = False
    wants_residual: bool = False

    def begin(self, view: View) -> None:
        """The stream's first call is about to be computed."""

    def decide(self, view: View) -> Verdict:
        """Say whether this step is computed."""
        raise NotImplementedError

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """A reused or watched site ran. What is kept of the tensors must be copied.

        Args:
            site: which.
            inputs: a span's, where the recipe keeps residuals or watches the span; the model's latents; else empty.
            outputs: of the site; an "entry" site's is what the first attention is about to read.
            view: the call.
        """

    def wants_attention(self, site: Site, view: View) -> bool:
        """Say whether `attended` is to see an attention module of the recipe's `attend`, which runs at this step."""
        return True

    def attended(self, site: Site, seen: Attended, view: View) -> None:
        """An attention module attends to these tensors, which must not be kept: several times for some models."""

    def verified(self, draft: Features, exact: Features, view: View) -> None:
        """A block's output with everything inside it forecast, and with everything computed, on the same input."""

    def computed(self, view: View) -> None:
        """The step was computed, on this policy's word or not."""

    def skipped(self, view: View) -> None:
        """The step was skipped."""

    def keeps(self, site: Site, inputs: Features, outputs: Features) -> Features:
        """What is kept for indicators because of a site, each as a tensor of that size; one may stand several times.

        It tells beforehand what `bytes_held` comes to, and is asked about the probe, reused and watched sites.

        Args:
            site: where.
            inputs, outputs: that passed through it in one call; tensors on the meta device, or real ones.
        """
        return ()

    def bytes_held(self) -> int:
        """Bytes of tensors kept for indicators."""
        return 0


@dataclass(frozen=True)
class Guards:
    """Limits that hold whatever the policy says; a recipe has its own, and the user's are joined to them.

    Attributes:
        warmup: first steps that are always computed; the very first always is.
        tail: last steps that are always computed.
        max_consecutive: skips in a row, -1 for no limit.
        max_total: skips per run and stream, -1 for no limit.
        forced: steps of the run that are always computed, in any order, counted from 0, or from the end by negative
            numbers (-1 is the last). A mask of ones and zeros, as cache-dit takes it, is the numbers of its ones.

    Raises:
        DitaError: a number out of range.

    Example:
        >>> print(Guards(tail=1, forced=[20, 10]))
        tail:1,forced:10/20
    """

    warmup: int = 0
    tail: int = 0
    max_consecutive: int = -1
    max_total: int = -1
    forced: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name, low in (("warmup", 0), ("tail", 0), ("max_consecutive", -1), ("max_total", -1)):
            check_whole(f"the guard {name}", getattr(self, name), low)
        given: Any = self.forced
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise DitaError(f"the guard forced is {given!r}; expected a list of step numbers")
        steps = list(given)
        for step in steps:
            check_whole("a step in the guard forced", step, -1_000_000)
        object.__setattr__(self, "forced", tuple(sorted(set(steps))))

    @classmethod
    def of(cls, given: Guards | Mapping[str, Any]) -> Guards:
        """Guards, or a mapping such as {"tail": 1, "forced": [10, 20]} as guards.

        Raises:
            DitaError: neither, an unknown guard, or a number out of range.
        """
        if isinstance(given, Guards):
            return given
        names = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or not set(given) <= set(names):
            raise DitaError(f"guards is {given!r}; expected a mapping with some of {', '.join(names)}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Those that are set, as plain values."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.default != ()}
        set_ones = {name: value for name, value in values.items() if value != getattr(Guards, name)}
        return set_ones | ({"forced": list(self.forced)} if self.forced else {})

    def __str__(self) -> str:
        parts = {name: "/".join(map(str, v)) if name == "forced" else v for name, v in self.to_dict().items()}
        return ",".join(f"{name}:{value}" for name, value in parts.items())

    def joined(self, other: Guards) -> Guards:
        """What satisfies both.

        Example:
            >>> print(Guards(warmup=3, max_total=9).joined(Guards(warmup=1, max_consecutive=2)))
            warmup:3,max_consecutive:2,max_total:9
        """
        return Guards(
            max(self.warmup, other.warmup),
            max(self.tail, other.tail),
            _stricter(self.max_consecutive, other.max_consecutive),
            _stricter(self.max_total, other.max_total),
            (*self.forced, *other.forced),
        )

    def verdict(self, view: View, skipped: int) -> Verdict | None:
        """A verdict if a guard forces one.

        Args:
            view: the call.
            skipped: steps of the run and stream so far.
        """
        position = view.position
        if position.local_step < self.warmup:
            return Verdict(True, "warm-up")
        if position.step >= position.steps - self.tail:
            return Verdict(True, "tail")
        if position.step in self.forced or position.step - position.steps in self.forced:
            return Verdict(True, "forced")
        if 0 <= self.max_consecutive <= view.skipped_in_row:
            return Verdict(True, "max_consecutive")
        if 0 <= self.max_total <= skipped:
            return Verdict(True, "max_total")
        return None


def _stricter(one: int, other: int) -> int:
    return min(limits) if (limits := [limit for limit in (one, other) if limit >= 0]) else -1


@dataclass
class FixedInterval(Policy):
    """Compute the first `warmup` steps, then every `interval`-th.

    With interval 6 and warm-up 3 over 50 steps: 0, 1, 2, 8, 14, ..., 44 (TaylorSeer's published schedule).
    """

    interval: int
    warmup: int = 1

    def due(self, step: int) -> bool:
        """Say whether a step of the run is computed."""
        return step < self.warmup or (step - max(self.warmup - 1, 0)) % self.interval == 0

    def decide(self, view: View) -> Verdict:
        """Follow the schedule."""
        step = view.position.local_step
        return Verdict(self.due(step), "warm-up" if step < self.warmup else f"interval {self.interval}")


@dataclass
class Periodic(Policy):
    """Compute the first `warmup` steps, then those whose number is a multiple of `interval` (AB-Cache, Delta-DiT)."""

    interval: int
    warmup: int = 1

    def decide(self, view: View) -> Verdict:
        """Follow the schedule."""
        step = view.position.local_step
        if step < self.warmup:
            return Verdict(True, "warm-up")
        return Verdict(step % self.interval == 0, f"interval {self.interval}")


@lru_cache
def against(what: str, limit: float) -> str:
    """The reason of a verdict that compares a number with a limit; the same at every step, and so made once.

    Example:
        >>> against("probe change", 0.10)
        'probe change against 0.1'
    """
    return f"{what} against {limit:g}"


def relative_l1(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Mean |new - old| over mean |old|, per sample, in float32.

    Args:
        new, old: tensors [B, ...] of one shape.

    Returns:
        float32 [B]; infinite where `old` is all zero and `new` is not.

    Example:
        >>> relative_l1(torch.tensor([[3.0], [1.0]]), torch.tensor([[2.0], [1.0]]))
        tensor([0.5000, 0.0000])
    """
    difference = (new.float() - old.float()).abs_().flatten(1).mean(1)
    scale = old.float().abs().flatten(1).mean(1)
    return torch.where(difference == 0, difference, difference / scale)
