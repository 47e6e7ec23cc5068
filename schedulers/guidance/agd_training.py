"""Training AGD's adapters on a pipeline's own guided runs.

    python -m dita.eval.training.agd --pipeline fashion-dit --save agd.safetensors

The pipeline runs plainly, with both branches and a guidance scale drawn for each run. Of each call what the conditional
branch is called with is kept, and what guidance makes of both outputs. The adapters then learn to put that out on these
states, in any order; the model is frozen, and nothing of it changes. No data are needed but the calls' conditioning.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dita.errors import DitaError
from dita.loop import Loop, tensors_of
from dita.patch import Patch
from dita.schedulers.guidance.agd import AGD
from dita.schedulers.guidance.agd_adapters import Conditions
from dita.schedulers.guidance.agd_states import State, one_transformer, record_states
from dita.schedulers.guidance.agd_weights import AdapterSet
from dita.watching import watched

KEPT_EVERY = 50
"""Updates between two checkpoints."""


def _joined(states: Sequence[State]) -> dict[str, Any]:
    """The arguments of one call for several states."""
    joined: dict[str, Any] = {}
    for name, first in states[0].arguments.items():
        values = [state.arguments[name] for state in states]
        if name == "timestep" and isinstance(first, torch.Tensor) and first.ndim == 0:
            values = [value[None] for value in values]
        if all(value is first for value in values) and not _rows(first):
            joined[name] = first
        elif all(_rows(value) for value in values):
            joined[name] = torch.cat(values)
        elif not all(_same(value, first) for value in values):
            raise DitaError(f"the states differ in {name}, which cannot be put in one batch; train with batches of 1")
        else:
            joined[name] = first
    return joined


def _rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == 1


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and one == other


@contextmanager
def _student(model: torch.nn.Module, adapters: AdapterSet) -> Iterator[Callable[[Sequence[State]], torch.Tensor]]:
    """Hook the adapters to a bare transformer; what comes is the error of the two on some states."""
    current: list[Conditions] = []
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def hook(number: int) -> Patch:
        def around(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return adapters.add(number, original(*args, **kwargs), current[0])

        return Patch(adapters.layers[number], "forward", around)

    def error(states: Sequence[State]) -> torch.Tensor:
        device = states[0].target.device
        numbers = torch.tensor([(s.timestep, s.scale) for s in states], device=device)
        arguments = _joined(states)
        current[:] = [Conditions.of(arguments, numbers[:, 0], numbers[:, 1])]
        output = tensors_of(model(**arguments))[0]
        assert output is not None
        return (output.float() - torch.cat([s.target for s in states]).float()).square().mean()

    patches = [hook(number) for number in range(len(adapters.layers))]
    try:
        # Only the adapters learn, and the graph need not hold what gradients of the weights would take.
        for parameter in learning:
            parameter.requires_grad_(False)
        for patch in patches:
            patch.apply()
        yield error
    finally:
        for patch in reversed(patches):
            patch.remove()
        for parameter in learning:
            parameter.requires_grad_(True)


@torch.no_grad()
def mean_error(pipe: Any, states: Sequence[State], adapters: AdapterSet, batch: int = 16) -> float:
    """Mean squared difference of the adapted output from the guided one.

    Args:
        pipe: plain, with one transformer.
        states: of guided runs.
        adapters: of this transformer; untrained ones add nothing, which is the conditional branch alone.
        batch: states in one call.

    Example:
        >>> mean_error(pipe, states, adapters)  # doctest: +SKIP
    """
    with _student(one_transformer(pipe).model, adapters.to(states[0].target.device)) as error:
        starts = range(0, len(states), batch)
        return sum(error(part).item() * len(part) for s in starts if (part := states[s : s + batch])) / len(states)


def train_adapters(
    pipe: Any,
    states: Sequence[State],
    adapters: AdapterSet,
    updates: int,
    batch: int = 16,
    rate: float = 2e-3,
    seed: int = 0,
    checkpoint: str | Path = "",
    told: Callable[[int, float], None] = lambda update, error: None,
) -> AdapterSet:
    """Let adapters learn, in place, to put out what guidance does; the pipeline comes back as it was.

    Args:
        pipe: plain, with one transformer.
        states: of guided runs.
        adapters: of this transformer.
        updates: of Adam; the rate rises over the first tenth and then falls to zero by a cosine.
        batch: states of each update, drawn at random.
        rate: the highest one.
        seed: of what is drawn.
        checkpoint: file to go on from, if it is there, and to write again every 50 updates; "" for none.
        told: called with the number and the error of each update.

    Raises:
        DitaError: under `torch.inference_mode`, or the states cannot be put in one batch.

    Example:
        >>> train_adapters(pipe, states, adapters, 1000)  # doctest: +SKIP
    """
    if torch.is_inference_mode_enabled():
        raise DitaError("agd learns by gradients, which torch.inference_mode forbids; use torch.no_grad")
    parameters = list(adapters.to(states[0].target.device).requires_grad_(True).parameters())
    optimizer, start = torch.optim.Adam(parameters, lr=rate), 0
    if checkpoint and Path(checkpoint).is_file():
        kept = torch.load(checkpoint, weights_only=True)
        adapters.load_state_dict(kept["adapters"])
        optimizer.load_state_dict(kept["optimizer"])
        start = kept["updates"]
    warm = max(1, updates // 10)
    with _student(one_transformer(pipe).model, adapters) as error, torch.enable_grad():
        for update in range(start, updates):
            share = (update - warm) / max(1, updates - warm)
            factor = (update + 1) / warm if update < warm else 0.5 + 0.5 * math.cos(math.pi * share)
            optimizer.param_groups[0]["lr"] = rate * factor
            loss = error(random.Random(f"{seed} {update}").choices(states, k=batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            told(update, loss.item())
            if checkpoint and (update + 1) % KEPT_EVERY == 0:
                kept = {"adapters": adapters.state_dict(), "optimizer": optimizer.state_dict(), "updates": update + 1}
                torch.save(kept, checkpoint)
    return adapters.requires_grad_(False)


def train_agd(
    pipe: Any,
    call: Callable[[Any, float], Any],
    save: str | Path,
    runs: int = 8,
    updates: int = 1000,
    scales: tuple[float, float] = (1.0, 6.0),
    kind: str = "auto",
    width: int = 32,
    seed: int = 0,
    **options: Any,
) -> AGD:
    """Train AGD's adapters on a pipeline, which comes back as it was, and write them to a file.

    Args:
        pipe, call, runs, scales, seed: see `record_states`.
        save: the file.
        updates, options: see `train_adapters`.
        kind: of adapter: "offset", "cross", or "auto": "cross" for text, "offset" for classes.
        width: of the embeddings in an adapter, even.

    Returns:
        The method with these weights.

    Raises:
        DitaError: see `record_states`, or the transformer has no layers for adapters.

    Example:
        >>> agd = train_agd(pipe, lambda p, w: p("a prompt", guidance_scale=w), "agd.safetensors")  # doctest: +SKIP
    """
    states = record_states(pipe, call, runs, scales, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters = AdapterSet.for_call(one_transformer(pipe), states[0].arguments, kind, width, scales=scales)
    with watched(pipe, Loop()):
        train_adapters(pipe, states, adapters, updates, seed=seed, **options).save(save)
    return AGD(str(save))
