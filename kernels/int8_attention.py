"""Attention with int8 logits: smoothed keys, int8 q and k, values in float16 or fp8.

Zhang et al., "SageAttention", ICLR 2025, arXiv 2410.02367, and "SageAttention2", ICML 2025, arXiv 2411.10958. The mean
of the keys is subtracted first; it adds one number to all logits of a query, so only the log-sum-exp has to be mended:
LSE = LSE' + scale q.mean. Then q is rounded to int8 with one scale per block of queries or per 32 of them ("warp"), k
with one per 64 keys: x / s rounded half away from zero, s = max|x| / 127 + 1e-7. Weights are multiplied with values in
float16, or both in fp8 e4m3: values with one scale per channel, weights times 448.

Differences: blocks are those of the plan, up to 128 queries and 64 keys; the authors' finer scales per thread, smoothed
queries and smoothed values are left out. Each tile's product with fp8 values goes to fresh registers and is then added
in float32, as theirs; they use a float16 accumulator on some devices.

On a CUDA device two Triton kernels do this. Elsewhere `naive_int8_attention` emulates them tile by tile, with the same
roundings; it is exact about the arithmetic and not fast.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from dita.errors import DitaError
from dita.kernels.plan import BlockPlan, block_count

GROUP_Q, GROUP_WARP, GROUP_K = 128, 32, 64
FP8_MAX = 448.0
LOG2_E, LN_2 = math.log2(math.e), math.log(2)


class Quantised(NamedTuple):
    """What both the emulation and the kernel multiply.

    Attributes:
        q, k: int8 [B, H, N, D] and [B, Hk, M, D].
        scale_q, scale_k: float32 [B, H, groups] and [B, Hk, groups].
        v: [B, Hk, M, D], float16 or float8_e4m3fn.
        scale_v: float32 [B, Hk, D] for fp8; None for float16.
        offset: float32 [B, H, N], q.mean of the keys, without the scale of the logits.
        group_q, group_k: rows that share a scale.
    """

    q: torch.Tensor
    k: torch.Tensor
    scale_q: torch.Tensor
    scale_k: torch.Tensor
    v: torch.Tensor
    scale_v: torch.Tensor | None
    offset: torch.Tensor
    group_q: int
    group_k: int


def quantise_rows(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to int8 with one scale per group of rows.

    Args:
        x: [B, H, N, D].
        group: rows that share a scale; the last group may be short.

    Returns:
        int8 [B, H, N, D] and float32 scales [B, H, groups].

    Example:
        >>> quantise_rows(torch.tensor([[1.0, -0.5], [254.0, 3.0]]).view(1, 1, 2, 2), 1)[0].flatten()
        tensor([127, -63, 127,   2], dtype=torch.int8)
    """
    batch, heads, rows, head_dim = x.shape
    groups = block_count(rows, group)
    padded = x.new_zeros(batch, heads, groups * group, head_dim, dtype=torch.float32)
    padded[:, :, :rows] = x
    padded = padded.view(batch, heads, groups, group, head_dim)
    scale = padded.abs().amax((-2, -1)) / 127 + 1e-7
    ratio = padded / scale[..., None, None]
    rounded = (ratio + 0.5 * ratio.sign()).trunc().to(torch.int8)
    return rounded.view(batch, heads, -1, head_dim)[:, :, :rows], scale


def key_mean(k: torch.Tensor, key_valid: torch.Tensor | None) -> torch.Tensor:
    """Mean of the keys that count for some head: float32 [B, Hk, D].

    Example:
        >>> key_mean(torch.tensor([1.0, 3.0, 9.0]).view(1, 1, 3, 1), torch.tensor([[[True, True, False]]]))
        tensor([[[2.]]])
    """
    if key_valid is None:
        return k.mean(2, dtype=torch.float32)
    counted = key_valid.any(1)[:, None, :, None]
    total = k.masked_fill(~counted, 0).sum(2, dtype=torch.float32)
    return total / counted.sum(2).clamp_min(1)


def quantise(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_valid: torch.Tensor | None,
    group_q: int,
    group_k: int,
    pv: str,
) -> Quantised:
    """Smooth the keys and round everything, in plain PyTorch.

    Keys that count for no head become 0, so that what stands in padding does not widen a scale.

    Example:
        >>> x = torch.randn(1, 1, 8, 16)
        >>> quantise(x, x, x, None, 8, 8, "fp16").q.dtype
        torch.int8
    """
    mean = key_mean(k, key_valid)
    smooth = k.float() - mean[:, :, None]
    values = v
    if key_valid is not None:
        uncounted = ~key_valid.any(1)[:, None, :, None]
        smooth, values = smooth.masked_fill(uncounted, 0), v.masked_fill(uncounted, 0)
    q8, scale_q = quantise_rows(q, group_q)
    k8, scale_k = quantise_rows(smooth, group_k)
    offset = (q.float() * mean.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]).sum(-1)
    narrow, scale_v = narrow_values(values, pv)
    return Quantised(q8, k8, scale_q, scale_k, narrow, scale_v, offset, group_q, group_k)


