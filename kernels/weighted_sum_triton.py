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
def weighted_sum_kernel(
    x0, x1, x2, x3, x4, x5, x6, x7, w0, w1, w2, w3, w4, w5, w6, w7, base, out, size,
    terms: tl.constexpr, has_base: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """out[i] = base[i] + sum_j w_j * x_j[i] for i < size, one program per `block` elements."""
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = offsets < size
    total = tl.zeros((block,), dtype=tl.float32)
    if has_base:
        total += tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
    total += w0 * tl.load(x0 + offsets, mask=inside, other=0.0).to(tl.float32)
    if terms > 1:
        total += w1 * tl.load(x1 + offsets, mask=inside, other=0.0).to(tl.float32)
    if terms > 2:
        total += w2 * tl.load(x2 + offsets, mask=inside, other=0.0).to(tl.float32)
    if terms > 3:
        total += w3 * tl.load(x3 + offsets, mask=inside, other=0.0).to(tl.float32)
    if terms > 4:
        total += w4 * tl.load(x4 + offsets, mask=inside, other=0.0).to(tl.float32)
    if terms > 5:
        total += w5 * tl.load(x5 + offsets, mask=inside, other=0.0).to(tl.float32)
    if terms > 6:
        total += w6 * tl.load(x6 + offsets, mask=inside, other=0.0).to(tl.float32)
    if terms > 7:
        total += w7 * tl.load(x7 + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)


def triton_weighted_sum(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], base: torch.Tensor | None = None
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
    numbers = [float(weight) for weight in weights] + [0.0] * (MAX_TERMS - len(terms))
    arguments: list[Any] = [*padded, *numbers, start, out, first.numel()]
    grid = (triton.cdiv(first.numel(), BLOCK),)
    options: dict[str, Any] = {"terms": len(terms), "has_base": base is not None, "block": BLOCK}
    weighted_sum_kernel[grid](*arguments, **options)
    return out
