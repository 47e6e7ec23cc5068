"""Shared parts of the tiny pipelines: the record, seeded weights, per-sample inputs."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import TimestepEmbedding

TEXT_TOKENS = 6
TEXT_WIDTH = 32
POOLED_WIDTH = 16
SLOW = 0.002

Dims = dict[str, int]


@dataclass(frozen=True)
class TinyPipeline:
    """One stock diffusers pipeline with tiny seeded weights, and a way to call it.

    Attributes:
        name: key in ``pipelines.TINY``.
        build: makes a fresh pipeline on the CPU in float32; two builds have bit-identical weights.
        call: ``call(pipe, steps=8, seed=0, batch=1, size="small", first=0, **extra)`` returns the result as a float32
            tensor with the batch first. Rows ``first .. first + batch - 1`` are generated; the noise and the
            conditioning of a row depend on ``seed`` and its index only, not on the batch. ``extra`` goes to
            the pipeline's ``__call__`` and overrides the defaults.
        branches: transformer calls per ``scheduler.step``.
        batched_cfg: whether one call carries both halves of classifier-free guidance.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    call: Callable[..., torch.Tensor]
    branches: int
    batched_cfg: bool


def noise(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal float32 tensor of ``shape`` that depends on ``seed`` only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of_noise(rows: range, salt: int, *shape: int) -> torch.Tensor:
    """Noise of shape ``[len(rows), *shape]`` whose row depends on its index and ``salt`` only."""
    return torch.stack([noise(100_000 * salt + row, *shape) for row in rows])


def text(rows: range, salt: int) -> torch.Tensor:
    """Prompt embeddings ``[B, TEXT_TOKENS, TEXT_WIDTH]``."""
    return rows_of_noise(rows, salt, TEXT_TOKENS, TEXT_WIDTH)


def pooled(rows: range, salt: int) -> torch.Tensor:
    """Pooled prompt embeddings ``[B, POOLED_WIDTH]``."""
    return rows_of_noise(rows, salt, POOLED_WIDTH)


def text_mask(rows: range, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """Masks ``[B, TEXT_TOKENS]`` with 3 to 5 valid tokens: never full, because some pipelines drop a full mask."""
    lengths = torch.tensor([5 - row % 3 for row in rows])
    return (torch.arange(TEXT_TOKENS)[None] < lengths[:, None]).to(dtype)


def seed_weights(model: torch.nn.Module, seed: int) -> None:
    """Overwrite every parameter of ``model`` in place with seeded values that keep all blocks alive.

    Matrices preserve variance (std ``1 / sqrt(fan_in)``), so that at these widths the adaLN gates are far from zero;
    modulation tables and label embeddings are of order one half, biases small, norm weights near one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parts = name.split(".")
            if "scale_shift_table" in parts or "embedding_table" in parts:
                values *= 0.5
            elif "pos_frequencies" in parts:
                values *= 0.05
            elif parameter.ndim >= 2:
                values /= math.sqrt(math.prod(parameter.shape[1:]))
            elif parts[-1] == "weight":
                values = 1 + 0.05 * values
            else:
                values *= 0.1
            parameter.copy_(values)
        for module in model.modules():
            if isinstance(module, TimestepEmbedding):
                smooth_in_time(module.linear_1.weight)


def smooth_in_time(weight: torch.Tensor) -> None:
    """Damp, in place, the columns of ``[D, 2 F]`` that read fast sinusoids of the timestep; the row norm stays.

    Trained models change little from step to step. White weights do not: most of the sinusoids turn by more than a
    radian between two of 8 steps, and the outputs of neighbouring steps would then have nothing in common.
    """
    half = weight.shape[1] // 2
    frequencies = 10_000 ** (-torch.arange(half) / half)
    gains = (SLOW / frequencies).clamp(max=1).repeat(2)
    weight *= gains / gains.square().mean().sqrt()


def assemble(
    cls: Callable[..., Any], seed: int, scheduler: Any, models: dict[str, Callable[[], torch.nn.Module]], **parts: Any
) -> Any:
    """Build a pipeline from model factories with seeded weights; every required component not given is None.

    Args:
        cls: a diffusers pipeline class.
        seed: the k-th model gets the weights of ``seed + k``.
        scheduler: a scheduler instance.
        models: component name to factory.
        **parts: further constructor arguments.

    Returns:
        The pipeline in eval mode, without progress bars. The global random state is left as it was.
    """
    components: dict[str, Any] = {
        name: None for name, slot in signature(cls).parameters.items() if slot.default is slot.empty
    }
    with torch.random.fork_rng(devices=[]):
        for offset, (name, factory) in enumerate(models.items()):
            model = factory().eval()
            seed_weights(model, seed + offset)
            components[name] = model
    pipe = cls(**{**components, **parts, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def quiet(message: str | None) -> Iterator[None]:
    """Ignore warnings that start with ``message``; None leaves the (process-wide) filters alone."""
    if message is None:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=re.escape(message))
        yield


def caller(
    inputs: Callable[[range, Dims], dict[str, Any]],
    sizes: dict[str, Dims],
    result: str = "images",
    upstream_warning: str | None = None,
    **defaults: Any,
) -> Callable[..., torch.Tensor]:
    """Make the ``call`` of a `TinyPipeline`.

    Args:
        inputs: maps the row indices and the size arguments to the conditioning arguments of the pipeline.
        sizes: for "small" and "large", the size arguments of the pipeline.
        result: field of the pipeline's output that holds the tensor.
        upstream_warning: start of a warning that torch, numpy or diffusers gives in every run, to be ignored.
        **defaults: further arguments of the pipeline.
    """

    def call(
        pipe: Any, steps: int = 8, seed: int = 0, batch: int = 1, size: str = "small", first: int = 0, **extra: Any
    ) -> torch.Tensor:
        rows = range(first, first + batch)
        arguments = {"output_type": "latent", "num_inference_steps": steps, **defaults, **sizes[size]}
        arguments["generator"] = [torch.Generator().manual_seed(1_000 * seed + row) for row in rows]
        arguments |= inputs(rows, sizes[size]) | extra
        with quiet(upstream_warning):
            return getattr(pipe(**arguments), result).float()

    return call
