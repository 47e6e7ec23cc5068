"""Training SLA's projections in the user's own sampling loop.

    python -m dita.eval.training.sla --pipeline fashion-wan --save sla.safetensors

Each call of the transformer is run dense (the teacher) and then sparse with the linear branch (the student), on the
same input. The projections of all layers take one step of Adam down the squared difference of the two outputs, and the
loop goes on with the teacher's. For a flow-matching model that is the flow-matching loss with the model's own velocity
as target, along its own trajectories, instead of that of training data; it needs no data but the calls' conditioning.

The projections live outside the model, and nothing of it changes. On a CPU the student's attention is computed sparse.
On a GPU the kernel has no backward pass: there the student's attention is a masked one with its whole map in memory,
which long sequences do not allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.errors import DitaError
from dita.fingerprint import fingerprint
from dita.kernels.block_sparse import block_sparse_attention
from dita.kernels.guards import steps_of
from dita.kernels.plan import BlockPlan
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.handler import SparseHandler
from dita.kernels.sparse.policy import Asked
from dita.kernels.sparse.sla import SLA, Projection, SparseLinear, load_projections
from dita.seams import Call, Features, Handler, Site


@dataclass
class Training:
    """The projections and how they learn.

    Attributes:
        rate: of Adam at the beginning; it falls to zero with `progress`. 0 only measures.
        progress: share of the training that is done.
        projections: layer -> W [D, D] and b [D]; made at zero when a layer is first seen.
        errors: of every call so far, mean squared difference of the outputs relative to the teacher's mean square.
        model: fingerprint of the transformer that they learn on.
    """

    rate: float = 3e-3
    progress: float = 0.0
    projections: dict[int, Projection] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)
    model: str = ""
    _optimizer: torch.optim.Adam | None = None

    def of(self, layer: int, like: torch.Tensor) -> None:
        """Make the projection of a layer whose heads are like this [..., D]."""
        if layer not in self.projections:
            width, device = like.shape[-1], like.device
            self.projections[layer] = torch.zeros(width, width, device=device), torch.zeros(width, device=device)

    def learn(self, loss: torch.Tensor) -> None:
        """One step of Adam."""
        tensors = [tensor for pair in self.projections.values() for tensor in pair]
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(tensors, lr=self.rate, betas=(0.9, 0.99))
        self._optimizer.param_groups[0]["lr"] = self.rate * (1 - self.progress)
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient
        self._optimizer.step()
        for tensor in tensors:
            tensor.grad = None


class Student(SparseLinear):
    """The policy of both passes: dense for the teacher, differentiable for the student."""

    def __init__(self, density: float, block: int, training: Training) -> None:
        super().__init__(density, block, training.projections)
        self.training, self.teaching = training, False

    def attend(self, asked: Asked) -> torch.Tensor:
        """See `Policy.attend`."""
        if self.teaching:
            return asked.dense()
        self.training.of(asked.layer, asked.q)
        for tensor in self.training.projections[asked.layer]:
            tensor.requires_grad_(self.training.rate > 0)
        return super().attend(asked)

    def attention(self, asked: Asked, plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Policy.attention`."""
        backend = "naive" if asked.q.is_cuda and self.training.rate > 0 else "auto"
        return block_sparse_attention(asked.q, asked.k, asked.v, plan, asked.scale, asked.key_mask, backend)


class TrainingHandler(SparseHandler):
    """Runs every call of a transformer twice. See `dita.seams.Handler`."""

    def __init__(self, policy: Student, sites: tuple[Site, ...], text_at: str) -> None:
        super().__init__(policy, sites, text_at)
        self.student = policy
        self.sites = (Site("model", "model"), *sites)

    def drives(self, site: Site) -> bool:
        """The model alone."""
        return site.kind == "model"

    def drive(self, site: Site, occurrence: int, call: Call, run: Callable[[], Features]) -> Features:
        """Teach, then learn."""
        training, policy = self.student.training, self.student
        if torch.is_inference_mode_enabled():
            raise DitaError("SLA learns by gradients, which torch.inference_mode forbids; use torch.no_grad")
        policy.teaching = True
        try:
            exact = run()
        finally:
            policy.teaching = False
        if call.position.step < steps_of(policy.dense_steps, call.position.steps):
            return exact
        with torch.set_grad_enabled(training.rate > 0):
            outputs = run()
            error = sum(_error(a, b) for a, b in zip(outputs, exact, strict=True) if a is not None and b is not None)
            if not isinstance(error, torch.Tensor):
                raise DitaError("the transformer put out no tensor")
            if training.rate > 0:
                training.learn(error)
        training.errors.append(error.item())
        return exact


