"""Looking at queries, keys and values inside an attention module, whatever its processor, and what to read off them.

A scoped torch function mode sees every call of `torch.nn.functional.scaled_dot_product_attention` while a module runs.
Nothing of the size of an attention map is kept: what is read off one is summed over chunks of its rows, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dita.flex import is_flex, of_flex, uncompiled

_ELEMENTS = 2**22  # of the attention map that are held at a time


@dataclass(frozen=True)
class Attended:
    """What one call of scaled dot-product attention was given.

    Attributes:
        q: [B, H, N, D].
        k, v: [B, H, M, D], perhaps with fewer heads, each serving several of q's.
        mask: bool, True where logits count, or added to them, broadcast to [B, H, N, M]; None without one.
        scale: of the logits; None for 1 / sqrt(D).
        causal: a query sees no later keys.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    scale: float | None = None
    causal: bool = False

    def attend(self) -> torch.Tensor:
        """The attention itself: [B, H, N, D].

        Example:
            >>> q = torch.zeros(1, 2, 3, 4)
            >>> Attended(q, q, q).attend().shape
            torch.Size([1, 2, 3, 4])
        """
        return torch.nn.functional.scaled_dot_product_attention(
            self.q, self.k, self.v, self.mask, is_causal=self.causal, scale=self.scale,
            enable_gqa=self.k.shape[1] != self.q.shape[1],
        )  # fmt: skip

    def biased(self, bias: torch.Tensor) -> Attended:
        """The same with something added to the logits.

        Args:
            bias: in q's dtype, broadcast to [B, H, N, M].

        Example:
            >>> q = torch.zeros(1, 1, 1, 2)
            >>> k, v = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.0, 0.0], [3.0, 3.0]]]])
            >>> Attended(q, k, v).biased(torch.tensor([[1.0, 2.0]]).log()).attend().flatten()
            tensor([2., 2.])
        """
        if self.mask is None:
            mask = bias
        elif self.mask.dtype == torch.bool:
            mask = torch.where(self.mask, bias, -math.inf)
        else:
            mask = self.mask + bias
        return replace(self, mask=mask)

    @cached_property
    def key_mask(self) -> torch.Tensor | None:
        """The mask as bool [B, M], True for keys that count, where it is the same for all queries and heads; else None.

        Queries that see no key at all are padding, and may differ.

        Example:
            >>> q = torch.zeros(1, 2, 3, 4)
            >>> Attended(q, q, q, torch.tensor([True, True, False])[None, None, None]).key_mask
            tensor([[ True,  True, False]])
        """
        mask = self.mask
        if mask is None or mask.ndim != 4:
            return None
        # Rows that are one row in memory need not be compared.
        mask = mask[:, :1] if mask.stride(1) == 0 else mask
        mask = mask[:, :, :1] if mask.stride(2) == 0 else mask
        allowed = mask if mask.dtype == torch.bool else mask > -1e4
        if mask.dtype != torch.bool and not bool((mask.masked_fill(~allowed, 0) == 0).all()):
            return None  # it weighs keys instead of leaving them out
        keys = allowed.amax((1, 2), keepdim=True)
        if allowed.shape[1:3] != (1, 1) and not bool(((allowed == keys) | ~allowed.any(-1, keepdim=True)).all()):
            return None
        return keys[:, 0, 0].expand(self.k.shape[0], self.k.shape[2])

    def rows(self, queries: slice = slice(None), elements: int = _ELEMENTS) -> Iterator[torch.Tensor]:
        """Rows of the attention map in order, a few at a time.

        Args:
            queries: which rows; all by default.
            elements: most numbers of a piece.

        Yields:
            float32 [B, H, n, M] with rows that sum to 1, or to 0 where a query sees no key.

        Example:
            >>> q = torch.zeros(1, 2, 5, 4)
            >>> [tuple(piece.shape) for piece in Attended(q, q, q).rows(elements=20)]
            [(1, 2, 2, 5), (1, 2, 2, 5), (1, 2, 1, 5)]
        """
        batch, heads, count, width = self.q.shape
        scale = 1 / math.sqrt(width) if self.scale is None else self.scale
        keys = self.k.float().repeat_interleave(heads // self.k.shape[1], 1).transpose(-2, -1)
        size = max(1, elements // max(1, batch * heads * keys.shape[-1]))
        start, stop, _ = queries.indices(count)
        for first in range(start, stop, size):
            last = min(first + size, stop)
            logits = self.q[:, :, first:last].float() * scale @ keys
            if self.causal:
                place = torch.arange(max(keys.shape[-1], last), device=logits.device)
                logits = logits.masked_fill(place[: keys.shape[-1]] > place[first:last, None], -math.inf)
            if self.mask is not None:
                mask = self.mask if self.mask.shape[-2] == 1 else self.mask[..., first:last, :]
                logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.float()
            yield logits.softmax(-1).nan_to_num(0.0)

    def maps(self) -> Iterator[torch.Tensor]:
        """The attention map, averaged over heads, in chunks of its rows [B, n, M], float32.

        Example:
            >>> q = torch.zeros(1, 2, 3, 4)
            >>> torch.cat(list(Attended(q, q, q).maps()), 1).shape
            torch.Size([1, 3, 3])
        """
        return (piece.mean(1) for piece in self.rows())

    def received(self, queries: slice = slice(None)) -> torch.Tensor:
        """How much attention each key gets of a query: the mean of its column of the map, averaged over heads.

        Args:
            queries: the rows it is the mean of; all by default.

        Returns:
            float32 [B, M]; sums to 1 over the keys.

        Example:
            >>> q = torch.zeros(1, 1, 2, 4)
            >>> Attended(q, q, q).received()
            tensor([[0.5000, 0.5000]])
        """
        total = torch.zeros(self.k.shape[0], self.k.shape[2], device=self.k.device)
        for piece in self.rows(queries):
            total += piece.sum(2).mean(1)
        start, stop, _ = queries.indices(self.q.shape[2])
        return total / max(1, stop - start)

    def column_mass(self) -> torch.Tensor:
        """How much attention each key receives in all: column sums of the map averaged over heads (ToCa, s1).

        Returns:
            float32 [B, M]; each row sums to N.

        Example:
            >>> q = torch.zeros(1, 1, 3, 4)
            >>> Attended(q, q[:, :, :2], q[:, :, :2]).column_mass()
            tensor([[1.5000, 1.5000]])
        """
        return self.received() * self.q.shape[2]

    def row_entropy(self, halves: bool = False) -> torch.Tensor:
        """How widely each query looks: entropy of the rows of the map averaged over heads, in nats (ToCa, s2).

        Args:
            halves: the batch is two halves of one guidance, whose maps are averaged first.

        Returns:
            float32 [B, N].

        Example:
            >>> q = torch.zeros(1, 1, 1, 4)
            >>> k = torch.zeros(1, 1, 8, 4)
            >>> Attended(q, k, k).row_entropy()
            tensor([[2.0794]])
        """
        pieces = []
        for rows in self.maps():
            if halves:
                rows = rows.unflatten(0, (2, -1)).mean(0).repeat(2, 1, 1)
            pieces.append(-(rows * (rows + 1e-7).log()).sum(-1))
        return torch.cat(pieces, 1)

    def value_lack(self, halves: bool = False) -> torch.Tensor:
        """Sum over heads of 1 - |v|: high for keys whose value is short (DuCa's score without an attention map).

        Args:
            halves: the batch is two halves of one guidance, whose norms are averaged.

        Returns:
            float32 [B, M].

        Example:
            >>> v = torch.tensor([3.0, 4.0]).expand(1, 2, 1, 2)
            >>> Attended(v, v, v).value_lack()
            tensor([[-8.]])
        """
        lack = (1 - self.v.float().norm(dim=-1)).sum(1)
        return lack.unflatten(0, (2, -1)).mean(0).repeat(2, 1) if halves else lack


class AttentionView(TorchFunctionMode):
    """Within the `with` block, show every scaled dot-product attention to `look`, and let it run as it is.

    Args:
        look: called before each attention.

    Example:
        >>> q, seen = torch.zeros(1, 2, 3, 4), []
        >>> with AttentionView(seen.append):
        ...     _ = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        >>> seen[0].q.shape
        torch.Size([1, 2, 3, 4])
    """

    def __init__(self, look: Callable[[Attended], None]) -> None:
        super().__init__()
        self.look = look

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """See torch.overrides."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            # The mode is off in here: what `look` computes is not looked at.
            self.look(_given(args, kwargs))
        return func(*args, **kwargs)


class AttentionTaken(TorchFunctionMode):
    """Within the `with` block, let `take` answer every scaled dot-product attention.

    A mode entered later is asked first: an `AttentionView` inside sees what the module computed either way.

    Args:
        take: called with what the attention was given and with the attention itself, which computes the same from the
            very object it gets, and from another what that says; returns the output [B, H, N, D].
        flex: calls of flex_attention are answered too, unless it was compiled. See `dita.flex`.

    Example:
        >>> q = torch.zeros(1, 2, 3, 4)
        >>> with AttentionTaken(lambda seen, plain: plain(seen) + 1):
        ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        >>> out.unique()
        tensor([1.])
    """

    def __init__(
        self, take: Callable[[Attended, Callable[[Attended], torch.Tensor]], torch.Tensor], flex: bool = False
    ) -> None:
        super().__init__()
        self.take, self.stance = take, uncompiled() if flex else nullcontext()

    def __enter__(self) -> AttentionTaken:
        """Enter."""
        self.stance.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Leave."""
        super().__exit__(*error)
        self.stance.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """See torch.overrides."""
        kwargs = kwargs or {}
        if is_flex(func, args):
            flexed = Attended(*of_flex(args))
            # Nobody asked for the logarithm of the sum of weights and the largest weight, which come with it.
            out = self.take(flexed, lambda seen: func(*args, **kwargs)[0] if seen is flexed else seen.attend())
            return out, out.new_empty(0), out.new_empty(0)
        if func is not torch.nn.functional.scaled_dot_product_attention or kwargs.get("dropout_p"):
            return func(*args, **kwargs)
        given = _given(args, kwargs)
        return self.take(given, lambda seen: func(*args, **kwargs) if seen is given else seen.attend())


def _given(args: Any, kwargs: dict[str, Any]) -> Attended:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask, scale, causal = given.get("attn_mask"), given.get("scale"), bool(given.get("is_causal", False))
    return Attended(given["query"], given["key"], given["value"], mask, scale, causal)


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Put per-sample results together whose lengths may differ (Mochi attends sample by sample without padding).

    Args:
        parts: [b, N_i] each.

    Returns:
        [sum of b, largest N], zeros where a part is shorter.

    Example:
        >>> joined([torch.ones(1, 2), torch.ones(1, 1)])
        tensor([[1., 1.],
                [1., 0.]])
    """
    if len(parts) == 1:
        return parts[0]
    longest = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts])
