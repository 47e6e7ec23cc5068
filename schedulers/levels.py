"""What a model's output says of the noise in its input, for any scheduler, and the input before noise was added."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dita.errors import DitaError

Kind = Literal["noise", "velocity", "flow", "clean"]
_KINDS: dict[str, Kind] = {
    "epsilon": "noise",
    "v_prediction": "velocity",
    "flow_prediction": "flow",
    "sample": "clean",
}
_PACKING = ("latents", "batch_size", "num_channels_latents", "height", "width")


def predicts(scheduler: Any) -> Kind:
    """What a model puts out for this scheduler, where x = alpha x0 + sigma n is what it reads.

    "noise" is n, "velocity" is alpha n - sigma x0, "flow" is n - x0 and "clean" is x0.

    Raises:
        DitaError: the scheduler does not say, or has no noise levels to read.

    Example:
        >>> from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
        >>> predicts(DDIMScheduler()), predicts(FlowMatchEulerDiscreteScheduler())
        ('noise', 'flow')
    """
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", {})
    said = config.get("prediction_type")
    flow = said is None and any(base.__name__.startswith("FlowMatch") for base in type(scheduler).__mro__)
    kind = "flow" if flow else _KINDS.get(str(said))
    levels = "sigmas" if kind == "flow" else "alphas_cumprod"
    if kind is None or not hasattr(scheduler, levels):
        raise DitaError(
            f"the scheduler is {name} with prediction_type {said!r}; expected one that predicts epsilon, v_prediction "
            "or sample over alphas_cumprod, or a flow-matching one"
        )
    return kind


@dataclass(frozen=True)
class Level:
    """A noise level: the model reads x = alpha x0 + sigma n.

    Attributes:
        kind: what the model puts out; see `predicts`.
        alpha, sigma: shares of picture and noise; they sum to 1 under flow matching, their squares do elsewhere.
        sign: -1 where time runs upwards (Mochi), so that the model puts out x0 - n.
    """

    kind: Kind
    alpha: float
    sigma: float
    sign: float = 1.0

    @classmethod
    def of(cls, scheduler: Any, entry: int) -> Level:
        """The level at an entry of the scheduler's list of timesteps.

        Raises:
            DitaError: see `predicts`.

        Example:
            >>> from diffusers import FlowMatchEulerDiscreteScheduler
            >>> scheduler = FlowMatchEulerDiscreteScheduler()
            >>> scheduler.set_timesteps(4)
            >>> Level.of(scheduler, 0)
            Level(kind='flow', alpha=0.0, sigma=1.0, sign=1.0)
        """
        kind = predicts(scheduler)
        if kind == "flow":
            sigma = float(scheduler.sigmas[entry])
            if scheduler.config.get("invert_sigmas"):
                return cls(kind, sigma, 1 - sigma, -1.0)
            return cls(kind, 1 - sigma, sigma)
        # Solvers with a list of sigmas may stand between two trained timesteps; there sigma / alpha is what they list.
        if hasattr(scheduler, "sigmas"):
            alpha = (1 + float(scheduler.sigmas[entry]) ** 2) ** -0.5
        else:
            alpha = float(scheduler.alphas_cumprod[int(scheduler.timesteps[entry])]) ** 0.5
        return cls(kind, alpha, max(0.0, 1 - alpha**2) ** 0.5)

    def output(self, sample: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """What a model would put out that takes `sample` for `clean` with noise.

        Args:
            sample, clean: of the same shape.

        Raises:
            DitaError: there is no noise at this level, so that it cannot be told.

        Example:
            >>> Level("flow", 0.5, 0.5).output(torch.tensor([1.0]), torch.tensor([0.5]))
            tensor([1.])
        """
        if self.kind == "clean":
            return clean
        if self.sigma <= 0:
            raise DitaError("this step is at a noise level of 0: no noise is left to be told from the picture")
        if self.kind == "flow":
            return (sample - clean) * (self.sign / self.sigma)
        if self.kind == "noise":
            return (sample - self.alpha * clean) / self.sigma
        return (self.alpha * sample - clean) / self.sigma

    def clean(self, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The picture that the model sees in `sample`, if it puts out `output`.

        Raises:
            DitaError: the model predicts noise, and there is nothing but noise at this level.

        Example:
            >>> Level("flow", 0.5, 0.5).clean(torch.tensor([1.0]), torch.tensor([1.0]))
            tensor([0.5000])
        """
        if self.kind == "clean":
            return output
        if self.kind == "flow":
            return sample - self.sign * self.sigma * output
        if self.kind == "velocity":
            return self.alpha * sample - self.sigma * output
        if self.alpha <= 0:
            raise DitaError("this step begins from nothing but noise, in which a predicted noise shows no picture")
        return (sample - self.sigma * output) / self.alpha


def entry_of(scheduler: Any, timestep: Any, otherwise: int) -> int:
    """The number of a timestep in the scheduler's list; `otherwise` if it is None or not in the list.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> scheduler = DDIMScheduler()
        >>> scheduler.set_timesteps(4)
        >>> entry_of(scheduler, scheduler.timesteps[2], 0)
        2
    """
    if timestep is None:
        return otherwise
    listed = torch.as_tensor(scheduler.timesteps).flatten()
    matches = (listed == torch.as_tensor(timestep, device=listed.device).flatten()[0]).nonzero()
    return int(matches[0]) if len(matches) else otherwise


class Origin:
    """Remembers what a run's latents were before the scheduler added noise to them.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def noised(self, clean: torch.Tensor, result: torch.Tensor) -> None:
        """The scheduler made `result` of `clean`."""
        self._seen = (clean, result)

    def clean(self, latents: torch.Tensor) -> torch.Tensor | None:
        """The latents of the input image, in the layout of the loop.

        Args:
            latents: [B, ...], with which the loop begins.

        Returns:
            of the same shape; None where no noise was added to anything, so that the latents are noise from the first.

        Raises:
            DitaError: what the scheduler made is not what the loop begins with.
        """
        if self._seen is None:
            return None
        for arrange in (lambda t: t, self._pack):
            result = arrange(self._seen[1])
            if result is not None and result.shape == latents.shape and torch.equal(result.to(latents.dtype), latents):
                clean = arrange(self._seen[0].expand_as(self._seen[1]))
                assert clean is not None
                return clean
        raise DitaError(
            f"{type(self._pipe).__name__} begins with latents of shape {list(latents.shape)}, which are not those of "
            f"shape {list(self._seen[1].shape)} to which the scheduler added noise: its input image cannot be told"
        )

    def _pack(self, latents: torch.Tensor) -> torch.Tensor | None:
        pack = getattr(self._pipe, "_pack_latents", None)
        if pack is None or latents.ndim < 4 or tuple(inspect.signature(pack).parameters) != _PACKING:
            return None
        channels, height, width = latents.shape[-3:]
        return pack(latents, latents.shape[0], channels, height, width)
