"""AutoDiffusion: the timesteps of a short run, and the blocks that each step leaves out, found by evolution.

Li et al., "AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion Model
Acceleration", ICCV 2023, arXiv 2309.10438.

When: `dita.calibrate` runs the call once with many steps, whose timesteps are the ones to choose from, and then a
candidate at a time. A candidate is a list of timesteps with a set of blocks each; the blocks run in all are at most
those of `steps` whole steps, so that what blocks save is spent on more steps. First only timesteps evolve; then blocks
may be left out too, at most a fifth of `skip` of them in the first generation, and a fifth more in each that follows.
Of a population half are mutations of the best, a fifth crossings and the rest random, the best fifth of a population's
number breed; published are populations of 50 over 10 to 15 generations. How: a block that is left out hands on what it
was given. Every run of at least `steps` steps is then replaced by the list.

Differs from the paper: candidates are judged by the mean squared difference of the final latents from the run of
many steps, on the images of one calibration call, where the authors compare the FID of thousands of images; `fitness`
takes any other judge. The first timestep is always that of the run of many steps, since the noise that a pipeline
starts from belongs to it. Both stages have `generations`; the authors go over to the second when the best candidate
stays the same, or after five. Within a candidate mutation redraws a step's set of blocks, where theirs keeps its size.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.loop import Loop
from dita.registry import register
from dita.schedulers.base import CalibratedSampling, SamplingMethod
from dita.schedulers.timesteps.evolution import Candidate, Space, evolve
from dita.schedulers.timesteps.running import ListedLoop, PointsTable
from dita.schedulers.timesteps.schedule import Points, check_scheduler
from dita.schedulers.timesteps.tracing import Trace, Watcher, same_start, trace
from dita.seams import Call, Features, Handler, Site
from dita.session import accelerated
from dita.table import Table, has_form, table_for

Blocks = tuple[tuple[int, ...], ...]


class SearchTable(PointsTable):
    """What the search found.

    `values` holds "timesteps" and "sigmas", "left_out" with the numbers of the blocks that each step leaves out, the
    "budget" in whole steps, and "scores" of the even list and of the one found.
    """

    noun: ClassVar[str] = "search of timesteps"
    form: ClassVar[Any] = {"timesteps": [float], "budget": int}

    def verify(self) -> None:
        """See `Table.verify`."""
        super().verify()
        count, left_out = len(self.values["timesteps"]), self.values["left_out"]
        if not has_form(left_out, tuple((int,) * len(blocks) for blocks in left_out)) or len(left_out) != count:
            raise ValueError(f"{count} timesteps, but blocks left out {left_out!r}")

    @property
    def left_out(self) -> Blocks:
        """Numbers of the blocks that each of them leaves out."""
        return tuple(tuple(int(block) for block in blocks) for blocks in self.values["left_out"])


class LeavingOut(Handler):
    """Leaves out blocks at the steps of one list.

    Args:
        anatomy: of the transformer.
        left_out: for each step, the numbers of the blocks.
    """

    def __init__(self, anatomy: Anatomy, left_out: Blocks) -> None:
        self._left_out = left_out
        blocks = sorted({block for step in left_out for block in step if block < len(anatomy.blocks)})
        self.sites: tuple[Site, ...] = tuple(anatomy.span(block, block) for block in blocks)

    def compute(self, site: Site, call: Call, inputs: Features) -> bool:
        """See `Handler.compute`; a run of another number of steps, or from the middle, is not the list's."""
        position = call.position
        ours = position.schedule_length == len(self._left_out) and position.index == position.step
        return not ours or site.first not in self._left_out[position.step]

    def skipped(self, site: Site, occurrence: int, call: Call, inputs: Features) -> Features:
        """See `Handler.skipped`."""
        said = f"without block {site.first}"
        call.reason = f"{call.reason}, {site.first}" if "without block" in call.reason else f"{call.reason}; {said}"
        if call.action == "computed":
            call.action = "partial"
        return inputs


