"""diffusers' own caches as peers: First-Block-Cache and MagCache here, the others in files of their own.

They are applied with diffusers' `apply_*` functions, so that a transformer without `CacheMixin` (DiT) can have them.
Help that they get here, where diffusers alone fails or silently does something else:

- A cache context is opened around calls for which the pipeline opens none, named after the guidance branch.
- All hooks are reset when a run starts. diffusers resets at the normal end of `__call__`, and only under `CacheMixin`.
- PAB and FasterCache keep one state for each guidance branch (`per_branch`). diffusers has one, and with sequential
  guidance hands the attention of one branch to the other.
- PAB and FasterCache are told the timestep by the transformer's argument where the pipeline has no `current_timestep`.
- MagCache's ratios come from a run in its calibration mode; see `MagCache`.
- TaylorSeer's patterns name the modules that are really there: its own miss Wan's `attn1` and `attn2`.
- FasterCache expects the unconditional half of a guided batch first; DiTPipeline has it last, so halves are exchanged
  on the way in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from dita.errors import DitaError
from dita.eval.peers.base import Peer
from dita.eval.peers.hooked import Hooked


class DiffusersPeer(Peer):
    """A cache that ships with diffusers."""

    package: ClassVar[str] = "diffusers"
    module: ClassVar[str] = "diffusers"


@dataclass(frozen=True)
class FirstBlock(DiffusersPeer):
    """First-Block-Cache: all blocks but the first are skipped while the first one's residual changes little.

    Attributes:
        threshold: largest relative change that still skips; diffusers' default is 0.05, its example has 0.2.

    Example:
        >>> [config.threshold for config in FirstBlock.ladder()]
        [0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5]
    """

    threshold: float = 0.05

    name: ClassVar[str] = "diffusers firstblock"

    def enable(self, pipe: Any, model: nn.Module) -> Hooked:
        """See `Peer.enable`."""
        from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

        apply_first_block_cache(model, FirstBlockCacheConfig(threshold=self.threshold))
        return Hooked(model)

    @classmethod
    def ladder(cls) -> tuple[FirstBlock, ...]:
        """The default and factors of 0.6 to 10 around it; 0.2 is the example's."""
        return tuple(cls(threshold) for threshold in (0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5))


@dataclass(frozen=True)
class MagCache(DiffusersPeer):
    """MagCache: all blocks are skipped while calibrated magnitude ratios predict little error.

    Attributes:
        threshold: largest accumulated error that still skips; 0.06 by default.
        max_skip: most skips in a row; 3 by default.
        retention: fraction of the steps that are computed first; 0.2 by default.
        ratios: one for each step, from `calibrated`. diffusers takes one list, so with sequential guidance it is the
            first branch's.

    Raises:
        DitaError: on attaching, there are no ratios; in a run, it has another number of steps than the calibration.
            diffusers itself would go on, with ratio 1 or from the start of the table.
    """

    threshold: float = 0.06
    max_skip: int = 3
    retention: float = 0.2
    ratios: tuple[float, ...] | None = field(default=None, repr=False)

    name: ClassVar[str] = "diffusers magcache"
    needs_calibration: ClassVar[bool] = True

    def enable(self, pipe: Any, model: nn.Module) -> Hooked:
        """See `Peer.enable`."""
        from diffusers.hooks import MagCacheConfig, apply_mag_cache

        if self.ratios is None:
            raise DitaError(f"{self.name} has no ratios: measure them with config.calibrated(pipe, lambda p: p(...))")
        config = MagCacheConfig(
            threshold=self.threshold,
            max_skip_steps=self.max_skip,
            retention_ratio=self.retention,
            num_inference_steps=len(self.ratios),
            mag_ratios=list(self.ratios),
        )
        apply_mag_cache(model, config)
        return Hooked(model, steps=len(self.ratios))

    def trial(self) -> MagCache:
        """With ratios of 1 if there are none."""
        return self if self.ratios is not None else replace(self, ratios=(1.0,))

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> MagCache:
        """Measure the ratios in one run in diffusers' calibration mode, in which everything is computed.

        Raises:
            DitaError: the call ran no sampling loop to its end.
        """
        measuring = _Measuring()
        with measuring.attached(pipe):
            call(pipe)
        if not measuring.found:
            raise DitaError(f"{self.name} measured nothing: the call must run {type(pipe).__name__} to its last step")
        return replace(self, ratios=tuple(measuring.found))

    @classmethod
    def ladder(cls) -> tuple[MagCache, ...]:
        """The default, the pairs of threshold and skips in the paper's tables, and two beyond them."""
        rungs = (
            (0.02, 2, 0.2),
            (0.04, 2, 0.2),
            (0.06, 3, 0.2),
            (0.12, 4, 0.2),
            (0.24, 6, 0.2),
            (0.24, 6, 0.1),
            (0.5, 8, 0.1),
        )
        return tuple(cls(threshold, skips, retention) for threshold, skips, retention in rungs)


@dataclass(frozen=True)
class _Measuring(DiffusersPeer):
    """MagCache's calibration mode."""

    found: list[float] = field(default_factory=list, repr=False)

    name: ClassVar[str] = "diffusers magcache, calibrating"

    def enable(self, pipe: Any, model: nn.Module) -> Hooked:
        from diffusers.hooks import MagCacheConfig, apply_mag_cache

        # With so many steps it never comes to the end, where it would print the ratios and forget them.
        apply_mag_cache(model, MagCacheConfig(calibrate=True, num_inference_steps=10**9))
        hooked = Hooked(model, may_idle=True)

        def keep() -> None:
            first = next(iter(hooked.managers[0]._state_cache.values()))
            self.found[:] = first.calibration_ratios

        hooked.at_finish = keep
        return hooked
