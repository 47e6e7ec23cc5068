"""Choosing, gathering and scattering tokens: what token-wise caching and token reduction have in common.

Plain PyTorch. Tokens are rows of [B, N, C]; a choice is an index [B, K], int64, that differs from sample to sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dita.errors import DitaError


def choose(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens of the highest scores, per sample; of equal scores the earlier token's counts for more.

    Args:
        scores: [B, N], any floating dtype.
        count: K, from 0 to N.

    Returns:
        int64 [B, K], highest score first.

    Raises:
        DitaError: K is out of range, or the scores are no matrix.

    Example:
        >>> choose(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2)
        tensor([[1, 2]])
    """
    if scores.ndim != 2 or not 0 <= count <= scores.shape[1]:
        raise DitaError(f"expected scores [B, N] and a count up to N, got {tuple(scores.shape)} and {count}")
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def gather_tokens(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take rows out of each sample.

    Args:
        tokens: [B, N, C].
        index: [B, K].

    Returns:
        [B, K, C], a copy.

    Raises:
        DitaError: the shapes do not belong together.

    Example:
        >>> gather_tokens(torch.arange(6.0).reshape(1, 3, 2), torch.tensor([[2, 0]]))
        tensor([[[4., 5.],
                 [0., 1.]]])
    """
    _check(tokens, index)
    # Whole rows are moved: torch.gather would look up every element.
    return tokens[_samples(index), index]


def scatter_tokens(tokens: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A copy of `tokens` in which the rows at `index` are `rows`.

    Args:
        tokens: [B, N, C].
        index: [B, K].
        rows: [B, K, C], cast to the tokens' dtype.

    Raises:
        DitaError: the shapes do not belong together.

    Example:
        >>> scatter_tokens(torch.zeros(1, 3, 1), torch.tensor([[2]]), torch.ones(1, 1, 1)).flatten()
        tensor([0., 0., 1.])
    """
    return put_tokens(tokens.clone(), index, rows)


def put_tokens(tokens: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`scatter_tokens` in place; `tokens` is returned.

    Example:
        >>> kept = torch.zeros(1, 3, 1)
        >>> put_tokens(kept, torch.tensor([[0]]), torch.ones(1, 1, 1)) is kept, kept.flatten()
        (True, tensor([1., 0., 0.]))
    """
    _check(tokens, index)
    if rows.shape != (*index.shape, tokens.shape[2]):
        raise DitaError(f"expected rows {(*index.shape, tokens.shape[2])}, got {tuple(rows.shape)}")
    return tokens.index_put_((_samples(index), index), rows.to(tokens.dtype))


def _samples(index: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(index), device=index.device)[:, None]


def _check(tokens: torch.Tensor, index: torch.Tensor) -> None:
    if tokens.ndim != 3 or index.ndim != 2 or len(tokens) != len(index):
        raise DitaError(
            f"expected tokens [B, N, C] and an index [B, K], got {tuple(tokens.shape)} and {tuple(index.shape)}"
        )


def cell_bonus(scores: torch.Tensor, grid: Sequence[int], bonus: float, cell: int = 2) -> torch.Tensor:
    """Raise the best token of every cell of a token grid, so that a choice by score reaches everywhere (ToCa, s4).

    Args:
        scores: [B, F H W] in row-major order.
        grid: (F, H, W) frames, rows and columns, or (H, W); cells at the lower and right edges may be cut off.
        bonus: the best token's score grows by this part of its magnitude.
        cell: side of a cell in tokens, within one frame.

    Returns:
        [B, F H W], a copy.

    Raises:
        DitaError: the grid does not hold as many tokens as there are scores.

    Example:
        >>> cell_bonus(torch.tensor([[1.0, 2.0, 4.0, 3.0]]), (2, 2), 0.5)
        tensor([[1., 2., 6., 3.]])
        >>> cell_bonus(torch.tensor([[1.0, 2.0, 4.0]]), (1, 3), 0.5)
        tensor([[1., 3., 6.]])
    """
    frames, rows, columns = (1, *grid) if len(grid) == 2 else grid
    if scores.shape[1] != frames * rows * columns:
        raise DitaError(f"a grid of {tuple(grid)} does not hold {scores.shape[1]} tokens")
    planes = scores.reshape(-1, 1, rows, columns).float()
    best, place = torch.nn.functional.max_pool2d(planes, cell, ceil_mode=True, return_indices=True)
    flat = scores.reshape(-1, rows * columns)
    raised = flat.scatter_add(1, place.flatten(1), (bonus * best.abs()).flatten(1).to(flat.dtype))
    return raised.reshape(scores.shape)


def cluster_tokens(
    tokens: torch.Tensor, centroids: torch.Tensor, iterations: int = 10, tolerance: float = 1e-4
) -> tuple[torch.Tensor, torch.Tensor]:
    """K-means per sample under the L1 distance (ClusCa); a cluster that lost its tokens keeps its centroid.

    Args:
        tokens: [B, N, C].
        centroids: [B, K, C] to start from.
        iterations: at most, at least 1.
        tolerance: relative change of the centroids below which it stops.

    Returns:
        labels int64 [B, N] and the centroids they were assigned by or, at the last iteration, their means; float32.

    Example:
        >>> x = torch.tensor([[[0.0], [1.0], [10.0]]])
        >>> labels, means = cluster_tokens(x, x[:, [0, 2]])
        >>> labels, means.flatten()
        (tensor([[0, 0, 1]]), tensor([ 0.5000, 10.0000]))
    """
    tokens, centroids = tokens.float(), centroids.float()
    labels = torch.empty(0)
    for _ in range(iterations):
        labels = torch.cdist(tokens, centroids, p=1).argmin(-1)
        means = cluster_means(tokens, labels, centroids)
        if torch.allclose(centroids, means, rtol=tolerance):
            break
        centroids = means
    return labels, centroids


def cluster_means(rows: torch.Tensor, labels: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """The mean row of every cluster.

    Args:
        rows: [B, N, C].
        labels: [B, N], from 0 to K - 1; rows of label -1 belong to none.
        otherwise: [B, K, C], for clusters without rows.

    Returns:
        [B, K, C] in the dtype of `otherwise`.

    Example:
        >>> cluster_means(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[1, 1]]), torch.zeros(1, 2, 1)).flatten()
        tensor([0., 2.])
    """
    # A product with the membership matrix is the same from run to run on a GPU, where scattered sums are not.
    members = _members(labels, otherwise.shape[1]).float()
    sizes = members.sum(-1, keepdim=True)
    return torch.where(sizes > 0, members @ rows.float() / sizes.clamp_min(1), otherwise.float()).to(otherwise.dtype)


def _members(labels: torch.Tensor, count: int) -> torch.Tensor:
    return labels[:, None] == torch.arange(count, device=labels.device)[None, :, None]


def draw_per_cluster(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """One token of every cluster at random.

    Every sample draws the same random numbers, so that its choice does not depend on its batch mates; the global random
    state is left alone.

    Args:
        labels: [B, N], from 0 to K - 1; tokens of label -1 are never drawn.
        count: K.
        seed: of the draw.

    Returns:
        int64 [B, K]; a cluster without tokens gets one that another cluster has drawn.

    Example:
        >>> draw_per_cluster(torch.tensor([[1, 0, 1, 1]]), 2, seed=0)[0, 0]
        tensor(1)
        >>> draw_per_cluster(torch.tensor([[1, 0, 1, 1]]), 2, seed=0).equal(draw_per_cluster(
        ...     torch.tensor([[1, 0, 1, 1]]), 2, seed=0))
        True
    """
    weights = torch.rand(labels.shape[1], generator=torch.Generator().manual_seed(seed)).to(labels.device)
    members = _members(labels, count)
    drawn = torch.where(members, weights, -1.0).argmax(-1)
    # The token of the largest number of all is the one that its cluster draws.
    spare = torch.where(labels >= 0, weights, -1.0).argmax(-1, keepdim=True)
    return torch.where(members.any(-1), drawn, spare)


def spread_to_clusters(tokens: torch.Tensor, index: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
    """Move every token by `share` towards the one that represents its cluster (ClusCa).

    Args:
        tokens: [B, N, C].
        index: [B, K], of which column c is the representative of cluster c.
        labels: [B, N], from 0 to K - 1; tokens of label -1 stay.
        share: from 0 to 1.

    Returns:
        [B, N, C], a copy.

    Example:
        >>> x = torch.tensor([[[0.0], [4.0], [8.0]]])
        >>> spread_to_clusters(x, torch.tensor([[1]]), torch.tensor([[0, 0, -1]]), 0.5).flatten()
        tensor([2., 4., 8.])
    """
    itself = torch.arange(labels.shape[1], device=labels.device)
    towards = torch.where(labels >= 0, index.gather(1, labels.clamp_min(0)), itself)
    return tokens.lerp(gather_tokens(tokens, towards), share)
