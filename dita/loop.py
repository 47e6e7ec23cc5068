"""The sampling loop as a method sees it: a run, its steps, and the pipeline's calls of a transformer.

Pipelines keep their loop variables to themselves: whether guidance is on and its scale are arguments of `__call__` that
many never store. They are read off the running call's own variables, so that no pipeline has to be edited or copied.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from dita.errors import DitaError
from dita.passage import flatten
from dita.seams import Position

if TYPE_CHECKING:
    from typing_extensions import Self

    from dita.anatomy import Anatomy

COND_FIRST = ("DiTPipeline", "LuminaPipeline")
"""Pipelines whose batched guidance puts the conditional half first; all others put it last."""
ROLES = ("cond", "uncond", "third")
"""What a branch can be to guidance, in the order in which unnamed calls of a step are taken for them."""
_ROW_LISTS = ("txt_seq_lens",)  # arguments that are lists of numbers, one a sample
_BATCH_SECOND = ("encoder_hidden_states_llama3",)  # arguments whose second axis is the batch
_NOT_BATCHED = ("ids", "rotary", "rope", "freqs", "shape")  # parts of argument names whose first axis is not the batch


class LoopVariables:
    """What the pipeline's running `__call__` says of itself.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def read(self) -> dict[str, Any]:
        """The local variables of the call under way, innermost first; {} where the loop is someone else's."""
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "__call__" and code.co_varnames[:1] == ("self",) and frame.f_locals["self"] is self.pipe:
                return dict(frame.f_locals)
            frame = frame.f_back
        return {}

    def elsewhere(self, scheduler: Any) -> bool:
        """Whether the call under way is made by another pipeline, with a scheduler of its own, sharing the model.

        Args:
            scheduler: that of this pipeline.
        """
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
                held = frame.f_locals["self"]
                if hasattr(type(held), "components") and hasattr(held, "scheduler"):
                    return held is not self.pipe and held.scheduler is not scheduler
            frame = frame.f_back
        return False

    @staticmethod
    def scale(variables: dict[str, Any], pipe: Any) -> float | None:
        """The guidance scale by which two calls are combined; None where there is no such thing."""
        if "true_cfg_scale" in variables:
            return float(variables["true_cfg_scale"]) if LoopVariables.guided(variables, pipe) else None
        scale = variables.get("guidance_scale", getattr(pipe, "_guidance_scale", None))
        if not isinstance(scale, (int, float)) or not LoopVariables.guided(variables, pipe):
            return None
        if variables.get("use_dynamic_cfg") is True:  # CogVideoX sets the step's scale after it called the transformer
            along = 1 - float(variables["t"]) / variables["num_inference_steps"]
            return 1 + scale * (1 - math.cos(math.pi * along**5)) / 2
        return float(scale)

    @staticmethod
    def guided(variables: dict[str, Any], pipe: Any) -> bool | None:
        """Whether the loop combines a conditional and an unconditional call; None if it does not tell."""
        for name in ("do_true_cfg", "do_classifier_free_guidance"):
            if isinstance(variables.get(name), bool):
                return variables[name]
        if "true_cfg_scale" in variables:
            return None
        said = getattr(pipe, "do_classifier_free_guidance", None)
        if isinstance(said, bool):
            return said
        scale = variables.get("guidance_scale")
        return scale > 1 if isinstance(scale, (int, float)) else None


@dataclass(frozen=True)
class Run:
    """A run of the sampling loop.

    Attributes:
        pipe: the pipeline.
        scheduler: its scheduler, with the run's timesteps set.
        steps: solver steps, as far as is known before the first one (image-to-image begins later).
        anatomies: of the pipeline's transformers.
    """

    pipe: Any
    scheduler: Any
    steps: int
    anatomies: tuple[Anatomy, ...]


