"""The Triton form of `gated_forecast`: J + 2 reads, one write, float32 accumulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from dita.kernels.weighted_sum import MAX_TERMS
from dita.kernels.weighted_sum_triton import BLOCK, add_terms, load, weight_of


@triton.jit
def gated_forecast_kernel(
    x0, x1, x2, x3, x4, x5, x6, x7, w0, w1, w2, w3, w4, w5, w6, w7, table, residual, gate, out, size, channels, tokens,
    gate_batch, gate_row, terms: tl.constexpr, per_channel: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """out[i] = residual[i] + gate * sum_j w_j * x_j[i] for i < size, one program per `block` elements.

    The gate's strides are 0 where one entry serves all samples or all tokens.
    """
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = offsets < size
    column = offsets % channels
    row = offsets // channels
    total = weight_of(w0, table, column, inside, per_channel) * load(x0, offsets, inside)
    total = add_terms(
        total, x1, x2, x3, x4, x5, x6, x7, w1, w2, w3, w4, w5, w6, w7, table, offsets, column, inside, channels,
        terms, per_channel,
    )  # fmt: skip
    opening = load(gate, row // tokens * gate_batch + row % tokens * gate_row + column, inside)
    total = load(residual, offsets, inside) + opening * total
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)


def triton_gated_forecast(
    residual: torch.Tensor,
    gate: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float] | torch.Tensor,
) -> torch.Tensor:
    """Launch the kernel; arguments as in `dita.kernels.gated_forecast.gated_forecast`, checked there.

    Runs on a CUDA device, or anywhere with TRITON_INTERPRET=1 set before triton is imported.

    Example:
        >>> x = torch.ones(1, 2, 4, device="cuda")  # doctest: +SKIP
        >>> triton_gated_forecast(x, x[:, :1], [x], [2.0])  # doctest: +SKIP
    """
    terms = [tensor.contiguous() for tensor in tensors]
    residual, gate = residual.contiguous(), gate if gate.stride(-1) == 1 else gate.contiguous()
    out = torch.empty_like(residual)
    padded = [*terms, *[terms[0]] * (MAX_TERMS - len(terms))]
    per_channel = isinstance(weights, torch.Tensor)
    table = weights.to(out.device, torch.float32).contiguous() if isinstance(weights, torch.Tensor) else residual
    numbers = [0.0] * MAX_TERMS if per_channel else [*map(float, weights), *[0.0] * (MAX_TERMS - len(terms))]
    strides = [gate.stride(i) if gate.shape[i] > 1 else 0 for i in (0, 1)]
    arguments: list[Any] = [
        *padded, *numbers, table, residual, gate, out, out.numel(), out.shape[2], out.shape[1], *strides,
    ]  # fmt: skip
    options: dict[str, Any] = {"terms": len(terms), "per_channel": per_channel, "block": BLOCK}
    if out.numel():
        with torch.cuda.device_of(out):
            gated_forecast_kernel[(triton.cdiv(out.numel(), BLOCK),)](*arguments, **options)
    return out
