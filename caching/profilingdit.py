"""ProfilingDiT: reuse the blocks that attend to the background, as a profile of their attention tells.

Ma et al., "Model Reveals What to Cache: Profiling-Based Feature Reuse for Video Diffusion Models", ICCV 2025,
arXiv 2504.03140.

Kept: the residuals of the blocks labelled background, a run of consecutive ones collapsed to one. When: the first
`warmup` steps are computed, then the anchor steps; on the others the labelled runs are skipped and all other blocks
run. Anchors lie T(s) = longest - (longest - shortest) (s - warmup) / (steps - warmup) apart (the paper's eq. 15), or
where `anchors` says. `reuse` also offers the foreground blocks, or both in turn. How: reuse.

The label: with a_j the attention that image token j receives, averaged over queries and heads, R is the share of the
foreground's tokens whose a_j is among the upper half of their frame, averaged over frames and steps; the `fraction` of
blocks with the least R is background.

Confidence: low for the labels, which the authors' code holds as lists only. The paper thresholds a_i = 1/N sum_j A_ij,
which is 1/N for every row of a softmax; its text sums over rows, as here. It names neither the threshold of a nor that
of R: here a frame's median, and a fraction of the blocks (the authors' lists hold 28 of 40 on Wan, 24 of 40 on
HunyuanVideo). It has SAM2 find the foreground in the principal components of the predicted noise; here Otsu's
threshold on the first one cuts the tokens in two, and the part that touches the frame's border less is the foreground.
The schedule and the residuals are those of the authors' code, which runs uniform anchors on Wan and
`PUBLISHED_ANCHORS` on HunyuanVideo, and skips the background blocks in both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from dita.anatomy import Anatomy
from dita.caching.engine import Recipe
from dita.caching.foreground import Profiler
from dita.caching.policy import Policy, Verdict, View
from dita.caching.table import CalibratedMethod, Measurement, measure
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.registry import register
from dita.seams import Site
from dita.table import Table, table_for

_REUSE = ("background", "foreground", "split", "alternate")
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


@register
@dataclass(frozen=True)
class ProfilingDiT(CalibratedMethod):
    """ProfilingDiT's settings.

    Attributes:
        reuse: the blocks to skip: "background", "foreground", "split" (foreground, background from `switch` on) or
            "alternate" (foreground and background by turns from anchor to anchor).
        fraction: of the blocks that are labelled background, at least one.
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
    fraction: float = 0.7
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
    shaping: ClassVar[tuple[str, ...]] = ()
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
        check_number("fraction", self.fraction, 0, 1)
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
            known = [(share, number) for number, share in enumerate(values["share"]) if share < _NEVER]
            cut = max(1, round(self.fraction * len(known)))
            background, front = (tuple(n for _, n in part) for part in (sorted(known)[:cut], sorted(known)[cut:]))
        else:
            background, front = values["background"], values["foreground"]
        needed = {"background": background, "foreground": front}.get(self.reuse, background + front)
        if not needed or max(background + front) >= count:
            raise DitaError(
                f"of {anatomy.name}'s {count} blocks this profile labels {list(background)} background and "
                f"{list(front)} foreground: with reuse {self.reuse!r} there is nothing to skip, or the table is of "
                "another model"
            )
        return background, front

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> ProfilingDiT:
        """Profile the attention maps in one full run; the pipeline comes back as it was."""
        counts: list[int] = []

        def build(anatomy: Anatomy, sink: Measurement) -> Recipe:
            attend = tuple(part.site for part in anatomy.attentions(cross=False))
            counts.append(len(anatomy.blocks))
            watch = (Site("model", "model"),)
            return Recipe(what="trunk", when=lambda: Profiler(sink, anatomy), watch=watch, attend=attend)

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
        return cls(fraction=1.0, warmup=1, longest=3, shortest=3)

    @classmethod
    def ladder(cls) -> tuple[ProfilingDiT, ...]:
        """Half of the blocks, as many as on Wan, nearly all; then at longer distances."""
        return (cls(fraction=0.5), cls(), cls(fraction=0.9), cls(fraction=0.9, longest=12, shortest=4))