@dataclass(frozen=True)
class Request:
    """One call of a transformer, as the pipeline makes it or as a method changed it.

    Attributes:
        position: of the call; its branch is a guidance role where that is known.
        roles: what each equal part of the batch is: "cond", "uncond", "third" (a branch of skip-layer or perturbed
            guidance), or "all" for a call without guidance. One entry for a call that carries one branch.
        parameters: names of the transformer's arguments, in order.
        args, kwargs: what it is called with.
        scale: the pipeline's guidance scale; None where there is none.
        anatomy: of the transformer.
        left_out: tells the report that a branch was not computed: (role, reason).
        divisible: the parts of the batch may be run without each other.
        apart: branches have to be run one by one, for some method keeps features of each.
        reason: why it is run, for the report.
        fresh: no cache may stand in for it: some method reads more from it than the next sample.
        remark: tells the report why the run is left alone.
        entries: where equal parts of a branch's batch stand in the scheduler's list of timesteps, one number a part;
            () where all samples stand at the position. Some method put samples of several runs into one batch.
        clean: with `entries`, the latents of the input images of those samples, in the layout of `latents`; None where
            they began from noise.
        tokens: how many image tokens a sample has in this call, and how many at full resolution; None if it has all.
        grid: frames, rows and columns in which those tokens lie, () if in none; None to read it off the arguments.
        due: says of a sample, None for all of the batch, whether it is computed, in place of what the plan of a cache
            says; None to leave it to the plan. Only caches that follow a plan ask it.
        each: one mapping a sample of a branch, if the samples are to run one by one: arguments that have no batch and
            yet differ from sample to sample.
    """

    position: Position
    roles: tuple[str, ...]
    parameters: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    anatomy: Anatomy
    scale: float | None = None
    left_out: Callable[[Position, str, str], None] = field(default=lambda position, role, reason: None, repr=False)
    divisible: bool = True
    apart: bool = False
    reason: str = ""
    fresh: bool = False
    remark: Callable[[str], None] = field(default=lambda text: None, repr=False)
    entries: tuple[int, ...] = ()
    clean: torch.Tensor | None = field(default=None, repr=False)
    tokens: tuple[int, int] | None = None
    grid: tuple[int, ...] | None = None
    due: Callable[[int | None], bool | None] = field(default=lambda sample: None, repr=False)
    each: tuple[Mapping[str, Any], ...] = ()

    def get(self, name: str) -> Any:
        """The argument of that name, None if it was not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        place = self.parameters.index(name) if name in self.parameters else len(self.args)
        return self.args[place] if place < len(self.args) else None

    def changed(self, **arguments: Any) -> Self:
        """The same call with other arguments, each of which was given before or is known to the transformer.

        Raises:
            DitaError: the transformer takes no such argument.
        """
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, value in arguments.items():
            if name in kwargs or name not in self.parameters:
                if name not in self.parameters and name not in kwargs:
                    raise DitaError(
                        f"{self.anatomy.name} takes no argument {name}; it takes {', '.join(self.parameters)}"
                    )
                kwargs[name] = value
            elif self.parameters.index(name) < len(args):
                args[self.parameters.index(name)] = value
            else:
                kwargs[name] = value
        return replace(self, args=tuple(args), kwargs=kwargs)

    @property
    def latents(self) -> torch.Tensor:
        """What the transformer denoises.

        Raises:
            DitaError: it is not handed over as a tensor.
        """
        value = self.get("hidden_states")
        if value is None:
            value = next((v for v in (*self.args, *self.kwargs.values()) if isinstance(v, torch.Tensor)), None)
        if not isinstance(value, torch.Tensor):
            raise DitaError(
                f"{self.anatomy.name} is called with {type(value).__name__} for its latents; expected a tensor"
            )
        return value

    @property
    def batch(self) -> int:
        """Samples of one branch."""
        return self.latents.shape[0] // len(self.roles)

    def part(self, role: str) -> Self:
        """The call of one branch alone: every argument whose first axis is the batch, cut to its rows."""
        if len(self.roles) == 1:
            return self
        size, place = self.batch, self.roles.index(role)
        own = self._batched(range(place * size, (place + 1) * size))
        return replace(own, position=replace(self.position, branch=role), roles=(role,))

    def taken(self, rows: Sequence[int]) -> Self:
        """The call on other rows of its batch, which may come several times: `rows` count over all branches.

        Every argument whose first axis is the batch is gathered, and so are lists with an entry a row.
        """
        return self._batched(rows)

    def _batched(self, wanted: Sequence[int]) -> Self:
        rows = self.latents.shape[0]
        first = self.parameters[0] if self.parameters else ""
        listed = isinstance(self.get(first), list)
        together = list(wanted) == list(range(wanted[0], wanted[-1] + 1))
        places = slice(wanted[0], wanted[-1] + 1) if together else list(wanted)

        def cut(name: str, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                if name in _BATCH_SECOND:
                    return value[:, places]
                batched = value.ndim and value.shape[0] == rows and not any(word in name for word in _NOT_BATCHED)
                return value[places] if batched else value
            if isinstance(value, dict):
                return {key: cut(key, v) for key, v in value.items()}
            if isinstance(value, list) and _an_entry_a_row(name, value, rows, listed):
                return [value[n] for n in wanted]
            if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
                return type(value)(cut(name, v) for v in value)
            return value

        names = (*self.parameters, *("" for _ in self.args))
        args = tuple(cut(name, value) for name, value in zip(names, self.args, strict=False))
        kwargs = {name: cut(name, value) for name, value in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs)

    def leave_out(self, reason: str) -> None:
        """Tell the report that this call was not carried out."""
        for role in self.roles:
            self.left_out(self.position, role, reason)

    def answer(self, tensors: Sequence[torch.Tensor | None]) -> Any:
        """Wrap tensors as the transformer would have returned them when asked like this."""
        if self.get("return_dict") is False:
            return tuple(tensors)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=tensors[0])  # pyright: ignore[reportArgumentType]

    def empty(self) -> torch.Tensor:
        """Zeros of the shape of the transformer's output, which may have other channels than its input."""
        from dita.grid import channel_axis

        latents, config = self.latents, getattr(self.anatomy.model, "config", None)
        shape = list(latents.shape)
        channels = getattr(config, "out_channels", None)
        if isinstance(channels, int) and latents.ndim >= 4:
            shape[channel_axis(self.anatomy.model, latents)] = channels
        elif isinstance(channels, int) and latents.ndim == 3 and shape[-1] == getattr(config, "in_channels", None):
            patch = getattr(config, "patch_size", 1)
            shape[-1] = channels * (patch if isinstance(patch, int) else 1) ** 2
        return latents.new_zeros(shape)


