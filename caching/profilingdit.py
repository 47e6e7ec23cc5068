"""ProfilingDiT: reuse the blocks that attend to the background, as a profile of their attention tells.

Ma et al., "Model Reveals What to Cache: Profiling-Based Feature Reuse for Video Diffusion Models", ICCV 2025,
arXiv 2504.03140.

Kept: the residuals of the blocks labelled background, a run of consecutive ones collapsed to one. When: the first
`warmup` steps are computed, then the anchor steps; on the others the labelled runs are skipped and all other blocks
run. Anchors lie T(s) = longest - (longest - shortest) (s - warmup) / (steps - warmup) apart (the paper's eq. 15), or
where `anchors` says. `reuse` also offers the foreground blocks, or both in turn. How: reuse.

The label: with a_j the attention that image token j receives, averaged over queries and heads, R is the share of the
foreground's tokens whose a_j is among the upper half of their frame, averaged over frames and steps; a block with
R < `threshold` is background.

Confidence: low for the labels, which the authors' code holds as lists only. The paper thresholds a_i = 1/N sum_j A_ij,
which is 1/N for every row of a softmax; its text sums over rows, as here. It names neither threshold: the median of a
frame and 0.5 are where a block without preference would stand. It has SAM2 find the foreground in the first principal
components of the predicted noise; here Otsu's threshold on the first component cuts the tokens in two, and the part
that touches the frame's border less is the foreground. The schedule and the residuals are those of the authors' code,
which runs uniform anchors on Wan and `PUBLISHED_ANCHORS` on HunyuanVideo, with the background blocks in both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch.nn import functional

from dita.anatomy import Anatomy
from dita.attention_maps import Attention
from dita.caching.base import check_number, check_whole
from dita.caching.engine import Recipe
from dita.caching.policy import Policy, Verdict, View
from dita.caching.table import CalibratedMethod, Measurement, Recorder, Table, measure, table_for
from dita.errors import DitaError
from dita.grid import channel_axis
from dita.registry import register
from dita.seams import Features, Site

_REUSE = ("background", "foreground", "split", "alternate")
_EVERY = 5  # steps between two profiled ones: the authors find the shares steady over the run
_NEVER = 1e30  # share of a block without self-attention

PUBLISHED_ANCHORS = (6, 18, 26, 32, 38, 42, 46, 48)
"""Of the authors' code, for 50 steps."""

WAN_14B = Table(
    {
        "background": (0, *range(2, 8), *range(10, 21), *range(25, 33), 37, 38),
        "foreground": (1, 3, 8, 9, 22, 24, 28, 29, 30, 32, *range(34, 40)),
    }
)
"""The authors' lists for Wan2.1-14B, which has 40 blocks; they overlap."""


def anchor_steps(steps: int, warmup: int, longest: int, shortest: int) -> list[int]:
    """Steps after the warm-up at which all blocks run, their distances shrinking linearly over the run.

    Example:
        >>> anchor_steps(50, 6, 6, 6)
        [6, 12, 18, 24, 30, 36, 42, 48]
        >>> anchor_steps(50, 6, 12, 2)
        [6, 18, 27, 34, 40, 44, 47]
    """
    anchors, step = [], warmup
    while step < steps:
        anchors.append(step)
        step += max(1, round(longest - (longest - shortest) * (step - warmup) / (steps - warmup)))
    return anchors


