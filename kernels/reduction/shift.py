"""Representation shift: how much a layer changes a token says how much the token matters.

Choi et al., "Representation Shift: Unifying Token Compression with FlashAttention", ICCV 2025, arXiv 2508.00367.

The score of a token is the L2 distance between what an MLP gives for it and what the MLP was given; it needs no
attention map. The paper drops the lowest tokens of classifiers. A denoiser needs every token, so here it only ranks:
it says which tokens others are merged into. Measured where the block's MLP last ran, which was at the step before,
and on its own input, which is normalised and modulated, where the paper takes the residual stream's. Blocks without an
MLP of their own take the nearest one's before them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dita.errors import DitaError


def representation_shift(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Score tokens: float32 [B, N], high for those that the layer changes.

    Args:
        before, after: [B, N, C], what a layer read and what it gave.

    Raises:
        DitaError: the shapes differ.

    Example:
        >>> representation_shift(torch.zeros(1, 2, 2), torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]))
        tensor([[5., 1.]])
    """
    if before.shape != after.shape:
        raise DitaError(f"a layer made {tuple(after.shape)} of {tuple(before.shape)}: there is no shift to measure")
    return (after.float() - before.float()).norm(dim=-1)


class Watched:
    """A reducer that reduces nothing, and tells the shift of what passes through a layer.

    Args:
        before: [B, N, C], what the layer reads.
        tell: is told the shift, float32 [B, N].
    """

    positions = None
    sizes = None

    def __init__(self, before: torch.Tensor, tell: Callable[[torch.Tensor], None]) -> None:
        self.before, self.tell = before, tell

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens themselves."""
        return x

    def restore(self, y: torch.Tensor) -> torch.Tensor:
        """The output itself."""
        self.tell(representation_shift(self.before, y))
        return y


def best_of_cells(members: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The token of the highest score of every cell; of equal ones the first.

    Args:
        members: int64 [cells, tokens of a cell].
        scores: [B, N].

    Returns:
        int64 [B, cells].

    Example:
        >>> best_of_cells(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1.0, 2.0, 4.0, 3.0]]))
        tensor([[1, 2]])
    """
    best = scores[:, members].argmax(-1, keepdim=True)
    return members.expand(len(scores), -1, -1).gather(2, best)[..., 0]
