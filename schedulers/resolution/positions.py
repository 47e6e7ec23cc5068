"""Telling a model where tokens lie that fill no grid.

Flux takes an id for every token, LTX-Video coordinates. Models that number the tokens themselves are given the tokens
side by side, as a picture one token high, and their module of positions is answered for that one call: the table that
Stable Diffusion 3 adds, read in between its entries by a straight line, and the rotations of Wan, turned by any
fraction. Nothing else of theirs depends on where a token lies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature
from typing import Any

import torch

from dita.errors import DitaError
from dita.loop import Request, Runner
from dita.patch import Patch
from dita.schedulers.resolution.layout import Layout


def check_positions(method: str, model: Any) -> None:
    """Raise `DitaError` unless `run_at` can tell this model where its tokens lie."""
    named = {"img_ids", "video_coords"} & set(signature(type(model).forward).parameters)
    if named or _table(model) is not None or _rotary(model) is not None:
        return
    raise DitaError(
        f"{method} puts tokens at fractions of rows and columns; {type(model).__name__} numbers its "
        "tokens by a full grid of rows and columns, and dita knows no way to tell it otherwise. Expected img_ids "
        "(Flux), video_coords (LTX-Video), a table of positions in pos_embed (Stable Diffusion 3), or rotations in "
        "rope with patches of one frame (Wan)"
    )


def run_at(
    request: Request,
    run: Runner,
    layout: Layout,
    grid: tuple[int, int],
    places: torch.Tensor,
    sequence: torch.Tensor,
    lying: tuple[int, ...] = (),
) -> Any:
    """Run the model on tokens at given places.

    Args:
        request: the pipeline's call.
        run: carries it out.
        layout: of the pictures.
        grid: rows and columns of the picture in whose units the places are.
        places: row and column, float [B, F, M, 2], or [1, F, M, 2] for all samples.
        sequence: latents, of B samples for each branch, as `mixture.sequence_of` has them.
        lying: frames, rows and columns, if the tokens do lie in such.

    Returns:
        what the model returns, of the shape of `sequence`.
    """
    request, model = request.changed(hidden_states=sequence), request.anatomy.model
    request = replace(request, grid=lying)
    if layout.kind == "ids":
        ids = [torch.cat([torch.zeros_like(own[..., :1]), own], dim=-1)[0] for own in places]
        if len(ids) == 1:
            return run(request.changed(img_ids=ids[0]))
        return run(replace(request, each=tuple({"img_ids": own} for own in ids)))
    if layout.kind == "sizes":
        coordinates = coordinates_at(model.rope, places, request.get("rope_interpolation_scale"))
        return run(request.changed(video_coords=coordinates.repeat(len(sequence) // len(places), 1, 1)))
    module = _table(model)
    if module is not None:
        added = table_at(module.pos_embed[0], grid, places[:, 0])
        with _answered(module, lambda latent: _embedded(module, latent, added)):
            return run(request)
    module = _rotary(model)
    assert module is not None
    turns = rotations_at(module, places)
    times = request.get("timestep")
    if isinstance(times, torch.Tensor) and times.ndim == 2 and times.shape[1] > 1:
        request = request.changed(timestep=times[:, :1].expand(-1, places.shape[1] * places.shape[2]))

    def answer(latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(turn.repeat(latent.shape[0] // turn.shape[0], 1, 1, 1) for turn in turns)

    with _answered(module, answer):
        return run(request)


def table_at(table: torch.Tensor, grid: tuple[int, int], places: torch.Tensor) -> torch.Tensor:
    """Entries of a square table of positions, of whose middle a picture takes as much as it needs.

    Args:
        table: [S * S, C].
        grid: rows and columns of the picture.
        places: [B, M, 2] in it; fractions are read in between entries.

    Returns:
        [B, M, C].

    Example:
        >>> table_at(torch.arange(16.0)[:, None], (2, 2), torch.tensor([[[0.0, 0.0], [0.5, 1.0]]])).flatten()
        tensor([5., 8.])
    """
    side = round(len(table) ** 0.5)
    square = table.view(side, side, -1)
    first = torch.tensor([(side - n) // 2 for n in grid], device=places.device)
    low = (places + first).floor().long().clamp(0, side - 1)
    rest = (places + first - low).to(table.dtype)[..., None]
    high = (low + 1).clamp(max=side - 1)

    def across(rows: torch.Tensor) -> torch.Tensor:
        return torch.lerp(square[rows, low[..., 1]], square[rows, high[..., 1]], rest[..., 1, :])

    return torch.lerp(across(low[..., 0]), across(high[..., 0]), rest[..., 0, :])


def rotations_at(module: Any, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for Wan's attention, [B, F * M, 1, D], at places [B, F, M, 2].

    Position n turns channel c by n times what position 1 does, which is less than half a turn.
    """
    angle = torch.atan2(module.freqs_sin[1].double(), module.freqs_cos[1].double())
    frames = torch.arange(places.shape[1], device=places.device)[None, :, None].expand(places.shape[:3])
    own = angle.split([module.t_dim, module.h_dim, module.w_dim])
    parts = zip((frames, places[..., 0], places[..., 1]), own, strict=True)
    turned = torch.cat([place[..., None].double() * turn for place, turn in parts], dim=-1).flatten(1, 2)[:, :, None]
    return turned.cos().to(module.freqs_cos.dtype), turned.sin().to(module.freqs_sin.dtype)


def coordinates_at(module: Any, places: torch.Tensor, scale: Any) -> torch.Tensor:
    """LTX-Video's coordinates of frames, rows and columns, [B, 3, F * M], at places [B, F, M, 2].

    Args:
        module: its `rope`, which divides them by the sides of a base picture.
        places: in tokens.
        scale: what a token measures along each axis; None for the base picture's sides.
    """
    frames = torch.arange(places.shape[1], device=places.device, dtype=places.dtype)
    frames = frames[None, :, None].expand(places.shape[:3])
    base = (module.base_num_frames, module.base_height, module.base_width)
    patches = (module.patch_size_t, module.patch_size, module.patch_size)
    sides = base if scale is None else [own * patch for own, patch in zip(scale, patches, strict=True)]
    axes = (frames, places[..., 0], places[..., 1])
    return torch.stack([(axis * side).flatten(1) for axis, side in zip(axes, sides, strict=True)], dim=1)


def _table(model: Any) -> Any:
    module = getattr(model, "pos_embed", None)
    known = getattr(module, "pos_embed_max_size", None) and hasattr(module, "proj")
    return module if known and isinstance(getattr(module, "pos_embed", None), torch.Tensor) else None


def _rotary(model: Any) -> Any:
    module: Any = getattr(model, "rope", None)
    known = all(hasattr(module, name) for name in ("freqs_cos", "freqs_sin", "t_dim", "h_dim", "w_dim", "patch_size"))
    return module if known and module.patch_size[0] == 1 else None


def _embedded(module: Any, latent: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    tokens = module.proj(latent).flatten(2).transpose(1, 2)
    tokens = module.norm(tokens) if module.layer_norm else tokens
    return (tokens + added.repeat(tokens.shape[0] // added.shape[0], 1, 1)).to(tokens.dtype)


@contextlib.contextmanager
def _answered(module: Any, answer: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    patch = Patch(module, "forward", lambda original, args, kwargs: answer(*args, **kwargs))
    patch.apply()
    try:
        yield
    finally:
        patch.remove()
