"""A small convolutional network that reads scenes and clips: the yardstick for what fashion-flux and fashion-wan draw.

It was trained on renders of real garments alone (`dita.eval.training.worldnet`), so that it knows nothing of the
diffusion models it judges. Its heads name garment, colour, place and motion; its features give the Frechet distance,
its feature maps the perceptual distance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dita.errors import DitaError
from dita.eval.classifier import feature_maps, save_network
from dita.eval.world import COLOURS, GARMENTS, MOTIONS, SIDE

BUNDLED = Path(__file__).resolve().parent / "models" / "fashion-world"
_WEIGHTS, _CONFIG = "worldnet.safetensors", "config.json"


class Reading(NamedTuple):
    """Logits of each 32x32 view: garment [..., 10], colour [..., 8], occupied [...]."""

    garment: torch.Tensor
    colour: torch.Tensor
    occupied: torch.Tensor


class WorldNet(nn.Module):
    """Five 3x3 convolutions over three scales on 32x32 views: the halves of a scene, or the frames of a clip.

    Args:
        widths: channels at 32x32, 16x16 and 8x8.
        features: size of the feature layer.
        track: size of the projection whose change over time tells the motion.

    Example:
        >>> net = WorldNet().eval()
        >>> net.features(torch.zeros(2, 3, 32, 64)).shape, net.features(torch.zeros(2, 5, 3, 32, 32)).shape
        (torch.Size([2, 256]), torch.Size([2, 160]))
    """

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64), features: int = 128, track: int = 32) -> None:
        super().__init__()
        self.config = {"widths": list(widths), "features": features, "track": track}
        fine, middle, coarse = widths
        channels = [(3, fine), (fine, middle), (middle, middle), (middle, coarse), (coarse, coarse)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in channels)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o in channels)
        self.embed = nn.Linear(coarse * 16, features)
        self.garment = nn.Linear(features, len(GARMENTS))
        self.colour = nn.Linear(features, len(COLOURS))
        self.place = nn.Linear(features, 1)
        self.track = nn.Linear(features, track)
        self.motion = nn.Sequential(nn.Linear(track, 64), nn.ReLU(), nn.Linear(64, len(MOTIONS)))

    def maps(self, views: torch.Tensor) -> list[torch.Tensor]:
        """Compute the five feature maps, after their ReLU, of views [N, 3, 32, 32] in [-1, 1]."""
        if views.ndim != 4 or views.shape[1:] != (3, SIDE, SIDE):
            raise DitaError(f"views have shape {tuple(views.shape)}; the world network expects [N, 3, {SIDE}, {SIDE}]")
        return feature_maps(self.convs, self.norms, views)

    def embedding(self, media: torch.Tensor) -> torch.Tensor:
        """Compute the feature layer of each view, before its ReLU: [N, views, features] of `media`; see `views_of`."""
        views = views_of(media)
        flat = self.embed(F.max_pool2d(self.maps(views.flatten(0, 1))[-1], 2).flatten(1))
        return flat.unflatten(0, views.shape[:2])

    def features(self, media: torch.Tensor) -> torch.Tensor:
        """Compute one vector a sample: both halves' features, or the frames' mean features and the slope over time."""
        embedding = self.embedding(media)
        if media.ndim == 4:
            return embedding.flatten(1)
        return torch.cat([embedding.mean(1), self._slope(embedding)], dim=1)

    def read(self, embedding: torch.Tensor) -> Reading:
        """Read each view from `embedding`, float [..., features]."""
        active = F.relu(embedding)
        return Reading(self.garment(active), self.colour(active), self.place(active).squeeze(-1))

    def read_motion(self, embedding: torch.Tensor) -> torch.Tensor:
        """Compute logits [N, 5] of the motions of clips with `embedding` [N, frames, features], at least two frames."""
        return self.motion(self._slope(embedding))

    def _slope(self, embedding: torch.Tensor) -> torch.Tensor:
        # Least-squares slope over time, in units of the whole clip, so that every frame has its say.
        time = torch.linspace(-0.5, 0.5, embedding.shape[1], device=embedding.device, dtype=embedding.dtype)
        time = time - time.mean()
        return torch.einsum("ntf,t->nf", self.track(F.relu(embedding)), time / time.square().sum().clamp(min=1e-6))

    def save(self, folder: str | Path) -> None:
        """Write the weights as float16 safetensors and the sizes as json into `folder`."""
        save_network(self, self.config, Path(folder) / _WEIGHTS)


def views_of(media: torch.Tensor) -> torch.Tensor:
    """Cut media into 32x32 views.

    Args:
        media: scenes [N, 3, 32, 64] or clips [N, frames, 3, 32, 32].

    Returns:
        [N, 2, 3, 32, 32], the left half first, or the clips as they are.

    Raises:
        DitaError: any other shape.

    Example:
        >>> views_of(torch.zeros(5, 3, 32, 64)).shape
        torch.Size([5, 2, 3, 32, 32])
    """
    if media.ndim == 4 and media.shape[1:] == (3, SIDE, 2 * SIDE):
        return torch.stack([media[..., :SIDE], media[..., SIDE:]], dim=1)
    if media.ndim == 5 and media.shape[2:] == (3, SIDE, SIDE):
        return media
    raise DitaError(
        f"media have shape {tuple(media.shape)}; the world network reads scenes [N, 3, {SIDE}, {2 * SIDE}] and clips "
        f"[N, frames, 3, {SIDE}, {SIDE}]"
    )


def load_worldnet(folder: str | Path | None = None, device: str | torch.device = "cpu") -> WorldNet:
    """Load the bundled network, or one written by `WorldNet.save`, in evaluation mode and float32.

    Raises:
        DitaError: a file is missing or does not fit.

    Example:
        >>> load_worldnet().features(scenes).shape  # doctest: +SKIP
    """
    from safetensors.torch import load_file

    folder = BUNDLED if folder is None else Path(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise DitaError(
                f"the world network's {name} is missing in {folder}; train one with "
                f"`python -m dita.eval.training.worldnet --out {folder}`"
            )
    net = WorldNet(**json.loads((folder / _CONFIG).read_text()))
    try:
        missing, unexpected = net.load_state_dict(load_file(folder / _WEIGHTS), strict=False)
    except RuntimeError as error:
        raise DitaError(f"{folder / _WEIGHTS} does not fit {folder / _CONFIG}: {error}") from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise DitaError(f"{folder / _WEIGHTS} does not fit: missing {missing}, unexpected {unexpected}")
    return net.float().eval().requires_grad_(False).to(device)
