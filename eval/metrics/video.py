"""Distances between two clips, and how steadily a clip moves. Clips are float [N, T, C, H, W] in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dita.errors import DitaError
from dita.eval.metrics.pixel import check_video_pair, check_videos

_STILL = 0.5 / 255  # a change below half a level of 8 bits is not seen


def per_frame(metric: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Turn a metric of image pairs into one of clips: frame by frame, then the mean over each clip's frames.

    Frames with an infinite value (PSNR of a frame that equals its reference) are left out of the mean, as
    `summarize_psnr` leaves out identical images: for PSNR that can only lower it. A clip with no other frames gets the
    infinite value. The mean of the frames' PSNR lies above the PSNR of the clip, the more so the more the error
    changes over time; `psnr` of whole clips has neither trouble.

    Args:
        metric: such as `psnr`, `ssim` or `lpips`: maps images and reference [M, C, H, W], and options, to [M].

    Returns:
        A function of videos [N, T, C, H, W], a reference of the same shape, and the options of `metric`. It returns
        float64 [N] and raises a DitaError for clips that do not fit and for a metric that does not return a number
        for each frame.

    Example:
        >>> from dita.eval.metrics.pixel import ssim
        >>> clip = torch.rand(2, 3, 1, 16, 16)
        >>> per_frame(ssim)(clip, clip).round(decimals=4)
        tensor([1., 1.], dtype=torch.float64)
    """

    def video_metric(videos: torch.Tensor, reference: torch.Tensor, **options: Any) -> torch.Tensor:
        videos, reference = check_video_pair(videos, reference)
        count, frames = videos.shape[:2]
        values = metric(videos.flatten(0, 1), reference.flatten(0, 1), **options).double()
        if values.shape != (count * frames,) or values.isnan().any():
            raise DitaError(
                f"the metric gave {tuple(values.shape)} values, {int(values.isnan().sum())} of them NaN, for {count} "
                f"clips of {frames} frames; expected one number for each frame"
            )
        values = values.reshape(count, frames)
        finite = values.isfinite()
        mean = values.where(finite, 0).sum(1) / finite.sum(1).clamp(min=1)
        return mean.where(finite.any(1), values[:, 0])

    return video_metric


def flicker(videos: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference between successive frames of each clip, in [0, 1]; 0 for a still one.

    The measure behind "temporal flickering" of VBench (Huang et al., CVPR 2024, arXiv 2311.17982), which takes it on
    clips without motion. Motion counts as well: compare with a reference by `flicker_difference`.

    Args:
        videos: float [N, T, C, H, W] in [0, 1], T at least 2.

    Returns:
        float64 [N].

    Raises:
        DitaError: there is one frame only, or values leave [0, 1].

    Example:
        >>> blink = torch.tensor([0.0, 1.0, 0.0]).reshape(1, 3, 1, 1, 1).expand(1, 3, 1, 8, 8)
        >>> flicker(blink)
        tensor([1.], dtype=torch.float64)
    """
    changes = _changes(check_videos(videos), "videos")
    return changes.abs().mean((1, 2, 3, 4), dtype=torch.float64)


def flicker_difference(videos: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """How much more each clip changes from frame to frame than its reference: the difference of their `flicker`.

    Negative for a clip that is stiller. It compares amounts only; `motion_consistency` tells whether the same things
    move.

    Args:
        videos: float [N, T, C, H, W] in [0, 1], T at least 2.
        reference: the same shape, such as the run without caching.

    Returns:
        float64 [N] in [-1, 1].

    Raises:
        DitaError: shapes differ, there is one frame only, or values leave [0, 1].

    Example:
        >>> clip = torch.rand(1, 3, 1, 8, 8)
        >>> flicker_difference(clip, clip)
        tensor([0.], dtype=torch.float64)
    """
    videos, reference = check_video_pair(videos, reference)
    return flicker(videos) - flicker(reference)


def motion_consistency(videos: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Agreement of what changes from frame to frame in each clip and in its reference, from -1 to 1.

    With a and b the differences of successive frames of the two clips, over all pixels: 2 <a, b> / (|a|^2 + |b|^2),
    which is 1 - |a - b|^2 / (|a|^2 + |b|^2). It is 1 only for the same motion, 0 if the motions have nothing in common
    or one clip is still, and -1 where each brightening is a darkening of the same size. Unlike the cosine of a and b it
    falls when motion is damped: half the amplitude gives 0.8. A constant offset between the clips does not count. Two
    still clips agree (1); a clip is still if no pixel changes by half a level of 8 bits. No flow is estimated, so a
    pattern that moves on a displaced path scores as low as another pattern. The measure is dita's own.

    Args:
        videos: float [N, T, C, H, W] in [0, 1], T at least 2.
        reference: the same shape.

    Returns:
        float64 [N].

    Raises:
        DitaError: shapes differ, there is one frame only, or values leave [0, 1].

    Example:
        >>> rising = torch.linspace(0, 0.5, 5).reshape(1, 5, 1, 1, 1).expand(1, 5, 1, 8, 8)
        >>> motion_consistency(torch.cat([rising, rising / 2, 1 - rising]), rising.expand(3, -1, -1, -1, -1))
        tensor([ 1.00,  0.80, -1.00], dtype=torch.float64)
    """
    videos, reference = check_video_pair(videos, reference)
    ours, theirs = _motion(_changes(videos, "videos")), _motion(_changes(reference, "reference"))
    shared = (ours * theirs).sum(1, dtype=torch.float64)
    power = (ours.square() + theirs.square()).sum(1, dtype=torch.float64)
    return (2 * shared / power).where(power > 0, 1.0)


def _changes(clips: torch.Tensor, name: str) -> torch.Tensor:
    if clips.shape[1] < 2:
        raise DitaError(f"{name} have {clips.shape[1]} frame, {tuple(clips.shape)}; changes need at least 2 frames")
    return clips.diff(dim=1)


def _motion(changes: torch.Tensor) -> torch.Tensor:
    changes = changes.flatten(1)
    moving = changes.abs().amax(1, keepdim=True) >= _STILL
    return changes * moving