class Searched(ListedLoop):
    """Runs the list that was found wherever at least its budget is asked for.

    Args:
        name: of the method.
        pipe: the pipeline.
        table: the list.
    """

    def __init__(self, name: str, pipe: Any, table: SearchTable) -> None:
        super().__init__(name, pipe, table)
        self.found, self.budget = table.listed, int(table.values["budget"])

    def chosen(self, asked: int) -> Points | int | str:
        """See `ListedLoop.chosen`."""
        if asked < self.budget:
            return f"the search was for {self.budget} steps, this run has fewer"
        return self.found


@register
@dataclass(frozen=True)
class AutoDiffusion(CalibratedSampling):
    """The settings of AutoDiffusion.

    Attributes:
        steps: what a run may cost, in whole steps; 0 leaves runs alone.
        skip: largest share of the blocks that a step may leave out; 0 searches timesteps only.
        population: candidates in a generation, each a run of the pipeline.
        generations: after the first population; with `skip`, as many again with blocks left out.
        probability: of a mutation, for each timestep and each set of blocks.
        seed: of the search.
        fitness: judges what `call` returned, lower being better; None for the difference from the run of many steps.
            It is not stored.
        table: what was found, from `dita.calibrate`.

    Raises:
        DitaError: a setting out of range; on attaching, no table, or one of another model, or a scheduler that calls
            the model twice a step, adds noise, or keeps its timesteps in an unknown way.

    Example:
        >>> AutoDiffusion(steps=8, skip=0.2).label()
        'steps=8 skip=0.2'
    """

    steps: int = 10
    skip: float = 0.0
    population: int = 20
    generations: int = 8
    probability: float = 0.25
    seed: int = 0
    fitness: Callable[[Any], float] | None = field(default=None, repr=False, compare=False)
    table: SearchTable | None = field(default=None, repr=False)

    name: ClassVar[str] = "autodiffusion"
    title: ClassVar[str] = "AutoDiffusion"
    arxiv: ClassVar[str] = "2309.10438"
    axes: ClassVar[str] = "timesteps and blocks; found by evolution; a block left out is the identity"
    confidence: ClassVar[str] = "medium"
    seams: ClassVar[frozenset[str]] = frozenset({"step", "block"})
    claims: ClassVar[frozenset[str]] = frozenset({"timesteps"})
    saves: ClassVar[bool] = False  # where as many steps are asked for as the list has
    table_kind: ClassVar[type[Table]] = SearchTable
    shaping: ClassVar[tuple[str, ...]] = ("steps", "skip", "population", "generations", "probability", "seed")
    citation: ClassVar[str] = """@inproceedings{li2023autodiffusion,
  title={AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion Model
    Acceleration},
  author={Li, Lijiang and Li, Huixia and Zheng, Xiawu and Wu, Jie and Xiao, Xuefeng and Wang, Rui and Zheng, Min and
    Pan, Xin and Chao, Fei and Ji, Rongrong},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2023}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("steps", self.steps, 0)
        check_number("skip", self.skip, 0, 1)
        check_whole("population", self.population, 2)
        check_whole("generations", self.generations, 0)
        check_number("probability", self.probability, 0, 1)
        check_whole("seed", self.seed, 0)

    def to_dict(self) -> dict[str, Any]:
        """See `Method.to_dict`; the judge is left out."""
        found = super().to_dict()
        del found["settings"]["fitness"]
        return found

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """See `Method.sites`; before the search any block may come to be left out."""
        if self.skip:
            anatomy.require("block", self.name)
        return tuple(anatomy.span(n, n) for n in range(len(anatomy.blocks))) if self.skip else ()

    def handler(self, anatomy: Anatomy) -> Handler:
        """See `Method.handler`."""
        return LeavingOut(anatomy, self.table.left_out if self.table is not None and self.steps else ())

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> Loop:
        """See `SamplingMethod.make`."""
        if pipe is not None:
            check_scheduler(self.name, pipe.scheduler)
        if self.steps == 0:
            return Loop()
        return Searched(self.name, pipe, table_for(self.name, self.table, anatomies[0]))

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> AutoDiffusion:
        """Search among the timesteps of the call, which should have many; the pipeline comes back as it was.

        Raises:
            DitaError: the call has no more than `steps` steps, ran no whole loop, or begins from other noise each time.
        """
        fine = trace(self.name, pipe, call)
        if not 0 < self.steps < fine.steps:
            raise DitaError(
                f"{self.name} searches {self.steps} steps among those of the calibration call, which has {fine.steps}"
            )
        judge = _Judge(self, pipe, call, fine)
        spaces = self._spaces(fine.steps, judge.blocks)
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(self.title, total=self.population * len(spaces))
            judge.advance = lambda: progress.advance(task)
            best, score = evolve(judge, spaces, self.population, self.probability, random.Random(self.seed))
        points = fine.points.pick(best.entries)
        values = {
            "timesteps": points.timesteps,
            "sigmas": points.sigmas,
            "left_out": best.left_out,
            "budget": self.steps,
            "scores": {"even": judge.first, "found": score},
        }
        return replace(self, fitness=None, table=fine.table(SearchTable, values, pipe))

    def _spaces(self, entries: int, blocks: int) -> list[Space]:
        """Of each population: without leaving out blocks, then with more and more of them."""
        whole = Space(entries, blocks, self.steps)
        spaces = [whole] * (1 + self.generations)
        most = int(self.skip * blocks)
        if most:
            spaces += [replace(whole, most=max(1, most * min(n + 1, 5) // 5)) for n in range(self.generations)]
        return spaces

    @classmethod
    def disabled(cls) -> AutoDiffusion:
        """Runs are left alone; needs no table."""
        return cls(steps=0)

    @classmethod
    def forced(cls) -> AutoDiffusion:
        """Five steps' worth, of a very short search."""
        return cls(steps=5, skip=0.5, population=4, generations=1)

    @classmethod
    def ladder(cls) -> tuple[AutoDiffusion, ...]:
        """From 20 to 6 steps' worth, and 10 with blocks left out."""
        return (*(cls(steps=steps) for steps in (20, 10, 6)), cls(steps=10, skip=0.3))


