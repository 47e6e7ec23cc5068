"""Drawing images and videos from a pipeline, one seed per sample."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from dita.errors import DitaError
from dita.eval.data import CLASSES

_STRIDE = 1_000_000  # runs with neighbouring seeds share no sample


@dataclass(frozen=True)
class Sampling:
    """What to draw; every sample has its own generator, so that it does not depend on its batch mates.

    Attributes:
        samples: number of images or videos.
        batch: samples in one call.
        steps: solver steps.
        guidance: the pipeline's `guidance_scale`.
        seed: of the whole set.
        prompts: sample i has prompt i modulo their number; none for a class-conditional pipeline, where it has class
            i modulo ten.
        call: further arguments of the pipeline's call, such as height or negative_prompt, as JSON values.
    """

    samples: int
    batch: int
    steps: int
    guidance: float
    seed: int
    prompts: tuple[str, ...] = ()
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("samples", "batch", "steps"):
            if getattr(self, name) < 1:
                raise DitaError(f"{name} is {getattr(self, name)}; expected at least 1")

    def labels(self) -> torch.Tensor:
        """Class of each sample, int64 [samples], where there are no prompts."""
        return torch.arange(self.samples) % len(CLASSES)

    def captions(self, indices: range) -> list[str]:
        """Prompts of the samples with these indices; names of their classes if there are none."""
        if self.prompts:
            return [self.prompts[index % len(self.prompts)] for index in indices]
        return [CLASSES[index % len(CLASSES)] for index in indices]

    def batches(self) -> Iterator[range]:
        """Indices of the samples of each call."""
        for start in range(0, self.samples, self.batch):
            yield range(start, min(start + self.batch, self.samples))


class Drawn(NamedTuple):
    """Samples of one call, on the CPU.

    Attributes:
        media: float32 images [n, C, H, W] or videos [n, frames, C, H, W] in [0, 1].
        latents: float32 [n, ...] before decoding; None where the pipeline does not hand them out.
    """

    media: torch.Tensor
    latents: torch.Tensor | None


def check_pipeline(pipe: Any, sampling: Sampling) -> None:
    """Raise a DitaError unless `draw` can draw this sampling from `pipe`.

    Example:
        >>> check_pipeline(pipe, Sampling(1, 1, 50, 3.0, 0))  # doctest: +SKIP
    """
    known = inspect.signature(type(pipe).__call__).parameters
    if "class_labels" not in known and "prompt" not in known:
        raise DitaError(f"{type(pipe).__name__} takes neither class_labels nor a prompt; dita cannot draw from it")
    if "prompt" in known and not sampling.prompts:
        raise DitaError(f"{type(pipe).__name__} needs prompts and none were given; pass a file, a line each")
    unknown = sorted(set(sampling.call) - set(known))
    if unknown:
        raise DitaError(f"{type(pipe).__name__} takes no argument {', '.join(unknown)}; it takes {', '.join(known)}")


@torch.no_grad()
def draw(pipe: Any, sampling: Sampling, indices: range, steps: int | None = None) -> Drawn:
    """Draw the samples with these indices in one call.

    Args:
        pipe: a diffusers pipeline that takes class labels or prompts, accelerated or not.
        sampling: what to draw.
        indices: which of its samples.
        steps: solver steps, if other than the sampling's own.

    Returns:
        Media and latents; see `Drawn`.

    Raises:
        DitaError: the pipeline returned neither images nor frames.

    Example:
        >>> draw(load_pipeline("fashion-dit"), Sampling(10, 10, 50, 3.0, 0), range(10)).media  # doctest: +SKIP
    """
    known = inspect.signature(type(pipe).__call__).parameters
    asked: dict[str, Any] = dict(sampling.call)
    if "class_labels" in known:
        labels = sampling.labels()
        asked["class_labels"] = [int(labels[index]) for index in indices]
    else:
        asked["prompt"] = sampling.captions(indices)
    latents: list[torch.Tensor] = []
    if "callback_on_step_end" in known:

        def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            latents[:] = [values["latents"]]
            return values

        asked["callback_on_step_end"] = keep
    if "guidance_scale" in known:
        asked["guidance_scale"] = sampling.guidance
    with _without_rounding_remark():
        result = pipe(
            generator=[torch.Generator().manual_seed(sampling.seed * _STRIDE + index) for index in indices],
            num_inference_steps=steps or sampling.steps,
            output_type="pt",
            **asked,
        )
    media = getattr(result, "images", None)
    media = getattr(result, "frames", None) if media is None else media
    if media is None:
        raise DitaError(f"{type(pipe).__name__} returned {type(result).__name__}, which has neither images nor frames")
    if isinstance(media, np.ndarray):
        media = torch.from_numpy(media).movedim(-1, -3)
    elif isinstance(media, list):
        media = torch.stack([item if isinstance(item, torch.Tensor) else torch.stack(list(item)) for item in media])
    return Drawn(media.float().clamp(0, 1).cpu(), latents[0].float().cpu() if latents else None)


@contextmanager
def _without_rounding_remark() -> Iterator[None]:
    """Hold back WanPipeline's remark on num_frames, which no number avoids with a VAE that keeps every frame."""
    logger = logging.getLogger("diffusers.pipelines.wan.pipeline_wan")
    remark = lambda record: "has to be divisible by 1." not in record.getMessage()  # noqa: E731
    logger.addFilter(remark)
    try:
        yield
    finally:
        logger.removeFilter(remark)
