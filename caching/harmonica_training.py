"""Training HarmoniCa's router in the user's own sampling loop.

Step-wise denoising training: each call of the transformer is run in full (the teacher), then with every module blended
with what is kept of it (the student), on the same input; the router's row of that step takes one optimizer step, and
the loop goes on with the student's output. Neither data nor weights are involved: only the router changes. See
`dita.caching.harmonica` for the method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.storage import bytes_of
from dita.caching.table import Measurement, guidance_of
from dita.errors import DitaError
from dita.patch import Patch
from dita.seams import Call, Features, Handler, Site

LIMIT = 5.0
"""Largest absolute logit."""
START = -1.0
"""Of all logits: above the published threshold, but not far."""
BASE = (-1, -1)
"""The window of the run that computes everything."""

Student = Callable[[torch.Tensor], tuple[torch.Tensor, Features]]


def error_of(outputs: Features, exact: Features) -> torch.Tensor:
    """Mean squared difference of a transformer's outputs, in float32 at least.

    Args:
        outputs, exact: tensors [B, ...] of equal shapes.

    Example:
        >>> error_of((torch.tensor([[1.0, 3.0]]),), (torch.tensor([[1.0, 1.0]]),))
        tensor(2.)
    """
    pairs = [(a, b) for a, b in zip(outputs, exact, strict=True) if a is not None and b is not None]
    at_least = [torch.promote_types(a.dtype, torch.float32) for a, _ in pairs]
    errors = [(a.to(kind) - b.to(kind)).square().mean() for (a, b), kind in zip(pairs, at_least, strict=True)]
    return torch.stack(errors).mean()


@dataclass
class Training:
    """The router and how it learns.

    Attributes:
        threshold: what is kept of a module is replaced where its sigmoid is above it.
        beta: weight of the mean sigmoid of a step against its weighted error, whose median over steps is 1 before the
            training.
        rate: of Adam, about what a logit moves in one trajectory; it falls to zero with `progress`.
        progress: share of the training that is done.
        names: of the module sites, the columns of the router.
        logits: step of the schedule -> [sites]; the first step of a run has none.
        errors: step -> those of its calls, when the proxy was measured.
        proxy: step -> weight of its error: how much the final latents change when the router is followed there.
        window: while the proxy is measured, the first and the last step at which the router comes to be followed;
            earlier ones are known from the run before, later ones are computed. None while training.
        sink: the conditions of the runs.
    """

    threshold: float = 0.1
    beta: float = 4.0
    rate: float = 0.4
    progress: float = 0.0
    names: list[str] = field(default_factory=list)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    proxy: dict[int, float] = field(default_factory=dict)
    errors: dict[int, list[float]] = field(default_factory=dict)
    window: tuple[int, int] | None = None
    visited: set[int] = field(default_factory=set)
    sink: Measurement = field(default_factory=Measurement)
    _optimizers: dict[int, torch.optim.Optimizer] = field(default_factory=dict)

    def row(self, step: int) -> torch.Tensor:
        """The logits of a step, made on its first visit."""
        if step not in self.logits:
            self.logits[step] = torch.full((len(self.names),), START, requires_grad=True)
            self._optimizers[step] = torch.optim.Adam([self.logits[step]], lr=self.rate)
        return self.logits[step]

    def loss(self, step: int, error: torch.Tensor, sigmoids: torch.Tensor) -> torch.Tensor:
        """The objective of one call: the step's error, weighted by its share in the image's, and the share computed."""
        return self.proxy.get(step, 0.0) * error + self.beta * sigmoids.mean()

    def learn(self, step: int, student: Student) -> Features:
        """One optimizer step on the row of one step.

        Args:
            step: of the schedule.
            student: maps the row to the loss and the student's outputs.
        """
        row = self.row(step)
        with torch.enable_grad():
            loss, outputs = student(row)
            (row.grad,) = torch.autograd.grad(loss, [row])
        optimizer = self._optimizers[step]
        optimizer.param_groups[0]["lr"] = self.rate * (1 - self.progress)
        optimizer.step()
        with torch.no_grad():
            row.clamp_(-LIMIT, LIMIT)
        return outputs

    def sigmoids(self) -> dict[str, list[float]]:
        """Site -> sigmoid per step; steps without a row, the first and those that no run reached, are computed."""
        rows = {step: row.detach().sigmoid().tolist() for step, row in self.logits.items()}
        always = torch.tensor(LIMIT).sigmoid().item()
        return {
            name: [round(rows[i][column], 4) if i in rows else round(always, 4) for i in range(self.sink.steps)]
            for column, name in enumerate(self.names)
        }


class RouterHandler(Handler):
    """Runs one transformer's modules as the training wants them. See `dita.seams.Handler`."""

    def __init__(self, anatomy: Anatomy, training: Training) -> None:
        self.training, self.model = training, anatomy.model
        self.sites: tuple[Site, ...] = (Site("model", "model"), *(part.site for part in anatomy.modules))
        training.names += [p.site.name for p in anatomy.modules if p.site.name not in training.names]
        self._columns = {name: column for column, name in enumerate(training.names)}
        self._kept: dict[Any, Features] = {}
        self._fresh: dict[Any, Features] = {}
        self._sigmoids: torch.Tensor | None = None
        self._results: dict[Any, Features] = {}
        self._starts: dict[Any, torch.Tensor] = {}

    def begin_run(self) -> None:
        """Forget everything, unless this run goes on with the proxy."""
        if self.training.window is None or self.training.window == BASE:
            self._kept, self._results, self._starts = {}, {}, {}

    def begin_call(self, call: Call) -> None:
        """Write down the conditions, and see that they stay the same."""
        sink, position = self.training.sink, call.position
        if sink.steps and sink.steps != position.schedule_length:
            raise DitaError(
                f"the call ran {sink.steps} steps first and {position.schedule_length} now; a router is trained for "
                "one number of steps"
            )
        sink.steps, sink.scheduler, sink.shape = position.schedule_length, call.scheduler, tuple(call.shapes[0][1:])
        if position.local_step == 0:
            sink.guidance.add(guidance_of(call))
        self.training.visited.add(position.index)
        if torch.is_inference_mode_enabled():
            raise DitaError("the router learns by gradients, which torch.inference_mode forbids; use torch.no_grad")
        if getattr(self.model, "is_gradient_checkpointing", False):
            raise DitaError("gradient checkpointing runs modules twice; disable it to train a router")

    def drives(self, site: Site) -> bool:
        """All of them."""
        return True

    def drive(self, site: Site, occurrence: int, call: Call, run: Callable[[], Features]) -> Features:
        """Train in a call of the model; blend a module."""
        if site.kind == "model":
            return self._measure(call, run) if self.training.window is not None else self._train(call, run)
        key, new = (call.position.stream, site, occurrence), run()
        old = self._kept.get(key)
        if self._sigmoids is not None and old is not None:
            share = self._sigmoids[self._columns[site.name]]
            new = tuple(b if a is None or b is None else _blend(a, b, share) for a, b in zip(old, new, strict=True))
        self._fresh[key] = new
        return new

    def _keep(self, row: torch.Tensor | None) -> None:
        """Keep what the modules put out in the last pass, where the router says so; all of it without a row."""
        replaced = None if row is None else (row.sigmoid() > self.training.threshold).tolist()
        for key, features in self._fresh.items():
            if replaced is None or key not in self._kept or replaced[self._columns[key[1].name]]:
                self._kept[key] = tuple(None if t is None else t.detach().clone() for t in features)
        self._fresh.clear()

    def _pass(self, run: Callable[[], Features], sigmoids: torch.Tensor | None = None) -> Features:
        self._sigmoids = sigmoids
        self._fresh.clear()
        try:
            return run()
        finally:
            self._sigmoids = None

    def _train(self, call: Call, run: Callable[[], Features]) -> Features:
        position, training = call.position, self.training
        exact = self._pass(run)
        if position.local_step == 0:
            self._keep(None)
            return exact

        def student(row: torch.Tensor) -> tuple[torch.Tensor, Features]:
            sigmoids = row.sigmoid()
            outputs = self._pass(run, sigmoids.to(call.latents.device if call.latents is not None else row.device))
            return training.loss(position.index, error_of(outputs, exact).to(row.device), sigmoids), outputs

        before = training.row(position.index).detach().clone()
        outputs = training.learn(position.index, student)
        self._keep(before)
        return tuple(None if t is None else t.detach() for t in outputs)

    def _measure(self, call: Call, run: Callable[[], Features]) -> Features:
        """Follow the router up to a step and compute what comes after; what earlier runs did is not done again."""
        position, training = call.position, self.training
        key = (position.index, position.stream)
        start = call.latents
        if position.step == 0 and start is not None and not torch.equal(self._starts.setdefault(key, start), start):
            raise DitaError(
                "the calibration call started from other noise under the same seed of torch; let all chance in it come "
                "from torch's global generator, or from generators that it makes itself"
            )
        first, last = training.window or BASE
        if key in self._results and position.index < first:
            return self._results[key]
        exact = self._pass(run)
        if position.local_step == 0:
            self._keep(None)
        elif first <= position.index <= last:
            row = training.row(position.index).detach()
            self._results[key] = self._pass(run, row.sigmoid())
            self._keep(row)
            training.errors.setdefault(position.index, []).append(error_of(self._results[key], exact).item())
            return self._results[key]
        self._results[key] = exact
        return exact

    def bytes_held(self) -> int:
        """Bytes of what is kept."""
        return bytes_of(t for features in self._kept.values() for t in features)


