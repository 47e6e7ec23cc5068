"""FID, KID and LPIPS proper, on the published networks; grey images are repeated to three channels."""

from __future__ import annotations

from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from dita.errors import DitaError
from dita.eval.metrics.kernel import KernelDistance, kernel_distance
from dita.eval.metrics.pixel import check_images, check_pair
from dita.eval.metrics.weights import ALEXNET, INCEPTION, SQUEEZENET, VGG16, find_weights, load_weights

_BACKBONES = {"alex": ALEXNET, "squeeze": SQUEEZENET, "vgg": VGG16}


def _three_channels(images: torch.Tensor) -> torch.Tensor:
    if images.shape[1] not in (1, 3):
        raise DitaError(
            f"images have {images.shape[1]} channels; FID, KID and LPIPS are defined for 3, grey is repeated"
        )
    return images.expand(-1, 3, -1, -1).clamp(0, 1)


def _checked(images: torch.Tensor, name: str = "images") -> torch.Tensor:
    images = check_images(images, name)
    _three_channels(images[:1])
    return images


def _eight_bits(images: torch.Tensor) -> torch.Tensor:
    # Rounded, not cut: (k / 127.5 - 1 + 1) / 2 * 255 is a little less than k for a quarter of all levels k.
    return (255 * _three_channels(images)).round().byte()


def require(module: str) -> None:
    """Raise a DitaError unless the optional `module` ("torch_fidelity" or "torchvision") is installed."""
    if find_spec(module) is None:
        raise DitaError(f"FID, KID and LPIPS need {module}, which is not installed: pip install 'dita[eval]'")


class InceptionDistance:
    """FID (arXiv 1706.08500) to a fixed set of real images, whose features are computed once.

    The network is torch-fidelity's port of the original Inception-v3, pixels have 8 bits, and images are resized as
    TensorFlow 1 did: like the original and torch-fidelity, unlike torchmetrics' default.

    Args:
        real: float [M, 1 or 3, H, W] in [0, 1].
        weights: file or folder of the Inception weights; see `find_weights` for where they are looked for otherwise.
        download: whether the network may be used to get them.
        batch: images at a time.
        features: 2048 is FID; 64, 192 and 768 are earlier layers and give other numbers.

    Raises:
        DitaError: the weights or torch-fidelity cannot be had, or the images do not fit.

    Example:
        >>> InceptionDistance(torch.rand(50, 1, 32, 32))(torch.rand(50, 1, 32, 32))  # doctest: +SKIP
    """

    def __init__(
        self,
        real: torch.Tensor,
        weights: str | Path | None = None,
        download: bool = True,
        batch: int = 50,
        features: int = 2048,
    ) -> None:
        real = _checked(real, "real")
        from torchmetrics.image.fid import FrechetInceptionDistance

        options = _inception_options(FrechetInceptionDistance, weights, download)
        self.batch = batch
        self._metric = FrechetInceptionDistance(features, reset_real_features=False, **options).to(real.device)
        self._update(real, True)

    def __call__(self, images: torch.Tensor) -> float:
        """Compute the distance of images, float [N, 1 or 3, H, W] in [0, 1]; it depends strongly on N below 10,000."""
        self._metric.reset()
        self._update(_checked(images), False)
        return self._metric.compute().item()

    def _update(self, images: torch.Tensor, real: bool) -> None:
        for part in images.split(self.batch):
            self._metric.update(_eight_bits(part), real=real)


def frechet_inception_distance(
    images: torch.Tensor, real: torch.Tensor, weights: str | Path | None = None, download: bool = True
) -> float:
    """FID of images [N, 1 or 3, H, W] to real ones [M, 1 or 3, H, W], both in [0, 1]; see `InceptionDistance`.

    Raises:
        DitaError: the weights or torch-fidelity cannot be had, or the images do not fit.

    Example:
        >>> frechet_inception_distance(torch.rand(50, 1, 32, 32), torch.rand(50, 1, 32, 32))  # doctest: +SKIP
    """
    return InceptionDistance(real, weights, download)(check_images(images))


