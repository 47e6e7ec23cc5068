"""The Triton form of `int8_attention`: one kernel that rounds q or k to int8, one that attends.

The second is the block-sparse kernel with an int8 product for the logits. A tile of keys has one scale, so tile and
group are the same, and the head dim is padded to a multiple of 32 with zeros, what an int8 product takes at least. Fp8
values lie channel by channel in memory, since Hopper multiplies fp8 only along contiguous keys; their product is summed
in fresh registers (`max_num_imprecise_acc`), whose 14 bits would not do for a whole row.
"""

# Triton's annotations are of its own language: a constexpr is passed as a plain value, `range` takes tensors.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dita.errors import DitaError
from dita.kernels.block_sparse_configs import Config, check_tiles, fitted, split_head_dim
from dita.kernels.block_sparse_triton import (
    INTERPRETED,
    LOG2_E,
    answers,
    check_launch,
    counted,
    heavy_first,
    key_tiles,
    load_tile,
    program_rows,
    scaled,
    shared_strides,
    soften,
    tile_start,
    unit_of,
    valid_words,
)
from dita.kernels.int8_attention import groups_of, key_mean, narrow_values
from dita.kernels.plan import block_count


@triton.jit
def quantise_kernel(
    x, mean, valid, out, scales, offset, x_batch, x_head, x_row, mean_batch, mean_head, valid_batch,
    heads, share, rows, groups, unit: tl.constexpr, head_dim: tl.constexpr, padded: tl.constexpr,
    width: tl.constexpr, group: tl.constexpr, smooth: tl.constexpr, has_valid: tl.constexpr,
):  # fmt: skip
    """One group of rows in int8, with its scale. Grid: (groups * heads * batch,), groups fastest.

    `smooth`: subtract the mean first. Otherwise write each row's product with the mean of head // share to `offset`.
    """
    number = tl.program_id(0) % groups
    head = ((tl.program_id(0) // groups) % heads).to(tl.int64)
    batch = (tl.program_id(0) // groups // heads).to(tl.int64)
    start = number.to(tl.int64) * group
    row = tl.arange(0, group)
    column = tl.arange(0, width)
    left = rows - start
    x += (batch * x_batch + head * x_head + start * x_row) * unit
    place = x + row[:, None] * (x_row * unit) + column[None, :]
    inside = (row[:, None] < left) & (column[None, :] < head_dim)
    tile = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    centre = tl.load(
        mean + batch * mean_batch + (head // share) * mean_head + column, mask=column < head_dim, other=0.0
    )
    line = batch * heads + head
    if smooth:
        tile = tl.where(inside, tile - centre[None, :], 0.0)
        if has_valid:
            used = tl.load(valid + batch * valid_batch + start + row, mask=row < left, other=0)
            tile = tl.where(used[:, None] != 0, tile, 0.0)
    else:
        tl.store(offset + line * rows + start + row, tl.sum(tile * centre[None, :], 1), mask=row < left)
    scale = tl.max(tl.abs(tile)) / 127.0 + 1e-7
    ratio = tl.div_rn(tile, tl.full([group, width], 1.0, tl.float32) * scale)
    rounded = (ratio + tl.where(ratio < 0, -0.5, 0.5)).to(tl.int8)
    place = out + (line * rows + start) * padded + row[:, None] * padded + column[None, :]
    tl.store(place, rounded, mask=(row[:, None] < left) & (column[None, :] < padded))
    tl.store(scales + line * groups + number, scale)


@triton.jit
def to_fp8(x, interpreted: tl.constexpr):
    """Non-negative numbers in e4m3, to the nearest, ties to even.

    Triton's interpreter drops the carry into the exponent and truncates subnormals, so there x is first put on the grid
    of e4m3: multiples of an eighth of its power of two, which is 2^-6 at least.
    """
    if interpreted:
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(power, 0.015625) * 0.125
        # Adding and taking off 1.5 * 2^23 rounds to a whole number.
        x = ((x / step + 12582912.0) - 12582912.0) * step
    return x.to(tl.float8e4nv)


@triton.jit
def product(weights, v, first, rows, columns, left, row_stride, head_dim, ragged: tl.constexpr, mask: tl.constexpr,
            fp8: tl.constexpr):  # fmt: skip
    """Weights times a tile of values, summed in float32."""
    if fp8:
        tile = load_tile(v + first, columns, row_stride, rows, head_dim, left, mask, ragged)
        return tl.dot(weights, tl.trans(tile), max_num_imprecise_acc=32)
    else:
        tile = load_tile(v + first.to(tl.int64) * row_stride, rows, row_stride, columns, left, head_dim, ragged, mask)
        return tl.dot(weights, tile)


@triton.jit
def attend_int8(
    q1, q2, acc1, acc2, top, total, factor, k, scale_k, v, valid, first, keys, v_row,
    p1: tl.constexpr, p2: tl.constexpr, d1: tl.constexpr, d2: tl.constexpr, head_dim: tl.constexpr,
    tile_k: tl.constexpr, ragged: tl.constexpr, has_valid: tl.constexpr, fp8: tl.constexpr,
    interpreted: tl.constexpr,
):  # fmt: skip
    """Take the keys from `first` on into the running softmax."""
    rows = tl.arange(0, tile_k)
    left = keys - first
    padded: tl.constexpr = p1 + p2
    k += first.to(tl.int64) * padded
    half = load_tile(k, rows, padded, tl.arange(0, p1), left, padded, ragged, False)
    x = tl.dot(q1, tl.trans(half), out_dtype=tl.int32)
    if p2 > 0:
        half = load_tile(k, rows, padded, p1 + tl.arange(0, p2), left, padded, ragged, False)
        x += tl.dot(q2, tl.trans(half), out_dtype=tl.int32)
    x = x.to(tl.float32)
    if has_valid:
        x = tl.where(counted(valid, first, tile_k)[None, :], x, float("-inf"))
    elif ragged:
        x = tl.where(rows[None, :] < left, x, float("-inf"))
    weights, decay, top, total = soften(x, factor * tl.load(scale_k + first // tile_k), top, total, True)
    weights = to_fp8(weights * 448.0, interpreted) if fp8 else weights.to(tl.float16)
    c1 = tl.arange(0, d1)
    acc1 = acc1 * decay[:, None] + product(
        weights, v, first, rows, c1, left, v_row, head_dim, ragged, d1 > head_dim, fp8
    )
    if d2 > 0:
        c2 = d1 + tl.arange(0, d2)
        part = product(weights, v, first, rows, c2, left, v_row, head_dim, ragged, d1 + d2 > head_dim, fp8)
        acc2 = acc2 * decay[:, None] + part
    return acc1, acc2, top, total


@triton.jit
def int8_kernel(
    q, k, scale_q, scale_k, v, scale_v, offset, valid, counts, indices, order, out, lse,
    v_batch, v_head, v_row, out_batch, out_head, out_row, valid_batch, valid_head,
    counts_batch, counts_head, indices_batch, indices_head, indices_row,
    heads, group, queries, keys, blocks, groups_q, groups_k, scale,
    unit: tl.constexpr, head_dim: tl.constexpr, p1: tl.constexpr, p2: tl.constexpr, d1: tl.constexpr, d2: tl.constexpr,
    block_q: tl.constexpr, block_k: tl.constexpr, tile_q: tl.constexpr, tile_k: tl.constexpr, group_q: tl.constexpr,
    even: tl.constexpr, has_valid: tl.constexpr, balanced: tl.constexpr, fp8: tl.constexpr,
    interpreted: tl.constexpr,
):  # fmt: skip
    """`tile_q` queries of one head; as `block_sparse_kernel`, with int8 q and k [B, H, N, p1 + p2] without gaps.

    Values are float16 with strides in units of `unit` elements, or fp8 [B, Hk, D, M'] with v_row = M'.
    """
    padded: tl.constexpr = p1 + p2
    block, head, batch, start = program_rows(order, blocks, heads, block_q, tile_q, balanced)
    wide = head.to(tl.int64)
    line = batch * heads + wide
    key_line = batch * (heads // group) + wide // group

    v_row, out_row = v_row * unit, out_row * unit
    q += (line * queries + start) * padded
    k += key_line * keys * padded
    v += (batch * v_batch + (wide // group) * v_head) * unit
    scale_k += key_line * groups_k
    valid += batch * valid_batch + wide * valid_head
    indices += batch * indices_batch + wide * indices_head + block.to(tl.int64) * indices_row
    count = tl.load(counts + batch * counts_batch + wide * counts_head + block)

    rows = tl.arange(0, tile_q)
    left = queries - start
    q1 = load_tile(q, rows, padded, tl.arange(0, p1), left, padded, True, False)
    acc1 = tl.zeros([tile_q, d1], tl.float32)
    q2, acc2 = q1, acc1
    if p2 > 0:
        q2 = load_tile(q, rows, padded, p1 + tl.arange(0, p2), left, padded, True, False)
    if d2 > 0:
        acc2 = tl.zeros([tile_q, d2], tl.float32)
    factor = tl.load(scale_q + line * groups_q + (start + rows) // group_q, mask=rows < left, other=1.0) * scale
    top = tl.full([tile_q], float("-inf"), tl.float32)
    total = tl.zeros([tile_q], tl.float32)

    full, last, tail = key_tiles(indices, count, keys, block_k, tile_k, even)
    upcoming = tile_start(indices, 0, full, block_k, tile_k)
    for j in range(full):
        first = upcoming
        upcoming = tile_start(indices, j + 1, full, block_k, tile_k)
        acc1, acc2, top, total = attend_int8(
            q1, q2, acc1, acc2, top, total, factor, k, scale_k, v, valid, first, keys, v_row,
            p1, p2, d1, d2, head_dim, tile_k, False, has_valid, fp8, interpreted,
        )  # fmt: skip
    if not even:
        for done in tl.range(0, tail, tile_k, num_stages=1):
            acc1, acc2, top, total = attend_int8(
                q1, q2, acc1, acc2, top, total, factor, k, scale_k, v, valid, last + done, keys, v_row,
                p1, p2, d1, d2, head_dim, tile_k, True, has_valid, fp8, interpreted,
            )  # fmt: skip

    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    out += (batch * out_batch + wide * out_head) * unit + start.to(tl.int64) * out_row
    place = out + rows[:, None] * out_row
    inside = rows[:, None] < left
    c1 = tl.arange(0, d1)
    acc1 = acc1 / safe[:, None]
    if fp8:
        acc1 *= tl.load(scale_v + key_line * head_dim + c1, mask=c1 < head_dim, other=0.0)[None, :] / 448.0
    tl.store(place + c1[None, :], acc1.to(out.dtype.element_ty), mask=inside & (c1[None, :] < head_dim))
    if d2 > 0:
        c2 = d1 + tl.arange(0, d2)
        acc2 = acc2 / safe[:, None]
        if fp8:
            acc2 *= tl.load(scale_v + key_line * head_dim + c2, mask=c2 < head_dim, other=0.0)[None, :] / 448.0
        tl.store(place + c2[None, :], acc2.to(out.dtype.element_ty), mask=inside & (c2[None, :] < head_dim))
    # What subtracting the mean of the keys took from every logit of a query.
    mended = tl.load(offset + line * queries + start + rows, mask=rows < left, other=0.0) * scale
    natural = (top + tl.math.log2(safe) + mended) * 0.6931471805599453
    tl.store(lse + line * queries + start + rows, natural, mask=rows < left)


def quantise_triton(
    x: torch.Tensor, mean: torch.Tensor, valid: torch.Tensor | None, group: int, smooth: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows in int8 with a head dim padded to a multiple of 32, scales, and products with the mean.

    Args:
        x: [B, H, N, D] with unit stride of D.
        mean: float32 [B, Hk, D] of the keys.
        valid: bool [B or 1, 1, N], rows that count; None for all.
        group: rows that share a scale, a power of two.
        smooth: for k: subtract the mean. For q: multiply with it.

    Returns:
        int8 [B, H, N, P], float32 [B, H, groups], and float32 [B, H, N], which is not set with `smooth`.
    """
    batch, heads, rows, head_dim = x.shape
    padded, groups = -(-head_dim // 32) * 32, block_count(rows, group)
    out = torch.empty(batch, heads, rows, padded, dtype=torch.int8, device=x.device)
    scales = torch.empty(batch, heads, groups, dtype=torch.float32, device=x.device)
    offset = torch.empty(batch, heads, 0 if smooth else rows, dtype=torch.float32, device=x.device)
    unit = unit_of(x)
    flags, flags_batch = (scales, 0) if valid is None else (valid.contiguous().view(torch.uint8), rows)
    arguments: list[Any] = [
        x, mean, flags, out, scales, offset, *[stride // unit for stride in x.stride()[:3]], *mean.stride()[:2],
        flags_batch if valid is not None and len(valid) > 1 else 0, heads, heads // mean.shape[1], rows, groups,
    ]  # fmt: skip
    options: dict[str, Any] = {
        "unit": unit, "head_dim": head_dim, "padded": padded, "width": triton.next_power_of_2(padded), "group": group,
        "smooth": smooth, "has_valid": valid is not None, "num_warps": 4 if group * padded <= 4096 else 8,
    }  # fmt: skip
    quantise_kernel[(batch * heads * groups,)](*arguments, **options)
    return out, scales, offset


def int8_config(head_dim: int, block_q: int, block_k: int) -> Config:
    """Tile sizes, the same on all devices; keys come in tiles of one scale group, up to 64.

    Example:
        >>> int8_config(128, 128, 128)
        Config(tile_q=128, tile_k=64, warps=8, stages=3)
    """
    # At head dim 96, 64 queries spill 8 bytes on compute capability 8.9 with 3 stages.
    stages = 4 if split_head_dim(head_dim) == (64, 32) and block_q % 128 else 3
    return fitted(Config(128, 64, 4 if head_dim <= 64 else 8, stages), block_q, block_k)


def triton_int8_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    counts: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    key_valid: torch.Tensor | None = None,
    pv: str = "fp16",
    granularity: str = "block",
    balance: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernels; arguments and results as of `int8_attention`.

    Runs on a CUDA device, or anywhere with TRITON_INTERPRET=1 set before triton is imported.

    Example:
        >>> x = torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16)  # doctest: +SKIP
        >>> out, lse = triton_int8_attention(x, x, x)  # doctest: +SKIP
    """
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    balance = balance and counts is not None
    if counts is None or indices is None:
        across = block_count(keys, block_k)
        rows = (1, 1, block_count(queries, block_q))
        counts = torch.full(rows, across, dtype=torch.int32, device=q.device)
        indices = torch.arange(across, dtype=torch.int32, device=q.device).expand(*rows, -1)
    check_launch(q, k, v, counts, indices, block_q)
    fp8 = pv == "fp8"
    if fp8 and q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 9):
        raise DitaError('fp8 values need compute capability 8.9 or later; use pv="fp16"')
    config = int8_config(head_dim, block_q, block_k)
    check_tiles(config, block_q, block_k)
    if fp8 and config.tile_k < 32:
        raise DitaError(f"fp8 values need blocks of keys that are multiples of 32, got {block_k}")
    q, scale = scaled(q, scale)
    q, k, v, indices = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, indices))
    counts = counts.contiguous()
    out, lse = answers(q)
    if not out.numel():
        return out, lse
    group_q, group_k = groups_of(block_q, block_k, granularity)
    used = None if key_valid is None else key_valid.any(1, keepdim=True)
    with torch.cuda.device_of(q):
        mean = key_mean(k, key_valid)
        q8, scale_q, offset = quantise_triton(q, mean, None, group_q, smooth=False)
        k8, scale_k, _ = quantise_triton(k, mean, used, group_k, smooth=True)
        if fp8 and used is not None:
            v = v.masked_fill(~used[..., None], 0)
        narrow, scale_v = narrow_values(v, pv)
        if fp8:
            across = -(-keys // 16) * 16
            turned = torch.zeros(batch, k.shape[1], head_dim, across, dtype=narrow.dtype, device=q.device)
            turned[..., :keys] = narrow.transpose(2, 3)
            narrow = turned
        valid, *valid_strides = valid_words(key_valid, counts, batch, heads)
        order = heavy_first(counts, batch, heads) if balance else counts
        unit = unit_of(narrow, out)
        p1, p2 = split_head_dim(q8.shape[-1])
        d1, d2 = split_head_dim(head_dim)
        arguments: list[Any] = [
            q8, k8, scale_q, scale_k, narrow, scale_q if scale_v is None else scale_v, offset, valid, counts, indices,
            order, out, lse, *[stride // unit for x in (narrow, out) for stride in x.stride()[:3]], *valid_strides,
            *shared_strides(counts, batch, heads, "counts"), *shared_strides(indices, batch, heads, "indices"),
            indices.stride(2), heads, heads // k.shape[1], queries, keys, counts.shape[-1], scale_q.shape[-1],
            scale_k.shape[-1], scale * LOG2_E,
        ]  # fmt: skip
        options: dict[str, Any] = {
            "unit": unit, "head_dim": head_dim, "p1": p1, "p2": p2, "d1": d1, "d2": d2, "block_q": block_q,
            "block_k": block_k, "tile_q": config.tile_q, "tile_k": config.tile_k, "group_q": group_q,
            "even": keys % block_k == 0, "has_valid": key_valid is not None, "balanced": balance, "fp8": fp8,
            "interpreted": INTERPRETED,
            "num_warps": config.warps, "num_stages": config.stages,
        }  # fmt: skip
        grid = (batch * heads * counts.shape[-1] * (block_q // config.tile_q),)
        int8_kernel[grid](*arguments, **options)
    return out, lse
