from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dita.errors import DitaError
from dita.eval.metrics import latent_l1, latent_l2

SHAPES = [(2, 16, 8, 8), (3, 16, 3, 4, 6), (2, 64, 32), (4, 5)]


def pair(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("metric", "order"), [(latent_l1, 1), (latent_l2, 2)])
def test_equals_numpy(metric, order, shape):
    latents, reference = pair(shape)
    expected = [
        np.linalg.norm((one - two).ravel(), order) / np.linalg.norm(two.ravel(), order)
        for one, two in zip(latents.double().numpy(), reference.double().numpy(), strict=True)
    ]
    assert metric(latents, reference).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("metric", [latent_l1, latent_l2])
def test_closed_forms(metric):
    _, reference = pair((3, 4, 4))
    scales = torch.tensor([1.0, 0.75, -1.0])[:, None, None]
    assert metric(scales * reference, reference).tolist() == pytest.approx([0, 0.25, 2])
    assert metric(torch.zeros_like(reference), reference).tolist() == [1, 1, 1]


def test_one_large_error_weighs_more_in_l2():
    reference = torch.ones(1, 100)
    spike = reference.clone()
    spike[0, 0] += 10
    assert latent_l1(spike, reference).item() == pytest.approx(0.1)
    assert latent_l2(spike, reference).item() == pytest.approx(1)


def test_half_precision_is_summed_in_double():
    reference = torch.full((1, 4096), 200.0).half()
    assert latent_l2(reference + 8, reference).item() == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("latents", "reference", "message"),
    [
        pytest.param(torch.ones(2, 3), torch.ones(2, 4), "the same", id="shapes"),
        pytest.param(torch.ones(3), torch.ones(3), "the same", id="rank"),
        pytest.param(torch.ones(2, 0), torch.ones(2, 0), "at least one value", id="empty"),
        pytest.param(torch.tensor([[1.0], [math.nan]]), torch.ones(2, 1), r"latents hold .* \[1\]", id="nan"),
        pytest.param(torch.ones(2, 1), torch.tensor([[math.inf], [1.0]]), r"reference hold .* \[0\]", id="inf"),
        pytest.param(torch.ones(2, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), r"all zero in samples \[1\]", id="zero"),
    ],
)
@pytest.mark.parametrize("metric", [latent_l1, latent_l2])
def test_unfit_latents_are_refused(metric, latents, reference, message):
    with pytest.raises(DitaError, match=message):
        metric(latents, reference)
