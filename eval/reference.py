"""Real data as a judging network sees them, kept next to its weights so that judging needs no data set."""

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
class Reference:
    """What generated samples are compared with.

    Attributes:
        test: Gaussian over the features of unseen real samples.
        test_accuracy: share of them that the network names rightly, in [0, 1].
        train_features: float32 [M, D] of real samples as the generator saw them in training, in mixed order.
    """

    test: Gaussian
    test_accuracy: float
    train_features: torch.Tensor

    def floor(self, samples: int) -> float:
        """Frechet distance of `samples` real training samples to unseen ones: what a perfect generator would score.

        Averaged over up to eight disjoint draws.

        Args:
            samples: as many as were generated, at least 2.

        Raises:
            DitaError: more samples than training features are held.
        """
        if not 2 <= samples <= len(self.train_features):
            raise DitaError(
                f"the floor was asked for {samples} samples; it can be had for 2 to {len(self.train_features)}, as "
                "many as the reference was measured with"
            )
        draws = self.train_features.split(samples)[:_MOST_DRAWS]
        distances = [frechet_distance(Gaussian.fit(part), self.test) for part in draws if len(part) == samples]
        return sum(distances) / len(distances)

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, or as reference.safetensors into a folder."""
        from safetensors.torch import save_file

        path = Path(path)

        tensors = {
            "test_mean": self.test.mean,
            "test_covariance": self.test.covariance,
            "test_count": torch.tensor(self.test.count),
            "test_accuracy": torch.tensor(self.test_accuracy, dtype=torch.float64),
            "train_features": self.train_features.contiguous(),
        }
        save_file(tensors, path / _FILE if path.is_dir() else path)


def measure_reference(classifier: FashionClassifier, data: str | Path | None = None, train: int = 2000) -> Reference:
    """Compute the reference from the data set.

    Args:
        classifier: from `load_classifier`.
        data: folder of the idx files; see `load_fashion_mnist`.
        train: number of training images, a multiple of ten: the first of each class.

    Returns:
        A `Reference`.

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
    return Reference(test, accuracy, garment_features((images[by_class.flatten()] + 1) / 2, classifier))


def load_reference(path: str | Path | None = None) -> Reference:
    """Load a reference from its file, or from the folder of the classifier that it belongs to; the bundled one if None.

    Raises:
        DitaError: it is missing.

    Example:
        >>> load_reference().test.count  # doctest: +SKIP
        10000
    """
    from safetensors.torch import load_file

    path = BUNDLED if path is None else Path(path)
    path = path / _FILE if path.is_dir() else path
    if not path.is_file():
        script = "classifier" if path.name == _FILE else "worldnet"
        raise DitaError(f"{path} is missing; `python -m dita.eval.training.{script} --out {path.parent}` writes it")
    kept = load_file(path)
    test = Gaussian(kept["test_mean"], kept["test_covariance"], int(kept["test_count"]))
    return Reference(test, float(kept["test_accuracy"]), kept["train_features"])
