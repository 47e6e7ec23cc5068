"""How a transformer's image tokens lie in frames, rows and columns, read off the arguments of a call."""

from __future__ import annotations

from typing import Any

import torch

Grid = tuple[int, ...]


def token_grid(model: Any, arguments: dict[str, Any], latents: torch.Tensor | None) -> Grid:
    """Frames, rows and columns of the image tokens, in the order in which the transformer flattens them.

    Args:
        model: the transformer.
        arguments: of the call, by name.
        latents: the tensor it denoises: [B, C, H, W], [B, C, F, H, W], or packed tokens [B, N, C].

    Returns:
        three counts, a single frame for images; () where the call does not tell, or they do not match the tokens.

    Example:
        >>> from types import SimpleNamespace
        >>> model = SimpleNamespace(config=SimpleNamespace(patch_size=2))
        >>> token_grid(model, {}, torch.zeros(1, 4, 8, 16))
        (1, 4, 8)
    """
    if latents is None:
        return ()
    if latents.ndim >= 4:
        return _of_patches(getattr(model, "config", None), latents)
    found = _of_ids(arguments.get("img_ids")) or _of_shapes(arguments.get("img_shapes")) or _of_sizes(arguments)
    rows = found[0] * found[1] * found[2] if found else 0
    return found if rows and latents.ndim == 3 and latents.shape[1] == rows else ()


def channel_axis(model: Any, latents: torch.Tensor) -> int:
    """Which axis of latents holds the channels.

    Args:
        model: the transformer.
        latents: packed tokens [B, N, C], images [B, C, H, W], or films [B, C, F, H, W]; CogVideoX alone puts frames
            before channels, Kandinsky alone puts channels last.

    Example:
        >>> from types import SimpleNamespace
        >>> model = SimpleNamespace(config=SimpleNamespace(in_channels=16, out_channels=16))
        >>> [channel_axis(model, torch.zeros(1, *rest)) for rest in [(9, 64), (4, 8, 8), (16, 3, 8, 8), (3, 16, 8, 8)]]
        [2, 1, 1, 2]
    """
    if latents.ndim < 5:
        return latents.ndim - 1 if latents.ndim == 3 else 1
    config = getattr(model, "config", None)
    if getattr(config, "in_visual_dim", None):
        return 4
    counts = [getattr(config, name, None) for name in ("in_channels", "out_channels")]
    return 2 if latents.shape[1] not in counts and latents.shape[2] in counts else 1


def _of_patches(config: Any, latents: torch.Tensor) -> Grid:
    patch = getattr(config, "patch_size", 1) or 1
    across = patch[-1] if isinstance(patch, (tuple, list)) else int(patch)
    along = (
        patch[0] if isinstance(patch, (tuple, list)) and len(patch) == 3 else getattr(config, "patch_size_t", 1) or 1
    )
    if getattr(config, "in_visual_dim", None) and latents.ndim == 5:  # Kandinsky alone puts channels last
        latents = latents.movedim(-1, 1)
    *_, height, width = latents.shape
    if height % across or width % across:
        return ()
    if latents.ndim == 4:
        return (1, height // across, width // across)
    # CogVideoX alone puts frames before channels; its config says in how many channels come in.
    channels_second = latents.shape[1] == getattr(config, "in_channels", latents.shape[1])
    frames = latents.shape[2] if channels_second else latents.shape[1]
    return (frames // along, height // across, width // across) if frames % along == 0 else ()


def _of_ids(ids: Any) -> Grid:
    """Flux numbers every token: [N, 3] of frame, row and column; Flux 2 has a fourth number for the layer."""
    if not isinstance(ids, torch.Tensor) or ids.ndim not in (2, 3) or ids.shape[-1] not in (3, 4):
        return ()
    ids = ids.reshape(-1, ids.shape[-1])
    counts = [int(ids[:, axis].unique().numel()) for axis in range(3)]
    return tuple(counts)


def _of_shapes(shapes: Any) -> Grid:
    """Qwen-Image lists (frames, rows, columns) per sample; reference images after the first make it more."""
    while isinstance(shapes, (list, tuple)) and len(shapes) == 1 and isinstance(shapes[0], (list, tuple)):
        shapes = shapes[0]
    if isinstance(shapes, (list, tuple)) and shapes and isinstance(shapes[0], (list, tuple)):
        first = shapes[0]
        while first and isinstance(first[0], (list, tuple)):
            first = first[0]
        shapes = first if all(s == shapes[0] for s in shapes) else ()
    return tuple(map(int, shapes)) if isinstance(shapes, (list, tuple)) and len(shapes) == 3 else ()


def _of_sizes(arguments: dict[str, Any]) -> Grid:
    """LTX names them."""
    sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
    return tuple(map(int, sizes)) if all(isinstance(size, int) for size in sizes) else ()  # pyright: ignore