def _an_entry_a_row(name: str, value: list[Any], rows: int, listed: bool) -> bool:
    """Whether a list has an entry for each row of the batch, rather than one a block or a layer, each for all rows.

    Args:
        name: of the argument.
        value: the list.
        rows: of the batch.
        listed: the transformer takes its latents as a list, an entry a row; its other tensors then come so too.
    """
    if len(value) != rows or "rotary" in name:
        return False
    if any(isinstance(v, torch.Tensor) for v in value):
        return listed
    return name in _ROW_LISTS or all(isinstance(v, (list, tuple)) for v in value)


Runner = Callable[[Request], Any]
"""Carries a request out and returns what the transformer returned."""


def one_by_one(request: Request, run: Runner) -> Any:
    """Run the samples of a request one by one, each with arguments of its own (`Request.each`), and join the results.

    A sample's branches stay together, and its position names it: what methods keep of one never serves another.
    """
    size, branches = request.batch, len(request.roles)
    results = []
    for sample, own in enumerate(request.each):
        part = request.taken([sample + place * size for place in range(branches)]).changed(**own)
        results.append(run(replace(part, each=(), position=replace(request.position, sample=sample))))
    columns = zip(*(tensors_of(result) for result in results), strict=True)
    joined = tuple(
        None if column[0] is None else torch.stack([t for t in column if t is not None], dim=1).flatten(0, 1)
        for column in columns
    )
    return flatten(results[0])[1](joined)


def tensors_of(result: Any) -> tuple[torch.Tensor | None, ...]:
    """The tensors that a transformer returned.

    Raises:
        DitaError: it returned something else.

    Example:
        >>> tensors_of((torch.ones(1), None))
        (tensor([1.]), None)
    """
    return flatten(result)[0]


@dataclass(frozen=True)
class Step:
    """One call of the scheduler's `step`.

    Attributes:
        position: of the step; its branch is "". A solver of second order has two calls a step, by `stage`.
        scheduler: the pipeline's scheduler, which has not stepped yet.
        output: the model's output after guidance.
        timestep: as the pipeline gives it.
        sample: the latents.
        pipe: the pipeline.
    """

    position: Position
    scheduler: Any
    output: torch.Tensor
    timestep: Any
    sample: torch.Tensor
    pipe: Any


