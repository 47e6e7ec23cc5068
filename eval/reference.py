"""The real garments as the classifier sees them, kept next to its weights so that judging needs no data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dita.errors import DitaError
from dita.eval.classifier import BUNDLED, FashionClassifier
from dita.eval.data import CLASSES, load_fashion_mnist
from dita.eval.metrics.frechet import Gaussian, frechet_distance
from dita.eval.metrics.garment import class_accuracy, garment_features

_FILE = "reference.safetensors"
_MOST_DRAWS = 8


@dataclass(frozen=True)
class GarmentReference:
    """What generated garments are compared with.

    Attributes:
        test: Gaussian over the features of all 10,000 test images.
        test_accuracy: share of them that the classifier names rightly, in [0, 1].
        train_features: float32 [M, 64] of training images, image i of class i mod 10.
    """

    test: Gaussian
    test_accuracy: float
    train_features: torch.Tensor

    def floor(self, samples: int) -> float:
        """FD-garment of `samples` real training images to the test set: what a perfect generator would score.

        Averaged over up to eight disjoint draws with as many of each class.

        Args:
            samples: as many as were generated, at least 2.

        Raises:
            DitaError: more samples than training features are held.
        """
        if not 2 <= samples <= len(self.train_features):
            raise DitaError(
                f"the floor was asked for {samples} samples; it can be had for 2 to {len(self.train_features)}; "
                "measure_reference(classifier, train=...) makes one with more"
            )
        draws = self.train_features.split(samples)[:_MOST_DRAWS]
        distances = [frechet_distance(Gaussian.fit(part), self.test) for part in draws if len(part) == samples]
        return sum(distances) / len(distances)

    def save(self, folder: str | Path) -> None:
        """Write to `folder` as safetensors."""
        from safetensors.torch import save_file

        tensors = {
            "test_mean": self.test.mean,
            "test_covariance": self.test.covariance,
            "test_count": torch.tensor(self.test.count),
            "test_accuracy": torch.tensor(self.test_accuracy, dtype=torch.float64),
            "train_features": self.train_features.contiguous(),
        }
        save_file(tensors, Path(folder) / _FILE)


def measure_reference(
    classifier: FashionClassifier, data: str | Path | None = None, train: int = 2000
) -> GarmentReference:
    """Compute the reference from the data set.

    Args:
        classifier: from `load_classifier`.
        data: folder of the idx files; see `load_fashion_mnist`.
        train: number of training images, a multiple of ten: the first of each class.

    Returns:
        A `GarmentReference`.

    Raises:
        DitaError: the data set was not found.

    Example:
        >>> measure_reference(load_classifier()).floor(1000)  # doctest: +SKIP
    """
    images, labels = load_fashion_mnist("test", data)
    pixels = (images + 1) / 2
    test = Gaussian.fit(garment_features(pixels, classifier))
    accuracy = class_accuracy(pixels, labels, classifier).overall
    images, labels = load_fashion_mnist("train", data)
    by_class = torch.stack([(labels == i).nonzero().flatten()[: train // 10] for i in range(len(CLASSES))], 1)
    return GarmentReference(test, accuracy, garment_features((images[by_class.flatten()] + 1) / 2, classifier))


def load_reference(folder: str | Path | None = None) -> GarmentReference:
    """Load the reference that belongs to the classifier in `folder`, the bundled one if None.

    Raises:
        DitaError: it is missing.

    Example:
        >>> load_reference().test.count  # doctest: +SKIP
        10000
    """
    from safetensors.torch import load_file

    path = (BUNDLED if folder is None else Path(folder)) / _FILE
    if not path.is_file():
        raise DitaError(f"{path} is missing; `python -m dita.eval.training.classifier --out {path.parent}` writes it")
    kept = load_file(path)
    test = Gaussian(kept["test_mean"], kept["test_covariance"], int(kept["test_count"]))
    return GarmentReference(test, float(kept["test_accuracy"]), kept["train_features"])
