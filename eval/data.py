"""Fashion-MNIST, read from the Debian package or downloaded by torchvision.

Zalando Research, MIT licence, 60,000 training and 10,000 test images of 28x28 grey pixels in ten classes
(arXiv 1708.07747).
"""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import torch

from dita.errors import DitaError

CLASSES: tuple[str, ...] = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_FILES = {"train": "train", "test": "t10k"}


def _read_idx(path: Path) -> np.ndarray:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        data = file.read()
    rank = data[3]
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def _find(folder: Path, stem: str) -> Path | None:
    candidates = [folder / f"{stem}{suffix}" for suffix in (".gz", "")]
    return next((path for path in candidates if path.is_file()), None)


def _candidate_folders(root: str | Path | None) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dita"
    folders = [Path(root)] if root is not None else []
    if "DITA_FASHION_MNIST" in os.environ:
        folders.append(Path(os.environ["DITA_FASHION_MNIST"]))
    return [*folders, _DEBIAN, cache / "FashionMNIST" / "raw"]


def load_fashion_mnist(split: str = "train", root: str | Path | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one split of Fashion-MNIST.

    Looks in `root`, then in `$DITA_FASHION_MNIST`, then where Debian's `dataset-fashion-mnist` puts the files, then in
    dita's cache folder, into which torchvision downloads them as a last resort.

    Args:
        split: "train" (60,000 images) or "test" (10,000).
        root: folder holding the four idx files, gzipped or not.

    Returns:
        images, float32 [N, 1, 32, 32] in [-1, 1], the 28x28 image centred on a black ground; labels, int64 [N].

    Raises:
        DitaError: the split is unknown, or the files were found nowhere and could not be downloaded.

    Example:
        >>> images, labels = load_fashion_mnist("test")  # doctest: +SKIP
        >>> images.shape  # doctest: +SKIP
        torch.Size([10000, 1, 32, 32])
    """
    if split not in _FILES:
        raise DitaError(f"split is {split!r}; expected one of {sorted(_FILES)}")
    folders = _candidate_folders(root)
    stem = _FILES[split]
    for folder in folders:
        images = _find(folder, f"{stem}-images-idx3-ubyte")
        labels = _find(folder, f"{stem}-labels-idx1-ubyte")
        if images is not None and labels is not None:
            return _to_tensors(_read_idx(images), _read_idx(labels))
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(folders[-1].parent.parent), train=split == "train", download=True)
    except Exception as error:
        places = "\n  ".join(str(folder) for folder in folders)
        raise DitaError(
            f"Fashion-MNIST was not found and its download failed ({error}). Looked in:\n  {places}\n"
            "Install Debian's dataset-fashion-mnist, or put the four idx files in one folder and set "
            "DITA_FASHION_MNIST to it."
        ) from error
    return load_fashion_mnist(split, folders[-1])


def _to_tensors(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.from_numpy(images.copy()).float().div_(127.5).sub_(1.0)
    pixels = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=-1.0)
    return pixels.unsqueeze(1), torch.from_numpy(labels.astype(np.int64))
