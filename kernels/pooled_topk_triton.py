"""The Triton form of `pooled_topk`: means of blocks, their logits and each row's highest, without logits in memory.

Two kernels, since every row needs the means of all keys. The first reads q and k once and writes the means, a block-th
of their size. The second keeps whole rows of logits in registers. It finds the k-th highest of a row by bisection over
the bits of float32, 32 counts instead of a sort, and takes ties in the order of the blocks; the kept blocks come out
ascending, as the attention kernel wants them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from dita.kernels.plan import block_count
from dita.kernels.pooled_scores import check_keep, check_pair


@triton.jit
def pool_kernel(
    x, valid, out, counted, x_batch, x_head, x_row, valid_batch, valid_head, out_line, out_block, out_column,
    heads, tokens, blocks, head_dim: tl.constexpr, width: tl.constexpr, block: tl.constexpr, chunk: tl.constexpr,
    has_valid: tl.constexpr,
):  # fmt: skip
    """Mean of the counted tokens of one block, and their number. Grid: (blocks * heads * batch,), blocks fastest."""
    number = tl.program_id(0) % blocks
    line = (tl.program_id(0) // blocks).to(tl.int64)
    head, batch = line % heads, line // heads
    x += batch * x_batch + head * x_head
    valid += batch * valid_batch + head * valid_head
    column = tl.arange(0, width)
    total = tl.zeros([width], tl.float32)
    seen = tl.zeros([chunk], tl.float32)
    for offset in range(0, block, chunk):
        part = offset + tl.arange(0, chunk)
        token = number.to(tl.int64) * block + part
        inside = (part < block) & (token < tokens)
        if has_valid:
            inside = inside & (tl.load(valid + token, mask=inside, other=0) != 0)
        mask = inside[:, None] & (column[None, :] < head_dim)
        tile = tl.load(x + token[:, None] * x_row + column[None, :], mask=mask, other=0.0)
        total += tl.sum(tile.to(tl.float32), 0)
        seen += inside.to(tl.float32)
    number_seen = tl.sum(seen, 0)
    place = out + line * out_line + number * out_block + column * out_column
    tl.store(place, total / tl.maximum(number_seen, 1.0), mask=column < head_dim)
    tl.store(counted + line * blocks + number, number_seen)


@triton.jit
def select_kernel(
    means_q, means_k, counted, counts, indices, heads, share, blocks_q, blocks_k, groups, keep, scale,
    head_dim: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """The `keep` highest of `rows` rows of logits. Grid: (groups of rows * heads * batch,), groups fastest."""
    line = (tl.program_id(0) // groups).to(tl.int64)
    row = (tl.program_id(0) % groups) * rows + tl.arange(0, rows)
    key_line = line // heads * (heads // share) + line % heads // share
    column = tl.arange(0, width)
    means_q += line * blocks_q * head_dim
    means_k += key_line * head_dim * blocks_k
    scores = tl.zeros([rows, width], tl.float32)
    for d in range(head_dim):
        a = tl.load(means_q + row * head_dim + d, mask=row < blocks_q, other=0.0)
        b = tl.load(means_k + d * blocks_k + column, mask=column < blocks_k, other=0.0)
        scores += a[:, None] * b[None, :]
    scores *= scale
    seen = tl.load(counted + key_line * blocks_k + column, mask=column < blocks_k, other=0.0)
    # -0 and 0 are equal but their bits are not.
    scores = tl.where(scores == 0.0, 0.0, scores)
    scores = tl.where(seen[None, :] > 0.0, scores, float("-inf"))

    bits = scores.to(tl.int32, bitcast=True)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # int32 in the order of the floats
    least = tl.full([rows], -2147483648, tl.int32)
    least = tl.where(tl.sum((rank >= 0).to(tl.int32), 1) >= keep, 0, least)
    for i in range(31):
        trial = least + (1 << (30 - i))
        least = tl.where(tl.sum((rank >= trial[:, None]).to(tl.int32), 1) >= keep, trial, least)
    above = rank > least[:, None]
    tied = rank == least[:, None]
    spare = keep - tl.sum(above.to(tl.int32), 1)
    tied = tied & (tl.cumsum(tied.to(tl.int32), 1) <= spare[:, None])
    chosen = (above | tied) & (scores > float("-inf"))
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    out = line * blocks_q + row
    inside = row < blocks_q
    tl.store(counts + out, tl.sum(chosen.to(tl.int32), 1), mask=inside)
    wide = tl.zeros([rows, width], tl.int32) + column[None, :]
    tl.store(indices + out[:, None] * keep + place, wide, mask=chosen & inside[:, None])


def pool(x: torch.Tensor, block: int, valid: torch.Tensor | None, turned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `pool_kernel`.

    Args:
        x: [B, H, N, D].
        block: tokens of a block.
        valid: bool [B or 1, H or 1, N], tokens that count; None for all.
        turned: return means as [B, H, D, T] instead of [B, H, T, D].

    Returns:
        float32 means, and float32 [B, H, T] numbers of tokens that count.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, tokens, head_dim = x.shape
    blocks = block_count(tokens, block)
    shape = (batch, heads, head_dim, blocks) if turned else (batch, heads, blocks, head_dim)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    counted = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    flags, strides = counted, [0, 0]
    if valid is not None:
        flags = valid.contiguous().view(torch.uint8)
        strides = [stride if size > 1 else 0 for size, stride in zip(flags.shape[:2], flags.stride()[:2], strict=True)]
    arguments: list[Any] = [
        x, flags, out, counted, *x.stride()[:3], *strides, out.stride(1), out.stride(3 if turned else 2),
        out.stride(2 if turned else 3), heads, tokens, blocks,
    ]  # fmt: skip
    options: dict[str, Any] = {
        "head_dim": head_dim, "width": triton.next_power_of_2(head_dim), "block": block,
        "chunk": min(32, triton.next_power_of_2(block)), "has_valid": valid is not None,
    }  # fmt: skip
    pool_kernel[(batch * heads * blocks,)](*arguments, **options)
    return out, counted


def triton_pooled_topk(
    q: torch.Tensor,
    k: torch.Tensor,
    block_q: int,
    block_k: int,
    keep: int,
    scale: float | None = None,
    key_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernels; arguments and results as of `pooled_topk`.

    Runs on a CUDA device, or anywhere with TRITON_INTERPRET=1 set before triton is imported.

    Example:
        >>> x = torch.randn(1, 2, 1024, 64, device="cuda")  # doctest: +SKIP
        >>> counts, indices = triton_pooled_topk(x, x, 128, 64, 4)  # doctest: +SKIP
    """
    check_pair(q, k, key_valid)
    batch, heads, queries, head_dim = q.shape
    blocks_q, blocks_k = block_count(queries, block_q), block_count(k.shape[2], block_k)
    check_keep(keep, blocks_k)
    if key_valid is not None and key_valid.shape[1] > 1:
        k = k.repeat_interleave(heads // k.shape[1], 1)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    counts = torch.empty(batch, heads, blocks_q, dtype=torch.int32, device=q.device)
    indices = torch.zeros(batch, heads, blocks_q, keep, dtype=torch.int32, device=q.device)
    if not counts.numel():
        return counts, indices
    width = triton.next_power_of_2(blocks_k)
    rows = max(1, min(4, 8192 // width))
    groups = triton.cdiv(blocks_q, rows)
    with torch.cuda.device_of(q):
        means_q, _ = pool(q, block_q, None, turned=False)
        means_k, counted = pool(k, block_k, key_valid, turned=True)
        arguments: list[Any] = [
            means_q, means_k, counted, counts, indices, heads, heads // k.shape[1], blocks_q, blocks_k, groups, keep,
            scale,
        ]  # fmt: skip
        options: dict[str, Any] = {
            "head_dim": head_dim, "width": width, "rows": rows, "num_warps": 8 if rows * width > 4096 else 4,
        }  # fmt: skip
        select_kernel[(batch * heads * groups,)](*arguments, **options)
    return counts, indices
