from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from dita.errors import DitaError
from dita.eval.metrics import (
    flicker,
    flicker_difference,
    motion_consistency,
    per_frame,
    psnr,
    ssim,
    summarize_psnr,
)

SHAPES = [pytest.param((2, 4, 1, 16, 16), id="grey"), pytest.param((3, 2, 3, 17, 13), id="rgb-ragged")]


def pair(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(shape, generator=generator)
    return (reference + 0.2 * torch.randn(shape, generator=generator)).clamp(0, 1), reference


def moving(frames: int = 5, step: int = 1, size: int = 16) -> torch.Tensor:
    """One clip [1, T, 1, H, W] of a pattern of period 4 in x that moves `step` pixels a frame."""
    row = torch.tensor([0.0, 0.25, 0.75, 1.0]).repeat(size // 4).expand(size, size)
    return torch.stack([row.roll(step * t, 1) for t in range(frames)])[None, :, None]


def still(frames: int = 5) -> torch.Tensor:
    return moving(1).expand(-1, frames, -1, -1, -1)


@pytest.mark.parametrize("shape", SHAPES)
def test_psnr_of_clips_is_that_of_the_whole_clip_by_scikit_image(shape):
    videos, reference = pair(shape)
    expected = [
        peak_signal_noise_ratio(r.numpy(), v.numpy(), data_range=1) for v, r in zip(videos, reference, strict=True)
    ]
    torch.testing.assert_close(psnr(videos, reference), torch.tensor(expected).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_per_frame_averages_scikit_image_over_the_frames(shape):
    videos, reference = pair(shape)
    options = {"data_range": 1, "channel_axis": 0, "gaussian_weights": True, "use_sample_covariance": False}
    frames = [list(zip(v.numpy(), r.numpy(), strict=True)) for v, r in zip(videos, reference, strict=True)]
    similar = [np.mean([structural_similarity(v, r, **options) for v, r in clip]) for clip in frames]
    noise = [np.mean([peak_signal_noise_ratio(r, v, data_range=1) for v, r in clip]) for clip in frames]
    assert per_frame(ssim)(videos, reference).tolist() == pytest.approx(similar, abs=2e-4)
    assert per_frame(psnr)(videos, reference).tolist() == pytest.approx(noise, rel=1e-5)


def test_the_clips_psnr_is_pooled_over_identical_frames_and_the_mean_leaves_them_out():
    videos, reference = pair((2, 4, 1, 16, 16))
    videos[0, 0] = reference[0, 0]
    videos[1] = reference[1]
    error = np.mean([mean_squared_error(r.numpy(), v.numpy()) for v, r in zip(videos[0], reference[0], strict=True)])
    pooled, mean = psnr(videos, reference), per_frame(psnr)(videos, reference)
    assert pooled.tolist() == pytest.approx([-10 * math.log10(error), math.inf])
    assert mean[0] == pytest.approx(summarize_psnr(psnr(videos[0], reference[0])).mean)
    assert mean[1] == math.inf


def test_pooled_psnr_is_never_above_the_mean_over_differing_frames():
    videos, reference = pair((6, 5, 1, 12, 12))
    strength = torch.linspace(0.1, 1, 5).reshape(5, 1, 1, 1)
    videos = reference + strength * (videos - reference)
    assert (per_frame(psnr)(videos, reference) - psnr(videos, reference) > 1).all()


def test_per_frame_hands_options_on_and_refuses_a_metric_that_does_not_fit():
    clip = torch.rand(2, 3, 1, 8, 8)
    scaled = per_frame(lambda one, two, scale=1.0: scale * (one - two).flatten(1).abs().mean(1))
    assert scaled(clip, 1 - clip, scale=3.0).tolist() == pytest.approx((3 * scaled(clip, 1 - clip)).tolist())
    with pytest.raises(DitaError, match="one number for each frame"):
        per_frame(lambda one, two: one.mean())(clip, clip)
    with pytest.raises(DitaError, match="6 of them NaN"):
        per_frame(lambda one, two: torch.full((6,), math.nan))(clip, clip)


@pytest.mark.parametrize("shape", SHAPES)
def test_flicker_equals_numpy(shape):
    videos, reference = pair(shape)
    expected = [np.abs(np.diff(v.double().numpy(), axis=0)).mean() for v in videos]
    other = [np.abs(np.diff(r.double().numpy(), axis=0)).mean() for r in reference]
    assert flicker(videos).tolist() == pytest.approx(expected, rel=1e-5)
    difference = [one - two for one, two in zip(expected, other, strict=True)]
    assert flicker_difference(videos, reference).tolist() == pytest.approx(difference, abs=1e-6)


def test_flicker_of_a_translated_pattern_in_closed_form():
    # The steps of the periodic row are 1/4, 1/2, 1/4 and 1: one pixel a frame changes each pixel by 1/2 on average.
    assert flicker(moving()).item() == pytest.approx(0.5)
    assert flicker(moving(step=4)).item() == 0
    assert flicker(still()).item() == 0
    assert flicker_difference(still(), moving()).item() == pytest.approx(-0.5)


def test_motion_consistency_in_closed_form():
    clip = moving()
    assert motion_consistency(clip, clip).item() == pytest.approx(1)
    assert motion_consistency(1 - clip, clip).item() == pytest.approx(-1)
    for amplitude in (0.75, 0.5, 0.1):
        damped = 0.1 + amplitude * clip[..., :8] * 0.9
        expected = 2 * 0.9 * amplitude / (1 + (0.9 * amplitude) ** 2)
        assert motion_consistency(damped, clip[..., :8]).item() == pytest.approx(expected, rel=1e-5)
    columns, rows = moving(), moving().transpose(-1, -2)
    assert motion_consistency(columns, rows).item() == pytest.approx(0, abs=1e-6)


def wave(frames: int, start: int = 0, step: int = 1) -> torch.Tensor:
    """One clip [1, T, 1, 16, 16] of a sine of period 16 in x that begins at `start` and moves `step` pixels a frame."""
    row = (0.5 + 0.5 * torch.cos(2 * math.pi * torch.arange(16) / 16)).expand(16, 16)
    return torch.stack([row.roll(start + step * t, 1) for t in range(frames)])[None, :, None]


@pytest.mark.parametrize("offset", [0, 2, 4, 8])
def test_a_wave_on_a_displaced_path_agrees_by_the_cosine_of_the_phase(offset):
    expected = math.cos(2 * math.pi * offset / 16)
    assert motion_consistency(wave(6, offset), wave(6)).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("frames", [2, 3, 4])
def test_a_wave_that_runs_backwards_in_closed_form(frames):
    changes, phase = frames - 1, 2 * math.pi / 16
    expected = -math.sin(2 * changes * phase) / (2 * changes * math.sin(phase))
    assert motion_consistency(wave(frames, step=-1), wave(frames)).item() == pytest.approx(expected, abs=1e-5)
    assert expected < -0.3


@pytest.mark.parametrize("shape", SHAPES)
def test_motion_consistency_equals_numpy(shape):
    videos, reference = pair(shape)
    expected = []
    for video, other in zip(videos.double().numpy(), reference.double().numpy(), strict=True):
        a, b = np.diff(video, axis=0).ravel(), np.diff(other, axis=0).ravel()
        expected.append(1 - ((a - b) ** 2).sum() / ((a**2).sum() + (b**2).sum()))
    assert motion_consistency(videos, reference).tolist() == pytest.approx(expected, rel=1e-5)


def test_still_clips_agree_with_each_other_and_with_nothing_that_moves():
    rounding = still() + 1e-4 * torch.rand(still().shape, generator=torch.Generator().manual_seed(1))
    assert motion_consistency(still(), 1 - still()).item() == 1
    assert motion_consistency(rounding.clamp(0, 1), still()).item() == 1
    assert motion_consistency(still(), moving()).item() == 0
    assert motion_consistency(moving(), still()).item() == 0
    both = motion_consistency(torch.cat([still(), moving()]), torch.cat([still(), moving()]))
    assert both.tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("videos", "reference", "message"),
    [
        pytest.param(torch.rand(2, 3, 1, 16, 16), torch.rand(2, 2, 1, 16, 16), "must agree", id="shapes"),
        pytest.param(2 * torch.ones(1, 2, 1, 16, 16), torch.ones(1, 2, 1, 16, 16), r"\[2, 2\]", id="range"),
        pytest.param(torch.rand(1, 1, 16, 16), torch.rand(1, 1, 16, 16), "N, T, C, H, W", id="rank"),
        pytest.param(torch.full((1, 2, 1, 4, 4), math.nan), torch.ones(1, 2, 1, 4, 4), "nan", id="nan"),
    ],
)
@pytest.mark.parametrize("metric", [psnr, per_frame(psnr), flicker_difference, motion_consistency])
def test_unfit_clips_are_refused(metric, videos, reference, message):
    if metric is psnr and videos.ndim == 4:
        return  # images
    with pytest.raises(DitaError, match=message):
        metric(videos, reference)


@pytest.mark.parametrize(
    "metric", [lambda v: flicker(v), lambda v: flicker_difference(v, v), lambda v: motion_consistency(v, v)]
)
def test_one_frame_has_no_motion(metric):
    with pytest.raises(DitaError, match="at least 2 frames"):
        metric(torch.rand(1, 1, 1, 8, 8))
