"""Block-sparse attention on a CPU: kept keys gathered for torch's flash attention, or compiled FlexAttention.

Both take tokens in the plan's order. Gathering returns the log-sum-exp; FlexAttention on a CPU cannot.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dita.errors import DitaError
from dita.kernels.plan import BlockPlan, block_count

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

    Query blocks that see equally many keys go together, so that nothing is padded or masked.

    Args:
        q: [B, H, N, D].
        k, v: [B, Hk, M, D].
        plan: its counts and indices, over these tokens in this order.
        scale: of the logits.
        key_valid: bool, broadcast to [B, H, M]; None if all keys count.

    Returns:
        output [B, H, N, D] and log-sum-exp, float32 [B, H, N].

    Example:
        >>> q = torch.randn(1, 1, 4, 8)
        >>> plan = BlockPlan.of_mask(torch.eye(2, dtype=torch.bool)[None, None], 2, 2)
        >>> torch.allclose(gather_attention(q, q, q, plan, 1.0)[1][0, 0, :2], (q @ q.mT)[0, 0, :2, :2].logsumexp(-1))
        True
    """
    (batch, heads, tokens, width), key_heads, keys = q.shape, k.shape[1], k.shape[2]
    rows, columns = block_count(tokens, plan.block_q), block_count(keys, plan.block_k)
    short = columns * plan.block_k - keys
    queries = _blocks(q, plan.block_q).reshape(batch * heads * rows, 1, plan.block_q, width)
    kept_keys, kept_values = (_blocks(x, plan.block_k).flatten(2) for x in (k, v))
    kept_keys, kept_values = kept_keys.flatten(0, 1), kept_values.flatten(0, 1)
    valid = None
    if key_valid is not None:
        whole = torch.nn.functional.pad(key_valid.expand(batch, heads, keys), (0, short))
        valid = whole.reshape(batch * heads * columns, plan.block_k)
    counts = plan.counts.expand(batch, heads, rows).reshape(-1)
    indices = plan.indices.expand(batch, heads, rows, -1).reshape(len(counts), -1).long()
    last = indices.gather(1, (counts.long() - 1).clamp_min(0)[:, None])[:, 0]
    codes = 2 * counts + ((last == columns - 1) & (counts > 0) if short else 0)
    order = None
    if bool((codes != codes[0]).any()):
        # Rows of one length side by side, so that they are read and written without looking each one up.
        order = codes.argsort(stable=True)
        codes, indices, queries = codes[order], indices[order], queries[order]
    place = torch.arange(len(counts)) if order is None else order
    mine = place // rows  # batch item and query head of each row
    owner = mine // heads * key_heads + mine % heads // (heads // key_heads)  # the key head that serves it
    outs, sums, start = [], [], 0
    for code, number in zip(*(x.tolist() for x in codes.unique_consecutive(return_counts=True)), strict=True):
        count, ragged = divmod(code, 2)
        stop = start + number
        if not count:
            outs.append(queries.new_zeros(number, 1, plan.block_q, width))
            sums.append(torch.full((number, 1, plan.block_q), -math.inf))
            start = stop
            continue
        seen = count * plan.block_k - (short if ragged else 0)
        size = max(1, _GATHERED_BYTES // (2 * count * plan.block_k * width * k.element_size()))
        for first in range(start, stop, size):
            some = slice(first, min(first + size, stop))
            chosen = indices[some, :count]
            blocks = (owner[some, None] * columns + chosen).flatten()
            shape = (len(chosen), 1, count * plan.block_k, width)
            one = kept_keys.index_select(0, blocks).view(shape)[:, :, :seen]
            two = kept_values.index_select(0, blocks).view(shape)[:, :, :seen]
            mask = None
            if valid is not None:
                blocks = (mine[some, None] * columns + chosen).flatten()
                mask = valid.index_select(0, blocks).view(len(chosen), 1, 1, -1)[..., :seen]
            out, lse = flash_with_lse(queries[some], one, two, scale, mask)
            outs.append(out)
            sums.append(lse)
        start = stop
    out, lse = torch.cat(outs), torch.cat(sums)
    if order is not None:
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        out, lse = out[back], lse[back]
    out = out.view(batch, heads, rows * plan.block_q, width)[:, :, :tokens]
    return out, lse.view(batch, heads, rows * plan.block_q)[:, :, :tokens]


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, H, N, D] cut into [B H, T, size, D]; a short last block ends in zeros."""
    missing = -x.shape[2] % size
    x = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
    return x.reshape(x.shape[0] * x.shape[1], -1, size, x.shape[3])


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
