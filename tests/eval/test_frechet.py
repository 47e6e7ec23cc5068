from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from dita.errors import DitaError
from dita.eval.metrics import Gaussian, frechet_distance


def features(count: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator)
    return torch.randn(count, size, generator=generator) @ mixing + torch.randn(size, generator=generator)


def by_scipy(one: torch.Tensor, two: torch.Tensor) -> float:
    one, two = one.double(), two.double()
    c1, c2 = np.cov(one.numpy(), rowvar=False), np.cov(two.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(c1 @ c2)
    difference = one.mean(0).numpy() - two.mean(0).numpy()
    return float(difference @ difference + np.trace(c1 + c2 - 2 * np.real(root)))


@pytest.mark.parametrize(("count", "size"), [(200, 8), (500, 64), (70, 64)])
def test_equals_scipy(count, size):
    one, two = features(count, size, 0), features(count + 13, size, 1)
    assert frechet_distance(Gaussian.fit(one), Gaussian.fit(two)) == pytest.approx(by_scipy(one, two), rel=1e-6)


def test_equals_torchmetrics_on_the_same_features():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(torch.nn.Module):
        num_features = 48

        def forward(self, images):
            return images.flatten(1)

    one, two = features(300, 48, 2), features(200, 48, 3)
    metric = FrechetInceptionDistance(Flat())
    metric.set_dtype(torch.float64)
    metric.update(one.double().reshape(-1, 3, 4, 4), real=True)
    metric.update(two.double().reshape(-1, 3, 4, 4), real=False)
    assert frechet_distance(Gaussian.fit(one), Gaussian.fit(two)) == pytest.approx(metric.compute().item(), rel=1e-5)


def test_closed_form_for_commuting_covariances():
    generator = torch.Generator().manual_seed(4)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator).double()).Q
    s1, s2 = (0.1 + torch.rand(6, generator=generator).double() for _ in range(2))
    m1, m2 = (torch.randn(6, generator=generator).double() for _ in range(2))
    one = Gaussian(m1, turn @ s1.square().diag() @ turn.T, 9)
    two = Gaussian(m2, turn @ s2.square().diag() @ turn.T, 9)
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    assert frechet_distance(one, two) == pytest.approx(expected.item(), rel=1e-9)


def test_singular_covariances_do_no_harm():
    few, many = features(5, 64, 5), features(400, 64, 6)
    distance = frechet_distance(Gaussian.fit(few), Gaussian.fit(many))
    swapped = frechet_distance(Gaussian.fit(many), Gaussian.fit(few))
    assert np.isfinite(distance)
    assert distance == pytest.approx(swapped, rel=1e-6)
    assert frechet_distance(Gaussian.fit(few), Gaussian.fit(few)) == pytest.approx(0, abs=1e-6 * distance)


def test_fewer_samples_score_worse_than_more_of_the_same():
    population = features(4000, 32, 7)
    whole = Gaussian.fit(population)
    distances = [frechet_distance(Gaussian.fit(population[:count]), whole) for count in (50, 200, 1000)]
    assert distances == sorted(distances, reverse=True)


def test_wrong_input_is_refused():
    with pytest.raises(DitaError, match="at least 2"):
        Gaussian.fit(torch.zeros(1, 4))
    with pytest.raises(DitaError, match="4 features, the other 5"):
        frechet_distance(Gaussian.fit(torch.rand(9, 4)), Gaussian.fit(torch.rand(9, 5)))
