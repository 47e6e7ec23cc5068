"""Block-sparse flash attention in Triton: forward, with the log-sum-exp.

One program computes `tile_q` queries of one head. It walks the list of key blocks that the plan keeps for them with the
online softmax of FlashAttention (Dao, arXiv 2307.08691) in base 2. Tiles divide the plan's blocks, so one plan fits all
tile sizes. What is particular here:

- The head dim is split into two powers of two, 72 = 64 + 8 of 16, 96 = 64 + 32, instead of padded to the next one.
- Key blocks come ascending, so only the last one in a row's list can be short. It has a loop of its own, of tiles so
  small that it needs no more registers than the main loop, which has no bounds mask.
- Rows that keep many blocks start first: the stable order of descending counts costs no wait for the device.
- Strides are passed in units of 8 elements where all allow it. Otherwise Triton, which looks for factors of 16, would
  load a head dim of 72 element by element.
- float32 is multiplied as three products of TF32 ("tf32x3"), on tensor cores. Emulated with accumulators that truncate
  as those of NVIDIA do, the error against float64 is 1.0e-6 to 1.3e-6 of the norm for head dims 64 and 128 and logits
  up to 50, where float32 itself has 0.4e-6 to 1.5e-6. "ieee" would leave the tensor cores, and spills registers for
  all but the smallest tiles.
- Triton's interpreter multiplies the bit patterns of bfloat16 as integers (3.8 and 3.9), so there, and only there,
  factors are made float32 first.
"""

# Triton's annotations are of its own language: a constexpr is passed as a plain value, `range` takes tensors.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl

from dita.errors import DitaError
from dita.kernels.block_sparse_configs import Config, check_tiles, choose_config, split_head_dim

PRECISION = "tf32x3"  # of float32; the other types have but one
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2_E = math.log2(math.e)


@triton.jit
def multiply(a, b, precision: tl.constexpr, upcast: tl.constexpr):
    """a @ b in float32."""
    if upcast:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=precision)


@triton.jit
def load_tile(x, rows, row_stride, columns, left, head_dim, mask_rows: tl.constexpr, mask_columns: tl.constexpr):
    """Rows and columns of a matrix with unit column stride; 0 from row `left` or column `head_dim` on if masked."""
    place = x + rows[:, None] * row_stride + columns[None, :]
    if mask_rows and mask_columns:
        return tl.load(place, mask=(rows[:, None] < left) & (columns[None, :] < head_dim), other=0.0)
    elif mask_rows:
        return tl.load(place, mask=rows[:, None] < left, other=0.0)
    elif mask_columns:
        return tl.load(place, mask=columns[None, :] < head_dim, other=0.0)
    else:
        return tl.load(place)