def runs_of(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers.

    Example:
        >>> runs_of([0, 2, 3, 4, 7])
        [(0, 0), (2, 4), (7, 7)]
    """
    ordered = sorted(set(blocks))
    groups = itertools.groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return [(run[0], run[-1]) for run in runs]


def foreground(noise: torch.Tensor) -> torch.Tensor:
    """Cut the tokens in two by their first principal component; the part that touches the border less is wanted.

    Args:
        noise: predicted noise per token [B, C, T, H, W].

    Returns:
        bool [B, T, H, W]; all False for a sample that is constant.

    Example:
        >>> noise = torch.zeros(1, 2, 1, 4, 4)
        >>> noise[..., 1:3, 1:3] = 1
        >>> foreground(noise)[0, 0].long().tolist()
        [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    border = torch.ones(noise.shape[2:], dtype=torch.bool, device=noise.device)
    border[:, 1:-1, 1:-1] = False
    masks = []
    for sample in noise:
        tokens = sample.flatten(1).T.double()
        tokens = tokens - tokens.mean(0)
        score = tokens @ torch.linalg.eigh(tokens.T @ tokens)[1][:, -1]
        ordered = score.sort()[0]
        count = torch.arange(1, len(score), device=score.device)
        # With the total 0, the variance between the two parts is sum^2 (1/n + 1/m) up to a factor.
        between = ordered.cumsum(0)[:-1].square() * (1 / count + 1 / (len(score) - count))
        mask = (score > ordered[between.argmax()]).reshape(border.shape)
        masks.append(mask if mask[border].float().mean() <= 0.5 else ~mask)
    return torch.stack(masks)


def foreground_share(received: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """The share R of the foreground that is among the half of its frame with the most attention.

    Args:
        received: attention per token [B, T, H, W].
        mask: the foreground, bool of the same shape.

    Returns:
        one number per frame that has a foreground.

    Example:
        >>> foreground_share(torch.tensor([[[[3.0, 2.0, 1.0, 0.0]]]]), torch.tensor([[[[True, False, True, False]]]]))
        [0.5]
    """
    frames, masks = received.flatten(0, 1).flatten(1), mask.flatten(0, 1).flatten(1)
    high = frames > frames.quantile(0.5, dim=1, keepdim=True)
    counts = masks.sum(1)
    shares = (high & masks).sum(1) / counts.clamp_min(1)
    return shares[counts > 0].tolist()


def noise_per_token(noise: torch.Tensor, axis: int, grid: Sequence[int]) -> torch.Tensor:
    """A model's output averaged over each token's patch.

    Args:
        noise: packed tokens [B, N, C], [B, C, H, W] or a film with its channels at `axis`.
        axis: of the channels.
        grid: frames, rows and columns of tokens.

    Returns:
        float32 [B, C, T, H, W].

    Example:
        >>> noise_per_token(torch.ones(1, 4, 8, 8), 1, (1, 4, 4)).shape
        torch.Size([1, 4, 1, 4, 4])
    """
    noise = noise.detach().float().movedim(axis, 1)
    if noise.ndim == 3:
        return noise.unflatten(2, tuple(grid))
    return functional.adaptive_avg_pool3d(noise if noise.ndim == 5 else noise[:, :, None], tuple(grid))


class Anchored(Policy):
    """Skip a set of sites between anchors.

    Args:
        sets: the sites skipped in turn; the first is skipped in the first segment, or until the switch.
        method: its settings.
    """

    def __init__(self, sets: Sequence[tuple[Site, ...]], method: ProfilingDiT) -> None:
        self.sets, self.method = [frozenset(sites) for sites in sets], method

    def decide(self, view: View) -> Verdict:
        """Follow the schedule."""
        position, method = view.position, self.method
        step = position.local_step
        if step < method.warmup:
            return Verdict(True, "warm-up")
        anchors = method.anchors or anchor_steps(position.steps, method.warmup, method.longest, method.shortest)
        if step in anchors:
            return Verdict(True, "anchor")
        if method.reuse == "alternate":
            turn = (sum(anchor <= step for anchor in anchors) - 1) % len(self.sets)
        else:
            turn = min(int(position.step >= method.switch * position.steps), len(self.sets) - 1)
        skipped = self.sets[turn]
        return Verdict(False, f"set {turn} of {method.reuse}", computes=lambda site: site not in skipped)


class _Profiler(Recorder):
    """Compares what the blocks attend to with the foreground of the predicted noise, every few steps."""

    watch_attention = True

    def __init__(self, sink: Measurement, anatomy: Anatomy) -> None:
        super().__init__(sink)
        self.anatomy = anatomy
        self._received: dict[int, list[torch.Tensor]] = {}

    def attended(self, site: Site, attention: Attention, view: View) -> None:
        """Sum the columns of self-attention's map over the image tokens."""
        count, tokens = attention.query.shape[2], math.prod(view.grid)
        if view.position.local_step % _EVERY or attention.key.shape[2] != count:
            return
        image = slice(None) if count == tokens else None
        if count > tokens and self.anatomy.text_at:
            image = slice(count - tokens, None) if self.anatomy.text_at == "first" else slice(tokens)
        if not view.grid or image is None:
            raise DitaError(
                f"profilingdit cannot tell which of the {count} queries in {site.name} of {self.anatomy.name} are the "
                f"image tokens {view.grid}: give the profile as `table`, or use another method"
            )
        self._received.setdefault(site.block, []).append(attention.received(image)[:, image])

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """The predicted noise is there: find its foreground."""
        noise, latents = outputs[0], inputs[0] if inputs else None
        if site.kind != "model" or not self._received or noise is None or latents is None:
            return
        axis = channel_axis(self.anatomy.model, latents)
        # Models that also predict a variance return it behind the noise.
        noise = noise.narrow(axis, 0, min(noise.shape[axis], latents.shape[axis]))
        mask = foreground(noise_per_token(noise, axis, view.grid))
        for block, pieces in self._received.items():
            # Some processors attend sample by sample, some blocks more than once.
            received = torch.cat(pieces).unflatten(0, (-1, len(mask))).mean(0).unflatten(1, view.grid)
            self.sink.seen.setdefault(str(block), []).extend(foreground_share(received, mask))
        self._received.clear()


@register
@dataclass(frozen=True)
class ProfilingDiT(CalibratedMethod):
    """ProfilingDiT's settings.

    Attributes:
        reuse: the blocks to skip: "background", "foreground", "split" (foreground, background from `switch` on) or
            "alternate" (foreground and background by turns from anchor to anchor).
        threshold: share of the foreground that a block's attention must cover to be labelled foreground; above 1 all
            blocks are background.
        warmup: first steps, all computed.
        longest, shortest: distance of anchors at the start and at the end; both 1 compute all.
        anchors: the anchor steps themselves, in place of distances.
        switch: fraction of the run at which "split" changes sets.
        table: the shares, from `dita.calibrate`, or lists such as `WAN_14B`.

    Raises:
        DitaError: a setting out of range; on attaching, no calibration, one of another model, or no block to skip.

    Example:
        >>> ProfilingDiT(anchors=PUBLISHED_ANCHORS, table=WAN_14B).label()
        'anchors=(6, 18, 26, 32, 38, 42, 46, 48)'
    """

    reuse: str = "background"
    threshold: float = 0.5
    warmup: int = 6
    longest: int = 6
    shortest: int = 6
    anchors: tuple[int, ...] = ()
    switch: float = 0.64
    table: Table | None = field(default=None, repr=False)

    name: ClassVar[str] = "profilingdit"
    title: ClassVar[str] = "ProfilingDiT"
    arxiv: ClassVar[str] = "2504.03140"
    confidence: ClassVar[str] = "low"
    axes: ClassVar[str] = "residuals of the blocks that attend to the background; anchors ever closer; reuse"
    seams: ClassVar[frozenset[str]] = frozenset({"block", "module"})
    bound: ClassVar[bool] = False
    citation: ClassVar[str] = """@inproceedings{ma2025profilingdit,
  title={Model Reveals What to Cache: Profiling-Based Feature Reuse for Video Diffusion Models},
  author={Ma, Xuran and Liu, Yexin and Liu, Yaofu and Wu, Xianfeng and Zheng, Mingzhe and Wang, Zihao and
    Lim, Ser-Nam and Yang, Harry},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        if self.reuse not in _REUSE:
            raise DitaError(f"reuse is {self.reuse!r}; expected one of {', '.join(_REUSE)}")
        check_number("threshold", self.threshold, 0)
        check_number("switch", self.switch, 0, 1)
        check_whole("warmup", self.warmup, 0)
        check_whole("longest", self.longest, 1)
        check_whole("shortest", self.shortest, 1, self.longest)
        if list(self.anchors) != sorted(set(self.anchors)) or any(
            not isinstance(a, int) or a < 0 for a in self.anchors
        ):
            raise DitaError(f"anchors is {self.anchors!r}; expected rising step numbers")

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """A span per run of labelled blocks."""
        anatomy.require("block", self.name)
        if not anatomy.attentions(cross=False):
            raise DitaError(f"profilingdit found no self-attention in the blocks of {anatomy.name}: nothing to profile")
        wanted = [range(len(anatomy.blocks))]
        if self.longest > 1 or self.anchors:
            background, front = self.labels(anatomy)
            both = [front, background]
            wanted = {"background": [background], "foreground": [front]}.get(self.reuse, both)
        sets = [tuple(s for first, last in runs_of(blocks) for s in anatomy.spans(first, last)) for blocks in wanted]
        sites = tuple(dict.fromkeys(site for pieces in sets for site in pieces))
        return Recipe(what="span", when=lambda: Anchored(sets, self), sites=sites)

    def labels(self, anatomy: Anatomy) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Numbers of the background and of the foreground blocks.

        Raises:
            DitaError: no table, or one that does not fit the model, or a set is empty that is to be skipped.
        """
        values, count = table_for(self.name, self.table, anatomy).values, len(anatomy.blocks)
        if "share" in values:
            shares = list(enumerate(values["share"]))
            background = tuple(n for n, share in shares if share < self.threshold)
            front = tuple(n for n, share in shares if self.threshold <= share < _NEVER)
        else:
            background, front = values["background"], values["foreground"]
        beyond = max((*background, *front), default=-1)
        needed = {"background": background, "foreground": front}.get(self.reuse, background + front)
        if beyond >= count or not needed:
            known = [round(share, 3) for share in values.get("share", ()) if share < _NEVER]
            why = f"names block {beyond}" if beyond >= count else f"labels no block {self.reuse} at {self.threshold:g}"
            raise DitaError(
                f"the profile {why}, and {anatomy.name} has {count} blocks (shares: {known}); choose another "
                "threshold or table"
            )
        return background, front

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> ProfilingDiT:
        """Profile the attention maps in one full run; the pipeline comes back as it was."""
        counts: list[int] = []

        def build(anatomy: Anatomy, sink: Measurement) -> Recipe:
            watch = (Site("model", "model"), *(part.site for part in anatomy.attentions(cross=False)))
            counts.append(len(anatomy.blocks))
            return Recipe(what="trunk", when=lambda: _Profiler(sink, anatomy), watch=watch)

        sink = measure(pipe, call, build)
        if not sink.seen:
            raise DitaError(
                "no self-attention of this model calls F.scaled_dot_product_attention with its image tokens: "
                "profilingdit cannot see its maps; give the profile as `table`"
            )
        seen = [sink.seen.get(str(number), ()) for number in range(max(counts))]
        shares = [sum(frames) / len(frames) if frames else _NEVER for frames in seen]
        return replace(self, table=sink.table(Table, {"share": shares}, pipe))

    @classmethod
    def disabled(cls) -> ProfilingDiT:
        """Every step computed; needs no calibration."""
        return cls(longest=1, shortest=1)

    @classmethod
    def forced(cls) -> ProfilingDiT:
        """All blocks, two steps of three."""
        return cls(threshold=2.0, warmup=1, longest=3, shortest=3)

    @classmethod
    def ladder(cls) -> tuple[ProfilingDiT, ...]:
        """Shrinking and uniform distances, then more blocks."""
        return (cls(longest=4, shortest=2), cls(), cls(longest=12, shortest=2), cls(threshold=2.0))