@dataclass(frozen=True)
class _Router(CachingMethod):
    """The training as a method, so that it is attached and taken off like any other."""

    training: Training = field(default_factory=Training, compare=False, repr=False)

    name: ClassVar[str] = "training"

    def handler(self, anatomy: Anatomy) -> Handler:
        anatomy.require("module", "harmonica")
        return RouterHandler(anatomy, self.training)

    @classmethod
    def disabled(cls) -> _Router:
        """It skips nothing, so that no warning is due."""
        return cls()


def train_router(
    pipe: Any,
    call: Callable[[Any], Any],
    training: Training,
    iterations: int,
    refresh: int,
    stride: int = 1,
    seed: int = 0,
) -> Training:
    """Let a router learn from trajectories of a pipeline, which comes back as it was, weights included.

    Args:
        pipe: the pipeline.
        call: runs it once, with torch's global generator seeded differently each time.
        training: the router, changed in place.
        iterations: trajectories; with 0 one is run, for its conditions, and nothing learned.
        refresh: trajectories between two measurements of the proxy.
        stride: steps that share one value of it; a measurement costs as much as steps / (2 stride) plain runs.
        seed: of the first trajectory.

    Raises:
        DitaError: the call ran no sampling loop, other numbers of steps, or from other noise under the same seed.

    Example:
        >>> train_router(pipe, lambda p: p("a prompt"), Training(beta=4.0), 40, 10)  # doctest: +SKIP
    """
    from dita.session import accelerated

    with accelerated(pipe, _Router(training=training)), _still(pipe):
        if iterations == 0:
            training.window = BASE
            _seeded(pipe, call, seed)
            training.window = None
            for step in sorted(training.visited)[1:]:
                training.row(step)
        scale = 0.0
        for number in range(iterations):
            if number % refresh == 0:
                changes = measure_proxy(pipe, call, training, seed + number, stride)
                weighted = [change * fmean(training.errors[step]) for step, change in changes.items()]
                # Later proxies are measured with another router; the unit stays that of the first.
                scale = scale or median(weighted or [0.0])
                training.proxy = {step: change / scale if scale else 0.0 for step, change in changes.items()}
            training.progress = number / iterations
            _seeded(pipe, call, seed + number)
    if not training.sink.steps:
        raise DitaError("the calibration call ran no sampling loop: it must run the pipeline once")
    return training


