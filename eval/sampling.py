"""Drawing garments from a class-conditional pipeline, one seed per image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dita.errors import DitaError
from dita.eval.data import CLASSES

_STRIDE = 1_000_000  # runs with neighbouring seeds share no image


@dataclass(frozen=True)
class Sampling:
    """What to draw; image i has class i mod 10 and its own generator, so that it does not depend on its batch mates.

    Attributes:
        samples: number of images.
        batch: images in one call.
        steps: solver steps.
        guidance: scale of classifier-free guidance.
        seed: of the whole set.
    """

    samples: int
    batch: int
    steps: int
    guidance: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("samples", "batch", "steps"):
            if getattr(self, name) < 1:
                raise DitaError(f"{name} is {getattr(self, name)}; expected at least 1")

    def labels(self) -> torch.Tensor:
        """Class of each image, int64 [samples]."""
        return torch.arange(self.samples) % len(CLASSES)

    def batches(self) -> Iterator[range]:
        """Indices of the images of each call."""
        for start in range(0, self.samples, self.batch):
            yield range(start, min(start + self.batch, self.samples))


def check_pipeline(pipe: Any) -> None:
    """Raise a DitaError unless `pipe` is a DiTPipeline that draws 32x32 grey garments."""
    from diffusers import DiTPipeline

    if not isinstance(pipe, DiTPipeline):
        raise DitaError(f"the garment metrics need a DiTPipeline, got {type(pipe).__name__}")
    config = pipe.transformer.config
    if (config.in_channels, config.sample_size) != (1, 32):
        raise DitaError(
            f"the garment metrics need images of 1x32x32; this pipeline's transformer makes "
            f"{config.in_channels}x{config.sample_size}x{config.sample_size}"
        )


def draw(pipe: Any, sampling: Sampling, indices: range, steps: int | None = None) -> torch.Tensor:
    """Draw the images with these indices in one call.

    Args:
        pipe: a DiTPipeline, accelerated or not.
        sampling: what to draw.
        indices: which of its images.
        steps: solver steps, if other than the sampling's own.

    Returns:
        float32 [len(indices), 1, 32, 32] in [0, 1], on the CPU.

    Example:
        >>> draw(load_pipeline("fashion-dit"), Sampling(10, 10, 50, 3.0, 0), range(10))  # doctest: +SKIP
    """
    labels = sampling.labels()
    images = pipe(
        class_labels=[int(labels[i]) for i in indices],
        guidance_scale=sampling.guidance,
        generator=[torch.Generator().manual_seed(sampling.seed * _STRIDE + i) for i in indices],
        num_inference_steps=steps or sampling.steps,
        output_type="pt",
    ).images
    return images.float().cpu()
