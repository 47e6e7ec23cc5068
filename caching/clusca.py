"""ClusCa: TaylorSeer, in which each MLP also runs on one token of every cluster and tells the others.

Zheng et al., "Compute Only 16 Tokens in One Timestep: Accelerating Diffusion Transformers with Cluster-Driven Feature
Caching", ACM MM 2025, arXiv 2509.10312.

Kept: outputs of attention and MLP modules before the adaLN gate, as TaylorSeer's ladder D_0, D_1, ... of differences.
When: as TaylorSeer. How: as TaylorSeer. Besides, at a computed step the tokens that leave the last block with an MLP of
its own are put into `clusters` clusters by k-means under the L1 distance, of at most 10 iterations from the centroids
of the computed step before. At a skipped step each MLP runs on one token of each cluster, drawn anew; these rows
replace those of D_0, then D_0 moves by `share` towards the fresh row of each token's cluster, and the forecast is made
from that D_0. The next computed step's D_1 is measured from it too.

Published: FLUX 16 clusters, share 0.005, interval 5, order 1 or 2, warm-up 3; HunyuanVideo 32 and 0.01; DiT-XL 16,
warm-up 2, up to 100 iterations. As in the code for FLUX, text tokens have clusters of their own and a share of 0, and
blocks in which attention and MLP run side by side are forecast only. Differences: the first centroids are different
tokens, a cluster that lost its tokens keeps its centroid (in their code it becomes 0 and draws the first token), and
all samples of a batch draw by the same random numbers. Where an MLP reads text and image as one (CogVideoX), only image
tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import factorial
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.caching.base import ForecastingMethod
from dita.caching.engine import Recipe
from dita.caching.forecast import Forecast
from dita.caching.history import Entry, History
from dita.caching.policy import FixedInterval, Verdict, View
from dita.caching.storage import Storage, bytes_of
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.kernels.tokens import cluster_tokens, draw_per_cluster
from dita.registry import register
from dita.seams import Features, Fresh, Site


class Ladder(History):
    """TaylorSeer's differences D_0, D_1, ... in place of anchors: what is done to D_0 leaves D_1 alone.

    The step of D_j is that of the anchor that it took in last, so that `steps` are a history's.
    """

    def push(self, step: int, features: Features, made: Mapping[int, float] | None = None) -> None:
        """Climb: D_0 is the feature, D_{j+1} the change of D_j since the last push, per step."""
        rungs, climbed = [features], [step, *self.steps]
        for entry in self._entries[: self.length - 1]:
            old = self._storage.get(entry.features, self._like)
            rungs.append(tuple(_slope(n, o, step - climbed[1]) for n, o in zip(rungs[-1], old, strict=True)))
        self._keep([Entry(at, rung) for at, rung in zip(climbed, rungs, strict=False)])


def _slope(new: torch.Tensor | None, old: torch.Tensor | None, gap: int) -> torch.Tensor | None:
    return None if new is None or old is None else (new - old) / gap


@dataclass(frozen=True)
class LadderForecast(Forecast):
    """The Taylor sum over a ladder's rungs."""

    def make_history(self, storage: Storage) -> History:
        """See `Forecast.make_history`."""
        return Ladder(self.anchors, None, storage)

    def weights(self, step: int, anchors: Sequence[int]) -> list[float]:
        """k^j / j! for rung j; those that the anchors' own weights would amplify too much are left out.

        Example:
            >>> LadderForecast(order=2).weights(8, [6, 5, 4])
            [1.0, 2.0, 2.0]
            >>> LadderForecast(order=2, amplification=5).weights(8, [6, 5, 4])
            [1.0, 2.0]
        """
        rungs = len(super().weights(step, anchors))
        return [(step - anchors[0]) ** j / factorial(j) for j in range(rungs)]


