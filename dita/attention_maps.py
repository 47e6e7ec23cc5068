"""Attention maps of any model: what F.scaled_dot_product_attention is asked for, and statistics of its map in pieces.

diffusers' attention processors differ in everything but this one call, so that a torch function mode around a module's
forward sees query, key and value as [B, H, N, D] whatever the processor. The map itself, [B, H, N, M], is never whole
in memory: its rows are made a few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_ELEMENTS = 2**24  # of a piece of the map: 64 MiB
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        query: [B, H, N, D].
        key, value: [B, H or fewer, M, D]; fewer heads serve several of the query's each.
        mask: what is added to the scores, or True where they count; None for no mask.
        causal: a query sees no later keys.
        scale: of the scores; None for 1 / sqrt(D).
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    causal: bool = False
    scale: float | None = None

    def rows(self, queries: slice = slice(None), elements: int = _ELEMENTS) -> Iterator[torch.Tensor]:
        """Rows of the map in order, softmax over the keys done.

        Args:
            queries: which rows; all by default.
            elements: most numbers of a piece.

        Yields:
            float32 [B, H, n, M] with rows that sum to 1.

        Example:
            >>> q = torch.zeros(1, 2, 5, 4)
            >>> [tuple(piece.shape) for piece in Attention(q, q, q).rows(elements=20)]
            [(1, 2, 2, 5), (1, 2, 2, 5), (1, 2, 1, 5)]
        """
        heads, keys = self.query.shape[1], self.key.shape[2]
        key = self.key.repeat_interleave(heads // self.key.shape[1], 1).float().transpose(-1, -2)
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        start, stop, _ = queries.indices(self.query.shape[2])
        count = max(1, elements // (self.query.shape[0] * heads * keys))
        for first in range(start, stop, count):
            last = min(first + count, stop)
            scores = self.query[:, :, first:last].float() @ key * scale
            if self.causal:
                place = torch.arange(max(keys, last), device=scores.device)
                later = place[:keys] > place[first:last, None]
                scores = scores.masked_fill(later, float("-inf"))
            if self.mask is not None:
                mask = self.mask[..., first:last, :] if self.mask.shape[-2] > 1 else self.mask
                barred = mask.dtype == torch.bool
                scores = scores.masked_fill(~mask, float("-inf")) if barred else scores + mask.float()
            # A query that sees no key, as of padding, gives its weight to none.
            yield scores.softmax(-1).nan_to_num(0.0)

    def received(self, queries: slice = slice(None)) -> torch.Tensor:
        """How much attention each key gets: the mean of its column of the map.

        Args:
            queries: the rows it is the mean of; all by default.

        Returns:
            float32 [B, M], averaged over heads; sums to 1 over the keys.

        Example:
            >>> q = torch.tensor([[[[0.0], [0.0]]]])
            >>> Attention(q, q, q).received()
            tensor([[0.5000, 0.5000]])
        """
        total = torch.zeros(self.key.shape[0], self.key.shape[2], device=self.key.device)
        for piece in self.rows(queries):
            total += piece.sum(2).mean(1)
        start, stop, _ = queries.indices(self.query.shape[2])
        return total / max(1, stop - start)


class Watching(TorchFunctionMode):
    """While it is entered, show every attention of this thread to a function, and let it run as it would.

    Args:
        look: called with each before it runs.

    Example:
        >>> seen = []
        >>> with Watching(seen.append):
        ...     out = functional.scaled_dot_product_attention(*torch.zeros(3, 1, 2, 4, 8))
        >>> seen[0].query.shape
        torch.Size([1, 2, 4, 8])
    """

    def __init__(self, look: Callable[[Attention], None]) -> None:
        super().__init__()
        self._look = look

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `torch.overrides`."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
            self._look(
                Attention(
                    given["query"],
                    given["key"],
                    given["value"],
                    given.get("attn_mask"),
                    bool(given.get("is_causal", False)),
                    given.get("scale"),
                )
            )
        return func(*args, **kwargs)
