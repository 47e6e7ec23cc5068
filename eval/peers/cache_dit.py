"""cache-dit's DBCache as a peer, alone and with its TaylorSeer calibrator.

cache-dit replaces `__call__` of the pipeline's class, renames the transformer's parts during a call, and leaves
attributes behind; switched off on one of two pipelines of a class, it breaks the other. Here the class, the pipeline
and all modules are put back from what was noted before, without cache-dit's own `disable_cache`.

Help that it gets: whether guidance takes two calls a step is read off the first step of each run. cache-dit goes by the
pipeline's name, which for Flux says one call, and with `true_cfg_scale` above 1 the branches would then share a cache.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from dita.errors import DitaError
from dita.eval.peers.base import Peer
from dita.eval.peers.harness import Attachment, Forward
from dita.seams import Position


@dataclass(frozen=True)
class DBCache(Peer):
    """Dual Block Cache: the first blocks are run and their residual decides whether the middle ones are.

    Attributes:
        fn: blocks that are always run first.
        threshold: largest relative change that still skips; 0.08 by default, 1 and above always skips.
        bn: blocks that are always run last; none by default.
        warmup: steps that are computed first.
        most: most skips in a row; cache-dit by itself sets no limit.

    cache-dit's own `fn` and `warmup` are 8, for models of 19 blocks and more. A model of 8 blocks would skip nothing
    with them, and a run of 20 steps little, so that these are 1 and 4 here.

    Example:
        >>> DBCache(threshold=0.3).label()
        'threshold=0.3'
    """

    fn: int = 1
    threshold: float = 0.08
    bn: int = 0
    warmup: int = 4
    most: int = 3

    name: ClassVar[str] = "cache-dit dbcache"
    package: ClassVar[str] = "cache-dit"
    module: ClassVar[str] = "cache_dit"
    loud: ClassVar[int] = logging.ERROR  # it warns of every forward that it does not check

    def enable(self, pipe: Any, model: nn.Module) -> Attachment:
        """See `Peer.enable`."""
        import cache_dit

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=self.fn,
            Bn_compute_blocks=self.bn,
            residual_diff_threshold=self.threshold,
            max_warmup_steps=self.warmup,
            max_continuous_cached_steps=self.most,
            enable_separate_cfg=True,
        )
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=self._forecast())
        return Contexts(pipe, model)

    def _forecast(self) -> Any:
        return None

    @classmethod
    def ladder(cls) -> tuple[DBCache, ...]:
        """Thresholds from 0.6 to 6 times the default, one with two blocks first; the strongest may skip longer."""
        rungs = (
            (1, 0.05, 4, 3),
            (1, 0.08, 4, 3),
            (1, 0.12, 4, 3),
            (2, 0.2, 4, 3),
            (1, 0.2, 4, 3),
            (1, 0.3, 4, 5),
            (1, 0.5, 3, 8),
        )
        return tuple(cls(fn, threshold, 0, warmup, most) for fn, threshold, warmup, most in rungs)


@dataclass(frozen=True)
class DBCacheTaylor(DBCache):
    """DBCache of which the skipped residual is forecast by a Taylor expansion.

    Attributes:
        order: of the expansion; 1 by default, 1 or 2 recommended.
    """

    order: int = 1

    name: ClassVar[str] = "cache-dit dbcache+taylorseer"

    def _forecast(self) -> Any:
        import cache_dit

        return cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=self.order)

    @classmethod
    def ladder(cls) -> tuple[DBCacheTaylor, ...]:
        """Thresholds, warm-up and longest skips of `DBCache`; order 2 where skips are long, both orders at the end."""
        rungs = (
            (0.05, 4, 3, 1),
            (0.08, 4, 3, 1),
            (0.12, 4, 3, 1),
            (0.2, 4, 3, 2),
            (0.3, 4, 5, 2),
            (0.5, 3, 8, 1),
            (0.5, 3, 8, 2),
        )
        return tuple(cls(1, threshold, 0, warmup, most, order) for threshold, warmup, most, order in rungs)


class Contexts(Attachment):
    """cache-dit's cache contexts of one pipeline, told how many calls a step has.

    They start each run expecting two. A run in which the second step begins after one call has no second branch, and
    its contexts are told so before anything was skipped.
    """

    def __init__(self, pipe: Any, model: nn.Module) -> None:
        self._manager = vars(pipe)["_context_manager"]
        self._names = tuple(vars(model)["_context_names"])
        self._steps = self._calls = 0
        self.summary = f"{len(self._names)} cache contexts on {type(model).__name__}"

    def start(self) -> None:
        """Count steps and calls anew; cache-dit makes new contexts in every call of the pipeline."""
        self._steps = self._calls = 0

    def call(self, position: Position, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look whether a step began."""
        if position.branch == "call 0":
            if self._steps == 1 and self._calls == 1:
                for context in map(self._manager.get_context, self._names):
                    context.cache_config = dataclasses.replace(context.cache_config, enable_separate_cfg=False)
            self._steps, self._calls = self._steps + 1, 0
        self._calls += 1
        if self._calls > 2:
            raise DitaError("cache-dit knows of two guidance branches, but this step has a third call")
        return forward(*args, **kwargs)