class Clusters(FixedInterval):
    """Put tokens into clusters at computed steps, and draw from them at the others.

    Args:
        interval, warmup: see `FixedInterval`.
        clusters, share, seed: see `ClusCa`.
        row_wise: the modules that run on some tokens.
        text: by block, where text lies in what an MLP reads together with the image, "first", "last" or "".
    """

    def __init__(
        self,
        interval: int,
        warmup: int,
        clusters: int,
        share: float,
        seed: int,
        row_wise: frozenset[Site],
        text: Mapping[int, str],
    ) -> None:
        super().__init__(interval, warmup)
        self.clusters, self.share, self.seed, self.row_wise, self.text = clusters, share, seed, row_wise, text
        self._labels: list[torch.Tensor | None] = [None, None]
        self._centroids: list[torch.Tensor | None] = [None, None]

    def decide(self, view: View) -> Verdict:
        """Follow the schedule."""
        verdict = super().decide(view)
        return verdict if verdict.compute else Verdict(False, verdict.reason, fresh=self._picker(view))

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """Cluster the image and the text tokens that leave the watched block."""
        if site.kind != "span" or not view.computing:
            return
        for stream, tokens in enumerate((*outputs, None)[:2]):
            self._labels[stream] = None
            if tokens is not None:
                start = self._centroids[stream]
                if start is None:
                    draw = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(self.seed))
                    start = tokens[:, draw[: self.clusters].to(tokens.device)]
                self._labels[stream], self._centroids[stream] = cluster_tokens(tokens, start)

    def _picker(self, view: View) -> Callable[[Site, tuple[int, ...]], Fresh | None]:
        return lambda site, shape: self._pick(site, shape[1], view.position.step)

    def _pick(self, site: Site, tokens: int, step: int) -> Fresh | None:
        labels = self._labels[site.text]
        if site not in self.row_wise or labels is None:
            return None
        if labels.shape[1] != tokens:
            labels = self._among_text(labels, site, tokens)
        seed = ((self.seed * 9_973 + step) * 9_973 + site.block) * 2 + site.text
        centroids = self._centroids[site.text]
        assert centroids is not None
        index = draw_per_cluster(labels, centroids.shape[1], seed)
        return Fresh(index, labels, 0.0 if site.text else self.share)

    def _among_text(self, labels: torch.Tensor, site: Site, tokens: int) -> torch.Tensor:
        """Labels of text and image tokens, -1 for text."""
        room, place = tokens - labels.shape[1], self.text[site.block]
        if room < 0 or not place:
            raise DitaError(
                f"{site.name} reads {tokens} tokens, but {labels.shape[1]} leave the blocks, and it is not known "
                "where text lies among them (dita/models.py lists the blocks it knows)"
            )
        return torch.nn.functional.pad(labels, (room, 0) if place == "first" else (0, room), value=-1)

    def keeps(self, site: Site, inputs: Features, outputs: Features) -> Features:
        """Labels and centroids of the tokens that leave the watched block."""
        tokens = [t for t in outputs if t is not None] if site.kind == "span" else []
        labels = [t.new_empty(t.shape[:2], dtype=torch.int64) for t in tokens]
        means = [t.new_empty(len(t), min(self.clusters, t.shape[1]), t.shape[2], dtype=torch.float32) for t in tokens]
        return (*labels, *means)

    def bytes_held(self) -> int:
        """Labels and centroids."""
        return bytes_of([*self._labels, *self._centroids])


@register
@dataclass(frozen=True)
class ClusCa(ForecastingMethod):
    """ClusCa's settings; the defaults are FLUX's.

    Attributes:
        interval: one computed step, then interval - 1 forecast ones; 1 computes all.
        order: of the Taylor forecast, 0 to 5.
        warmup: first steps that are all computed.
        clusters: per sample, and tokens per skipped step and MLP; fewer if there are fewer tokens.
        share: part by which a token follows the one drawn from its cluster, 0 to 1.
        seed: of the draws; the global random state is not touched.

    Raises:
        DitaError: a setting out of range; on attaching, a model without MLPs that treat each token by itself.

    Example:
        >>> ClusCa(interval=6, order=2).label()
        'interval=6 order=2'
    """

    interval: int = 5
    order: int = 1
    warmup: int = 3
    clusters: int = 16
    share: float = 0.005
    seed: int = 0

    name: ClassVar[str] = "clusca"
    title: ClassVar[str] = "ClusCa"
    arxiv: ClassVar[str] = "2509.10312"
    axes: ClassVar[str] = "modules; fixed interval; Taylor forecast, MLPs on one token of every cluster"
    seams: ClassVar[frozenset[str]] = frozenset({"module", "block"})
    citation: ClassVar[str] = """@inproceedings{zheng2025clusca,
  title={Compute Only 16 Tokens in One Timestep: Accelerating Diffusion Transformers with Cluster-Driven Feature
    Caching},
  author={Zheng, Zhixin and Wang, Xinyu and Zou, Chang and Wang, Shaobo and Zhang, Linfeng},
  booktitle={Proceedings of the 33rd ACM International Conference on Multimedia},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)
        check_whole("warmup", self.warmup, 1)
        check_whole("clusters", self.clusters, 1)
        check_number("share", self.share, 0, 1)
        check_whole("seed", self.seed, 0)
        Forecast(self.order)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Modules, and the last block with an MLP of its own."""
        anatomy.require("module", self.name)
        row_wise = frozenset(part.site for part in anatomy.modules if part.row_wise)
        if not row_wise:
            raise DitaError(f"clusca found no MLP in the blocks of {anatomy.name} that treats every token by itself")
        last = max(site.block for site in row_wise)
        text = {block.number: block.entry.text for block in anatomy.blocks}
        return Recipe(
            what="module",
            when=lambda: Clusters(self.interval, self.warmup, self.clusters, self.share, self.seed, row_wise, text),
            how=LadderForecast(self.order, amplification=self.amplification),
            keep="output",
            watch=(anatomy.span(last, last),) if self.interval > 1 else (),
            oldest_anchor=self.warmup - 2,
        )

    @classmethod
    def disabled(cls) -> ClusCa:
        """Every step computed."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> ClusCa:
        """Every other step forecast."""
        return cls(interval=2, warmup=1)

    @classmethod
    def ladder(cls) -> tuple[ClusCa, ...]:
        """Orders 1 and 2, with the warm-up of 5 of TaylorSeer's ladder."""
        return tuple(cls(interval=n, order=order, warmup=5) for order in (1, 2) for n in (3, 4, 5, 6))
