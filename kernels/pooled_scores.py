"""Scores of blocks by their means, and the blocks of keys that score highest for each block of queries.

The first step of SpargeAttn, SLA, Jenga, VSA and DraftAttention: softmax is monotone, so the highest logits of a row
name the same blocks as the highest probabilities. Means and logits are in float32.
"""

from __future__ import annotations

import math

import torch

from dita.errors import DitaError
from dita.kernels.plan import block_count


def block_means(x: torch.Tensor, block: int, valid: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the tokens of each block that count; the last block may be short.

    Args:
        x: [B, H, N, D], any floating dtype.
        block: tokens of a block.
        valid: bool [B or 1, H or 1, N], tokens that count; None for all.

    Returns:
        float32 [B, H, T, D], 0 for a block in which no token counts, and how many do, int64 [B or 1, H or 1, T].

    Example:
        >>> block_means(torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 3, 1), 2)[0].flatten()
        tensor([2., 5.])
    """
    tokens, blocks = x.shape[2], block_count(x.shape[2], block)
    short = blocks * block - tokens
    if valid is None:
        valid = torch.ones(1, 1, tokens, dtype=torch.bool, device=x.device)
    else:
        x = x.masked_fill(~valid[..., None], 0)
    counted = torch.nn.functional.pad(valid, (0, short)).unflatten(2, (blocks, block)).sum(-1)
    total = torch.nn.functional.pad(x, (0, 0, 0, short)).unflatten(2, (blocks, block)).sum(3, dtype=torch.float32)
    return total / counted.clamp_min(1)[..., None], counted


def pooled_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    key_valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits between the means of blocks of queries and of keys.

    Args:
        q: [B, H, N, D].
        k: [B, Hk, M, D] with Hk dividing H.
        block_q, block_k: tokens of a block.
        scale: of the logits, 1 / sqrt(D) by default.
        key_valid: bool [B or 1, H or 1, M], False for keys that do not count.

    Returns:
        float32 [B, H, Tq, Tk], -inf for blocks in which no key counts.

    Raises:
        DitaError: shapes that do not fit.

    Example:
        >>> x = torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 3, 1)
        >>> pooled_scores(x, x, 2, 1)[0, 0]
        tensor([[ 2.,  6., 10.],
                [ 5., 15., 25.]])
    """
    check_pair(q, k, key_valid)
    repeat = q.shape[1] // k.shape[1]
    if key_valid is not None and key_valid.shape[1] > 1:
        k, repeat = k.repeat_interleave(repeat, 1), 1
    means_q, _ = block_means(q, block_q)
    means_k, counted = block_means(k, block_k, key_valid)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = means_q @ means_k.repeat_interleave(repeat, 1).transpose(-2, -1) * scale
    return scores.masked_fill(counted[:, :, None] == 0, -math.inf)


def naive_pooled_topk(
    q: torch.Tensor,
    k: torch.Tensor,
    block_q: int,
    block_k: int,
    keep: int,
    scale: float | None = None,
    key_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`pooled_topk` in plain PyTorch: the oracle.

    Example:
        >>> x = torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 3, 1)
        >>> naive_pooled_topk(x, x, 1, 1, 1)[1].flatten()
        tensor([0, 0, 0], dtype=torch.int32)
    """
    scores = pooled_scores(q, k, block_q, block_k, scale, key_valid)
    check_keep(keep, scores.shape[-1])
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    taken = scores.gather(-1, order) > -math.inf
    # What is not taken sorts behind, and is then 0.
    indices = order.masked_fill(~taken, scores.shape[-1]).sort(-1).values
    counts = taken.sum(-1, dtype=torch.int32)
    return counts, indices.masked_fill(indices == scores.shape[-1], 0).to(torch.int32)


def pooled_topk(
    q: torch.Tensor,
    k: torch.Tensor,
    block_q: int,
    block_k: int,
    keep: int,
    scale: float | None = None,
    key_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each block of queries the `keep` blocks of keys of the highest pooled logits; of equal ones the earlier.

    On a CUDA device, Triton reads q and k once and does not write the logits.

    Args:
        q, k, block_q, block_k, scale, key_valid: as of `pooled_scores`.
        keep: from 1 to the number of key blocks. Blocks in which no key counts are never kept.

    Returns:
        counts int32 [B, H, Tq] and indices int32 [B, H, Tq, keep], ascending, as a `BlockPlan` has them.

    Raises:
        DitaError: shapes that do not fit, or `keep` out of range.

    Example:
        >>> x = torch.tensor([1.0, 3.0, -5.0]).view(1, 1, 3, 1)
        >>> counts, indices = pooled_topk(x, x, 1, 1, 2)
        >>> indices[0, 0]
        tensor([[0, 1],
                [0, 1],
                [0, 2]], dtype=torch.int32)
    """
    if q.is_cuda:
        from dita.kernels.pooled_topk_triton import triton_pooled_topk

        return triton_pooled_topk(q, k, block_q, block_k, keep, scale, key_valid)
    return naive_pooled_topk(q, k, block_q, block_k, keep, scale, key_valid)


def check_pair(q: torch.Tensor, k: torch.Tensor, key_valid: torch.Tensor | None) -> None:
    """Raise `DitaError` unless queries, keys and the keys' validity belong together.

    Example:
        >>> check_pair(torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 5, 8), None)
    """
    if q.ndim != 4 or k.ndim != 4 or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[1] % k.shape[1]:
        raise DitaError(f"expected q [B, H, N, D] and k [B, Hk, M, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    if key_valid is not None and (
        key_valid.dtype != torch.bool
        or key_valid.ndim != 3
        or key_valid.shape[0] not in (1, q.shape[0])
        or key_valid.shape[1] not in (1, q.shape[1])
        or key_valid.shape[2] != k.shape[2]
    ):
        raise DitaError(
            f"expected key_valid bool {(*q.shape[:2], k.shape[2])}, 1 for either of the first two, got "
            f"{key_valid.dtype} {tuple(key_valid.shape)}"
        )


def check_keep(keep: int, blocks: int) -> None:
    """Raise `DitaError` unless that many blocks can be kept.

    Example:
        >>> check_keep(2, 3)
    """
    if not 1 <= keep <= blocks:
        raise DitaError(f"keep must be from 1 to the {blocks} blocks of keys there are, got {keep}")
