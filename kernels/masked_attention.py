"""The oracle of all sparse attention: plain masked attention in float32 or better, with its log-sum-exp."""

from __future__ import annotations

import math

import torch

from dita.kernels.plan import BlockPlan, arrange, block_count, key_validity, put_back


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the keys that a mask allows.

    Args:
        q: [B, H, N, D], any floating dtype; computed in float32, float64 in float64.
        k, v: [B, Hk, M, D] with Hk dividing H: each serves H / Hk query heads.
        mask: bool, broadcast to [B, H, N, M], True where a query sees a key.
        scale: of the logits, 1 / sqrt(D) by default.

    Returns:
        output [B, H, N, D] in the dtype of q, and the natural log of the sum of exponentials [B, H, N], float32 or
        float64. A query that sees no key has output 0 and -inf.

    Example:
        >>> q = torch.zeros(1, 1, 1, 2)
        >>> out, lse = masked_attention(q, q, torch.ones_like(q))
        >>> out.flatten(), lse.flatten()
        (tensor([1., 1.]), tensor([0.]))
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    repeat = q.shape[1] // k.shape[1]
    keys = k.to(wide).repeat_interleave(repeat, 1)
    values = v.to(wide).repeat_interleave(repeat, 1)
    logits = q.to(wide) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale) @ keys.transpose(-2, -1)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    return (weights @ values).to(q.dtype), lse


def naive_block_sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dita.kernels.block_sparse.block_sparse_attention` with the whole map in memory: the oracle.

    Example:
        >>> q = torch.randn(1, 2, 5, 4)
        >>> plan = BlockPlan.of_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool), 2, 2)
        >>> torch.allclose(naive_block_sparse(q, q, q, plan)[0], masked_attention(q, q, q)[0])
        True
    """
    queries, tokens = arrange(q, plan.order_q), q.shape[2]
    repeat = q.shape[1] // k.shape[1]
    keys, values = (arrange(x.repeat_interleave(repeat, 1), plan.order_k) for x in (k, v))
    columns = keys.shape[2]
    mask = plan.mask(block_count(columns, plan.block_k))
    mask = mask.repeat_interleave(plan.block_q, -2)[..., : queries.shape[2], :]
    mask = mask.repeat_interleave(plan.block_k, -1)[..., :columns]
    valid = key_validity(plan, key_mask)
    if valid is not None:
        mask = mask & valid[..., None, :]
    out, lse = masked_attention(queries, keys, values, mask, scale)
    return put_back(out, plan.order_q, tokens), put_back(lse, plan.order_q, tokens, -math.inf)
