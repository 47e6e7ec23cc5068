"""Attaching methods to a pipeline, taking them off, and asking what they did."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from dita.agreement import check_group
from dita.anatomy import Anatomy, describe
from dita.clock import RunClock
from dita.config import Method
from dita.defaults import default_methods
from dita.errors import DitaError
from dita.fingerprint import fingerprint
from dita.loop import Run
from dita.models import REFUSED_PIPELINES
from dita.patch import unwrapped
from dita.registry import resolve
from dita.reporting import KEPT_RUNS, Report, RunReport
from dita.runtime import ModelRuntime
from dita.seams import Handler, Position

P = TypeVar("P")
T = TypeVar("T")
_KEY = "_dita_session"
_OWNER = "_dita_owner"
_OTHER_NAMES = ("prior", "decoder")
_TRANSFORMERS = "diffusers.models.transformers."


class Session:
    """All that is attached to one pipeline."""

    def __init__(
        self,
        pipe: Any,
        methods: tuple[Method, ...],
        models: dict[str, nn.Module],
        anatomies: dict[str, Anatomy],
        per_sample: bool = False,
    ) -> None:
        self.pipe, self.methods, self.per_sample = pipe, methods, per_sample
        self.labels = tuple(f"{m.name}({m.label()})" for m in methods)
        self.runs: list[RunReport] = []
        self.group: Any = None
        self._idle = all(not m.saves or m.across_runs or m == type(m).disabled() for m in methods)
        self._build(models, anatomies)

    def _build(self, models: dict[str, nn.Module], anatomies: dict[str, Anatomy]) -> None:
        """Make all that is to be hung on the pipeline."""
        pipe, found = self.pipe, tuple(anatomies.values())
        loops = tuple(loop for m in self.methods if (loop := _made(m, m.loop, found, pipe)) is not None)
        clock = RunClock(
            lambda: pipe.scheduler, self._run_started, self._run_finished, self._stepped, loops, pipe, self._refresh
        )
        shares = [m.among(len(anatomies)) for m in self.methods]
        runtimes = [
            ModelRuntime(
                number, name, anatomy, [_handler(m, anatomy) for m in shares], clock, self._current, loops,
                pipe, models[name], self.per_sample,
            )
            for number, (name, anatomy) in enumerate(anatomies.items())
        ]  # fmt: skip
        self.models, self.loops, self.clock, self.runtimes = models, loops, clock, runtimes
        self.share_decisions(self.group)

    def share_decisions(self, group: Any) -> None:
        """See `dita.share_decisions`."""
        self.group = group
        for runtime in self.runtimes:
            runtime.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copied pipeline is a plain one: its hooks know that they were copied

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())  # so is one that was written and read again

    def attach(self) -> None:
        """Hook everything, or nothing if any hook fails."""
        try:
            self.clock.attach()
            for runtime in self.runtimes:
                runtime.attach()
                vars(runtime.anatomy.model)[_OWNER] = self
            vars(self.pipe)[_KEY] = self
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Unhook everything."""
        vars(self.pipe).pop(_KEY, None)
        for runtime in reversed(self.runtimes):
            vars(runtime.anatomy.model).pop(_OWNER, None)
            runtime.detach()
        self.clock.detach()

    def _refresh(self) -> bool:
        """Before a run: if a transformer was replaced, compiled, or given a LoRA, hang everything on it anew."""
        same = all(getattr(self.pipe, name, None) is model for name, model in self.models.items())
        if same and not any(runtime.compilation.changed() for runtime in self.runtimes):
            return False
        before = self.models, self.loops, self.clock, self.runtimes
        self._build(*_examined(self.pipe, self))
        after = self.models, self.loops, self.clock, self.runtimes
        self.models, self.loops, self.clock, self.runtimes = before
        self.detach()
        self.models, self.loops, self.clock, self.runtimes = after
        self.attach()
        return True

    def _current(self) -> RunReport:
        if not self.runs:
            self.runs.append(RunReport(self.labels))
        return self.runs[-1]

    def _run_started(self) -> None:
        self.runs.append(RunReport(self.labels))
        del self.runs[:-KEPT_RUNS]
        run = Run(self.pipe, self.pipe.scheduler, self.clock.steps, tuple(r.anatomy for r in self.runtimes))
        for loop in self.loops:
            loop.begin_run(run)

    def _run_finished(self) -> None:
        run = self._current()
        run.steps, run.finished = self.clock.steps, True
        run.warn_if_idle(self._idle)

    def _stepped(self, model: int, position: Position, latents: torch.Tensor) -> torch.Tensor:
        return self.runtimes[model].stepped(position, latents)

    def report(self) -> Report:
        """Gather the report; see `dita.report`."""
        for run in self.runs:
            run.settle()
        if self.runs and not self.runs[-1].finished:
            self.runs[-1].steps = 1 + max((r.step for r in self.runs[-1].records), default=-1)
        models = tuple(
            f"{r.name}: {r.anatomy.name}, {len(r.anatomy.blocks)} blocks, {len(r.anatomy.modules)} modules, "
            f"{len({s for h in r.handlers for s in h.sites})} sites hooked"
            for r in self.runtimes
        )
        return Report(self.labels, models, [run for run in self.runs if run.records])


