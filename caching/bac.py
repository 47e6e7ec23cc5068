"""BAC: a schedule of its own for every attention and MLP of every block, laid by dynamic programming.

Ji et al., "Block-wise Adaptive Caching for Accelerating Diffusion Policy", ICLR 2026, arXiv 2506.13456.

Kept: the outputs of attention, cross-attention and MLP modules, before the adaLN gate. When: one run gives the cosine
similarity of each module's outputs between all pairs of steps; the adaptive caching scheduler chooses `updates` steps,
step 0 among them, so that the summed similarity of every skipped step to the update before it is greatest. The bubbling
union then adds, for the `upstream` blocks whose MLPs change most, the update steps of all MLPs behind them, since an
error that enters there would travel through every one of these. How: reuse.

Difference: the paper writes the objective with similarities of adjacent steps, whose sum is the same for all choices
but for the updates themselves; like an independent implementation, this takes the similarity to the update that is
reused. Confidence: medium; no code of the authors was read. The union is restricted to MLPs, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.caching.engine import Recipe
from dita.caching.policy import Verdict, View
from dita.caching.table import CalibratedMethod, Measurement, Recorder, StepPolicy, measure
from dita.config import check_whole
from dita.registry import register
from dita.seams import Features, Site
from dita.table import Table, nearest_index, table_for

_TOKENS = 64  # per sample, that the calibration looks at
_MLP_ROLES = ("mlp", "parallel")


def best_updates(similarity: Sequence[Sequence[float]], updates: int) -> list[int]:
    """Choose the steps to compute so that what is reused is most like what it stands for.

    Args:
        similarity: [S][S], of steps.
        updates: how many to choose, at most S; step 0 is one.

    Returns:
        rising steps.

    Example:
        >>> best_updates([[1, 0.9, 0.1, 0.1], [0.9, 1, 0.2, 0.1], [0.1, 0.2, 1, 0.9], [0.1, 0.1, 0.9, 1]], 2)
        [0, 2]
    """
    steps = len(similarity)
    updates = min(updates, steps)
    # gain[i][j]: similarity of steps i + 1 .. j - 1 to step i.
    gain = [[0.0] * (steps + 1) for _ in range(steps)]
    for i in range(steps):
        for j in range(i + 2, steps + 1):
            gain[i][j] = gain[i][j - 1] + similarity[i][j - 1]
    # best[i]: (value, updates so far) of choices whose newest update is i, the tail behind it left out.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}
    for _ in range(updates - 1):
        following: dict[int, tuple[float, list[int]]] = {}
        for i, (value, chosen) in best.items():
            for j in range(i + 1, steps):
                total = value + gain[i][j]
                if j not in following or total > following[j][0]:
                    following[j] = (total, [*chosen, j])
        best = following
    return max(((value + gain[i][steps], chosen) for i, (value, chosen) in best.items()), key=lambda p: p[0])[1]


def bubbling_union(
    updates: Mapping[str, Sequence[int]], blocks: Mapping[str, int], change: Mapping[str, float], upstream: int
) -> dict[str, frozenset[int]]:
    """Let the MLPs that change most follow the updates of all MLPs behind them.

    Args:
        updates: site -> update steps.
        blocks: MLP site -> number of its block.
        change: MLP site -> mean change between steps.
        upstream: how many MLPs follow.

    Example:
        >>> found = bubbling_union({"a": [0], "b": [0, 3]}, {"a": 0, "b": 1}, {"a": 2.0, "b": 1.0}, 1)
        >>> sorted(found["a"])
        [0, 3]
    """
    result = {name: frozenset(steps) for name, steps in updates.items()}
    chosen = sorted(change, key=lambda name: -change[name])[:upstream]
    for name in chosen:
        behind = [frozenset(updates[other]) for other, block in blocks.items() if block > blocks[name]]
        result[name] = result[name].union(*behind)
    return result


@dataclass(frozen=True)
class SimilarityTable(Table):
    """For each module "similarity", the cosines of its features at every pair of steps, and "change", a number."""

    noun: ClassVar[str] = "table of similarities"
    form: ClassVar[Any] = {"similarity": {str: [[float]]}, "change": {str: float}}

    __hash__ = Table.__hash__

    def verify(self) -> None:
        """See `Table.verify`."""
        super().verify()
        wrong = [n for n, rows in self.values["similarity"].items() if {*map(len, rows), len(rows)} != {self.steps}]
        wrong += sorted(set(self.values["similarity"]) ^ set(self.values["change"]))
        if wrong:
            raise ValueError(f"{wrong[0]} is not compared over {self.steps} steps")


class ScheduledSites(StepPolicy):
    """Follow a schedule per site.

    Args:
        schedule: site name -> steps computed, in the table's steps.
        table: where it comes from.
    """

    def __init__(self, schedule: Mapping[str, frozenset[int]], table: Table) -> None:
        super().__init__(table)
        self.schedule = schedule

    def decide(self, view: View) -> Verdict:
        """Read the schedules."""
        if not self.schedule:
            return Verdict(True, "no schedule")
        step = nearest_index(self.table.steps, view.position)
        due = frozenset(name for name, steps in self.schedule.items() if step in steps)
        if len(due) == len(self.schedule):
            return Verdict(True, "schedule")
        reason = f"schedule: {len(due)} of {len(self.schedule)} modules due"
        return Verdict(False, reason, computes=lambda site: site.name in due or site.name not in self.schedule)


class _Recorder(Recorder):
    """Keeps some tokens of every module's first output at every step."""

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """Keep them on the host."""
        new = outputs[0]
        if site.kind == "module" and new is not None:
            stride = max(1, new.shape[1] // _TOKENS)
            kept = self.sink.seen.setdefault(site.name, {}).setdefault(view.position.index, [])
            kept.append(new[:, ::stride].float().flatten().cpu())


@register
@dataclass(frozen=True)
class BAC(CalibratedMethod):
    """BAC's settings.

    Attributes:
        updates: steps at which a module is computed, in percent of the calibration's steps; 100 computes all. The
            paper: 10 of 100.
        upstream: MLPs that follow the updates of those behind them.
        table: similarities and changes, from `dita.calibrate`.

    Raises:
        DitaError: a setting out of range; on attaching, no calibration, or one of another model; while
            running, another number of steps than it was made for.

    Example:
        >>> BAC(updates=30).label()
        'updates=30'
    """

    updates: int = 40
    upstream: int = 3
    table: SimilarityTable | None = field(default=None, repr=False)

    name: ClassVar[str] = "bac"
    table_kind: ClassVar[type[Table] | None] = SimilarityTable
    title: ClassVar[str] = "Block-wise Adaptive Caching"
    arxiv: ClassVar[str] = "2506.13456"
    confidence: ClassVar[str] = "medium"
    axes: ClassVar[str] = "modules, each on its own schedule by dynamic programming, MLPs upstream follow; reuse"
    seams: ClassVar[frozenset[str]] = frozenset({"module"})
    shaping: ClassVar[tuple[str, ...]] = ()
    citation: ClassVar[str] = """@inproceedings{ji2026bac,
  title={Block-wise Adaptive Caching for Accelerating Diffusion Policy},
  author={Ji, Kangye and Meng, Yuan and Cui, Hanyun and Li, Ye and Hua, Shengjia and Chen, Lei and Wang, Zhi},
  booktitle={International Conference on Learning Representations},
  year={2026}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("updates", self.updates, 1, 100)
        check_whole("upstream", self.upstream, 0)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Modules, each by its schedule."""
        anatomy.require("module", self.name)
        table, schedule = SimilarityTable({}), {}
        if self.updates < 100:
            table = table_for(self.name, self.table, anatomy)
            count = max(1, round(self.updates / 100 * table.steps))
            chosen = {name: best_updates(rows, count) for name, rows in table.values["similarity"].items()}
            sites = {part.site.name: part.site for part in anatomy.modules}
            blocks = {name: sites[name].block for name in chosen if sites[name].role in _MLP_ROLES}
            change = {name: table.values["change"][name] for name in blocks}
            schedule = bubbling_union(chosen, blocks, change, self.upstream)
        return Recipe(what="module", when=lambda: ScheduledSites(schedule, table), keep="output")

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> BAC:
        """Measure the similarities in one full run; the pipeline comes back as it was."""

        def build(anatomy: Anatomy, sink: Measurement) -> Recipe:
            anatomy.require("module", self.name)
            watch = tuple(part.site for part in anatomy.modules)
            return Recipe(what="trunk", when=lambda: _Recorder(sink), watch=watch)

        sink = measure(pipe, call, build)
        similarity: dict[str, list[list[float]]] = {}
        change: dict[str, float] = {}
        for name, kept in sink.seen.items():
            length = min(sum(map(len, parts)) for parts in kept.values())  # Heun's last step has one stage
            # A step that the run left out (image-to-image) is like no other.
            rows = [torch.cat(kept[i])[:length] if i in kept else torch.zeros(length) for i in range(sink.steps)]
            features = torch.stack(rows)
            normed = features / features.norm(dim=1, keepdim=True).clamp_min(1e-12)
            similarity[name] = (normed @ normed.T).tolist()
            change[name] = torch.cdist(features, features, p=1).mean().item() / length
        table = sink.table(SimilarityTable, {"similarity": similarity, "change": change}, pipe)
        return replace(self, table=table)

    @classmethod
    def disabled(cls) -> BAC:
        """Every step computed; needs no calibration."""
        return cls(updates=100)

    @classmethod
    def forced(cls) -> BAC:
        """Half of the steps."""
        return cls(updates=50)

    @classmethod
    def ladder(cls) -> tuple[BAC, ...]:
        """A half to a fifth of the steps."""
        return tuple(cls(updates=n) for n in (50, 40, 30, 20))
