"""Which blocks of keys each block of queries attends to: what block-sparse attention methods differ in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from dita.errors import DitaError


@dataclass(frozen=True)
class Grouping:
    """The query blocks of a plan by what they see, for backends that gather keys; kept as long as the plan.

    Attributes:
        shape: batch, query heads, queries, key heads and keys that it is for.
        valid: bool, keys that count, as given; None for all.
        counted: int64, numbers of the keys that count among all of all samples and heads; None for all.
        begin, held: int64 [G, K], of each group the spans of keys that it sees: the first, and how many.
        order: int64 [G], groups of equally many keys and queries behind each other.
        places: int64, the queries in the groups' order.
        kinds: of groups alike: keys, queries, and how many groups.
    """

    shape: tuple[int, ...]
    valid: torch.Tensor | None
    counted: torch.Tensor | None
    begin: torch.Tensor
    held: torch.Tensor
    order: torch.Tensor
    places: torch.Tensor
    kinds: list[tuple[int, int, int]]

    def serves(self, shape: tuple[int, ...], valid: torch.Tensor | None) -> bool:
        """Whether it is for these tokens, of which the same count."""
        if shape != self.shape or valid is None or self.valid is None:
            return shape == self.shape and valid is self.valid
        return torch.equal(valid, self.valid)


@dataclass(frozen=True)
class BlockPlan:
    """A block-sparse attention pattern in the form that kernels read.

    The tokens are first put in an order, then cut into blocks; the last block may be short. B' is the batch or 1, H'
    the number of query heads or 1: a plan may be shared.

    Attributes:
        counts: int32 [B', H', Tq], how many key blocks each query block attends to; 0 is allowed.
        indices: int32 [B', H', Tq, K], those key blocks, ascending; what follows the first `counts` is not read.
        block_q, block_k: tokens of a block.
        order_q, order_k: int64 [N'] or [B', H', N'], the tokens in the order in which they are cut into blocks, -1 for
            an empty place that pads a block; None for the order they come in. A token that is not named is left out:
            as a key it is not seen, as a query its output is 0 and its log-sum-exp -inf.
        lifetime: for how many further steps a policy means to use it.
        holes: whether an order has empty places; looked up if None, for which a GPU is waited for.
        grouping: how its blocks go together where keys are gathered, once that was asked for.

    Example:
        >>> plan = BlockPlan.of_mask(torch.tensor([[True, False], [True, True]])[None, None], 2, 2)
        >>> plan.counts, plan.indices, plan.density
        (tensor([[[1, 2]]], dtype=torch.int32), tensor([[[[0, 1],
                  [0, 1]]]], dtype=torch.int32), 0.75)
    """

    counts: torch.Tensor
    indices: torch.Tensor
    block_q: int
    block_k: int
    order_q: torch.Tensor | None = None
    order_k: torch.Tensor | None = None
    lifetime: int = 0
    holes: bool | None = None
    grouping: Grouping | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        counts, indices = self.counts, self.indices
        if counts.ndim != 3 or indices.ndim != 4 or indices.shape[:3] != counts.shape:
            raise DitaError(
                f"a plan needs counts [B, H, Tq] and indices [B, H, Tq, K], got {tuple(counts.shape)} and "
                f"{tuple(indices.shape)}"
            )
        if counts.dtype != torch.int32 or indices.dtype != torch.int32:
            raise DitaError(f"counts and indices must be int32, got {counts.dtype} and {indices.dtype}")
        if min(self.block_q, self.block_k) < 1:
            raise DitaError(f"blocks hold at least one token, got {self.block_q} queries and {self.block_k} keys")
        if self.holes is None:
            holes = any(order is not None and bool((order < 0).any()) for order in (self.order_q, self.order_k))
            object.__setattr__(self, "holes", holes)

    @classmethod
    def of_mask(
        cls,
        mask: torch.Tensor,
        block_q: int,
        block_k: int,
        order_q: torch.Tensor | None = None,
        order_k: torch.Tensor | None = None,
        lifetime: int = 0,
        holes: bool | None = None,
    ) -> BlockPlan:
        """Make a plan of a mask over blocks.

        Args:
            mask: bool [B', H', Tq, Tk], True where a block of queries sees a block of keys.
            block_q, block_k, order_q, order_k, lifetime, holes: as of the plan.

        Raises:
            DitaError: the mask is not bool with four dimensions.
        """
        if mask.ndim != 4 or mask.dtype != torch.bool:
            raise DitaError(f"expected a bool mask [B, H, Tq, Tk], got {mask.dtype} {tuple(mask.shape)}")
        counts = mask.sum(-1, dtype=torch.int32)
        # Kept blocks first, both parts ascending: neighbouring rows then read neighbouring keys.
        indices = (~mask).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)
        return cls(counts, indices, block_q, block_k, order_q, order_k, lifetime, holes)

    def mask(self, key_blocks: int) -> torch.Tensor:
        """The mask over blocks: bool [B', H', Tq, key_blocks].

        Example:
            >>> BlockPlan.of_mask(torch.eye(2, dtype=torch.bool)[None, None], 8, 8).mask(2)[0, 0]
            tensor([[ True, False],
                    [False,  True]])
        """
        place = torch.arange(self.indices.shape[-1], device=self.indices.device)
        read = place < self.counts[..., None]
        mask = torch.zeros(*self.counts.shape, key_blocks + 1, dtype=torch.bool, device=self.indices.device)
        # What is not read goes to a column that is cut off.
        mask.scatter_(-1, self.indices.long().masked_fill(~read, key_blocks), True)
        return mask[..., :key_blocks]

    @property
    def density(self) -> float:
        """Share of the pairs of blocks that are kept, as far as the widest row tells how many blocks there are."""
        return float(self.counts.sum()) / max(1, self.counts.numel() * self.indices.shape[-1])

    def kept(self, queries: int, keys: int) -> float:
        """Share of the pairs of tokens that the plan keeps: the density that reports state.

        Args:
            queries, keys: numbers of tokens.

        Example:
            >>> BlockPlan.of_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool).tril(), 4, 4).kept(6, 6)
            0.7777777777777778
        """
        rows, columns = (
            present(order, tokens, block).to(self.counts.device).sum(-1, dtype=torch.float32)
            for order, tokens, block in ((self.order_q, queries, self.block_q), (self.order_k, keys, self.block_k))
        )
        batch, heads = (max(x.shape[d] for x in (columns, self.counts)) for d in (0, 1))
        indices = self.indices.long().expand(batch, heads, -1, -1)
        read = torch.arange(indices.shape[-1], device=indices.device) < self.counts[..., None]
        seen = columns.expand(batch, heads, -1).gather(-1, indices.flatten(2)).view_as(indices) * read
        return float((rows * seen.sum(-1)).sum(-1).mean()) / (queries * keys)

    def to(self, device: torch.device | str) -> BlockPlan:
        """The same plan on another device."""
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


def block_count(tokens: int, block: int) -> int:
    """How many blocks hold that many tokens.

    Example:
        >>> block_count(9, 4)
        3
    """
    return -(-tokens // block)


def present(order: torch.Tensor | None, tokens: int, block: int) -> torch.Tensor:
    """Which places of each block hold a token: bool [B' or 1, H' or 1, T, block].

    Args:
        order: as in a plan.
        tokens: how many there are; only read without an order.
        block: tokens of a block.

    Example:
        >>> present(torch.tensor([1, -1, 0]), 2, 2).int()
        tensor([[[[1, 0],
                  [1, 0]]]], dtype=torch.int32)
    """
    there = torch.ones(tokens, dtype=torch.bool) if order is None else order >= 0
    there = there.view(*(1,) * (3 - there.ndim), *there.shape)
    return torch.nn.functional.pad(there, (0, -there.shape[-1] % block)).unflatten(-1, (-1, block))


def arrange(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Put tokens in a plan's order; an empty place holds some token, which nothing must read.

    Args:
        x: [B, H, N, D].
        order: as in a plan; with heads of its own, H of them, or 1.

    Returns:
        [B, H, N', D]; `x` itself without an order.

    Example:
        >>> arrange(torch.tensor([5.0, 6.0, 7.0]).view(1, 1, 3, 1), torch.tensor([2, 1, 0])).flatten()
        tensor([7., 6., 5.])
    """
    if order is None:
        return x
    place = order.clamp_min(0)
    if order.ndim == 1:
        return x.index_select(2, place)
    place = place.expand(*x.shape[:2], -1)
    return x.gather(2, place[..., None].expand(-1, -1, -1, x.shape[-1]))


