"""Does a sample show what its caption asked: garment, colour, place, motion, as the bundled network reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch

from dita.errors import DitaError
from dita.eval.world import COLOURS, GARMENTS, MOTIONS, PLACES, Clip, Scene, read_caption
from dita.eval.worldnet import WorldNet

_COLOURS, _MOTIONS = tuple(COLOURS), tuple(MOTIONS)


@dataclass(frozen=True)
class Semantics:
    """Shares in [0, 1], float32 [N] each: per sample, of the garments asked for.

    Attributes:
        garment: garments found.
        colour: colours found.
        place: garments at the side asked for, nothing where nothing was asked; None for clips.
        motion: whether the garment moves as asked; None for scenes.
    """

    garment: torch.Tensor
    colour: torch.Tensor
    place: torch.Tensor | None
    motion: torch.Tensor | None

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The attributes that apply, by name."""
        named = {"garment": self.garment, "colour": self.colour, "place": self.place, "motion": self.motion}
        return {name: values for name, values in named.items() if values is not None}

    @property
    def whole(self) -> torch.Tensor:
        """1 where everything asked for is there, else 0: float32 [N]; its mean is the semantic accuracy."""
        return torch.stack(list(self.parts.values())).min(dim=0).values.eq(1).float()


@torch.no_grad()
def semantics(media: torch.Tensor, captions: Sequence[str], net: WorldNet) -> Semantics:
    """Compare samples with their captions.

    In a scene the garments asked for are matched to the sides that are occupied in the order that explains most of
    garment, colour and place, so that two garments that swapped sides have garment and colour right and place wrong.

    Args:
        media: scenes float [N, 3, 32, 64] or clips [N, frames, 3, 32, 32], in [0, 1].
        captions: N captions in the world's language; see `dita.eval.world.read_caption`.
        net: from `load_worldnet`.

    Raises:
        DitaError: the number of captions differs, one cannot be read, or does not fit the media.

    Example:
        >>> semantics(torch.rand(1, 3, 32, 64), ["a red bag on the left"], WorldNet().eval()).garment.shape
        torch.Size([1])
    """
    if len(captions) != len(media):
        raise DitaError(f"{len(captions)} captions for {len(media)} samples; expected one each")
    asked = [read_caption(caption) for caption in captions]
    wanted = Scene if media.ndim == 4 else Clip
    strange = next((item for item in asked if not isinstance(item, wanted)), None)
    if strange is not None:
        raise DitaError(f"{strange!s} is not the caption of a {wanted.__name__.lower()}, which the samples are")
    found = torch.cat([net.embedding(2 * part - 1) for part in media.split(250)])
    if wanted is Clip:
        return _clips(asked, found, net)  # pyright: ignore[reportArgumentType]
    reading = net.read(found)
    sides = zip(
        reading.garment.argmax(-1).tolist(),
        reading.colour.argmax(-1).tolist(),
        (reading.occupied > 0).tolist(),
        strict=True,
    )
    scores = torch.tensor([_scene(scene, *side) for scene, side in zip(asked, sides, strict=True)])  # pyright: ignore[reportArgumentType]
    return Semantics(scores[:, 0], scores[:, 1], scores[:, 2], None)


def _clips(asked: list[Clip], found: torch.Tensor, net: WorldNet) -> Semantics:
    reading = net.read(found)
    garment = torch.tensor([GARMENTS.index(clip.garment) for clip in asked])
    colour = torch.tensor([_COLOURS.index(clip.colour) for clip in asked])
    motion = torch.tensor([_MOTIONS.index(clip.motion) for clip in asked])
    return Semantics(
        (reading.garment.log_softmax(-1).mean(1).argmax(-1).cpu() == garment).float(),
        (reading.colour.log_softmax(-1).mean(1).argmax(-1).cpu() == colour).float(),
        None,
        (net.read_motion(found).argmax(-1).cpu() == motion).float(),
    )


def _scene(scene: Scene, garments: list[int], colours: list[int], occupied: list[bool]) -> tuple[float, float, float]:
    """Shares of garment, colour and place under the best assignment of items to sides; an empty side shows nothing."""
    count = len(scene.items)
    stray = sum(occupied) > count
    best = (-1.0, (0.0, 0.0, 0.0))
    for sides in permutations(range(2), count):
        hits = [0.0, 0.0, 0.0]
        for item, side in zip(scene.items, sides, strict=True):
            if not occupied[side]:
                continue
            hits[0] += GARMENTS[garments[side]] == item.garment
            hits[1] += _COLOURS[colours[side]] == item.colour
            hits[2] += not stray and (item.place is None or PLACES.index(item.place) == side)
        # Place breaks ties only: which garment is which is told by what it looks like.
        rank = hits[0] + hits[1] + 0.5 * hits[2]
        if rank > best[0]:
            best = (rank, (hits[0] / count, hits[1] / count, hits[2] / count))
    return best[1]