Solver = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Steps the scheduler: (output, sample) to the next sample."""


class Loop:
    """A method at work on the sampling loop: this one changes nothing, others override what they need.

    One object serves all transformers of a pipeline. State belongs to a run and is forgotten in `begin_run`.
    """

    def begin_run(self, run: Run) -> None:
        """A run starts: its timesteps are set. Forget everything.

        Raises:
            DitaError: the scheduler is one that the method cannot work with.
        """

    def timesteps(self, scheduler: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]):
        """Answer `scheduler.set_timesteps(*args, **kwargs)`; `original` is the scheduler's own."""
        return original(*args, **kwargs)

    def noised(self, clean: torch.Tensor, result: torch.Tensor) -> None:
        """The scheduler added noise to an input, before the first step: an image-to-image run begins.

        Args:
            clean: the latents of the input, as the pipeline has them before it packs them.
            result: of the same shape, with noise.
        """

    def model(self, request: Request, run: Runner) -> Any:
        """Answer a call of a transformer: run it, run it changed, run parts of it, or return something in its place.

        Whatever is not run has to be told to the report, by `Request.leave_out`.
        """
        return run(request)

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """Answer a step of the scheduler with the next sample. `solve` may be called once, or not at all.

        If it is not, the scheduler steps all the same, to keep count, and what it made is dropped.
        """
        return solve(step.output, step.sample)

    def bytes_held(self) -> int:
        """Bytes of tensors kept between calls."""
        return 0


class StepCall:
    """The arguments of one call of a scheduler's `step`, by name.

    Args:
        scheduler: the scheduler.
        original: its own `step`.
        args, kwargs: what it is called with.
    """

    def __init__(
        self, scheduler: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        names = tuple(inspect.signature(type(scheduler).step).parameters)[1:]
        self._original = original
        self.arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        self.first = names[0]

    @property
    def readable(self) -> bool:
        """It is given a model output and a sample, as tensors."""
        given = (self.arguments.get(self.first), self.arguments.get("sample"))
        return all(isinstance(value, torch.Tensor) for value in given)

    def run(self, output: torch.Tensor, sample: torch.Tensor) -> Any:
        """Step with another output and sample."""
        return self._original(**{**self.arguments, self.first: output, "sample": sample})


def previous_sample(result: Any) -> torch.Tensor | None:
    """The latents in what a scheduler's `step` returned; None if there are none.

    Example:
        >>> previous_sample((torch.ones(1),))
        tensor([1.])
    """
    old = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
    return old if isinstance(old, torch.Tensor) else None


def with_sample(result: Any, sample: torch.Tensor) -> Any:
    """The same result with other latents.

    Example:
        >>> with_sample((torch.ones(1), 2), torch.zeros(1))
        (tensor([0.]), 2)
    """
    if isinstance(result, tuple):
        return (sample, *result[1:])
    result.prev_sample = sample
    return result


def roles_of(
    variables: dict[str, Any], pipe: Any, branch: str, earlier: Sequence[tuple[str, ...]], latents: Any
) -> tuple[str, ...]:
    """What the parts of a call's batch are to the pipeline's guidance.

    Args:
        variables: of the pipeline's `__call__`.
        pipe: the pipeline.
        branch: the name it gave the call, or "call 0", "call 1", ... by order.
        earlier: roles of the calls before it in this step.
        latents: what the transformer is called with.

    Example:
        >>> class DiTPipeline: ...
        >>> variables = {"latents": torch.zeros(1, 4, 8, 8), "guidance_scale": 4.0}
        >>> roles_of(variables, DiTPipeline(), "call 0", [], torch.zeros(2, 4, 8, 8))
        ('cond', 'uncond')
    """
    guided = LoopVariables.guided(variables, pipe)
    own = variables.get("latents")
    if guided is False or not isinstance(latents, torch.Tensor) or not isinstance(own, torch.Tensor):
        return ("all",)
    ratio, rest = divmod(latents.shape[0], own.shape[0])
    if not rest and ratio in (2, 3) and guided:
        pair = ("cond", "uncond") if type(pipe).__name__ in COND_FIRST else ("uncond", "cond")
        return (*pair, "third")[:ratio]
    if ratio != 1 or rest:
        return ("all",)
    if any(len(roles) > 1 for roles in earlier):
        return ("third",)
    if not branch.startswith("call "):
        name = branch.removeprefix("pred_")
        known = {"cond": "cond", "uncond": "uncond", "neg": "uncond"}
        return (known.get(name, "third"),)
    if guided is None and not earlier:
        return ("all",)
    return (ROLES[min(len(earlier), 2)],)
