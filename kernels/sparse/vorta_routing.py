"""Which heads VORTA sends where: by a calibration, or by the authors' trained router.

See `dita.kernels.sparse.vorta`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dita.errors import DitaError
from dita.files import read_tensors
from dita.kernels.sparse.policy import Asked
from dita.table import Table

Route = Callable[[Asked], Sequence[int]]
"""Says which branch each head of a layer takes: 0 dense, 1 coreset, 2 sliding tiles."""


def range_key(asked: Asked, ranges: int, away: int = 0) -> str:
    """The table's name of a layer and a part of the run, or of one some parts away."""
    return f"{asked.layer}/{min(ranges - 1, asked.step * ranges // max(1, asked.steps)) + away}"


def cheapest(
    errors: Mapping[str, Sequence[Sequence[float]]], densities: Sequence[float], budget: float
) -> dict[str, tuple[int, ...]]:
    """Choose branches of least summed error whose mean density is at most a budget.

    Args:
        errors: name -> errors of the two sparse branches, for each head.
        densities: of the two.
        budget: largest mean density; one that cannot be met gives the least dense choice.

    Returns:
        name -> branch of each head. On the lower convex hull of what can be reached.

    Example:
        >>> cheapest({"0/0": [[0.1, 0.9], [0.5, 0.2]]}, (0.25, 0.3), 0.3)
        {'0/0': (1, 2)}
        >>> cheapest({"0/0": [[0.1, 0.9], [0.5, 0.2]]}, (0.25, 0.3), 0.7)
        {'0/0': (1, 0)}
    """
    names = list(errors)
    table = torch.cat([torch.tensor([[0.0] * len(errors[n][0]), *errors[n]], dtype=torch.float64) for n in names], 1)
    cost = torch.tensor([1.0, *densities], dtype=torch.float64)[:, None]

    def chosen(price: float) -> torch.Tensor:
        return (table + price * cost).argmin(0)

    low, high = 1e-12, 1e12  # of density, in units of error
    if cost[chosen(low), 0].mean() <= budget:
        high = low
    while high > low * 1.000001:
        price = (low * high) ** 0.5
        low, high = (low, price) if cost[chosen(price), 0].mean() <= budget else (price, high)
    best = chosen(high)
    pieces = best.split([len(errors[name][0]) for name in names])
    return {name: tuple(piece.tolist()) for name, piece in zip(names, pieces, strict=True)}


def by_table(table: Table, budget: float, ranges: int) -> Route:
    """Read the routing off a calibration; parts of the run that it has not seen are as the nearest one."""
    values = dict(table.values)
    routes = cheapest(values, values.pop("densities"), budget)

    def route(asked: Asked) -> Sequence[int]:
        aways = sorted(range(1 - ranges, ranges), key=abs)
        known = (routes[key] for away in aways if (key := range_key(asked, ranges, away)) in routes)
        return next(known, (0,) * asked.q.shape[1])

    return route


def by_router(path: str | Path, model: torch.nn.Module, layers: int, tau: float) -> Route:
    """Route by the authors' trained router.

    Args:
        path: its file, safetensors or torch's own format.
        model: the transformer; it must embed its time step as Wan does.
        layers: of attention.
        tau: least probability of a branch that is not dense.

    Raises:
        DitaError: another kind of model, no such file, or not for so many layers.
    """
    embedder: Any = getattr(model, "condition_embedder", None)
    if not hasattr(embedder, "timesteps_proj") or not hasattr(embedder, "time_embedder"):
        raise DitaError(
            f"{type(model).__name__} does not embed its time step as Wan does, which VORTA's router reads; leave "
            "router empty and use dita.calibrate"
        )
    try:
        if str(path).endswith(".safetensors"):
            tensors, _ = read_tensors(path, "VORTA's router", "its training")
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        names = [f"blocks.{layer}.router.linear" for layer in range(layers)]
        linears = [(tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()) for name in names]
    except Exception as error:
        raise DitaError(f"cannot read VORTA's router for {layers} layers from {path} ({error!r})") from error
    kept: dict[float, torch.Tensor] = {}

    def route(asked: Asked) -> Sequence[int]:
        if asked.timestep not in kept:
            kept.clear()
            at = torch.tensor([asked.timestep], device=asked.q.device)
            weight = next(embedder.time_embedder.parameters())
            kept[asked.timestep] = embedder.time_embedder(embedder.timesteps_proj(at).to(weight.dtype))[0].float().cpu()
        weight, bias = linears[asked.layer]
        scores = (weight @ torch.nn.functional.silu(kept[asked.timestep]) + bias).view(-1, 3).softmax(-1)
        best = scores.max(-1)
        return best.indices.masked_fill(best.values < tau, 0).tolist()

    return route
