"""The adapters of Adapter Guidance Distillation: what they read of a call, and what they add.

See `dita.schedulers.guidance.agd`; all adapters of one model, and their file, are in `agd_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dita.errors import DitaError

_MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")


@dataclass(frozen=True)
class Conditions:
    """What the adapters know of a call.

    Attributes:
        timestep: float32 [B], of the training schedule, scaled to 0..1000.
        scale: float32 [B], the guidance scale.
        labels: int64 [B], classes; None for a model without classes.
        pooled: [B, P], the text as one vector; None for a model that takes none.
        text: [B, T, E], the text's tokens; None for a model without text.
        mask: bool [B, T], the tokens that count; None for all.
    """

    timestep: torch.Tensor
    scale: torch.Tensor
    labels: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    text: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any], timestep: torch.Tensor, scale: torch.Tensor) -> Conditions:
        """Read the conditioning off the arguments of a transformer's call, whose batch is B.

        Args:
            arguments: by name.
            timestep, scale: float32 [B].

        Example:
            >>> labels = torch.tensor([3, 4])
            >>> Conditions.of({"class_labels": labels}, torch.ones(2), torch.ones(2)).labels
            tensor([3, 4])
        """
        batch = len(timestep)

        def given(name: str, axes: int) -> torch.Tensor | None:
            value = arguments.get(name)
            fits = isinstance(value, torch.Tensor) and value.ndim == axes and value.shape[0] == batch
            return value if fits else None

        text = given("encoder_hidden_states", 3)
        mask = next((m for name in _MASKS if (m := given(name, 2)) is not None), None)
        if text is None or (mask is not None and mask.shape != text.shape[:2]):
            mask = None
        return cls(
            timestep, scale, given("class_labels", 1), given("pooled_projections", 2), text,
            None if mask is None else mask > 0,
        )  # fmt: skip


class Scalar(nn.Module):
    """Embeds a number: sines and cosines, a perceptron, layer normalization.

    Args:
        width: C of the embedding, even.
        unit: difference of two numbers that are to be told apart.
    """

    def __init__(self, width: int, unit: float) -> None:
        super().__init__()
        half = width // 2
        self.register_buffer("frequencies", 100 ** (-torch.arange(half) / half) / unit, persistent=False)
        self.net = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.LayerNorm(width)
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """From float32 [B] to [B, C]."""
        turns = values[:, None] * self.get_buffer("frequencies")
        return self.net(torch.cat([turns.sin(), turns.cos()], -1))


class Adapter(nn.Module):
    """What is added to the output of one layer. Its last projection starts at zero, so that it adds nothing.

    Args:
        kind: "offset": one vector for all tokens, from the sum of the embeddings; "cross": each token attends to them.
        width: of the embeddings, even.
        channels: C of the layer's output.
        sources: name -> width of what is read besides time step and scale: "labels", "pooled", "text".
    """

    def __init__(self, kind: str, width: int, channels: int, sources: Mapping[str, int]) -> None:
        super().__init__()
        self.kind = kind
        self.scale, self.timestep = Scalar(width, 0.5), Scalar(width, 20.0)
        self.sources = nn.ModuleDict({name: nn.Linear(size, width) for name, size in sources.items()})
        if kind == "cross":
            self.query = nn.Linear(channels, width, bias=False)
            self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        else:
            self.hidden = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width))
        self.out = nn.Linear(width, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: torch.Tensor, conditions: Conditions, table: torch.Tensor | None) -> torch.Tensor:
        """What is added to the layer's output.

        Args:
            hidden: the output, float32 [B, N, C].
            conditions: of the call.
            table: [classes, E], the model's own embeddings of its classes.

        Returns:
            float32 [B, N, C], or [B, 1, C] of the kind "offset".
        """
        given: dict[str, torch.Tensor | None] = {"pooled": conditions.pooled, "text": conditions.text}
        if table is not None and conditions.labels is not None:
            given["labels"] = table[conditions.labels]
        tokens = [self.scale(conditions.scale)[:, None], self.timestep(conditions.timestep)[:, None]]
        counts = [torch.ones_like(tokens[0][..., 0])] * 2
        for name, project in self.sources.items():
            value = given.get(name)
            if value is None:
                raise DitaError(f"AGD's adapters were trained with {name} of a kind that this call does not carry")
            tokens.append(project(value.float() if value.ndim == 3 else value.float()[:, None]))
            full = tokens[-1].new_ones(tokens[-1].shape[:2])
            counts.append(full if name != "text" or conditions.mask is None else conditions.mask.float())
        if self.kind == "offset":
            means = [
                (t * c[..., None]).sum(1) / c.sum(1, keepdim=True).clamp(min=1)
                for t, c in zip(tokens, counts, strict=True)
            ]
            return self.out(self.hidden(torch.stack(means).sum(0)))[:, None]
        # Written out, because scaled_dot_product_attention in here would pass for the model's own.
        memory, counted = torch.cat(tokens, 1), torch.cat(counts, 1)
        scores = self.query(hidden) @ self.key(memory).transpose(1, 2) / math.sqrt(memory.shape[-1])
        weights = scores.masked_fill(counted[:, None] == 0, -math.inf).softmax(-1)
        return self.out(weights @ self.value(memory))