def _error(outputs: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return (outputs.float() - exact.float()).square().mean() / exact.float().square().mean()


@dataclass(frozen=True)
class _Pupil(SparseMethod):
    """The training as a method, so that it is attached and taken off like any other."""

    method: SLA = field(default_factory=SLA, compare=False)
    training: Training = field(default_factory=Training, compare=False, repr=False)

    name: ClassVar[str] = "training"

    def handler(self, anatomy: Anatomy) -> Handler:
        """The two passes."""
        policy = Student(self.method.density, self.method.block, self.training)
        policy.dense_steps, policy.dense_layers = self.method.dense_steps, self.method.dense_layers
        sites = super().handler(anatomy).sites
        return TrainingHandler(policy, sites, anatomy.text_at)

    def policy(self, anatomy: Anatomy) -> SparseLinear:
        """Only asked for its sites."""
        return SparseLinear(1.0, self.method.block, {})

    @classmethod
    def disabled(cls) -> _Pupil:
        """It changes no output, so that no warning is due."""
        return cls()


def train_sla(
    pipe: Any,
    call: Callable[[Any], Any],
    method: SLA,
    save: str | Path,
    runs: int = 8,
    rate: float = 3e-3,
    seed: int = 0,
) -> SLA:
    """Tune SLA's projections on a pipeline, which comes back as it was.

    Args:
        pipe: with one transformer.
        call: runs it once, on other conditioning each time if it likes; torch's global generator is seeded before.
        method: density, block and dense steps to train for.
        save: file to write the projections to.
        runs: how often `call` runs; each call of the transformer takes about four times as long as a plain one.
        rate: of Adam at the beginning; it falls to zero. Ten times the default made matters worse on fashion-wan.
        seed: of the first run; the next ones follow.

    Returns:
        The method with these weights.

    Raises:
        DitaError: two transformers, a call that ran no sampling loop, or one whose steps are all dense.

    Example:
        >>> sla = train_sla(pipe, lambda p: p("a prompt"), SLA(density=0.1), "sla.safetensors")  # doctest: +SKIP
    """
    training = _run(pipe, call, method, Training(rate=rate), runs, seed)
    save_projections(training.projections, save, training.model)
    return replace(method, weights=str(save))


def measure_sla(pipe: Any, call: Callable[[Any], Any], method: SLA, runs: int = 1, seed: int = 0) -> float:
    """How far SLA's outputs are from the dense ones, on the same inputs along the dense trajectory.

    Args: as of `train_sla`; `method.weights` may name projections.

    Returns:
        Mean over sparse calls of the mean squared difference, relative to the dense output's mean square.

    Example:
        >>> measure_sla(pipe, lambda p: p("a prompt"), SLA(density=0.1))  # doctest: +SKIP
    """
    return fmean(_run(pipe, call, method, Training(rate=0.0), runs, seed).errors)


def _run(pipe: Any, call: Callable[[Any], Any], method: SLA, training: Training, runs: int, seed: int) -> Training:
    from dita.session import accelerated, transformers_of

    models = list(transformers_of(pipe).values())
    if len(models) != 1:
        raise DitaError(f"SLA is trained for one transformer, and {type(pipe).__name__} has {len(models)}")
    training.model = fingerprint(models[0])
    if method.weights:
        training.projections.update(load_projections(method.weights, model=training.model))
    with accelerated(pipe, _Pupil(method=method, training=training)):
        for number in range(runs):
            training.progress = number / runs
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(seed + number)
                call(pipe)
    if not training.errors:
        raise DitaError("the call ran no step that is to be sparse: it must run the sampling loop of the pipeline")
    return training


def save_projections(projections: dict[int, Projection], path: str | Path, model: str = "") -> None:
    """Write projections as safetensors: "weight" [L, D, D] and "bias" [L, D], float32, layers in order.

    `model`, the fingerprint of the transformer that they were trained on, goes into the header.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_projections({0: (torch.eye(2), torch.ones(2))}, f"{folder}/sla.safetensors")
        ...     load_projections(f"{folder}/sla.safetensors")[0][1]
        tensor([1., 1.])
    """
    from safetensors.torch import save_file

    weights, biases = zip(*(projections[layer] for layer in sorted(projections)), strict=True)
    tensors = {"weight": torch.stack(weights), "bias": torch.stack(biases)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, {"model": model})
