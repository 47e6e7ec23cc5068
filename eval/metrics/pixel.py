"""Distances between two images pixel by pixel: PSNR and SSIM."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dita.errors import DitaError

_WINDOW = 11  # pixels that a Gaussian of sigma 1.5 covers when it is cut at 3.5 sigma


def check_images(images: torch.Tensor, name: str = "images") -> torch.Tensor:
    """Return `images` as float32 if they are [N, C, H, W] floats in [0, 1], else raise a DitaError."""
    return _check(images, name, "N, C, H, W")


def check_pair(images: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both as float32 if each passes `check_images` and their shapes agree, else raise a DitaError."""
    _check_shapes(images, reference, "images")
    return check_images(images), check_images(reference, "reference")


def check_videos(videos: torch.Tensor, name: str = "videos") -> torch.Tensor:
    """Return `videos` as float32 if they are [N, T, C, H, W] floats in [0, 1], else raise a DitaError."""
    return _check(videos, name, "N, T, C, H, W")


def check_video_pair(videos: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both as float32 if each passes `check_videos` and their shapes agree, else raise a DitaError."""
    _check_shapes(videos, reference, "videos")
    return check_videos(videos), check_videos(reference, "reference")


def _check(values: torch.Tensor, name: str, layout: str) -> torch.Tensor:
    if values.ndim != len(layout.split(", ")) or not values.is_floating_point():
        raise DitaError(f"{name} is {values.dtype} {tuple(values.shape)}; expected a float tensor [{layout}]")
    values = values.float()
    if values.numel() == 0:
        raise DitaError(f"{name} is empty, {tuple(values.shape)}")
    low, high = values.min().item(), values.max().item()
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # also refuses NaN
        raise DitaError(f"{name} ranges over [{low:.4g}, {high:.4g}]; expected [0, 1]; divide or rescale it first")
    return values


def _check_shapes(values: torch.Tensor, reference: torch.Tensor, name: str) -> None:
    if values.shape != reference.shape:
        raise DitaError(
            f"{name} have shape {tuple(values.shape)}, their reference {tuple(reference.shape)}; they are compared "
            "one by one and must agree"
        )


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image or clip, in dB: -10 log10 of its mean squared error, for a peak of 1.

    The error of a clip is that over all pixels of all frames, identical ones with their 0: its PSNR is never above the
    mean of its frames', if none is identical.

    Args:
        images: float [N, C, H, W] or [N, T, C, H, W] in [0, 1].
        reference: the same shape.

    Returns:
        float64 [N]; inf where an image or clip equals its reference. `summarize_psnr` averages them.

    Raises:
        DitaError: shapes differ, or values leave [0, 1].

    Example:
        >>> psnr(torch.full((1, 1, 8, 8), 0.6), torch.full((1, 1, 8, 8), 0.5)).round(decimals=3)
        tensor([20.], dtype=torch.float64)
        >>> clip = torch.full((1, 4, 1, 8, 8), 0.5)
        >>> half = clip.clone()
        >>> half[:, :2] += 0.1
        >>> psnr(half, clip).round(decimals=2)
        tensor([23.01], dtype=torch.float64)
    """
    images, reference = (check_video_pair if images.ndim == 5 else check_pair)(images, reference)
    error = (images.double() - reference.double()).square().flatten(1).mean(1)
    return -10 * error.log10()


class PsnrSummary(NamedTuple):
    """PSNR of a set of images, in dB.

    Attributes:
        mean: average over the images that differ from their reference; inf only if none differs. Leaving out the
            identical ones, whose PSNR is infinite, can only lower it.
        pooled: PSNR of the mean squared error over all images, identical ones included; never above the average.
        worst: the lowest of any image.
        identical: how many images equal their reference bit for bit.
    """

    mean: float
    pooled: float
    worst: float
    identical: int


def summarize_psnr(values: torch.Tensor) -> PsnrSummary:
    """Average what `psnr` returned.

    Args:
        values: float [N] in dB, inf allowed.

    Returns:
        Mean, pooled and worst value and the number of identical images; see `PsnrSummary` for how they are defined.

    Raises:
        DitaError: there are no values, or one of them is NaN.

    Example:
        >>> summarize_psnr(torch.tensor([20.0, 40.0, float("inf")])).mean
        30.0
    """
    if values.numel() == 0 or values.isnan().any():
        raise DitaError(f"PSNR values are {values.tolist()}; expected at least one and no NaN")
    differing = values[values.isfinite()].double()
    identical = values.numel() - differing.numel()
    mean = differing.mean().item() if differing.numel() else float("inf")
    pooled = -10 * torch.pow(10.0, -values.double() / 10).mean().log10().item()
    return PsnrSummary(mean, pooled, values.min().item(), identical)


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image (Wang et al. 2004), Gaussian window of sigma 1.5 over 11x11 pixels.

    The mean is over the windows that lie wholly inside the image, as in the paper and in scikit-image. torchmetrics,
    which computes the map, also averages over windows that see a mirrored border.

    Args:
        images: float [N, C, H, W] in [0, 1], H and W at least 11.
        reference: the same shape.

    Returns:
        float32 [N], 1 for identical images.

    Raises:
        DitaError: shapes differ, values leave [0, 1], or the images are smaller than the window.

    Example:
        >>> ssim(torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16)).shape
        torch.Size([2])
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    images, reference = check_pair(images, reference)
    if min(images.shape[-2:]) < _WINDOW:
        raise DitaError(f"images are {images.shape[-2]}x{images.shape[-1]}; SSIM's window needs at least 11x11")
    similarity = structural_similarity_index_measure(
        images, reference, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
    )
    border = _WINDOW // 2
    height, width = images.shape[-2:]
    inside = similarity[1][..., border : height - border, border : width - border]
    return inside.flatten(1).mean(1)