class KernelInceptionDistance:
    """KID (arXiv 1801.01401) to a fixed set of real images, whose features are computed once.

    Network, weights, pixels and resizing are those of `InceptionDistance`; the distance is `kernel_distance`. Unlike
    FID it is unbiased, and so fit for a few hundred images.

    Args:
        real: float [M, 1 or 3, H, W] in [0, 1].
        weights: file or folder of the Inception weights; see `find_weights` for where they are looked for otherwise.
        download: whether the network may be used to get them.
        batch: images at a time.
        features: 2048 is KID; 64, 192 and 768 are earlier layers and give other numbers.

    Raises:
        DitaError: the weights or torch-fidelity cannot be had, or the images do not fit.

    Example:
        >>> KernelInceptionDistance(torch.rand(50, 1, 32, 32))(torch.rand(50, 1, 32, 32))  # doctest: +SKIP
    """

    def __init__(
        self,
        real: torch.Tensor,
        weights: str | Path | None = None,
        download: bool = True,
        batch: int = 50,
        features: int = 2048,
    ) -> None:
        real = _checked(real, "real")
        from torchmetrics.image.fid import NoTrainInceptionV3

        options = _inception_options(NoTrainInceptionV3, weights, download)
        self.batch = batch
        self._network = NoTrainInceptionV3("inception-v3-compat", [str(features)], **options).to(real.device)
        self.real = self._features(real)

    def __call__(
        self, images: torch.Tensor, subsets: int = 100, subset_size: int | None = None, seed: int = 0
    ) -> KernelDistance:
        """Compute the distance of images, float [N, 1 or 3, H, W] in [0, 1]; the rest as in `kernel_distance`."""
        return kernel_distance(self.features(images), self.real, subsets, subset_size, seed)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the network's features, float [N, features], of images [N, 1 or 3, H, W] in [0, 1].

        A Frechet distance between Gaussians fitted to these and to `real` is FID.
        """
        return self._features(_checked(images))

    @torch.no_grad()
    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._network(_eight_bits(part)) for part in images.split(self.batch)])


def _inception_options(cls: type, weights: str | Path | None, download: bool) -> dict[str, Any]:
    require("torch_fidelity")
    path = find_weights(INCEPTION, weights, download)
    load_weights(path)  # the extractor unpickles without restraint, so refuse here what is not plain tensors
    # Older releases of torchmetrics know only TensorFlow 1's way of resizing, which is the one wanted.
    newer = "antialias" in signature(cls).parameters
    return {"feature_extractor_weights_path": str(path), **({"antialias": False} if newer else {})}


def lpips(
    images: torch.Tensor,
    reference: torch.Tensor,
    net: str = "alex",
    weights: str | Path | None = None,
    download: bool = True,
    batch: int = 50,
) -> torch.Tensor:
    """LPIPS v0.1 (arXiv 1801.03924) of each image to its reference, at the images' own resolution.

    Args:
        images: float [N, 1 or 3, H, W] in [0, 1], H and W at least 32.
        reference: the same shape.
        net: "alex", "squeeze" or "vgg".
        weights: file or folder of torchvision's ImageNet weights of that network; see `find_weights` otherwise. The
            learned linear layers come with torchmetrics.
        download: whether the network may be used to get them.
        batch: images at a time.

    Returns:
        float32 [N].

    Raises:
        DitaError: the weights cannot be had, or the images do not fit.

    Example:
        >>> lpips(torch.rand(2, 1, 64, 64), torch.rand(2, 1, 64, 64))  # doctest: +SKIP
    """
    if net not in _BACKBONES:
        raise DitaError(f"net is {net!r}; expected one of {sorted(_BACKBONES)}")
    images, reference = check_pair(images, reference)
    if min(images.shape[-2:]) < 32:
        raise DitaError(f"images are {images.shape[-2]}x{images.shape[-1]}; LPIPS needs at least 32x32")
    images, reference = _three_channels(images), _three_channels(reference)
    require("torchvision")
    network = _lpips_network(net, find_weights(_BACKBONES[net], weights, download)).to(images.device)
    with torch.no_grad():
        parts = zip(images.split(batch), reference.split(batch), strict=True)
        return torch.cat([network(one, two, normalize=True).reshape(-1) for one, two in parts])


def _lpips_network(net: str, path: Path) -> torch.nn.Module:
    # The public class downloads the backbone under a fixed name; this builds the same network around a given file.
    from torchmetrics.functional.image.lpips import _LPIPS

    state = load_weights(path)
    network = _LPIPS(net=net, pnet_rand=True)  # pyright: ignore[reportArgumentType]
    backbone = network.net.state_dict()
    prefix = 2 if net == "squeeze" else 1  # "slices.0." there, "slice1." in the others
    renamed = {key: "features." + key.split(".", prefix)[prefix] for key in backbone}
    missing = sorted(set(renamed.values()) - set(state))
    if missing:
        raise DitaError(f"{path} does not hold torchvision's {net} weights: missing {', '.join(missing[:4])}")
    network.net.load_state_dict({key: state[name] for key, name in renamed.items()})
    return network
