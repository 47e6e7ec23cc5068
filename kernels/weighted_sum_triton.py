"""The Triton form of `weighted_sum`: J reads, one write, float32 accumulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from dita.kernels.weighted_sum import MAX_TERMS

BLOCK = 1024


@triton.jit
def load(x, offsets, inside):
    """Elements of a tensor in float32, 0 outside."""
    return tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def weight_of(number, row, column, inside, per_channel: tl.constexpr):
    """One weight for all elements, or each element's channel's."""
    if per_channel:
        return tl.load(row + column, mask=inside, other=0.0)
    else:
        return number


@triton.jit
def add_terms(
    total, x1, x2, x3, x4, x5, x6, x7, w1, w2, w3, w4, w5, w6, w7, table, offsets, column, inside, channels,
    terms: tl.constexpr, per_channel: tl.constexpr,
):  # fmt: skip
    """total + sum_j w_j * x_j from the second of `terms` terms on, with the weights in `table` if `per_channel`."""
    if terms > 1:
        total += weight_of(w1, table + 1 * channels, column, inside, per_channel) * load(x1, offsets, inside)
    if terms > 2:
        total += weight_of(w2, table + 2 * channels, column, inside, per_channel) * load(x2, offsets, inside)
    if terms > 3:
        total += weight_of(w3, table + 3 * channels, column, inside, per_channel) * load(x3, offsets, inside)
    if terms > 4:
        total += weight_of(w4, table + 4 * channels, column, inside, per_channel) * load(x4, offsets, inside)
    if terms > 5:
        total += weight_of(w5, table + 5 * channels, column, inside, per_channel) * load(x5, offsets, inside)
    if terms > 6:
        total += weight_of(w6, table + 6 * channels, column, inside, per_channel) * load(x6, offsets, inside)
    if terms > 7:
        total += weight_of(w7, table + 7 * channels, column, inside, per_channel) * load(x7, offsets, inside)
    return total


@triton.jit
def weighted_sum_kernel(
    x0, x1, x2, x3, x4, x5, x6, x7, w0, w1, w2, w3, w4, w5, w6, w7, table, base, out, size, channels,
    terms: tl.constexpr, has_base: tl.constexpr, per_channel: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """out[i] = base[i] + sum_j w_j * x_j[i] for i < size, one program per `block` elements.

    With `per_channel` w_j is table[j, i % channels]; the table is small and stays in the cache.
    """
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = offsets < size
    column = offsets % channels
    total = weight_of(w0, table, column, inside, per_channel) * load(x0, offsets, inside)
    if has_base:
        total += load(base, offsets, inside)
    total = add_terms(
        total, x1, x2, x3, x4, x5, x6, x7, w1, w2, w3, w4, w5, w6, w7, table, offsets, column, inside, channels,
        terms, per_channel,
    )  # fmt: skip
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)


def triton_weighted_sum(
    tensors: Sequence[torch.Tensor], weights: Sequence[float] | torch.Tensor, base: torch.Tensor | None = None
) -> torch.Tensor:
    """Launch the kernel; arguments as in `dita.kernels.weighted_sum.weighted_sum`, checked there.

    Runs on a CUDA device, or anywhere with TRITON_INTERPRET=1 set before triton is imported.

    Example:
        >>> triton_weighted_sum([torch.ones(3, device="cuda")], [2.0])  # doctest: +SKIP
        tensor([2., 2., 2.], device='cuda:0')
    """
    terms = [tensor.contiguous() for tensor in tensors]
    first = terms[0]
    out = torch.empty_like(first)
    padded = [*terms, *[first] * (MAX_TERMS - len(terms))]
    start = first if base is None else base.contiguous()
    per_channel = isinstance(weights, torch.Tensor)
    table = weights.to(first.device, torch.float32).contiguous() if isinstance(weights, torch.Tensor) else first
    numbers = [0.0] * MAX_TERMS if per_channel else [*map(float, weights), *[0.0] * (MAX_TERMS - len(terms))]
    channels = first.shape[-1] if per_channel else 1
    arguments: list[Any] = [*padded, *numbers, table, start, out, first.numel(), channels]
    grid = (triton.cdiv(first.numel(), BLOCK),)
    options: dict[str, Any] = {
        "terms": len(terms), "has_base": base is not None, "per_channel": per_channel, "block": BLOCK,
    }  # fmt: skip
    weighted_sum_kernel[grid](*arguments, **options)
    return out
