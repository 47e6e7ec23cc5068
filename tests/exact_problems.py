"""Sampling problems whose exact score is known, as pipelines to which solver and timestep methods can be attached.

The data are a Gaussian, or a mixture of Gaussians, over latents of `SHAPE`. The "transformer" is an `nn.Module` whose
forward is the exact mean of the noise ("vp": DDPM's noise levels, eps prediction) or of the velocity ("flow"). The
scheduler is a real one of diffusers, and the loop is the usual one.

    problem = gaussian("vp")                       # or mixture("vp"), gaussian("flow"), mixture("flow")
    pipe = problem.pipeline("ddim")                # a name in SCHEDULERS, or any scheduler object of that process
    noise = problem.noise(batch=4, seed=0)         # float64 [B, *SHAPE], unit variance; a row depends on its number
    out = pipe(20, latents=noise)                  # 20 steps; float64 [B, *SHAPE]
    truth = pipe.exact(20, latents=noise)          # where the probability-flow ODE leads from the same start
    distance(out, truth)                           # root mean square over all elements

`pipe.exact` starts and ends at the noise levels of the scheduler's own run with that many steps (set `steps` as for the
call), so that it tells the error of the solver alone. `pipe.transformer.calls` counts the model's evaluations; a call
may bring a timestep for each row, as parallel methods do, and counts as one. `dita.accelerate_pipeline(pipe, method)`
works for methods on the sampling loop; the model has no blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict

SHAPE = (2, 4, 4)
SIZE = math.prod(SHAPE)
FINE = 100  # steps of the reference solution, whose error is then below 1e-8
Level = tuple[torch.Tensor, torch.Tensor]
"""The a and s of x = a x0 + s eps: float64, each a scalar or [B, 1]."""


@dataclass(frozen=True)
class Solver:
    """A scheduler of diffusers, set so that it converges at the order of its formula.

    Attributes:
        process: "vp" or "flow".
        order: its error falls with this power of the step length.
        build: makes one; with `even` set, the strength of a "vp" process falls evenly in its logarithm over the
            timesteps. DDPM's falls in a rush at the end, so that a multistep solver needs very many steps to show its
            order.
    """

    process: str
    order: int
    build: Callable[..., Any]


def _vp(name: str, **options: Any) -> Callable[..., Any]:
    def build(even: bool = False) -> Any:
        betas = {"trained_betas": _even_betas()} if even else {"beta_start": 1e-4, "beta_end": 0.02}
        return getattr(diffusers, name)(**betas, **options)

    return build


def _even_betas() -> list[float]:
    alphas = 1 / (1 + torch.linspace(math.log(0.002), math.log(40), 1000, dtype=torch.float64).exp() ** 2)
    return (1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])).tolist()


_MULTISTEP = {"solver_order": 2, "lower_order_final": False, "final_sigmas_type": "sigma_min"}
SCHEDULERS: dict[str, Solver] = {
    "ddim": Solver("vp", 1, _vp("DDIMScheduler", timestep_spacing="trailing", clip_sample=False)),
    "euler": Solver("vp", 1, _vp("EulerDiscreteScheduler", timestep_spacing="linspace")),
    "heun": Solver("vp", 2, _vp("HeunDiscreteScheduler", timestep_spacing="linspace")),
    "dpm++2m": Solver("vp", 2, _vp("DPMSolverMultistepScheduler", **_MULTISTEP)),
    "unipc": Solver("vp", 3, _vp("UniPCMultistepScheduler", **_MULTISTEP)),
    "flow-euler": Solver("flow", 1, lambda even=False: diffusers.FlowMatchEulerDiscreteScheduler()),
    "flow-heun": Solver("flow", 2, lambda even=False: diffusers.FlowMatchHeunDiscreteScheduler()),
}
"""By name. The corrector gives UniPC of order 2 one order more. Multistep solvers of flow models are missing: diffusers
rounds their timesteps to whole numbers."""


class ExactModel(torch.nn.Module):
    """The exact eps or velocity of a mixture of Gaussians that share their principal axes.

    Args:
        process: "vp" or "flow".
        means: [K, SIZE], in the principal axes.
        variances: [K, SIZE], along them.
        weights: [K], which sum to 1.

    Attributes:
        calls, rows: how often it was called, and on how many samples in all.
        sigmas: strength of the noise relative to the data at every whole timestep of a "vp" process.
    """

    axes: torch.Tensor
    means: torch.Tensor
    variances: torch.Tensor
    weights: torch.Tensor
    sigmas: torch.Tensor

    def __init__(self, process: str, means: torch.Tensor, variances: torch.Tensor, weights: torch.Tensor) -> None:
        super().__init__()
        axes = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=_generator(7), dtype=torch.float64)).Q
        for name, value in {"axes": axes, "means": means, "variances": variances, "weights": weights}.items():
            self.register_buffer(name, value.double())
        self.register_buffer("sigmas", torch.zeros(0, dtype=torch.float64))
        self.process, self.calls, self.rows = process, 0, 0
        self.config = FrozenDict(process=process, in_channels=SHAPE[0], out_channels=SHAPE[0], components=len(weights))

    def forward(self, hidden_states: torch.Tensor, timestep: Any, return_dict: bool = True) -> Any:
        """Evaluate at [B, *SHAPE] and the timesteps of the noise schedule, from 0 to 1000: one, or [B]."""
        self.calls, self.rows = self.calls + 1, self.rows + len(hidden_states)
        sample = self.output(hidden_states, self.level(timestep))
        return SimpleNamespace(sample=sample) if return_dict else (sample,)

    def level(self, timestep: Any) -> Level:
        """The noise level of timesteps, whole or not."""
        t = torch.as_tensor(timestep, dtype=torch.float64)
        t = t[:, None] if t.ndim else t
        if self.process == "flow":
            return 1 - t / 1000, t / 1000
        below = t.floor().clamp(0, len(self.sigmas) - 2).long()
        return of_sigma(torch.lerp(self.sigmas[below], self.sigmas[below + 1], t - below))

    def output(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        """Mean of eps, or of eps - x0, given x: of the shape and dtype of x."""
        a, s = level
        y = (x.double().flatten(1) @ self.axes)[:, None]  # [B, 1, SIZE]
        a, s = (v[..., None] for v in (a, s)) if a.ndim else (a, s)
        total = a**2 * self.variances + s**2
        away = (y - a * self.means) / total  # [B, K, SIZE]
        logits = self.weights.log() - 0.5 * (away * (y - a * self.means) + total.log()).sum(-1)
        share = logits.softmax(-1)[..., None]
        eps = (share * s * away).sum(1)
        clean = (share * (self.means + a * self.variances * away)).sum(1)
        found = eps if self.process == "vp" else eps - clean
        return (found @ self.axes.mT).view(x.shape).to(x.dtype)


class ExactPipeline:
    """The usual sampling loop around an `ExactModel`.

    Args:
        model: what denoises.
        scheduler: of diffusers, for the model's process.
    """

    def __init__(self, model: ExactModel, scheduler: Any) -> None:
        self.transformer, self.scheduler = model, scheduler
        if model.process == "vp":
            alphas = scheduler.alphas_cumprod.double()
            model.sigmas = ((1 - alphas) / alphas).sqrt()

    @property
    def components(self) -> dict[str, Any]:
        """As of a diffusers pipeline."""
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(
        self, num_inference_steps: int = 20, latents: torch.Tensor | None = None, generator: Any = None, **schedule: Any
    ) -> torch.Tensor:
        """Sample from noise of unit variance [B, *SHAPE], which is also the shape and dtype of what is returned.

        Without noise, `generator` draws one row. `schedule` holds further arguments of `set_timesteps`.
        """
        if latents is None:
            latents = torch.randn(1, *SHAPE, generator=generator, dtype=torch.float64)
        self._set(num_inference_steps, schedule)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for t in self.scheduler.timesteps:
            scale = getattr(self.scheduler, "scale_model_input", None)
            given = latents if scale is None else scale(latents, t)
            output = self.transformer(hidden_states=given, timestep=t, return_dict=False)[0]
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        assert latents is not None
        return latents

    @torch.no_grad()
    def exact(self, num_inference_steps: int, latents: torch.Tensor, **schedule: Any) -> torch.Tensor:
        """Where the probability-flow ODE leads: closed form for one Gaussian, else `FINE` steps of Runge and Kutta."""
        self._set(num_inference_steps, schedule)
        model, (first, last), scaled = self.transformer, ends(self.scheduler), in_sigmas(self.scheduler)
        x = latents.double() * getattr(self.scheduler, "init_noise_sigma", 1.0) * (first[0] if scaled else 1)
        alone = len(model.weights) == 1
        x = _closed(model, x, first, last) if alone else integrate(model, x, first, last, FINE)
        return x / last[0] if scaled else x

    def _set(self, steps: int, schedule: dict[str, Any]) -> None:
        self.scheduler.set_timesteps(**schedule) if schedule else self.scheduler.set_timesteps(steps)


@dataclass(frozen=True)
class Problem:
    """Data with a known score: weights [K], means and variances [K, SIZE] along the axes of `ExactModel`."""

    process: str
    means: torch.Tensor
    variances: torch.Tensor
    weights: torch.Tensor

    def pipeline(self, scheduler: Any) -> ExactPipeline:
        """A fresh pipeline on a scheduler of that name, or on that scheduler."""
        if isinstance(scheduler, str):
            assert SCHEDULERS[scheduler].process == self.process, f"{scheduler} is not for {self.process}"
            scheduler = SCHEDULERS[scheduler].build()
        return ExactPipeline(ExactModel(self.process, self.means, self.variances, self.weights), scheduler)

    def noise(self, batch: int = 4, seed: int = 0, first: int = 0) -> torch.Tensor:
        """Standard normal float64 [B, *SHAPE]; a row depends on the seed and its number, which counts from `first`."""
        rows = range(first, first + batch)
        return torch.stack(
            [torch.randn(SHAPE, generator=_generator(1000 * seed + row), dtype=torch.float64) for row in rows]
        )


def gaussian(process: str) -> Problem:
    """One Gaussian with standard deviations from 0.2 to 1.5 along its axes."""
    mean = torch.randn(1, SIZE, generator=_generator(1), dtype=torch.float64)
    variances = torch.linspace(math.log(0.2), math.log(1.5), SIZE, dtype=torch.float64).exp()[None] ** 2
    return Problem(process, 0.5 * mean, variances, torch.ones(1, dtype=torch.float64))


def mixture(process: str) -> Problem:
    """Three Gaussians that overlap little, with standard deviations from 0.3 to 0.8 and unequal weights."""
    means = torch.randn(3, SIZE, generator=_generator(2), dtype=torch.float64)
    stds = 0.3 + 0.5 * torch.rand(3, SIZE, generator=_generator(3), dtype=torch.float64)
    return Problem(process, 0.6 * means, stds**2, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the difference."""
    return (a.double() - b.double()).square().mean().sqrt().item()


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """The order of convergence: minus the slope of log error against log steps, by least squares."""
    x = torch.tensor(steps, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    return -((x - x.mean()) * (y - y.mean())).sum().item() / (x - x.mean()).square().sum().item()


def in_sigmas(scheduler: Any) -> bool:
    """Its samples are x / a, which it scales for the model."""
    return hasattr(scheduler, "sigmas") and "DiscreteScheduler" in type(scheduler).__name__ and not of_flow(scheduler)


def of_flow(scheduler: Any) -> bool:
    """It solves a flow of x = (1 - s) x0 + s eps."""
    return "FlowMatch" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas"))


def of_sigma(sigma: torch.Tensor) -> Level:
    """The variance-preserving level of noise of that strength relative to the data."""
    a = (1 + sigma**2).rsqrt()
    return a, sigma * a


def ends(scheduler: Any) -> tuple[Level, Level]:
    """The noise levels at which the run that is set starts and ends."""
    if not hasattr(scheduler, "sigmas"):  # DDIM
        alphas = [
            scheduler.alphas_cumprod[int(scheduler.timesteps[0])].double(),
            scheduler.final_alpha_cumprod.double(),
        ]
        start, end = ((alpha.sqrt(), (1 - alpha).sqrt()) for alpha in alphas)
        return start, end
    first, last = scheduler.sigmas[0].double(), scheduler.sigmas[-1].double()
    if of_flow(scheduler):
        return (1 - first, first), (1 - last, last)
    return of_sigma(first), of_sigma(last)


def _closed(model: ExactModel, x: torch.Tensor, first: Level, last: Level) -> torch.Tensor:
    def spread(level: Level) -> torch.Tensor:
        return (level[0] ** 2 * model.variances + level[1] ** 2).sqrt()

    units = (x.flatten(1) @ model.axes - first[0] * model.means) / spread(first)
    return ((last[0] * model.means + spread(last) * units) @ model.axes.mT).view(x.shape)


def integrate(model: ExactModel, x: torch.Tensor, first: Level, last: Level, steps: int) -> torch.Tensor:
    """Solve the probability-flow ODE by the classical fourth-order method.

    It is solved for x / (a + s) over u = s / (a + s), whose slope is the mean of eps - x0 and bounded everywhere.
    """
    flow = ExactModel("flow", model.means, model.variances, model.weights)
    x = x / (first[0] + first[1])
    times = torch.linspace(float(first[1] / sum(first)), float(last[1] / sum(last)), steps + 1, dtype=torch.float64)

    def slope_at(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return flow.output(x, (1 - u, u))

    for u, after in zip(times[:-1], times[1:], strict=True):
        h = after - u
        k1 = slope_at(x, u)
        k2 = slope_at(x + h / 2 * k1, u + h / 2)
        k3 = slope_at(x + h / 2 * k2, u + h / 2)
        k4 = slope_at(x + h * k3, after)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x * (last[0] + last[1])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
