"""diffusers' caches of attention: Pyramid Attention Broadcast and FasterCache.

Both run every block and leave out attention inside it, at timesteps within a window that the user chooses. What help
they get is said in `dita.eval.peers.diffusers_hooks`; PAB and FasterCache without a state for each branch
(`per_branch=False`) are what diffusers does alone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from dita.errors import DitaError
from dita.eval.peers.diffusers_hooks import DiffusersPeer
from dita.eval.peers.harness import Forward
from dita.eval.peers.hooked import Hooked, Timestep
from dita.eval.peers.trace import quiet

_NULL_CLASS = 1000  # the label that DiTPipeline gives the unconditional half
_SEQUENTIAL = ("FluxPipeline", "WanPipeline")
_WHOLE = (-1, 1001)


@dataclass(frozen=True)
class PyramidBroadcast(DiffusersPeer):
    """Pyramid Attention Broadcast: attention outputs are used again for some steps, by kind of attention.

    Attributes:
        spatial: self-attention is computed once in so many steps.
        temporal: the same for temporal attention, which few models have.
        cross: the same for cross-attention.
        window: timesteps between which attention may be skipped, exclusive; (100, 800) by default.
        per_branch: each guidance branch keeps its own attention.
    """

    spatial: int = 2
    temporal: int = 4
    cross: int = 6
    window: tuple[int, int] = (100, 800)
    per_branch: bool = True

    name: ClassVar[str] = "diffusers pab"

    def enable(self, pipe: Any, model: nn.Module) -> Hooked:
        """See `Peer.enable`."""
        from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

        now = Timestep(pipe)
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=self.spatial,
            temporal_attention_block_skip_range=self.temporal,
            cross_attention_block_skip_range=self.cross,
            spatial_attention_timestep_skip_range=self.window,
            temporal_attention_timestep_skip_range=self.window,
            cross_attention_timestep_skip_range=self.window,
            current_timestep_callback=now,  # pyright: ignore[reportArgumentType]
        )
        apply_pyramid_attention_broadcast(model, config)

        def around(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            now.read(kwargs)
            return forward(*args, **kwargs)

        return Hooked(model, per_branch=self.per_branch, around=around)

    @classmethod
    def ladder(cls) -> tuple[PyramidBroadcast, ...]:
        """The paper's pyramid of 2, 4 and 6 in the default window and in all timesteps, and wider pyramids there."""
        rungs = (
            (2, 4, 6, (100, 800)),
            (2, 4, 6, _WHOLE),
            (3, 4, 6, _WHOLE),
            (4, 6, 8, _WHOLE),
            (6, 6, 8, _WHOLE),
            (8, 8, 8, _WHOLE),
        )
        return tuple(cls(*rung) for rung in rungs)


@dataclass(frozen=True)
class FasterCache(DiffusersPeer):
    """FasterCache: attention is extrapolated between steps, and the unconditional half of a guided batch is left out.

    The second part needs both halves in one call (DiTPipeline with guidance above 1, which must then hold). Where the
    pipeline calls the transformer once for each branch (Flux, Wan) only attention is extrapolated: diffusers has no
    other way there.

    Attributes:
        attention: attention is computed once in so many steps; 2 by default.
        unconditional: so is the unconditional half; 5 by default.
        attention_until: attention may be skipped below this timestep; 681 by default.
        unconditional_until: the unconditional half may be left out below this one; 641 by default.
        per_branch: each guidance branch keeps its own attention.

    Raises:
        DitaError: on attaching, it is not known how the pipeline arranges guidance; in a run of DiTPipeline, there is
            no guidance.
    """

    attention: int = 2
    unconditional: int = 5
    attention_until: int = 681
    unconditional_until: int = 641
    per_branch: bool = True

    name: ClassVar[str] = "diffusers fastercache"

    def enable(self, pipe: Any, model: nn.Module) -> Hooked:
        """See `Peer.enable`."""
        from diffusers.hooks import FasterCacheConfig, apply_faster_cache

        batched = type(pipe).__name__ == "DiTPipeline"
        if not batched and type(pipe).__name__ not in _SEQUENTIAL:
            known = ", ".join(("DiTPipeline", *_SEQUENTIAL))
            raise DitaError(f"{self.name} must know how {type(pipe).__name__} arranges guidance; known are {known}")
        now = Timestep(pipe)
        config = FasterCacheConfig(
            spatial_attention_block_skip_range=self.attention,
            spatial_attention_timestep_skip_range=(-1, self.attention_until),
            unconditional_batch_skip_range=self.unconditional,
            unconditional_batch_timestep_skip_range=(-1, self.unconditional_until),
            attention_weight_callback=lambda _: 0.5,  # diffusers' default, which it warns of
            tensor_format="BCHW" if batched else "BCFHW",
            is_guidance_distilled=not batched,
            current_timestep_callback=now,  # pyright: ignore[reportArgumentType]
            _unconditional_conditional_input_kwargs_identifiers=["timestep", "class_labels"],
        )
        with quiet("diffusers.hooks.faster_cache", logging.ERROR):  # "purely experimental", at every attachment
            apply_faster_cache(model, config)

        def around(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            now.read(kwargs)
            return halves_exchanged(forward, args, kwargs) if batched else forward(*args, **kwargs)

        return Hooked(model, per_branch=self.per_branch, around=around)

    @classmethod
    def ladder(cls) -> tuple[FasterCache, ...]:
        """The default, then wider windows and ranges; a window must not hold the first step."""
        rungs = (
            (2, 5, 681, 641),
            (2, 5, 801, 801),
            (2, 5, 951, 951),
            (3, 5, 951, 951),
            (4, 8, 951, 951),
            (6, 10, 951, 951),
        )
        return tuple(cls(*rung) for rung in rungs)


def halves_exchanged(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call DiT's transformer with the unconditional half first, and put its output's halves back.

    Args:
        forward: takes hidden_states [2B, C, H, W], timestep [2B] and class_labels [2B], the last B being unconditional.
        args: its positional arguments.
        kwargs: its other arguments.

    Returns:
        Its output, with `sample` [2B, C', H, W] in the order of the input.

    Raises:
        DitaError: the last half is not unconditional.
    """
    labels = kwargs.get("class_labels")
    if labels is None or len(labels) % 2 or not bool((labels[len(labels) // 2 :] == _NULL_CLASS).all()):
        raise DitaError("FasterCache leaves out the unconditional half of a guided batch: set guidance_scale above 1")

    def exchanged(value: Any) -> Any:
        whole = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == len(labels)
        return torch.cat(value.chunk(2)[::-1]) if whole else value

    result = forward(*map(exchanged, args), **{name: exchanged(value) for name, value in kwargs.items()})
    result.sample = exchanged(result.sample)
    return result
