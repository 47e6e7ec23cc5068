"""A weighted forecast behind its gate: out = residual + gate * sum_j w_j X_j, in one pass.

What follows a forecast of an attention or MLP output in a transformer block with adaptive layer norm. Separately it
costs J + 1 passes for the sum, and more for gate and residual; together it is J + 2 reads and one write. The sum is in
float32 to the end, and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dita.errors import DitaError
from dita.kernels.weighted_sum import MAX_TERMS


def naive_gated_forecast(
    residual: torch.Tensor,
    gate: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float] | torch.Tensor,
) -> torch.Tensor:
    """`gated_forecast` in plain PyTorch, term by term in float32: the oracle.

    Example:
        >>> one = torch.ones(1, 1, 2)
        >>> naive_gated_forecast(one, 2 * one, [one, one], [2.0, -1.0])
        tensor([[[3., 3.]]])
    """
    total = torch.zeros_like(residual, dtype=torch.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        total = total + tensor.float() * weight
    return (residual.float() + gate.float() * total).to(residual.dtype)


def gated_forecast(
    residual: torch.Tensor,
    gate: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float] | torch.Tensor,
) -> torch.Tensor:
    """Add a gated forecast to a residual stream.

    Args:
        residual: [B, N, C], any floating dtype.
        gate: [B, 1, C] or [B, N, C], B may be 1.
        tensors: J past features [B, N, C], J from 1 to 8.
        weights: J numbers, or a tensor [J, C] with a weight per channel.

    Returns:
        a new tensor [B, N, C] in the dtype of the residual.

    Raises:
        DitaError: no tensors, shapes that differ, or a wrong number of weights.

    Example:
        >>> stream, gate = torch.zeros(2, 3, 4), torch.full((2, 1, 4), 0.5)
        >>> gated_forecast(stream, gate, [torch.full((2, 3, 4), 3.0), torch.ones(2, 3, 4)], [1.5, -0.5])[0, 0]
        tensor([2., 2., 2., 2.])
    """
    if not 1 <= len(tensors) <= MAX_TERMS or len(weights) != len(tensors):
        raise DitaError(f"expected 1 to {MAX_TERMS} tensors with a weight each, got {len(tensors)} and {len(weights)}")
    shape = residual.shape
    if len(shape) != 3 or any(tensor.shape != shape for tensor in tensors):
        raise DitaError(f"expected all of shape [B, N, C], got {tuple(shape)} and {[tuple(t.shape) for t in tensors]}")
    if gate.ndim != 3 or any(size not in (1, full) for size, full in zip(gate.shape[:2], shape[:2], strict=True)):
        raise DitaError(f"a gate of shape {tuple(gate.shape)} does not fit {tuple(shape)}; expected [B, 1 or N, C]")
    if gate.shape[2] != shape[2]:
        raise DitaError(f"a gate of {gate.shape[2]} channels does not fit {shape[2]}")
    if isinstance(weights, torch.Tensor) and weights.shape != (len(tensors), shape[2]):
        raise DitaError(f"weights have shape {tuple(weights.shape)}; expected {(len(tensors), shape[2])}")
    if residual.is_cuda:
        from dita.kernels.gated_forecast_triton import triton_gated_forecast

        return triton_gated_forecast(residual, gate, tensors, weights)
    return naive_gated_forecast(residual, gate, tensors, weights)