@triton.jit
def tile_start(list_, j, end, block_k: tl.constexpr, tile_k: tl.constexpr):
    """The first key of the j-th tile of a row's list, 0 from tile `end` on."""
    inner: tl.constexpr = block_k // tile_k
    if inner == 1:
        return tl.load(list_ + j, mask=j < end, other=0) * block_k
    else:
        return tl.load(list_ + j // inner, mask=j < end, other=0) * block_k + (j % inner) * tile_k


@triton.jit
def counted(valid, first, tile_k: tl.constexpr):
    """Whether the keys from `first` on count: bits of words of 64, of which a tile of up to 64 keys reads one."""
    keys = first + tl.arange(0, tile_k)
    word = tl.load(valid + first // 64) if tile_k <= 64 else tl.load(valid + keys // 64)
    return ((word >> (keys % 64).to(tl.int64)) & 1) != 0


@triton.jit
def soften(x, scale, top, total, per_row: tl.constexpr):
    """One step of the online softmax: weights, factor of the sums so far, maximum, sum.

    `scale` > 0, one or one per row, brings x to units of log 2. It is applied to the maximum and, in one multiply-add,
    to the exponent. While a row has seen no key its maximum is -inf; taking off 0 instead makes its weights 0, not NaN.
    """
    new_top = tl.maximum(top, tl.max(x, 1) * scale)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    spread = scale[:, None] if per_row else scale
    weights = tl.math.exp2(x * spread - shift[:, None])
    decay = tl.math.exp2(top - shift)
    return weights, decay, new_top, total * decay + tl.sum(weights, 1)


@triton.jit
def attend(
    q1, q2, acc1, acc2, top, total, k, v, valid, first, keys, k_row, v_row, scale,
    d1: tl.constexpr, d2: tl.constexpr, head_dim: tl.constexpr, tile_k: tl.constexpr, ragged: tl.constexpr,
    has_valid: tl.constexpr, precision: tl.constexpr, upcast: tl.constexpr,
):  # fmt: skip
    """Take the keys from `first` on into the running softmax."""
    rows = tl.arange(0, tile_k)
    left = keys - first
    c1 = tl.arange(0, d1)
    mask1: tl.constexpr = d1 > head_dim
    mask2: tl.constexpr = d1 + d2 > head_dim
    # Only the start needs 64 bits; what is added to it stays within a tile.
    k += first.to(tl.int64) * k_row
    v += first.to(tl.int64) * v_row
    x = multiply(q1, tl.trans(load_tile(k, rows, k_row, c1, left, head_dim, ragged, mask1)), precision, upcast)
    if d2 > 0:
        c2 = d1 + tl.arange(0, d2)
        x += multiply(q2, tl.trans(load_tile(k, rows, k_row, c2, left, head_dim, ragged, mask2)), precision, upcast)
    if has_valid:
        x = tl.where(counted(valid, first, tile_k)[None, :], x, float("-inf"))
    elif ragged:
        x = tl.where(rows[None, :] < left, x, float("-inf"))
    weights, decay, top, total = soften(x, scale, top, total, False)
    weights = weights.to(v.dtype.element_ty)
    tile = load_tile(v, rows, v_row, c1, left, head_dim, ragged, mask1)
    acc1 = acc1 * decay[:, None] + multiply(weights, tile, precision, upcast)
    if d2 > 0:
        tile = load_tile(v, rows, v_row, c2, left, head_dim, ragged, mask2)
        acc2 = acc2 * decay[:, None] + multiply(weights, tile, precision, upcast)
    return acc1, acc2, top, total


@triton.jit
def program_rows(order, blocks, heads, block_q: tl.constexpr, tile_q: tl.constexpr, balanced: tl.constexpr):
    """Which block of queries of which head and batch item a program computes, and its first query."""
    tiles: tl.constexpr = block_q // tile_q
    row = tl.program_id(0) // tiles
    if balanced:
        row = tl.load(order + row)
    block = row % blocks
    head = (row // blocks) % heads
    batch = (row // blocks // heads).to(tl.int64)
    return block, head, batch, block * block_q + (tl.program_id(0) % tiles) * tile_q


@triton.jit
def key_tiles(indices, count, keys, block_k: tl.constexpr, tile_k: tl.constexpr, even: tl.constexpr):
    """Whole tiles of keys in a row's list; the first key of its last block, if that is short, and how many it holds."""
    inner: tl.constexpr = block_k // tile_k
    full = count * inner
    last = 0
    tail = 0
    if not even:
        last = tl.load(indices + count - 1, mask=count > 0, other=0) * block_k
        short = (count > 0) & (last + block_k > keys)
        full -= tl.where(short, inner, 0)
        tail = tl.where(short, keys - last, 0)
    return full, last, tail


@triton.jit
def block_sparse_kernel(
    q, k, v, valid, counts, indices, order, out, lse,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    valid_batch, valid_head, counts_batch, counts_head, indices_batch, indices_head, indices_row,
    heads, group, queries, keys, blocks, scale,
    unit: tl.constexpr, head_dim: tl.constexpr, d1: tl.constexpr, d2: tl.constexpr,
    block_q: tl.constexpr, block_k: tl.constexpr, tile_q: tl.constexpr, tile_k: tl.constexpr,
    even: tl.constexpr, has_valid: tl.constexpr, balanced: tl.constexpr,
    precision: tl.constexpr, upcast: tl.constexpr,
):  # fmt: skip
    """`tile_q` queries of one head. Grid: (tiles of a block * blocks of a head * heads * batch,), tiles fastest.

    Strides of q, k, v and out count `unit` elements. `even`: no key block is short.
    """
    block, head, batch, start = program_rows(order, blocks, heads, block_q, tile_q, balanced)
    wide = head.to(tl.int64)

    q_row, k_row, v_row, out_row = q_row * unit, k_row * unit, v_row * unit, out_row * unit
    q += (batch * q_batch + wide * q_head) * unit + start.to(tl.int64) * q_row
    k += (batch * k_batch + (wide // group) * k_head) * unit
    v += (batch * v_batch + (wide // group) * v_head) * unit
    valid += batch * valid_batch + wide * valid_head
    indices += batch * indices_batch + wide * indices_head + block.to(tl.int64) * indices_row
    count = tl.load(counts + batch * counts_batch + wide * counts_head + block)

    rows = tl.arange(0, tile_q)
    left = queries - start
    c1 = tl.arange(0, d1)
    mask1: tl.constexpr = d1 > head_dim
    mask2: tl.constexpr = d1 + d2 > head_dim
    q1 = load_tile(q, rows, q_row, c1, left, head_dim, True, mask1)
    acc1 = tl.zeros([tile_q, d1], tl.float32)
    if d2 > 0:
        c2 = d1 + tl.arange(0, d2)
        q2 = load_tile(q, rows, q_row, c2, left, head_dim, True, mask2)
        acc2 = tl.zeros([tile_q, d2], tl.float32)
    else:
        q2, acc2 = q1, acc1
    top = tl.full([tile_q], float("-inf"), tl.float32)
    total = tl.zeros([tile_q], tl.float32)

    full, last, tail = key_tiles(indices, count, keys, block_k, tile_k, even)
    # Read one tile ahead: a load whose address is loaded in the same turn costs the pipeline a stage.
    upcoming = tile_start(indices, 0, full, block_k, tile_k)
    for j in range(full):
        first = upcoming
        upcoming = tile_start(indices, j + 1, full, block_k, tile_k)
        acc1, acc2, top, total = attend(
            q1, q2, acc1, acc2, top, total, k, v, valid, first, keys, k_row, v_row, scale,
            d1, d2, head_dim, tile_k, False, has_valid, precision, upcast,
        )  # fmt: skip
    if not even:
        short_k: tl.constexpr = min(tile_k, 32)
        for done in tl.range(0, tail, short_k, num_stages=1):
            acc1, acc2, top, total = attend(
                q1, q2, acc1, acc2, top, total, k, v, valid, last + done, keys, k_row, v_row, scale,
                d1, d2, head_dim, short_k, True, has_valid, precision, upcast,
            )  # fmt: skip

    empty = total == 0.0
    share = 1.0 / tl.where(empty, 1.0, total)
    out += (batch * out_batch + wide * out_head) * unit + start.to(tl.int64) * out_row
    place = out + rows[:, None] * out_row
    mask = rows[:, None] < left
    tl.store(place + c1[None, :], (acc1 * share[:, None]).to(out.dtype.element_ty), mask & (c1[None, :] < head_dim))
    if d2 > 0:
        tl.store(place + c2[None, :], (acc2 * share[:, None]).to(out.dtype.element_ty), mask & (c2[None, :] < head_dim))
    natural = (top + tl.math.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453
    tl.store(lse + (batch * heads + wide) * queries + start + rows, natural, mask=rows < left)


def heavy_first(counts: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
    """Rows of all heads by descending count, equal counts in their own order.

    Args:
        counts: int32 [B' or 1, H' or 1, Tq].
        batch, heads: B and H.

    Returns:
        int32 [B * H * Tq], a permutation.

    Example:
        >>> heavy_first(torch.tensor([[[1, 3, 2]]], dtype=torch.int32), 1, 2)
        tensor([1, 4, 2, 5, 0, 3], dtype=torch.int32)
    """
    return counts.expand(batch, heads, -1).flatten().argsort(descending=True, stable=True).to(torch.int32)


def shared_strides(x: torch.Tensor, batch: int, heads: int, what: str) -> tuple[int, int]:
    """Strides of batch and head, 0 where one entry serves all.

    Raises:
        DitaError: neither one entry nor as many as there are.

    Example:
        >>> shared_strides(torch.zeros(1, 4, 3), 2, 4, "counts")
        (0, 3)
    """
    if x.shape[0] not in (1, batch) or x.shape[1] not in (1, heads):
        raise DitaError(f"{what} of shape {tuple(x.shape)} fit neither batch {batch} and {heads} heads nor all at once")
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0


def valid_words(
    key_valid: torch.Tensor | None, otherwise: torch.Tensor, batch: int, heads: int
) -> tuple[torch.Tensor, int, int]:
    """Which keys count, 64 to an int64, with strides of batch and head; for None some tensor, which is not read.

    Example:
        >>> words, *strides = valid_words(torch.tensor([[[True, False, True]]]), torch.zeros(1), 1, 2)
        >>> words, strides
        (tensor([[[5]]]), [0, 0])
    """
    if key_valid is None:
        return otherwise, 0, 0
    padded = torch.nn.functional.pad(key_valid, (0, -key_valid.shape[-1] % 64)).unflatten(-1, (-1, 64)).long()
    words = (padded << torch.arange(64, device=key_valid.device)).sum(-1)
    return words, *shared_strides(words, batch, heads, "key_valid")


def unit_of(*tensors: torch.Tensor) -> int:
    """8 if all strides but the last are multiples of 8, else 1.

    Example:
        >>> unit_of(torch.zeros(1, 2, 5, 72)), unit_of(torch.zeros(1, 2, 5, 70))
        (8, 1)
    """
    return 8 if all(stride % 8 == 0 for x in tensors for stride in x.stride()[:-1]) else 1


def scaled(q: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, float]:
    """Queries and a scale above 0, as kernels need that take the maximum before they scale.

    Example:
        >>> scaled(torch.ones(1, 1, 1, 4), None)[1], scaled(torch.ones(1, 1, 1, 1), -2.0)
        (0.5, (tensor([[[[-2.]]]]), 1.0))
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return (q, scale) if scale > 0 else (q * scale, 1.0)


def answers(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where output and log-sum-exp go; the output in q's memory order: a view of [B, N, H, D] gives such a view.

    Example:
        >>> answers(torch.zeros(2, 9, 4, 8).transpose(1, 2))[0].stride()
        (288, 8, 32, 1)
    """
    return torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def check_launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor, indices: torch.Tensor, block_q: int
) -> None:
    """Raise `DitaError` on what would make a kernel read outside its tensors or multiply what it cannot."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.shape != v.shape or k.shape[::3] != q.shape[::3] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise DitaError(f"expected q [B, H, N, D] and k, v [B, Hk, M, D] with Hk dividing H, got {shapes}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or {k.dtype, v.dtype} != {q.dtype}:
        raise DitaError(f"expected one of float32, float16, bfloat16 for all, got {q.dtype}, {k.dtype}, {v.dtype}")
    if counts.dtype != torch.int32 or indices.dtype != torch.int32 or indices.shape[:-1] != counts.shape:
        raise DitaError(
            f"expected int32 counts [B, H, Tq] and indices [B, H, Tq, K], got {counts.dtype} {tuple(counts.shape)} "
            f"and {indices.dtype} {tuple(indices.shape)}"
        )
    if counts.shape[-1] != -(-q.shape[2] // block_q):
        raise DitaError(f"{counts.shape[-1]} rows of {block_q} queries do not fit {q.shape[2]} queries")


def triton_block_sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    key_valid: torch.Tensor | None = None,
    balance: bool = True,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel. The tokens are in the plan's order already; `block_sparse_attention` sees to that.

    Runs on a CUDA device, or anywhere with TRITON_INTERPRET=1 set before triton is imported.

    Args:
        q: [B, H, N, D], float32, float16 or bfloat16; any strides as long as that of D is 1, else it is copied.
        k, v: [B, Hk, M, D], dtype of q, Hk dividing H.
        counts: int32 [B or 1, H or 1, Tq].
        indices: int32 [B or 1, H or 1, Tq, K], the first `counts` ascending and below the number of key blocks.
        block_q, block_k: tokens of a block, multiples of 16.
        scale: of the logits, 1 / sqrt(D) by default.
        key_valid: bool [B or 1, H or 1, M], False for keys that no query sees.
        balance: start rows of many blocks first. False saves a sort when all counts are equal.
        config: tile sizes; `choose_config` by default.

    Returns:
        output [B, H, N, D] in the dtype and memory order of q, and the natural log of the sum of exponentials, float32
        [B, H, N]. A query that sees no key has output 0 and -inf.

    Raises:
        DitaError: shapes or dtypes that do not fit, or blocks that are no multiples of 16.

    Example:
        >>> x = torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16)  # doctest: +SKIP
        >>> plan = BlockPlan.of_mask(torch.ones(1, 1, 2, 4, dtype=torch.bool, device="cuda"), 128, 64)  # doctest: +SKIP
        >>> out, lse = triton_block_sparse(x, x, x, plan.counts, plan.indices, 128, 64)  # doctest: +SKIP
    """
    check_launch(q, k, v, counts, indices, block_q)
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    config = config or choose_config(q, k, indices, block_q, block_k)
    check_tiles(config, block_q, block_k)
    q, scale = scaled(q, scale)
    q, k, v, indices = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, indices))
    counts = counts.contiguous()
    out, lse = answers(q)
    blocks = counts.shape[-1]
    if not out.numel():
        return out, lse
    plan_strides = [*shared_strides(counts, batch, heads, "counts"), *shared_strides(indices, batch, heads, "indices")]
    valid, *valid_strides = valid_words(key_valid, counts, batch, heads)
    balanced = balance and indices.shape[-1] > 1
    order = heavy_first(counts, batch, heads) if balanced else counts
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:3]]
    unit = unit_of(q, k, v, out)
    d1, d2 = split_head_dim(head_dim, 32 if q.dtype == torch.float32 else 16)
    arguments: list[Any] = [
        q, k, v, valid, counts, indices, order, out, lse, *[stride // unit for stride in strides], *valid_strides,
        *plan_strides, indices.stride(2), heads, heads // k.shape[1], queries, keys, blocks, scale * LOG2_E,
    ]  # fmt: skip
    options: dict[str, Any] = {
        "unit": unit, "head_dim": head_dim, "d1": d1, "d2": d2, "block_q": block_q, "block_k": block_k,
        "tile_q": config.tile_q, "tile_k": config.tile_k, "even": keys % block_k == 0,
        "has_valid": key_valid is not None, "balanced": balanced, "precision": PRECISION,
        "upcast": INTERPRETED and q.dtype == torch.bfloat16, "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    grid = (batch * heads * blocks * (block_q // config.tile_q),)
    with torch.cuda.device_of(q):
        block_sparse_kernel[grid](*arguments, **options)
    return out, lse
