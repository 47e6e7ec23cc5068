"""FID and LPIPS proper, by torchmetrics on the published networks; grey images are repeated to three channels."""

from __future__ import annotations

from pathlib import Path

import torch

from dita.errors import DitaError
from dita.eval.metrics.pixel import check_images, check_pair
from dita.eval.metrics.weights import ALEXNET, INCEPTION, VGG16, find_weights, load_weights

_BACKBONES = {"alex": ALEXNET, "vgg": VGG16}


def _three_channels(images: torch.Tensor) -> torch.Tensor:
    if images.shape[1] not in (1, 3):
        raise DitaError(f"images have {images.shape[1]} channels; FID and LPIPS are defined for 3, grey is repeated")
    return images.expand(-1, 3, -1, -1).clamp(0, 1)


def frechet_inception_distance(
    images: torch.Tensor,
    real: torch.Tensor,
    weights: str | Path | None = None,
    download: bool = True,
    batch: int = 50,
) -> float:
    """FID (arXiv 1706.08500) on torch-fidelity's port of the original Inception-v3, 2048 features, 8-bit pixels.

    Args:
        images: float [N, 1 or 3, H, W] in [0, 1]; resized to 299x299 by the network's own layer.
        real: float [M, 1 or 3, H, W] in [0, 1].
        weights: file or folder of the Inception weights; see `find_weights` for where they are looked for otherwise.
        download: whether the network may be used to get them.
        batch: images at a time.

    Returns:
        The distance. It depends strongly on N and M below some ten thousand; report them.

    Raises:
        DitaError: the weights cannot be had, or the images do not fit.

    Example:
        >>> frechet_inception_distance(torch.rand(50, 1, 32, 32), torch.rand(50, 1, 32, 32))  # doctest: +SKIP
    """
    images, real = check_images(images), check_images(real, "real")
    path = find_weights(INCEPTION, weights, download)
    load_weights(path)  # the extractor unpickles without restraint, so refuse here what is not plain tensors
    return _inception_distance(images, real, path, 2048, batch)


def _inception_distance(images: torch.Tensor, real: torch.Tensor, path: Path, features: int, batch: int) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    images, real = _three_channels(images), _three_channels(real)
    metric = FrechetInceptionDistance(features, normalize=True, feature_extractor_weights_path=str(path))
    metric = metric.to(images.device)
    for part in real.split(batch):
        metric.update(part, real=True)
    for part in images.split(batch):
        metric.update(part, real=False)
    return metric.compute().item()


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
        net: "alex" or "vgg".
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
    renamed = {key: "features." + key.split(".", 1)[1] for key in backbone}
    missing = sorted(set(renamed.values()) - set(state))
    if missing:
        raise DitaError(f"{path} does not hold torchvision's {net} weights: missing {', '.join(missing[:4])}")
    network.net.load_state_dict({key: state[name] for key, name in renamed.items()})
    return network