@dataclass(frozen=True)
class _Trial(SamplingMethod):
    """A candidate at work."""

    watcher: Watcher | None = field(default=None, compare=False)
    left_out: Blocks = field(default=(), compare=False)

    name: ClassVar[str] = "autodiffusion search"
    saves: ClassVar[bool] = False

    def handler(self, anatomy: Anatomy) -> Handler:
        return LeavingOut(anatomy, self.left_out)

    def loop(self, anatomies: tuple[Anatomy, ...], pipe: Any = None) -> Loop | None:
        return self.watcher

    @classmethod
    def disabled(cls) -> _Trial:
        return cls()


class _Judge:
    """Scores candidates: runs each."""

    def __init__(self, method: AutoDiffusion, pipe: Any, call: Callable[[Any], Any], fine: Trace) -> None:
        from dita.anatomy import describe
        from dita.session import transformers_of

        anatomies = [describe(model) for model in transformers_of(pipe).values()]
        if method.skip:
            for anatomy in anatomies:
                anatomy.require("block", method.name)
        self.blocks = max(1, min(len(anatomy.blocks) for anatomy in anatomies))
        self.method, self.pipe, self.call, self.fine = method, pipe, call, fine
        self.first: float | None = None
        self.advance: Callable[[], None] = lambda: None

    def __call__(self, candidate: Candidate) -> float:
        watcher = Watcher(self.method.name, self.pipe, self.fine.points.pick(candidate.entries))
        with accelerated(self.pipe, _Trial(watcher, candidate.left_out)):
            result = self.call(self.pipe)
        found = watcher.trace
        if found is None or len(found.states) != found.steps + 1:
            raise DitaError(f"{self.method.name} runs the calibration call again and again; once it ran no whole loop")
        same_start(self.fine, found)
        self.advance()
        if self.method.fitness is not None:
            score = float(self.method.fitness(result))
        else:
            score = (found.states[-1].double() - self.fine.states[-1].double()).square().mean().item()
        self.first = score if self.first is None else self.first
        return score
