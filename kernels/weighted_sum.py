"""Weighted sums of tensors in one pass: the forecast of every caching method.

Out = base + sum_j w_j X_j, accumulated in float32. On a CUDA device one Triton kernel reads each X_j once and writes
Out once. On a CPU, where every operation of PyTorch is a pass over memory, float32 anchors are interpolated pair by
pair, a pass less than a product and sums, wherever the weights sum to 1; half precision is summed in float32 piece by
piece, each small enough to stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from dita.errors import DitaError

MAX_TERMS = 8
_PIECE = 2**17  # elements: half a megabyte of float32
_LEAST = 0.1  # sum of some of the weights that may be divided by


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
    if isinstance(weights, torch.Tensor):
        return _per_channel(tensors, weights.to(torch.float32), base)
    if base is None and _interpolates(weights):
        if len(tensors) == 2:
            return torch.lerp(tensors[1], first, weights[0])  # of half precision too, with float32 in between
        if first.dtype == torch.float32:
            return _interpolated(tensors, weights)
    if first.dtype != torch.float32:
        return _in_pieces(tensors, weights, base, 1)
    total = torch.mul(first, weights[0]) if base is None else torch.add(base, first, alpha=weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def _interpolates(weights: Sequence[float]) -> bool:
    """Whether they sum to 1, and no sum of the first few, which `_interpolated` divides by, is near 0."""
    sums = list(accumulate(weights))
    return len(sums) > 1 and abs(sums[-1] - 1) < 1e-12 and all(abs(part) >= _LEAST for part in sums[1:])


def _interpolated(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The mean of the first two, then of that and the third, and so on, each in its share."""
    total, share = tensors[0], weights[0]
    for number, (tensor, weight) in enumerate(zip(tensors[1:], weights[1:], strict=True)):
        whole = share + weight
        total = torch.lerp(tensor, total, share / whole, out=total if number else None)
        share = whole
    return total


def _per_channel(tensors: Sequence[torch.Tensor], rows: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    first = tensors[0]
    if first.dtype != torch.float32:
        return _in_pieces(tensors, rows, base, first.shape[-1])
    total = first * rows[0] if base is None else torch.addcmul(base, first, rows[0])
    for tensor, row in zip(tensors[1:], rows[1:], strict=True):
        total.addcmul_(tensor, row)
    return total


def _in_pieces(
    tensors: Sequence[torch.Tensor], weights: Sequence[float] | torch.Tensor, base: torch.Tensor | None, width: int
) -> torch.Tensor:
    """Rows of `width` numbers at a time, so many that a sum in float32 stays in the cache."""
    out = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    flat = [tensor.reshape(-1, width) for tensor in tensors]
    start, result = None if base is None else base.reshape(-1, width), out.view(-1, width)
    step = max(1, _PIECE // width)
    room = torch.empty(min(step, len(result)), width, dtype=torch.float32, device=out.device)
    for at in range(0, len(result), step):
        target = result[at : at + step]
        total = room[: len(target)]
        if start is None:
            total.zero_()
        else:
            total.copy_(start[at : at + step])
        for rows, weight in zip(flat, weights, strict=True):
            piece = rows[at : at + step]
            if isinstance(weight, torch.Tensor):
                total.addcmul_(piece.float(), weight)
            else:
                total.add_(piece, alpha=weight)
        target.copy_(total)
    return out
