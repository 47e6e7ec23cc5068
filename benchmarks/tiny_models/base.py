"""The record of one tiny transformer, and seeded numbers for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

HEADS, HEAD_WIDTH = 2, 16
WIDTH = HEADS * HEAD_WIDTH
TEXT, TEXT_WIDTH = 5, 24
"""Text tokens and their width."""
SIDE = 4
"""Rows and columns of image tokens."""
IMAGE = SIDE * SIDE
ROPE = (4, 6, 6)
"""Widths of a head's three rotary axes."""

Inputs = Callable[[torch.Tensor, torch.Tensor], dict[str, Any]]


@dataclass(frozen=True)
class TinyModel:
    """One transformer class of diffusers: how to build it tiny, and how a sampling loop calls it.

    Attributes:
        name: the class.
        kind: what it makes: "image", "video", "audio" or "other".
        config: arguments of its constructor.
        latents: shape of what is denoised.
        inputs: makes the arguments of a call from latents and timestep [B].
        read: finds the prediction in the model's output; by default its first tensor.
        prepare: is given the model once it is built.
    """

    name: str
    kind: str
    config: dict[str, Any]
    latents: tuple[int, ...]
    inputs: Inputs
    read: Callable[[Any], torch.Tensor] | None = None
    prepare: Callable[[torch.nn.Module], None] | None = None


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal float32 numbers that depend on shape and seed only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(width: int = TEXT_WIDTH, count: int = TEXT, seed: int = 1) -> torch.Tensor:
    """Prompt embeddings [1, count, width]."""
    return noise(1, count, width, seed=seed)


def mask(count: int = TEXT, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """A mask [1, count] that leaves none out."""
    return torch.ones(1, count, dtype=dtype)


def grid_ids(frames: int = 1, rows: int = SIDE, columns: int = SIDE) -> torch.Tensor:
    """Frame, row and column of every image token, [frames * rows * columns, 3]."""
    axes = [torch.arange(n, dtype=torch.float32) for n in (frames, rows, columns)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def angles(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [tokens, width] of a rotary embedding, each angle twice in a row."""
    frequencies = 100 ** (-torch.arange(width // 2) / (width // 2))
    turned = (torch.arange(tokens)[:, None] * frequencies).repeat_interleave(2, 1)
    return turned.cos(), turned.sin()


def seed_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Overwrite all parameters in place with seeded numbers, so that no block is silenced by a zero gate.

    Matrices preserve variance; modulation tables are of order a third, other vectors near one (weights) or zero.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "table" in name or "embedding" in name.rsplit(".", 1)[-1]:
                values *= 0.3
            elif parameter.ndim >= 2:
                values /= math.sqrt(math.prod(parameter.shape[1:]))
            elif name.endswith("weight"):
                values = 1 + 0.05 * values
            else:
                values *= 0.1
            parameter.copy_(values)