def measure_proxy(
    pipe: Any, call: Callable[[Any], Any], training: Training, seed: int, stride: int = 1
) -> dict[int, float]:
    """By how much the final latents change when the router is followed at further steps, from the first step on.

    Args:
        pipe: with the training attached.
        call, training, seed, stride: see `train_router`.

    Returns:
        step -> mean squared change, shared equally among the steps of a stride. `training.errors` holds each step's own
        errors besides.
    """
    training.errors, training.visited, training.window = {}, set(), BASE
    changes: dict[int, float] = {}
    try:
        last = _seeded(pipe, call, seed)
        steps = sorted(training.visited)[1:]
        for start in range(0, len(steps), stride):
            group = steps[start : start + stride]
            training.window = (group[0], group[-1])
            now = _seeded(pipe, call, seed)
            changes |= dict.fromkeys(group, error_of((now,), (last,)).item() / len(group))
            last = now
    finally:
        training.window = None
    return {step: change for step, change in changes.items() if step in training.errors}


def _seeded(pipe: Any, call: Callable[[Any], Any], seed: int) -> torch.Tensor:
    """Run the pipeline once and return the latents that its last step put out."""
    latents: list[torch.Tensor] = []

    def around(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = original(*args, **kwargs)
        latents[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    patch = Patch(pipe.scheduler, "step", around)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        patch.apply()
        try:
            call(pipe)
        finally:
            patch.remove()
    if not latents:
        raise DitaError("the calibration call ran no sampling loop: it must run the pipeline once")
    return latents[0].detach()


@contextmanager
def _still(pipe: Any) -> Iterator[None]:
    """Keep the weights out of the graph, which halves what it holds."""
    from dita.session import transformers_of

    learning = [p for model in transformers_of(pipe).values() for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _blend(old: torch.Tensor, new: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    share = share.to(new.dtype)
    return share * new + (1 - share) * old
