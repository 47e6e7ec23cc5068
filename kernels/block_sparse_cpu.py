"""Block-sparse attention on a CPU: kept keys gathered for torch's flash attention, or compiled FlexAttention.

Both take tokens in the plan's order. Gathering returns the log-sum-exp; FlexAttention on a CPU cannot.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dita.errors import DitaError
from dita.kernels.plan import BlockPlan, Grouping, block_count, present

_GATHERED_BYTES = 2**21  # keys and values at a time: about what stays in a core's second-level cache
_MAX_SHAPES = 64  # compiled forms of FlexAttention; torch's own limit is 8, after which it silently runs uncompiled

_compiled: dict[str, Any] = {}


def flash_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's flash attention for CPUs, with its log-sum-exp.

    Args:
        q: [B, H, N, D].
        k, v: [B, H, M, D].
        scale: of the logits.
        mask: bool, broadcast to [B, H, N, M]; a query that sees no key has output 0 and -inf.

    Returns:
        output [B, H, N, D] and log-sum-exp, float32 [B, H, N].

    Example:
        >>> q = torch.zeros(1, 1, 2, 4)
        >>> flash_with_lse(q, q, q, 1.0)[1].exp().flatten()
        tensor([2., 2.])
    """
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
        bias = bias.expand(bias.shape[0], bias.shape[1], bias.shape[2], k.shape[2])
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = operator(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    if mask is not None:
        unseen = ~mask.any(-1).expand(lse.shape)
        out, lse = out.masked_fill(unseen[..., None], 0), lse.masked_fill(unseen, -math.inf)
    return out, lse.float()


def gather_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    key_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the kept keys of some query blocks side by side and attend to them, a cache's worth at a time.

    Only tokens that count are copied, so that nothing is padded or masked. Query blocks that see the same keys are
    one, and those of equally many queries and keys go together; the plan keeps how they go (`grouping`).

    Args:
        q: [B, H, N, D].
        k, v: [B, Hk, M, D].
        plan: its counts and indices, over these tokens in this order.
        scale: of the logits.
        key_valid: bool, broadcast to [B, Hk, M]; None if all keys count.

    Returns:
        output [B, H, N, D] and log-sum-exp, float32 [B, H, N]; 0 and -inf at empty places.

    Example:
        >>> q = torch.randn(1, 1, 4, 8)
        >>> plan = BlockPlan.of_mask(torch.eye(2, dtype=torch.bool)[None, None], 2, 2)
        >>> torch.allclose(gather_attention(q, q, q, plan, 1.0)[1][0, 0, :2], (q @ q.mT)[0, 0, :2, :2].logsumexp(-1))
        True
    """
    width = q.shape[3]
    queries, sources = q.reshape(-1, width), tuple(x.reshape(-1, width) for x in (k, v))
    groups = grouping(plan, (*q.shape[:3], *k.shape[1:3]), key_valid)
    if groups.counted is not None:
        sources = tuple(x.index_select(0, groups.counted) for x in sources)
    begin, held, order, places = groups.begin, groups.held, groups.order, groups.places
    trains = any(x.requires_grad for x in (q, k, v))
    out, lse = torch.zeros_like(queries), torch.full(queries.shape[:1], -math.inf)
    for length, asking, number in groups.kinds:
        some, order = order.tensor_split([number])
        mine, places = places.tensor_split([number * asking])
        if not length or not asking:
            continue
        size = max(1, _GATHERED_BYTES // ((2 * length + asking) * width * k.element_size()))
        # Written over and over: memory that is new each time costs more than the copy. A gradient needs it all.
        buffers = [x.new_empty(0 if trains else min(size, number) * length, width) for x in sources]
        for chosen, asks in zip(some.split(size), mine.split(size * asking), strict=True):
            wanted = _spans(begin[chosen].flatten(), held[chosen].flatten())
            one, two = (
                torch.index_select(x, 0, wanted, out=None if trains else buffer[: len(wanted)]).view(
                    len(chosen), 1, length, width
                )
                for x, buffer in zip(sources, buffers, strict=True)
            )
            three = queries.index_select(0, asks).view(len(chosen), 1, asking, width)
            answer, sums = flash_with_lse(three, one, two, scale)
            out.index_copy_(0, asks, answer.reshape(-1, width))
            lse.index_copy_(0, asks, sums.flatten())
    return out.view(q.shape), lse.view(q.shape[:3])


def grouping(plan: BlockPlan, shape: tuple[int, ...], key_valid: torch.Tensor | None) -> Grouping:
    """The groups of a plan's query blocks, worked out when they are first asked for.

    Args:
        plan: which keeps the newest.
        shape: batch, query heads, queries, key heads and keys.
        key_valid: as of `gather_attention`.

    Example:
        >>> plan = BlockPlan.of_mask(torch.ones(1, 1, 2, 3, dtype=torch.bool), 2, 2)
        >>> found = grouping(plan, (1, 1, 4, 1, 6), None)
        >>> found.kinds, grouping(plan, (1, 1, 4, 1, 6), None) is found
        ([(6, 4, 1)], True)
    """
    known = plan.grouping
    if known is None or not known.serves(shape, key_valid):
        known = _group(plan, shape, key_valid)
        object.__setattr__(plan, "grouping", known)
    return known


def _group(plan: BlockPlan, shape: tuple[int, ...], key_valid: torch.Tensor | None) -> Grouping:
    batch, heads, tokens, key_heads, keys = shape
    rows, columns = block_count(tokens, plan.block_q), block_count(keys, plan.block_k)
    valid = torch.ones(1, 1, keys, dtype=torch.bool) if key_valid is None else key_valid
    valid = valid.expand(batch, key_heads, keys)
    counted = None if key_valid is None else valid.flatten().nonzero()[:, 0]
    # Of every block of keys, and of one more without any, where they begin in the sources and how many there are.
    held = torch.nn.functional.pad(valid, (0, columns * plan.block_k - keys)).unflatten(-1, (columns, plan.block_k))
    held = held.sum(-1).flatten(0, 1)
    begin = (held.flatten().cumsum(0) - held.flatten()).view_as(held)
    held, begin = (torch.nn.functional.pad(x, (0, 1)) for x in (held, begin))
    # Of every block of queries, the same; an empty place before its last query is computed for nothing.
    asked = present(plan.order_q, tokens, plan.block_q) * torch.arange(1, plan.block_q + 1)
    asked = asked.amax(-1).expand(batch, heads, rows).flatten()
    head = torch.arange(batch * heads).repeat_interleave(rows)
    first = head * tokens + (torch.arange(rows) * plan.block_q).repeat(batch * heads)

    owner = head // heads * key_heads + head % heads // (heads // key_heads)  # the key head that serves it
    unread = torch.arange(plan.indices.shape[-1]) >= plan.counts[..., None]
    lists = plan.indices.long().masked_fill(unread, columns).expand(batch, heads, rows, -1).flatten(0, 2)
    lists, group = torch.cat([owner[:, None], lists], 1).unique(dim=0, return_inverse=True)
    owner, lists = lists[:, :1], lists[:, 1:]
    begin, held = begin[owner, lists], held[owner, lists]
    seen, most = held.sum(1), batch * heads * tokens + 1
    code = seen * most + torch.zeros_like(seen).index_add_(0, group, asked)
    row = (code[group] * len(code) + group).argsort(stable=True)
    order = code.argsort(stable=True)
    found = zip(*(x.tolist() for x in code[order].unique_consecutive(return_counts=True)), strict=True)
    kinds = [(*divmod(kind, most), number) for kind, number in found]
    return Grouping(shape, key_valid, counted, begin, held, order, _spans(first[row], asked[row]), kinds)


def _spans(first: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """So many whole numbers from the first of each on, one span behind the other: int64 [sum of lengths]."""
    ends = lengths.cumsum(0)
    return torch.arange(int(ends[-1])) + (first - ends + lengths).repeat_interleave(lengths)


def flex_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    key_valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compiled FlexAttention with the plan as its block mask; one compilation per shape, none per plan.

    Args: as of `gather_attention`; blocks of queries and keys that FlexAttention takes (16 tokens or more).

    Returns:
        output [B, H, N, D].

    Raises:
        DitaError: keys that do not count (its token mask would be compiled anew for each), or more shapes than are
            kept compiled. It never falls back to the uncompiled form, which holds the whole map.

    Example:
        >>> out = flex_attention(q, k, v, plan, 0.125)  # doctest: +SKIP
    """
    from torch.nn.attention.flex_attention import BlockMask
    from torch.nn.attention.flex_attention import flex_attention as flex

    if key_valid is not None:
        raise DitaError("the flex backend takes no keys that do not count; use the gather backend")
    if "flex" not in _compiled:
        _compiled["flex"] = torch.compile(flex, dynamic=False)
    batch, heads, tokens, _ = q.shape
    counts = plan.counts.expand(batch, heads, -1).contiguous()
    indices = plan.indices.expand(batch, heads, -1, -1)
    columns = block_count(k.shape[2], plan.block_k)
    indices = torch.nn.functional.pad(indices, (0, columns - indices.shape[-1])).contiguous()
    nothing = torch.zeros_like(counts), torch.zeros_like(indices)
    mask = BlockMask.from_kv_blocks(
        *nothing, counts, indices, (plan.block_q, plan.block_k), seq_lengths=(tokens, k.shape[2]),
        compute_q_blocks=False,
    )  # fmt: skip
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    try:
        with config.patch(recompile_limit=_MAX_SHAPES, fail_on_recompile_limit_hit=True):
            return _compiled["flex"](q, k, v, block_mask=mask, scale=scale, enable_gqa=heads != k.shape[1])
    except FailOnRecompileLimitHit:
        raise DitaError(
            f"FlexAttention was compiled for {_MAX_SHAPES} shapes already; use the gather backend for further ones"
        ) from None
