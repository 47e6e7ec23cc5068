"""The record of one tiny pipeline: a stock diffusers pipeline class with small seeded models, and a call of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from tiny_models import TINY_MODELS
from tiny_models.base import TEXT, TEXT_WIDTH, mask, noise, seed_weights, text

POOLED = 16
PIXELS = 16
"""Rows and columns of the images of pipelines whose VAE halves them."""
CALM = 0.03
_TIME = re.compile(
    r"(.*?(?:timestep_embedder|t_embedder|time_in|time_embeddings|time_embedder|time_embedding|distilled_time))(?:\.|$)"
)

Factories = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class TinyPipeline:
    """One pipeline class of diffusers: how to build it tiny, and how to call it.

    Attributes:
        name: the class.
        task: what it does, in the field's words.
        transformer: class of its denoiser; its configuration is that of `tiny_models`, with `config` over it.
        scheduler: makes its scheduler.
        inputs: makes the arguments of a call, steps and generator apart.
        config: what differs in the transformer's configuration.
        models: component -> makes a further model, whose weights are seeded.
        parts: component or option -> makes a value that is handed to the constructor as it is.
        holds: the attributes that hold a transformer of that class.
        steps: of a run.
        executed: steps of a loop that begins in the middle; 0 if it does not.
        counts: the name of the argument for the number of steps.
        output: of the call's `output_type`.
        variant: tells several entries of one class apart; "" for the plain one.
        prepare: is given the pipeline once it is built.
        remark: what there is to say of it.
    """

    name: str
    task: str
    transformer: str
    scheduler: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    config: Mapping[str, Any] = field(default_factory=dict)
    models: Factories = field(default_factory=dict)
    parts: Factories = field(default_factory=dict)
    holds: tuple[str, ...] = ("transformer",)
    steps: int = 4
    executed: int = 0
    counts: str = "num_inference_steps"
    output: str = "latent"
    variant: str = ""
    prepare: Callable[[Any], None] | None = None
    remark: str = ""

    @property
    def key(self) -> str:
        """Class, and variant if there is one."""
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def build(self) -> Any:
        """A fresh pipeline on the CPU in float32, whose missing components are None; two builds are the same.

        The transformer changes little from step to step, as trained ones do: its output is small, and its embedding of
        time slow.
        """
        cls = getattr(diffusers, self.name)
        made: dict[str, Any] = {n: None for n, s in signature(cls).parameters.items() if s.default is s.empty}
        made |= {name: make() for name, make in self.parts.items()} | {"scheduler": self.scheduler()}
        config = {**TINY_MODELS[self.transformer].config, **self.config}
        factories: dict[str, Callable[[], Any]] = {
            name: lambda: getattr(diffusers, self.transformer)(**config) for name in self.holds
        }
        with torch.random.fork_rng(devices=[]):
            for number, (name, make) in enumerate((factories | dict(self.models)).items()):
                made[name] = make().eval()
                seed_weights(made[name], number)
                if name in self.holds:
                    calm(made[name])
        accepted = signature(cls).parameters
        pipe = cls(**{name: part for name, part in made.items() if name in accepted})
        pipe.set_progress_bar_config(disable=True)
        if self.prepare is not None:
            self.prepare(pipe)
        return pipe

    def call(self, pipe: Any, steps: int = 0, **changed: Any) -> torch.Tensor:
        """Run a pipeline of this entry on the same noise and conditions; the result as one float32 tensor."""
        arguments = {self.counts: steps or self.steps, "output_type": self.output, **self.inputs(), **changed}
        accepted = signature(type(pipe).__call__).parameters
        if "generator" in accepted:
            arguments.setdefault("generator", torch.Generator().manual_seed(0))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # some encode their pictures with noise of the global generator
            result = pipe(**{name: value for name, value in arguments.items() if name in accepted})
        return tensor_of(result if isinstance(result, torch.Tensor) else result[0])


def tensor_of(result: Any) -> torch.Tensor:
    """What a pipeline returned, as one float32 tensor.

    Example:
        >>> tensor_of([torch.ones(2), torch.zeros(2)]).shape
        torch.Size([2, 2])
    """
    if isinstance(result, (list, tuple)):
        return torch.stack([tensor_of(item) for item in result])
    return torch.as_tensor(np.asarray(result) if isinstance(result, Image.Image) else result).float()


def calm(model: torch.nn.Module) -> None:
    """Let a transformer's output be small, and change slowly in time, in place."""
    last = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d))][-1]
    readers = {m.group(1): "" for name, _ in model.named_modules() if (m := _TIME.match(name))}
    with torch.no_grad():
        for parameter in last.parameters():
            parameter *= CALM
        for reader in readers:
            first = [m for m in model.get_submodule(reader).modules() if isinstance(m, torch.nn.Linear)][:1]
            for linear in first:
                slow(linear.weight)


def slow(weight: torch.Tensor) -> None:
    """Damp, in place, the columns of [D, F] that read fast sinusoids of the timestep."""
    half = weight.shape[1] // 2
    frequencies = 10_000 ** (-torch.arange(half) / half)
    gains = (0.0002 / frequencies).clamp(max=1).repeat(2)
    weight[:, : 2 * half] *= 0.3 * gains / gains.square().mean().sqrt()


def flow(**options: Any) -> Callable[[], Any]:
    """Flow matching's Euler scheduler, shifted towards the noise."""
    return lambda: diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **options})


def dynamic(**options: Any) -> Callable[[], Any]:
    """The same with a shift that depends on the number of tokens."""
    return flow(use_dynamic_shifting=True, **options)


def picture(size: int = PIXELS, seed: int = 5) -> Any:
    """An image of noise."""
    pixels = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def film(frames: int = 5, size: int = 32, seed: int = 5) -> list[Any]:
    """Frames of noise."""
    return [picture(size, seed + n) for n in range(frames)]


def hole(size: int = PIXELS) -> Any:
    """A mask whose left half is to be painted."""
    pixels = np.zeros((size, size), dtype=np.uint8)
    pixels[:, : size // 2] = 255
    return Image.fromarray(pixels)


def prompts(*kinds: str, width: int = TEXT_WIDTH) -> dict[str, Any]:
    """Prompt embeddings for both branches.

    Args:
        kinds: what besides: "pooled", "attention" for `prompt_attention_mask`, "mask" for `prompt_embeds_mask`.
        width: of the embeddings.
    """
    found: dict[str, Any] = {"prompt_embeds": text(width), "negative_prompt_embeds": text(width, seed=2)}
    if "pooled" in kinds:
        found |= {"pooled_prompt_embeds": noise(1, POOLED, seed=3)}
        found |= {"negative_pooled_prompt_embeds": noise(1, POOLED, seed=4)}
    for kind, name in (("attention", "attention_mask"), ("mask", "embeds_mask")):
        if kind in kinds:
            partly = mask(TEXT)
            partly[:, -1] = 0
            found |= {f"prompt_{name}": partly, f"negative_prompt_{name}": partly.clone()}
    return found
