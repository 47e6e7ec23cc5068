"""Sparse VideoGen 2: queries and keys are clustered, and clusters of queries see the clusters that matter to them.

Yang et al., "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware Permutation",
NeurIPS 2025, arXiv 2505.18875.

Score: k-means of the queries and of the keys of every head; the share of cluster b in the attention of cluster a is
estimated as n_b exp(c_a c_b / sqrt(D)) over its sum, from the centroids c and sizes n. Selection: the smallest set of
clusters that holds `mass` of it, the one that crosses included, and at least `least` of all clusters. The tokens are
put in the order of their clusters. When: at every step; k-means begins with 50 iterations from random tokens at the
first sparse step, and later goes on from the last step's centroids for 2.

The published 300 clusters of queries and 1,000 of keys are for 33 to 76 thousand tokens. Below 32,760 tokens (Wan at
480p) there are fewer, in proportion, so that a cluster keeps its mean size of at least 109 queries or 33 keys.

Every cluster starts a block of its own, whose last one ends in empty places, so that exactly the chosen pairs of
clusters are computed, as by the authors' kernel for blocks of any size. Blocks cut across the clusters would have to be
computed if any of their clusters asked for it. That costs more, too: with clusters of n tokens and blocks of b it is a
factor of about 1 + b / n for queries and again for keys, against 1 + b / 2n.

Differs from the paper: clusters without tokens keep their centroid and are not chosen; text, where it is among the
tokens, is not clustered and always seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.kernels.plan import BlockPlan
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Cut
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.select import top_mass
from dita.kernels.sparse.tiles import crossed, grouped
from dita.registry import register

_PUBLISHED_TOKENS = 32760  # from which on there are as many clusters as published
_ELEMENTS = 2**26  # distances that are held at a time


def cluster_count(published: int, tokens: int) -> int:
    """How many clusters that many tokens get.

    Example:
        >>> [cluster_count(1000, tokens) for tokens in (75600, 32760, 3328, 16)]
        [1000, 1000, 102, 1]
    """
    return max(1, min(published, round(published * tokens / _PUBLISHED_TOKENS)))


def k_means(x: torch.Tensor, centroids: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm under the Euclidean distance.

    Args:
        x: float32 [B, H, V, D].
        centroids: float32 [B, H, C, D] to start from; one that loses its tokens stays as it is.
        iterations: at least 1.

    Returns:
        labels int64 [B, H, V], and the centroids, which are the means of the tokens so labelled.

    Example:
        >>> x = torch.tensor([0.0, 1.0, 10.0]).view(1, 1, 3, 1)
        >>> labels, centroids = k_means(x, x[:, :, [0, 2]], 2)
        >>> labels.flatten().tolist(), centroids.flatten().tolist()
        ([0, 0, 1], [0.5, 10.0])
    """
    count, pieces = centroids.shape[2], []
    size = max(1, _ELEMENTS // (x.shape[2] * count))
    for points, means in zip(x.flatten(0, 1).split(size), centroids.flatten(0, 1).split(size), strict=True):
        labels = torch.empty(0)
        for _ in range(iterations):
            distance = torch.baddbmm(means.square().sum(-1)[:, None], points, means.mT, alpha=-2)
            labels = distance.argmin(-1)
            # A product with the memberships is the same from run to run on a GPU, where scattered sums are not.
            members = (labels[:, None] == torch.arange(count, device=x.device)[:, None]).to(points.dtype)
            held = members.sum(-1, keepdim=True)
            means = torch.where(held > 0, members @ points / held.clamp_min(1), means)
        pieces.append((labels, means))
    labels, means = (torch.cat(parts).unflatten(0, x.shape[:2]) for parts in zip(*pieces, strict=True))
    return labels, means


class Clusters(Policy):
    """Compute the pairs of clusters that hold most of the attention.

    Args:
        mass, least: as of the method.
        clusters: published numbers of clusters of queries and of keys.
        blocks: tokens of a block of queries and of keys.
        iterations: of k-means, at the first and at later steps.
    """

    def __init__(
        self,
        mass: float,
        least: float,
        clusters: tuple[int, int],
        blocks: tuple[int, int],
        iterations: tuple[int, int],
    ) -> None:
        self.mass, self.least, self.clusters = mass, least, clusters
        self.blocks, self.iterations = blocks, iterations
        self.fleeting = True

    def plan(self, asked: Asked) -> BlockPlan | None:
        """Cluster, and choose for every cluster of queries."""
        if self.mass >= 1:
            return None
        layout, repeat = asked.layout, asked.q.shape[1] // asked.k.shape[1]
        queries, centroids = self._cluster(asked, asked.q, 0)
        keys, others = (x.repeat_interleave(repeat, 1) for x in self._cluster(asked, asked.k, 1))
        chosen = choose_clusters(centroids, others, keys, asked.scale, self.mass, self.least)
        order_q, row = grouped(queries, centroids.shape[2], self.blocks[0])
        order_k, column = grouped(keys, others.shape[2], self.blocks[1])
        places = column.clamp_min(0)[:, :, None].expand(-1, -1, centroids.shape[2], -1)
        mask = chosen.gather(3, places)
        mask = mask.gather(2, row.clamp_min(0)[..., None].expand(-1, -1, -1, mask.shape[3]))
        mask &= (row >= 0)[..., None] & (column >= 0)[:, :, None]
        rows, columns = (Cut(layout, b, b, o) for b, o in zip(self.blocks, (order_q, order_k), strict=True))
        return crossed(rows, columns, mask)

    def _cluster(self, asked: Asked, x: torch.Tensor, which: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels [B, H, V] and centroids [B, H, C, D] of the image tokens of queries or keys."""
        points = x[:, :, asked.layout.visual_slice].float()
        held = asked.state.get(f"centroids {which}")
        iterations = self.iterations[1]
        if held is None or held.shape[:2] != x.shape[:2]:
            # The same tokens for every head and batch item, whatever was drawn before.
            generator = torch.Generator().manual_seed(2 * asked.layer + which)
            count = cluster_count(self.clusters[which], points.shape[2])
            drawn = torch.randperm(points.shape[2], generator=generator)[:count].to(x.device)
            held, iterations = points[:, :, drawn], self.iterations[0]
        labels, centroids = k_means(points, held, iterations)
        asked.state[f"centroids {which}"] = centroids
        return labels, centroids


def choose_clusters(
    queries: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, scale: float, mass: float, least: float
) -> torch.Tensor:
    """Which clusters of keys each cluster of queries sees.

    Args:
        queries, keys: centroids, float32 [B, H, Cq, D] and [B, H, Ck, D].
        labels: int64 [B, H, V], clusters of the keys.
        scale: of the logits.
        mass, least: as of the method.

    Returns:
        bool [B, H, Cq, Ck].

    Example:
        >>> q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 1.0, 1.0]).view(1, 1, 3, 1)
        >>> choose_clusters(q, k, torch.tensor([[[0, 1, 1, 1]]]), 1.0, 0.8, 0.1)
        tensor([[[[False,  True, False]]]])
    """
    sizes = labels.new_zeros(keys.shape[:3]).scatter_add_(-1, labels, torch.ones_like(labels))
    shares = (queries @ keys.mT * scale + sizes.float().log()[:, :, None]).softmax(-1)
    return top_mass(shares, mass, least=max(1, int(least * keys.shape[2])))


@register
@dataclass(frozen=True)
class SparseVideoGen2(SparseMethod):
    """Sparse VideoGen 2's settings; the defaults are those for Wan 2.1.

    Attributes:
        mass: part of the estimated attention that the chosen clusters hold.
        least: part of the clusters of keys that are chosen at least.
        query_clusters: clusters of queries from 32,760 tokens on, fewer in proportion below; 400 for HunyuanVideo.
        key_clusters: likewise of keys.
        block_q, block_k: tokens of a block; short ones, since every cluster fills its last block up.
        first_iterations: of k-means where no centroids are there to go on from.
        iterations: of k-means at every later step.
        dense_steps: 0.1 for HunyuanVideo.
        dense_layers: 3 % of the layers.

    Raises:
        DitaError: a setting out of range; on attaching, a model without attention inside its blocks.

    Example:
        >>> SparseVideoGen2(mass=0.8).label()
        'mass=0.8'
    """

    mass: float = 0.9
    least: float = 0.1
    query_clusters: int = 300
    key_clusters: int = 1000
    block_q: int = 64
    block_k: int = 32
    first_iterations: int = 50
    iterations: int = 2
    dense_layers: int = field(default=1, kw_only=True)

    name: ClassVar[str] = "svg2"
    title: ClassVar[str] = "Sparse VideoGen 2"
    arxiv: ClassVar[str] = "2505.18875"
    axes: ClassVar[str] = "k-means centroids of queries and keys; top-p of clusters; at every step"
    citation: ClassVar[str] = """@inproceedings{yang2025sparse,
  title={Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware Permutation},
  author={Yang, Shuo and Xi, Haocheng and Zhao, Yilong and Li, Muyang and Zhang, Jintao and Cai, Han and others},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("mass", self.mass, 0, 1)
        check_number("least", self.least, 0, 1)
        for name in ("query_clusters", "key_clusters", "block_q", "block_k", "first_iterations", "iterations"):
            check_whole(name, getattr(self, name), 1)

    def policy(self, anatomy: Anatomy) -> Policy:
        """See `SparseMethod.policy`."""
        clusters, blocks = (self.query_clusters, self.key_clusters), (self.block_q, self.block_k)
        return Clusters(self.mass, self.least, clusters, blocks, (self.first_iterations, self.iterations))

    @classmethod
    def forced(cls) -> SparseVideoGen2:
        """So many clusters that few tokens suffice."""
        quarter = _PUBLISHED_TOKENS // 4
        return cls(
            mass=0.5, least=0, query_clusters=quarter, key_clusters=quarter, block_q=2, block_k=2, first_iterations=5,
            dense_layers=0, cutoff=1.0,
        )  # fmt: skip

    @classmethod
    def ladder(cls) -> tuple[SparseVideoGen2, ...]:
        """Shares of the attention around the published one."""
        return (cls(mass=0.95), cls(), cls(mass=0.8), cls(mass=0.6))
