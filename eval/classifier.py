"""A small convolutional network that names garments; the yardstick for everything fashion-dit draws.

It was trained on the real Fashion-MNIST images alone (`dita.eval.training.classifier`), so that it knows nothing of the
diffusion model it judges. Its class decides class accuracy, its 64 features give the Frechet distance, its feature maps
give the perceptual distance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dita.errors import DitaError

BUNDLED = Path(__file__).resolve().parent / "models" / "fashion-classifier"
_WEIGHTS, _CONFIG = "classifier.safetensors", "config.json"


class FashionClassifier(nn.Module):
    """Five 3x3 convolutions over three scales, 64 features, ten classes.

    Args:
        widths: channels at 32x32, 16x16 and 8x8.
        features: size of the feature layer.
        classes: number of classes.

    Example:
        >>> net = FashionClassifier().eval()
        >>> net(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64), features: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.widths, self.num_features, self.classes = tuple(widths), features, classes
        fine, middle, coarse = widths
        channels = [(1, fine), (fine, middle), (middle, middle), (middle, coarse), (coarse, coarse)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in channels)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o in channels)
        self.embed = nn.Linear(coarse * 16, features)
        self.head = nn.Linear(features, classes)

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Compute the five feature maps after their ReLU.

        Args:
            images: float [N, 1, 32, 32] in [-1, 1].

        Returns:
            Maps [N, 16, 32, 32], two of [N, 32, 16, 16] and two of [N, 64, 8, 8] at the default widths.
        """
        if images.ndim != 4 or images.shape[1:] != (1, 32, 32):
            raise DitaError(f"images have shape {tuple(images.shape)}; the classifier expects [N, 1, 32, 32]")
        return feature_maps(self.convs, self.norms, images)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the features before the last ReLU: images [N, 1, 32, 32] in [-1, 1] to float [N, 64]."""
        return self.embed(F.max_pool2d(self.maps(images)[-1], 2).flatten(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute logits [N, 10] of images [N, 1, 32, 32] in [-1, 1]."""
        return self.head(F.relu(self.features(images)))

    def save(self, folder: str | Path) -> None:
        """Write the weights as float16 safetensors and the three sizes as json into `folder`."""
        sizes = {"widths": list(self.widths), "features": self.num_features, "classes": self.classes}
        save_network(self, sizes, Path(folder) / _WEIGHTS)


def feature_maps(convs: nn.ModuleList, norms: nn.ModuleList, images: torch.Tensor) -> list[torch.Tensor]:
    """Apply five convolutions with their norms and ReLUs, the sides halved after the first, third and fifth."""
    maps = []
    for index, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
        images = F.relu(norm(conv(images)))
        maps.append(images)
        if index in (0, 2, 4):
            images = F.max_pool2d(images, 2)
    return maps


def save_network(net: nn.Module, sizes: dict[str, Any], path: Path) -> None:
    """Write weights as float16 safetensors to `path`, and the sizes that rebuild the network as config.json beside."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file({k: v.half().contiguous() for k, v in state.items()}, path)
    (path.parent / _CONFIG).write_text(json.dumps(sizes, indent=2) + "\n")


def load_classifier(folder: str | Path | None = None, device: str | torch.device = "cpu") -> FashionClassifier:
    """Load the bundled classifier, or one written by `FashionClassifier.save`.

    Args:
        folder: where its two files lie; the bundled one if None.
        device: where to put it.

    Returns:
        The network in evaluation mode, float32, without gradients.

    Raises:
        DitaError: a file is missing or does not fit.

    Example:
        >>> net = load_classifier()  # doctest: +SKIP
        >>> net(images).argmax(1)  # doctest: +SKIP
    """
    from safetensors.torch import load_file

    folder = BUNDLED if folder is None else Path(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise DitaError(
                f"the classifier's {name} is missing in {folder}; train one with "
                f"`python -m dita.eval.training.classifier --out {folder}`"
            )
    net = FashionClassifier(**json.loads((folder / _CONFIG).read_text()))
    missing, unexpected = net.load_state_dict(load_file(folder / _WEIGHTS), strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise DitaError(f"{folder / _WEIGHTS} does not fit: missing {missing}, unexpected {unexpected}")
    return net.float().eval().requires_grad_(False).to(device)


@torch.no_grad()
def in_batches(function, images: torch.Tensor, batch: int = 500) -> torch.Tensor:
    """Apply `function` to slices of `images` [N, ...] and join the results along the first axis.

    Example:
        >>> in_batches(lambda x: 2 * x, torch.arange(5.0), batch=2)
        tensor([0., 2., 4., 6., 8.])
    """
    return torch.cat([function(part) for part in images.split(batch)])
