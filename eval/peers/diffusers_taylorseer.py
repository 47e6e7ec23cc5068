"""diffusers' TaylorSeer as a peer, by module and in its lite mode.

What help it gets is said in `dita.eval.peers.diffusers_hooks`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from dita.anatomy import Anatomy, describe
from dita.errors import DitaError
from dita.eval.peers.diffusers_hooks import DiffusersPeer
from dita.eval.peers.hooked import Hooked


@dataclass(frozen=True)
class TaylorSeer(DiffusersPeer):
    """TaylorSeer: the outputs of modules are forecast by a Taylor expansion between computed steps.

    Attributes:
        interval: a step in so many is computed; 5 by default.
        modules: "attention", which is what diffusers does by itself, or "all", the feed-forward modules too, as in the
            paper. Where attention and feed-forward run side by side (Flux), the projection that joins them is forecast.
        order: highest order; 1 by default.
        warmup: steps computed first; 3 by default.

    The factors are float32, as in diffusers' example; its default of bfloat16 costs accuracy.
    """

    interval: int = 5
    modules: str = "attention"
    order: int = 1
    warmup: int = 3

    name: ClassVar[str] = "diffusers taylorseer"

    def enable(self, pipe: Any, model: nn.Module) -> Hooked:
        """See `Peer.enable`."""
        return self._apply(model, *module_patterns(describe(model), self.modules))

    def _apply(self, model: nn.Module, cached: list[str], skipped: list[str]) -> Hooked:
        from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

        config = TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.warmup,
            max_order=self.order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=cached,
            skip_predict_identifiers=skipped or None,
        )
        apply_taylorseer_cache(model, config)
        return Hooked(model)

    @classmethod
    def ladder(cls) -> tuple[TaylorSeer, ...]:
        """The default, and all modules at intervals of 0.4 to 1.8 times the default."""
        return (cls(), *(cls(interval, "all") for interval in (2, 3, 4, 5, 7, 9)))


@dataclass(frozen=True)
class TaylorSeerLite(TaylorSeer):
    """TaylorSeer's lite mode: blocks are skipped whole and the model's last projection is forecast.

    On DiT, which names that projection `proj_out_2`, the same is said with patterns.
    """

    modules: str = "projection"

    name: ClassVar[str] = "diffusers taylorseer lite"

    def enable(self, pipe: Any, model: nn.Module) -> Hooked:
        """See `Peer.enable`."""
        last = next((name for name in ("proj_out", "proj_out_2") if hasattr(model, name)), None)
        if last is None:
            raise DitaError(
                f"{self.name} forecasts the model's last projection; {type(model).__name__} has no proj_out"
            )
        return self._apply(model, [re.escape(last)], [re.escape(block.path) for block in describe(model).blocks])

    @classmethod
    def ladder(cls) -> tuple[TaylorSeerLite, ...]:
        """The default interval and factors of 0.4 to 1.6 around it."""
        return tuple(cls(interval) for interval in (2, 3, 4, 5, 6, 7, 8))


def module_patterns(anatomy: Anatomy, modules: str) -> tuple[list[str], list[str]]:
    """Regular expressions for TaylorSeer: modules whose output is forecast, and modules that then need not run.

    Raises:
        DitaError: `modules` is neither "attention" nor "all", or the model has no such module.
    """
    if modules not in ("attention", "all"):
        raise DitaError(f"modules is {modules!r}; expected 'attention' or 'all'")
    anatomy.require("module", "diffusers taylorseer")
    paths = {id(module): path for path, module in anatomy.model.named_modules()}
    cached, skipped = [], []
    for part in anatomy.modules:
        feeders = [paths[id(feeder)] for feeder in part.feeders if any(True for _ in feeder.parameters())]
        if modules == "all":
            cached.append(part.site.name)
            skipped += feeders
        elif "attention" in part.site.role:
            cached.append(part.site.name)
        else:
            cached += [path for path in feeders if path.endswith("attn")]
    return [re.escape(path) for path in cached], [re.escape(path) for path in skipped]