def narrow_values(v: torch.Tensor, pv: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values in float16, or in fp8 with one float32 scale [B, Hk, D] per channel.

    Example:
        >>> narrow_values(torch.tensor([1.0, 2.0]).view(1, 1, 2, 1), "fp8")[0].float().flatten()
        tensor([224., 448.])
    """
    if pv == "fp16":
        return v.to(torch.float16), None
    scale = v.abs().amax(2).float().clamp_min(1e-7) / FP8_MAX
    return (v.float() / scale[:, :, None]).to(torch.float8_e4m3fn), scale


def groups_of(block_q: int, block_k: int, granularity: str) -> tuple[int, int]:
    """How many rows of q and of k share a scale.

    Example:
        >>> groups_of(128, 128, "warp"), groups_of(48, 32, "block")
        ((32, 64), (16, 32))
    """
    power = [block & -block for block in (block_q, block_k)]
    return min(power[0], GROUP_Q if granularity == "block" else GROUP_WARP), min(power[1], GROUP_K)


def naive_int8_attention(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """`int8_attention` in plain PyTorch: the oracle of the kernel, which takes the same steps in the same order.

    Example:
        >>> x = torch.randn(1, 2, 100, 64)
        >>> out, lse = naive_int8_attention(x, x, x)
        >>> bool((out - torch.nn.functional.scaled_dot_product_attention(x, x, x)).abs().mean() < 0.01)
        True
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if scale <= 0:
        q, scale = q * scale, 1.0
    group_q, group_k = groups_of(block_q, block_k, granularity)
    small = quantise(q, k, v, key_valid, group_q, group_k, pv)
    heads, queries = q.shape[1:3]
    keys, repeat = k.shape[2], heads // k.shape[1]
    seen = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=q.device) if key_valid is None else key_valid[:, :, None]
    if counts is not None and indices is not None:
        mask = BlockPlan(counts, indices, block_q, block_k).mask(block_count(keys, block_k))
        seen = seen & mask.repeat_interleave(block_q, 2)[:, :, :queries].repeat_interleave(block_k, 3)[..., :keys]
    k8, v8 = (x.float().repeat_interleave(repeat, 1) for x in (small.k, small.v))
    factor = small.scale_q.repeat_interleave(group_q, 2)[:, :, :queries] * (scale * LOG2_E)
    q8 = small.q.float()
    scale_k = small.scale_k.repeat_interleave(repeat, 1)

    top = torch.full_like(factor, -math.inf)
    total, sums = torch.zeros_like(factor), q.new_zeros(q.shape, dtype=torch.float32)
    for group, start in enumerate(range(0, keys, group_k)):
        tile = slice(start, start + group_k)
        # Products of int8 and their sums stay below 2^24: float32 holds them exactly.
        logits = (q8 @ k8[:, :, tile].transpose(-2, -1)) * (factor * scale_k[:, :, group, None])[..., None]
        logits = logits.masked_fill(~seen[..., tile], -math.inf)
        new_top = torch.maximum(top, logits.amax(-1))
        shift = new_top.masked_fill(new_top == -math.inf, 0)
        weights = (logits - shift[..., None]).exp2()
        decay = (top - shift).exp2()
        total, top = total * decay + weights.sum(-1), new_top
        rounded = weights.half() if pv == "fp16" else (weights * FP8_MAX).to(torch.float8_e4m3fn)
        sums = sums * decay[..., None] + rounded.float() @ v8[:, :, tile]
    empty = total == 0
    out = sums / total.masked_fill(empty, 1)[..., None]
    if small.scale_v is not None:
        out = out * (small.scale_v.repeat_interleave(repeat, 1) / FP8_MAX)[:, :, None]
    lse = (top + total.masked_fill(empty, 1).log2()) * LN_2 + small.offset * scale
    return out.to(q.dtype), lse


def int8_attention(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with int8 logits, dense or over the blocks that a plan keeps.

    Args:
        q: [B, H, N, D], float32, float16 or bfloat16.
        k, v: [B, Hk, M, D] with Hk dividing H.
        counts, indices: of a `BlockPlan`, whose order the tokens are in; None for dense attention.
        block_q, block_k: tokens of a block, multiples of 16, of 32 for block_k with fp8.
        scale: of the logits, 1 / sqrt(D) by default.
        key_valid: bool [B or 1, H or 1, M], False for keys that no query sees.
        pv: "fp16" or "fp8" values and weights; the kernel for fp8 needs compute capability 8.9.
        granularity: one scale of q per "block" or per "warp" of 32 queries.

    Returns:
        output [B, H, N, D] in the dtype of q, and the natural log of the sum of exponentials, float32 [B, H, N], of the
        true logits up to rounding. A query that sees no key has output 0 and -inf.

    Raises:
        DitaError: a setting that does not exist, half a plan, or shapes that do not fit.

    Example:
        >>> x = torch.randn(1, 2, 64, 32)
        >>> out, lse = int8_attention(x, x, x, pv="fp8", granularity="warp")
        >>> bool((lse - (x @ x.transpose(-2, -1) / 32**0.5).logsumexp(-1)).abs().mean() < 0.02)
        True
    """
    if pv not in ("fp16", "fp8") or granularity not in ("block", "warp"):
        raise DitaError(f"expected pv fp16 or fp8 and granularity block or warp, got {pv!r} and {granularity!r}")
    if (counts is None) != (indices is None):
        raise DitaError("got counts or indices alone; give both of a plan, or neither for dense attention")
    if q.is_cuda:
        from dita.kernels.int8_attention_triton import triton_int8_attention

        return triton_int8_attention(q, k, v, counts, indices, block_q, block_k, scale, key_valid, pv, granularity)
    return naive_int8_attention(q, k, v, counts, indices, block_q, block_k, scale, key_valid, pv, granularity)
