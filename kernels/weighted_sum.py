"""Weighted sums of tensors in one pass: the forecast of every caching method.

Out = base + sum_j w_j X_j, accumulated in float32. On a CUDA device one Triton kernel reads each X_j once and writes
Out once; elsewhere plain PyTorch does the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dita.errors import DitaError

MAX_TERMS = 8


def naive_weighted_sum(
    tensors: Sequence[torch.Tensor], weights: Sequence[float] | torch.Tensor, base: torch.Tensor | None = None
) -> torch.Tensor:
    """The oracle: the same sum in plain PyTorch, term by term in float32.

    Arguments and result are those of `weighted_sum`.

    Example:
        >>> naive_weighted_sum([torch.ones(2), torch.ones(2)], [2.0, -1.0])
        tensor([1., 1.])
    """
    first = tensors[0]
    total = torch.zeros_like(first, dtype=torch.float32) if base is None else base.float()
    for tensor, weight in zip(tensors, weights, strict=True):
        total = total + tensor.float() * weight
    return total.to(first.dtype)


def weighted_sum(
    tensors: Sequence[torch.Tensor], weights: Sequence[float] | torch.Tensor, base: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum tensors with weights, accumulating in float32.

    Args:
        tensors: J tensors of one shape [..., C], dtype and device, J from 1 to 8.
        weights: J numbers, or a tensor [J, C] with a weight per channel.
        base: a tensor of the same shape to add to.

    Returns:
        a new tensor of the shape, dtype and device of `tensors`.

    Raises:
        DitaError: no tensors, shapes that differ, or a wrong number of weights.

    Example:
        >>> weighted_sum([torch.full((2,), 3.0), torch.full((2,), 1.0)], [1.5, -0.5])
        tensor([4., 4.])
    """
    if not 1 <= len(tensors) <= MAX_TERMS or len(weights) != len(tensors):
        raise DitaError(f"expected 1 to {MAX_TERMS} tensors with a weight each, got {len(tensors)} and {len(weights)}")
    first = tensors[0]
    shape = first.shape
    for other in tensors if base is None else (*tensors, base):
        if other is not first and other.shape != shape:
            raise DitaError(f"all tensors must have one shape, got {tuple(shape)} and {tuple(other.shape)}")
    if isinstance(weights, torch.Tensor) and weights.shape != (len(tensors), first.shape[-1]):
        raise DitaError(f"weights have shape {tuple(weights.shape)}; expected {(len(tensors), first.shape[-1])}")
    if first.is_cuda:
        from dita.kernels.weighted_sum_triton import triton_weighted_sum

        return triton_weighted_sum(tensors, weights, base)
    if first.dtype != torch.float32:
        return naive_weighted_sum(tensors, weights, base)
    if isinstance(weights, torch.Tensor):
        rows = weights.to(torch.float32)
        total = first * rows[0] if base is None else torch.addcmul(base, first, rows[0])
        for tensor, row in zip(tensors[1:], rows[1:], strict=True):
            total.addcmul_(tensor, row)
        return total
    numbers = weights
    if base is None and len(numbers) == 2 and abs(numbers[0] + numbers[1] - 1) < 1e-12:
        return torch.lerp(tensors[1], first, numbers[0])  # one pass instead of two
    total = torch.mul(first, numbers[0]) if base is None else torch.add(base, first, alpha=numbers[0])
    for tensor, weight in zip(tensors[1:], numbers[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total