def _handler(method: Method, anatomy: Anatomy) -> Handler:
    handler = _made(method, method.handler, anatomy)
    handler.owner = method.name
    return handler


def _made(method: Method, make: Callable[..., T], *parts: Any) -> T:
    """A method's own part in a session; numbers that it cannot even read are refused."""
    try:
        return make(*parts)
    except DitaError:
        raise
    except Exception as error:
        if getattr(method, "table", None) is None:
            raise
        raise DitaError(f"the numbers of {method.name} are damaged ({error!r}): calibrate again") from error


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The denoising transformers among a pipeline's components, by attribute name.

    Raises:
        DitaError: not a diffusers pipeline with a scheduler, one whose loop cannot be followed, or its denoiser is no
            transformer.
    """
    refused = [REFUSED_PIPELINES[cls.__name__] for cls in type(pipe).__mro__ if cls.__name__ in REFUSED_PIPELINES]
    if refused:
        raise DitaError(f"{type(pipe).__name__} cannot be accelerated: {refused[0]}")
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict) or not hasattr(pipe, "scheduler"):
        raise DitaError(
            f"expected a diffusers pipeline with components and a scheduler, got {type(pipe).__name__}; "
            "load one with DiffusionPipeline.from_pretrained"
        )
    named = {n: c for n, c in components.items() if "transformer" in n.split("_") and isinstance(c, nn.Module)}
    found = dict(sorted(named.items(), key=lambda item: not item[0].startswith("transformer")))
    if not found:  # priors of embeddings and decoders of spectrograms denoise too
        others = {n: c for n, c in components.items() if n in _OTHER_NAMES and isinstance(c, nn.Module)}
        found = {n: c for n, c in others.items() if type(unwrapped(c)).__module__.startswith(_TRANSFORMERS)}
    if not found:
        held = ", ".join(f"{n} ({type(c).__name__})" for n, c in components.items() if isinstance(c, nn.Module))
        raise DitaError(
            f"{type(pipe).__name__} has no component named transformer; it holds {held or 'no models'}. dita "
            "accelerates pipelines whose denoiser is a diffusion transformer."
        )
    return found


def model_of(pipe: Any) -> str:
    """Fingerprint of a pipeline's transformer, of the first where there are two: what its calibrations belong to.

    Raises:
        DitaError: as `transformers_of`.

    Example:
        >>> model_of(pipe)  # doctest: +SKIP
        'FluxTransformer2DModel:0c9d...'
    """
    return fingerprint(next(iter(transformers_of(pipe).values())))


def accelerate_pipeline(pipe: P, *methods: str | Method | type[Method], per_sample: bool = False, **options: Any) -> P:
    """Make a diffusers pipeline faster; its calls stay as they are.

    Attaches to this pipeline object only, wholly or not at all. A second call replaces what the first attached.

    Args:
        pipe: a diffusers pipeline whose denoiser is a transformer.
        methods: names or configs; with none, the pipeline's own calibration if `dita.calibrate` left one, else the
            default of the model's family (`dita.defaults`).
        per_sample: run the samples of a batch one by one through the transformer, each with its guidance branches and
            on decisions of its own: an image is the same bit for bit alone and in any batch, and no sample is computed
            because another has to be. Costs what the device gains by batching.
        options: settings of the one method given.

    Returns:
        the same pipe.

    Raises:
        DitaError: unknown method or setting, methods that exclude each other, one that decides for a whole batch where
            `per_sample` is asked for, or a model without the seam a method needs. The pipeline is then as it was.

    Example:
        >>> pipe = accelerate_pipeline(pipe, "taylorseer", interval=4)  # doctest: +SKIP
    """
    old = _find(pipe)
    models, anatomies = _examined(pipe, old)
    if options and len(methods) != 1:
        raise DitaError(f"options {sorted(options)} configure a single method, but {len(methods)} were given")
    configs = tuple(resolve(m, **options) for m in methods) or default_methods(next(iter(anatomies.values())), pipe)
    _check_claims(configs)
    _check_samples(configs, per_sample)
    session = Session(pipe, configs, models, anatomies, per_sample)
    if old is not None:
        old.detach()
    try:
        session.attach()
    except BaseException:
        if old is not None:
            old.attach()
        raise
    return pipe


def _examined(pipe: Any, session: Session | None) -> tuple[dict[str, nn.Module], dict[str, Anatomy]]:
    """The transformers as a pipeline calls them, and what is in them, for this session or a new one to be hung on.

    Raises:
        DitaError: one of them cannot be accelerated, or another pipeline's session is hung on it.
    """
    models = transformers_of(pipe)
    anatomies = {name: describe(model) for name, model in models.items()}
    for name, anatomy in anatomies.items():
        if "model" in anatomy.reasons:
            raise DitaError(f"{name} ({anatomy.name}) cannot be accelerated: {anatomy.reasons['model']}")
        owner: Session | None = vars(anatomy.model).get(_OWNER)
        own = owner is not None and any(r.anatomy.model is anatomy.model for r in owner.runtimes)
        if owner is not None and own and owner is not session:
            raise DitaError(
                f"the {name} of this {type(pipe).__name__} is shared with a {type(owner.pipe).__name__} that is "
                "already accelerated; restore that one first (a pipe made by from_pipe shares what is attached)"
            )
    return models, anatomies


def _check_claims(methods: tuple[Method, ...]) -> None:
    owners: dict[str, Method] = {}
    for method in methods:
        for claim in method.claimed:
            if claim in owners:
                raise DitaError(
                    f"{owners[claim].name} and {method.name} exclude each other: both decide about {claim}; choose one"
                )
            owners[claim] = method


def _check_samples(methods: tuple[Method, ...], per_sample: bool) -> None:
    if not isinstance(per_sample, bool):
        raise DitaError(f"per_sample is {per_sample!r}; expected True or False")
    joint = [method.name for method in methods if method.joint]
    if per_sample and joint:
        raise DitaError(
            f"{joint[0]} decides about all samples of a batch together, per_sample=True asks for decisions of each: "
            "they exclude each other; give the pipeline one sample a call, or leave per_sample out"
        )


def restore_pipeline(pipe: P) -> P:
    """Take all methods off; the pipeline is bit for bit what it was. Does nothing to a plain pipeline.

    Example:
        >>> pipe = restore_pipeline(pipe)  # doctest: +SKIP
    """
    session = _find(pipe)
    if session is not None:
        session.detach()
    return pipe


@contextlib.contextmanager
def accelerated(
    pipe: P, *methods: str | Method | type[Method], per_sample: bool = False, **options: Any
) -> Iterator[P]:
    """Accelerate within a `with` block, then put back what was attached before, if anything.

    Arguments and errors are those of `accelerate_pipeline`.

    Example:
        >>> with accelerated(pipe, "fbcache", threshold=0.1):  # doctest: +SKIP
        ...     pipe("a prompt")
    """
    old = _find(pipe)
    accelerate_pipeline(pipe, *methods, per_sample=per_sample, **options)
    try:
        yield pipe
    finally:
        restore_pipeline(pipe)
        if old is not None:
            old.attach()


def report(pipe: Any) -> Report:
    """What ran, what was skipped, and why, over the last runs.

    Raises:
        DitaError: the pipeline is not accelerated.

    Example:
        >>> print(report(pipe))  # doctest: +SKIP
    """
    return session_of(pipe).report()


def share_decisions(pipe: P, group: Any = None) -> P:
    """Have the ranks of a process group, which work on one sample together, compute what any of them wants computed.

    For ranks that share work in a way dita cannot see, such as the guidance branches of one sample. diffusers' context
    and tensor parallelism need no word. Every rank has to accelerate its pipeline by the same methods; holds until the
    pipeline is restored or accelerated anew.

    Args:
        pipe: an accelerated pipeline.
        group: of torch.distributed; by default all ranks.

    Raises:
        DitaError: the pipeline is not accelerated, torch.distributed is not initialised, or no group was given.

    Example:
        >>> pipe = share_decisions(pipe, group)  # doctest: +SKIP
    """
    session = session_of(pipe)
    check_group(group)
    session.share_decisions(torch.distributed.group.WORLD if group is None else group)
    return pipe


def _find(pipe: Any) -> Session | None:
    session = vars(pipe).get(_KEY) if hasattr(pipe, "__dict__") else None
    return session if session is not None and session.pipe is pipe else None


def session_of(pipe: Any) -> Session:
    """The session attached to a pipeline.

    Raises:
        DitaError: there is none.
    """
    session = _find(pipe)
    if session is None:
        raise DitaError(f"this {type(pipe).__name__} is not accelerated; call dita.accelerate_pipeline first")
    return session


def cite(pipe: Any) -> str:
    """BibTeX entries of the methods attached to a pipeline.

    Raises:
        DitaError: the pipeline is not accelerated.

    Example:
        >>> print(cite(pipe))  # doctest: +SKIP
    """
    return "\n\n".join(dict.fromkeys(m.citation for m in session_of(pipe).methods))
