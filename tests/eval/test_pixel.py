from __future__ import annotations

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dita.errors import DitaError
from dita.eval.metrics import psnr, ssim, summarize_psnr

SHAPES = [
    pytest.param((3, 1, 32, 32), id="grey32"),
    pytest.param((2, 3, 17, 23), id="rgb-ragged"),
    pytest.param((1, 1, 11, 64), id="one-row-of-windows"),
]


def pair(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(shape, generator=generator)
    return (reference + 0.2 * torch.randn(shape, generator=generator)).clamp(0, 1), reference


@pytest.mark.parametrize("shape", SHAPES)
def test_psnr_equals_scikit_image(shape):
    images, reference = pair(shape)
    pairs = zip(images, reference, strict=True)
    expected = [peak_signal_noise_ratio(r.numpy(), i.numpy(), data_range=1) for i, r in pairs]
    torch.testing.assert_close(psnr(images, reference), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_ssim_equals_scikit_image(shape):
    images, reference = pair(shape)
    expected = [
        structural_similarity(
            i.numpy(), r.numpy(), data_range=1, channel_axis=0, gaussian_weights=True, use_sample_covariance=False
        )
        for i, r in zip(images, reference, strict=True)
    ]
    torch.testing.assert_close(ssim(images, reference).double(), torch.tensor(expected).double(), rtol=0, atol=2e-4)


def test_identical_images_are_counted_and_never_averaged_as_a_number():
    images, reference = pair((4, 1, 16, 16))
    images[1] = reference[1]
    values = psnr(images, reference)
    summary = summarize_psnr(values)
    assert values[1] == math.inf
    assert summary.identical == 1
    assert summary.mean == pytest.approx(values[[0, 2, 3]].mean().item())
    error = (images.double() - reference.double()).square().mean().item()
    assert summary.pooled == pytest.approx(-10 * math.log10(error))
    assert summary.pooled <= summary.mean + 10 * math.log10(4 / 3)
    assert summary.worst == values.min()


def test_all_identical_is_infinite():
    image = torch.rand(2, 1, 16, 16)
    assert summarize_psnr(psnr(image, image)) == (math.inf, math.inf, math.inf, 2)
    torch.testing.assert_close(ssim(image, image), torch.ones(2))


@pytest.mark.parametrize(
    ("images", "reference", "message"),
    [
        pytest.param(torch.rand(2, 1, 16, 16), torch.rand(1, 1, 16, 16), "must agree", id="shapes"),
        pytest.param(2 * torch.ones(1, 1, 16, 16), torch.ones(1, 1, 16, 16), r"\[2, 2\]", id="range"),
        pytest.param(torch.full((1, 1, 16, 16), math.nan), torch.ones(1, 1, 16, 16), "nan", id="nan"),
        pytest.param(torch.rand(1, 16, 16), torch.rand(1, 16, 16), "N, C, H, W", id="rank"),
        pytest.param(torch.ones(1, 1, 16, 16).byte(), torch.ones(1, 1, 16, 16).byte(), "uint8", id="dtype"),
    ],
)
@pytest.mark.parametrize("metric", [psnr, ssim])
def test_unfit_images_are_refused(metric, images, reference, message):
    with pytest.raises(DitaError, match=message):
        metric(images, reference)


def test_ssim_refuses_images_below_its_window():
    with pytest.raises(DitaError, match="10x16"):
        ssim(torch.rand(1, 1, 10, 16), torch.rand(1, 1, 10, 16))


def test_summary_refuses_nan_and_nothing():
    for values in (torch.tensor([math.nan]), torch.tensor([])):
        with pytest.raises(DitaError, match="PSNR values"):
            summarize_psnr(values)
