"""A sampling loop around one bare transformer, and counters of what ran in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import diffusers
import torch
from torch.overrides import TorchFunctionMode

from dita.flex import is_flex
from tiny_models.base import TinyModel, noise, seed_weights


class Sampler:
    """The least that a pipeline is: components, a scheduler, and a call that takes the scheduler through its steps.

    Args:
        tiny: what to build.

    Example:
        >>> from tiny_models import TINY_MODELS
        >>> Sampler(TINY_MODELS["WanTransformer3DModel"])(steps=2).shape
        torch.Size([1, 4, 2, 8, 8])
    """

    def __init__(self, tiny: TinyModel) -> None:
        self.tiny = tiny
        with torch.random.fork_rng(devices=[]):
            self.transformer: torch.nn.Module = getattr(diffusers, tiny.name)(**tiny.config).eval()
        seed_weights(self.transformer)
        if tiny.prepare is not None:
            tiny.prepare(self.transformer)
        self.scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()

    @property
    def components(self) -> dict[str, Any]:
        """What a diffusers pipeline shows of itself."""
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(self, steps: int = 6) -> torch.Tensor:
        """Denoise the same noise in a number of steps; float32 of the latents' shape."""
        latents = noise(*self.tiny.latents, seed=7)
        self.scheduler.set_timesteps(steps)
        for timestep in self.scheduler.timesteps:
            output = self.transformer(**self.tiny.inputs(latents, timestep.expand(1)))
            found = self.tiny.read(output) if self.tiny.read is not None else output[0]
            # Some predict a variance besides.
            found = found[tuple(slice(size) for size in latents.shape)]
            latents = self.scheduler.step(found, timestep, latents)[0]
        return latents


class Counted(TorchFunctionMode):
    """Calls of modules that hold no other, and of attention, while it is entered.

    Attributes:
        modules, attentions: how many there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.modules = self.attentions = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """See torch.overrides."""
        if func is torch.nn.functional.scaled_dot_product_attention or is_flex(func, args):
            self.attentions += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(model: torch.nn.Module, attention: bool = True) -> Iterator[Counted]:
    """Count what runs inside a model, with hooks that know nothing of acceleration.

    Args:
        model: to count in.
        attention: count attention too, which slows everything down.

    Example:
        >>> with counting(model := torch.nn.Sequential(torch.nn.Linear(2, 2))) as count:
        ...     _ = model(torch.zeros(1, 2))
        >>> count.modules, count.attentions
        (1, 0)
    """
    count = Counted()

    def ran(*_: Any) -> None:
        count.modules += 1

    leaves = [m for m in model.modules() if next(m.children(), None) is None]
    handles = [leaf.register_forward_pre_hook(ran) for leaf in leaves]
    try:
        with count if attention else nullcontext():
            yield count
    finally:
        for handle in handles:
            handle.remove()