def put_back(x: torch.Tensor, order: torch.Tensor | None, tokens: int, otherwise: float = 0.0) -> torch.Tensor:
    """Undo `arrange`: every token of [B, H, N', ...] at its place among `tokens`, `otherwise` where none is.

    Example:
        >>> put_back(torch.tensor([7.0, 0.0, 5.0]).view(1, 1, 3), torch.tensor([2, -1, 0]), 3).flatten()
        tensor([5., 0., 7.])
    """
    if order is None:
        return x
    # Empty places go to one more token, which is cut off.
    place = order.masked_fill(order < 0, tokens)
    result = x.new_full((*x.shape[:2], tokens + 1, *x.shape[3:]), otherwise)
    if order.ndim == 1:
        return result.index_copy_(2, place, x)[:, :, :tokens]
    place = place.expand(*x.shape[:2], -1)
    result.scatter_(2, place.view(*place.shape, *(1,) * (x.ndim - 3)).expand_as(x), x)
    return result[:, :, :tokens]


def key_validity(plan: BlockPlan, key_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which keys count once they are in a plan's order.

    Args:
        plan: whose empty places do not count.
        key_mask: bool [B, N], True for keys that count; None for all.

    Returns:
        bool [B', H', N']; None if all count.

    Example:
        >>> plan = BlockPlan.of_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool), 3, 3, order_k=torch.tensor([1, -1, 0]))
        >>> key_validity(plan, torch.tensor([[True, False]]))
        tensor([[[False, False,  True]]])
    """
    valid = None if key_mask is None else key_mask[:, None]
    order = plan.order_k
    if order is None or (valid is None and not plan.holes):
        return valid
    order = order if order.ndim == 3 else order[None, None]
    if valid is None:
        return order >= 0
    batch = max(len(valid), len(order))
    place = order.clamp_min(0).expand(batch, -1, -1)
    return valid.expand(batch, order.shape[1], -1).gather(2, place) & (order >= 0)
