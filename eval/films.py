"""Pictures of videos: a film of frames side by side, and a small animation next to the plain run's."""

from __future__ import annotations

import io

import numpy as np
import torch

from dita.errors import DitaError


def film(videos: torch.Tensor, frames: int = 7, gap: int = 2, limit: int = 128) -> bytes:
    """Lay videos out in one PNG: one row for each, its frames from left to right.

    Args:
        videos: float [N, T, 1 or 3, H, W] in [0, 1].
        frames: most frames of a video that are shown, evenly spread with the first and the last among them.
        gap: white pixels between them.
        limit: longest side of a frame in the picture, in pixels; larger ones are averaged down.

    Returns:
        The bytes of an 8-bit PNG.

    Raises:
        DitaError: the shape is another, or there is nothing to show.

    Example:
        >>> film(torch.zeros(2, 13, 3, 8, 8))[1:4]
        b'PNG'
    """
    from PIL import Image

    pixels = _pixels(videos, limit)
    count = max(1, min(frames, pixels.shape[1]))
    places = np.linspace(0, pixels.shape[1] - 1, count).round().astype(int)
    rows = [join([video[place] for place in places], gap, axis=1) for video in pixels]
    stream = io.BytesIO()
    Image.fromarray(join(rows, gap, axis=0)).save(stream, format="png", optimize=True)
    return stream.getvalue()


def animation(
    videos: torch.Tensor, reference: torch.Tensor | None = None, fps: float = 8, gap: int = 2, limit: int = 96
) -> bytes:
    """Play videos next to each other without end: for each clip the plain run's, if given, and then the own one.

    Args:
        videos: float [N, T, 1 or 3, H, W] in [0, 1].
        reference: the plain run's videos of the same seeds, same shape.
        fps: frames per second.
        gap: white pixels within a pair; four times as many are between pairs.
        limit: longest side of a clip in the picture, in pixels; larger ones are averaged down.

    Returns:
        The bytes of an animated WebP of T frames.

    Raises:
        DitaError: a shape is another than expected, `fps` is not above 0, or there is nothing to show.

    Example:
        >>> animation(torch.zeros(2, 3, 3, 8, 8))[8:12]
        b'WEBP'
    """
    from PIL import Image

    if fps <= 0:
        raise DitaError(f"fps is {fps}; expected more than 0")
    if reference is not None and reference.shape != videos.shape:
        raise DitaError(f"the reference has shape {list(reference.shape)}; expected {list(videos.shape)}")
    pairs = list(zip(*(_pixels(each, limit) for each in (reference, videos) if each is not None), strict=True))
    pictures = [
        Image.fromarray(join([join([clip[time] for clip in pair], gap, axis=1) for pair in pairs], 4 * gap, axis=1))
        for time in range(videos.shape[1])
    ]
    stream = io.BytesIO()
    pictures[0].save(
        stream,
        format="webp",
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / fps),
        loop=0,
        quality=90,
        method=4,
    )
    return stream.getvalue()


def join(parts: list[np.ndarray], gap: int, axis: int) -> np.ndarray:
    """Put pictures uint8 [H, W, 3] next to each other along an axis, `gap` white pixels between them.

    Example:
        >>> join([np.zeros((4, 4, 3), np.uint8)] * 3, 1, axis=1).shape
        (4, 14, 3)
    """
    shape = list(parts[0].shape)
    shape[axis] = gap
    white = np.full(shape, 255, np.uint8)
    return np.concatenate([piece for part in parts for piece in (white, part)][1:], axis=axis)


def shrink(images: torch.Tensor, limit: int) -> torch.Tensor:
    """Average images float [N, C, H, W] down until their longer side is at most `limit` pixels; small ones stay.

    Example:
        >>> shrink(torch.rand(2, 3, 64, 128), 32).shape
        torch.Size([2, 3, 16, 32])
    """
    height, width = images.shape[-2:]
    if max(height, width) <= limit:
        return images
    factor = limit / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return torch.nn.functional.interpolate(images.float(), size=size, mode="area")


def _pixels(videos: torch.Tensor, limit: int) -> np.ndarray:
    if videos.ndim != 5 or videos.shape[2] not in (1, 3) or 0 in videos.shape:
        raise DitaError(f"the videos have shape {list(videos.shape)}; expected [N, T, 1 or 3, H, W], none of them 0")
    small = shrink(videos.flatten(0, 1), limit).expand(-1, 3, -1, -1)
    pixels = (small.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return pixels.reshape(*videos.shape[:2], *pixels.shape[1:])
