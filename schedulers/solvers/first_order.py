"""Deterministic first-order solvers, stepped on a copy, so that the pipeline's scheduler never notices."""

from __future__ import annotations

import copy
from typing import Any

import torch

from dita.errors import DitaError

FIRST_ORDER = (
    "CogVideoXDDIMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "ListedDDIMScheduler",
    "ListedFlowMatchEulerDiscreteScheduler",
)
"""Schedulers whose step depends on nothing but the model's output, the sample and the place in the schedule."""
_HOOKED = ("step", "set_timesteps", "scale_noise", "add_noise")


def check_first_order(scheduler: Any, method: str) -> None:
    """Refuse schedulers with steps of second order, with a memory of earlier steps, or with noise.

    Args:
        scheduler: of a pipeline.
        method: what needs it, for the message.

    Raises:
        DitaError: the scheduler is another one; it is named.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> check_first_order(DDIMScheduler(), "picard")
    """
    name = type(scheduler).__name__
    if name not in FIRST_ORDER:
        raise DitaError(
            f"{method} needs a deterministic first-order scheduler ({', '.join(FIRST_ORDER)}); this pipeline has "
            f"{name}, whose steps are of higher order, remember earlier steps, draw noise, or are not known here. "
            "Replace it, for instance: pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config), or "
            "FlowMatchEulerDiscreteScheduler for flow matching"
        )
    if scheduler.config.get("stochastic_sampling"):
        raise DitaError(
            f"{method} needs a deterministic scheduler; this {name} has stochastic_sampling set, which draws noise at "
            "every step: build it with stochastic_sampling=False"
        )


class FirstOrder:
    """A scheduler's own step, at any place of its schedule and in any order.

    Args:
        scheduler: one that `check_first_order` accepts, with its timesteps set. It is copied, not kept.

    Attributes:
        timesteps: as the scheduler lists them, [n].
        trained: timesteps of training.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> scheduler = FlowMatchEulerDiscreteScheduler()
        >>> scheduler.set_timesteps(4)
        >>> solver = FirstOrder(scheduler)
        >>> solver.step(3, torch.ones(1, 2), torch.ones(1, 2))
        tensor([[0.9990, 0.9990]])
        >>> scheduler.step_index is None
        True
    """

    def __init__(self, scheduler: Any) -> None:
        self._copy = copy.copy(scheduler)
        for name in _HOOKED:
            vars(self._copy).pop(name, None)
        self.scales = type(scheduler).__name__ == "EulerDiscreteScheduler"
        if self.scales:
            self._copy.is_scale_input_called = True
        self.timesteps = torch.as_tensor(scheduler.timesteps)
        self.trained = int(scheduler.config.get("num_train_timesteps", 1000))

    def step(self, entry: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The sample after the step that begins at an entry of the list of timesteps.

        Args:
            entry: from 0 to n - 1.
            output: the model's output after guidance, [B, ...].
            sample: of the same shape.
        """
        self._stand(entry)
        own = type(self._copy).step
        return own(self._copy, output, self.timesteps[entry], sample, return_dict=False)[0]

    def scaled(self, entry: int, sample: torch.Tensor) -> torch.Tensor:
        """What the model reads where the latents are `sample`."""
        if not self.scales:
            return sample
        self._stand(entry)
        return type(self._copy).scale_model_input(self._copy, sample, self.timesteps[entry])

    def variances(self) -> list[float]:
        """Variance of the noise that an ancestral (DDPM) step from each entry would add, n numbers.

        With x = a x0 + s eps before and a', s' after the step it is (s' / s)^2 (s^2 - (a / a')^2 s'^2): the posterior
        variance of DDPM where a^2 + s^2 = 1, the square of Euler ancestral's sigma_up where a = 1, and the same for
        flow matching, where a = 1 - s. A last step to no noise at all has none; it is given that of the step before it,
        as is usual for DDPM's clipped variance.

        Example:
            >>> from diffusers import FlowMatchEulerDiscreteScheduler
            >>> scheduler = FlowMatchEulerDiscreteScheduler()
            >>> scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.25])
            >>> [round(v, 4) for v in FirstOrder(scheduler).variances()]
            [0.25, 0.0556, 0.0556]
        """
        found = []
        levels = self._levels()
        for (a, s), (a_next, s_next) in zip(levels[:-1], levels[1:], strict=True):
            found.append(max(0.0, (s_next / s) ** 2 * (s**2 - (a / a_next) ** 2 * s_next**2)))
        if len(found) > 1 and found[-1] == 0:
            found[-1] = found[-2]
        return found

    def _stand(self, entry: int) -> None:
        if hasattr(self._copy, "_step_index"):
            self._copy._step_index = entry

    def _levels(self) -> list[tuple[float, float]]:
        """Shares of picture and noise at each entry and at the end."""
        scheduler = self._copy
        if self.scales:
            return [(1.0, s) for s in scheduler.sigmas.double().tolist()]
        if hasattr(scheduler, "sigmas"):
            sigmas = scheduler.sigmas.double()
            sigmas = 1 - sigmas if scheduler.config.get("invert_sigmas") else sigmas
            return [(1 - s, s) for s in sigmas.tolist()]
        places = self.timesteps.long().to(scheduler.alphas_cumprod.device)
        alphas = [*scheduler.alphas_cumprod[places].double().tolist(), float(scheduler.final_alpha_cumprod)]
        return [(alpha**0.5, (1 - alpha) ** 0.5) for alpha in alphas]
