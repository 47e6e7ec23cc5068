from __future__ import annotations

import pytest
import torch

from dita.errors import DitaError
from dita.eval.classifier import BUNDLED, FashionClassifier, load_classifier
from dita.eval.data import CLASSES, load_fashion_mnist
from dita.eval.metrics import (
    Gaussian,
    class_accuracy,
    fd_garment,
    garment_features,
    garment_perceptual_distance,
)
from dita.eval.reference import load_reference
from dita.eval.training.classifier import shifted


@pytest.fixture(scope="module")
def test_split() -> tuple[torch.Tensor, torch.Tensor]:
    try:
        images, labels = load_fashion_mnist("test")
    except DitaError as error:
        pytest.skip(str(error))
    return (images + 1) / 2, labels


def noise(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_perceptual_distance_is_one_minus_cosine_averaged(untrained):
    images, reference = noise(3, 0), noise(3, 1)
    expected = torch.zeros(3, dtype=torch.float64)
    maps, others = untrained.maps(2 * images - 1), untrained.maps(2 * reference - 1)
    for one, two in zip(maps, others, strict=True):
        a, b = one.double().flatten(2), two.double().flatten(2)
        lengths, dot = a.norm(dim=1) * b.norm(dim=1), (a * b).sum(1)
        alive = (a.norm(dim=1) > 0).double() + (b.norm(dim=1) > 0).double()
        cosine = torch.where(lengths > 0, dot / lengths.clamp(min=1e-30), torch.zeros_like(dot))
        expected += (alive - 2 * cosine).mean(1) / len(maps)
    torch.testing.assert_close(
        garment_perceptual_distance(images, reference, untrained).double(), expected, rtol=1e-4, atol=1e-6
    )


def test_perceptual_distance_is_zero_symmetric_and_grows(untrained):
    reference, other = noise(2, 2), noise(2, 3)
    assert garment_perceptual_distance(reference, reference, untrained).tolist() == [0, 0]
    steps = [torch.lerp(reference, other, weight) for weight in (0.1, 0.4, 1.0)]
    distances = torch.stack([garment_perceptual_distance(step, reference, untrained) for step in steps])
    assert (distances.diff(dim=0) > 0).all()
    backwards = garment_perceptual_distance(reference, other, untrained)
    torch.testing.assert_close(backwards, distances[-1])


def test_features_and_accuracy_do_not_depend_on_the_batching(untrained):
    images = noise(501, 4)
    alone = torch.cat([untrained.features(2 * part - 1) for part in images.split(100)])
    torch.testing.assert_close(garment_features(images, untrained), alone, rtol=1e-4, atol=1e-5)


def test_class_accuracy_counts(untrained):
    images = noise(6, 5)
    named = untrained(2 * images - 1).argmax(1)
    labels = named.clone()
    labels[0] = (labels[0] + 1) % 10
    accuracy = class_accuracy(images, labels, untrained)
    assert accuracy.overall == pytest.approx(5 / 6)
    assert set(accuracy.per_class) == set(labels.tolist())
    assert accuracy.per_class[int(labels[0])] < 1
    with pytest.raises(DitaError, match=r"expected \[6\]"):
        class_accuracy(images, labels[:5], untrained)


def test_classifier_wants_its_own_shape(untrained):
    with pytest.raises(DitaError, match="1, 1, 28, 28"):
        untrained(torch.zeros(1, 1, 28, 28))


def test_save_and_load_round_trip(untrained, tmp_path):
    untrained.save(tmp_path)
    again, images = load_classifier(tmp_path), noise(4, 6)
    torch.testing.assert_close(again(images), untrained(images), rtol=0, atol=5e-3)
    assert not again.training


def test_missing_or_foreign_weights_are_named(tmp_path):
    with pytest.raises(DitaError, match=r"config\.json is missing"):
        load_classifier(tmp_path)
    FashionClassifier(widths=(2, 2, 2)).save(tmp_path)
    from safetensors.torch import save_file

    save_file({"head.weight": torch.zeros(10, 64)}, tmp_path / "classifier.safetensors")
    with pytest.raises(DitaError, match="does not fit"):
        load_classifier(tmp_path)
    with pytest.raises(DitaError, match=r"reference\.safetensors is missing"):
        load_reference(tmp_path)


def test_shifts_move_whole_images():
    images = torch.full((64, 1, 9, 9), -1.0)
    images[:, :, 4, 4] = 1.0
    moved = shifted(images, torch.Generator().manual_seed(0), reach=2)
    assert moved.shape == images.shape
    assert (moved == 1).flatten(1).sum(1).tolist() == [1] * 64
    places = (moved == 1).nonzero()[:, 2:]
    assert places.min() == 2
    assert places.max() == 6
    assert len(places.unique(dim=0)) > 10


def test_bundled_classifier_is_small():
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 2_000_000


def test_bundled_classifier_names_real_garments(test_split):
    images, labels = test_split[0][:2000], test_split[1][:2000]
    accuracy = class_accuracy(images, labels, load_classifier())
    assert accuracy.overall > 0.915
    assert len(accuracy.per_class) == len(CLASSES)


def test_bundled_reference_belongs_to_the_bundled_classifier(test_split):
    classifier, reference = load_classifier(), load_reference()
    assert reference.test.count == 10_000
    half = Gaussian.fit(garment_features(test_split[0][:2000], classifier))
    spread = half.covariance.diagonal().sqrt()
    assert ((half.mean - reference.test.mean).abs() < 0.15 * spread).all()


def test_floor_is_below_damaged_images_and_falls_with_more_samples(test_split):
    classifier, reference = load_classifier(), load_reference()
    generator = torch.Generator().manual_seed(0)
    damaged = (test_split[0][:200] + 0.3 * torch.randn(200, 1, 32, 32, generator=generator)).clamp(0, 1)
    clean = fd_garment(test_split[0][:200], reference.test, classifier)
    assert clean < 3 * reference.floor(200)
    assert fd_garment(damaged, reference.test, classifier) > 2 * clean
    assert reference.floor(1000) < reference.floor(100) < reference.floor(20)
    with pytest.raises(DitaError, match="2 to 2000"):
        reference.floor(2001)
