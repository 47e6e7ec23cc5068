"""The small world that the bundled text-to-image and text-to-video pipelines draw.

Real Fashion-MNIST garments, tinted with one of eight colours, on a plain dark ground. A *scene* is 32x64 pixels with a
garment on the left, on the right, or one on each side. A *clip* is 32x32 pixels over time with one garment that stands
still or moves in one of four directions. Each has a caption, from which it can be read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from dita.errors import DitaError
from dita.eval.data import load_fashion_mnist

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.12, 0.12),
    "orange": (1.0, 0.55, 0.05),
    "yellow": (0.95, 0.95, 0.15),
    "green": (0.15, 0.8, 0.2),
    "cyan": (0.1, 0.85, 0.95),
    "blue": (0.2, 0.3, 1.0),
    "purple": (0.75, 0.2, 0.95),
    "white": (1.0, 1.0, 1.0),
}
GARMENTS: tuple[str, ...] = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
PLACES: tuple[str, ...] = ("left", "right")
MOTIONS: dict[str, tuple[int, int]] = {  # (x, y) in pixel axes: y grows downwards
    "standing still": (0, 0),
    "moving left": (-1, 0),
    "moving right": (1, 0),
    "moving up": (0, -1),
    "moving down": (0, 1),
}
GROUND = 0.1  # brightness of the ground, of 1
SIDE = 32  # pixels: height of a scene, half its width, both sides of a clip
CLIP_GARMENT = 20  # pixels: side of a garment in a clip
CLIP_FRAMES = 13
_NAMES = tuple(COLOURS)
_PALETTE = torch.tensor(list(COLOURS.values()))
_JITTER = 2  # pixels by which a garment in a scene may be off its place


@dataclass(frozen=True)
class Item:
    """One garment of a scene: a word of GARMENTS, of COLOURS and of PLACES; place None leaves it open."""

    garment: str
    colour: str
    place: str | None = None

    def __post_init__(self) -> None:
        _known("garment", self.garment, GARMENTS)
        _known("colour", self.colour, _NAMES)
        _known("place", self.place, (*PLACES, None))

    def __str__(self) -> str:
        words = _noun(self.garment, self.colour)
        return words if self.place is None else f"{words} on the {self.place}"


@dataclass(frozen=True)
class Scene:
    """One or two garments side by side.

    Example:
        >>> str(Scene((Item("sneaker", "red", "left"), Item("bag", "blue", "right"))))
        'a red sneaker on the left and a blue bag on the right'
    """

    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        places = [item.place for item in self.items]
        if not 1 <= len(places) <= 2 or (len(places) == 2 and places[0] == places[1] and places[0] is not None):
            raise DitaError(f"a scene holds one garment, or two at different places; got places {places}")

    def __str__(self) -> str:
        return " and ".join(map(str, self.items))


@dataclass(frozen=True)
class Clip:
    """One garment that moves or stands still.

    Example:
        >>> str(Clip("dress", "green", "moving left"))
        'a green dress moving left'
    """

    garment: str
    colour: str
    motion: str

    def __post_init__(self) -> None:
        Item(self.garment, self.colour)
        _known("motion", self.motion, tuple(MOTIONS))

    def __str__(self) -> str:
        return f"{_noun(self.garment, self.colour)} {self.motion}"


def _known(what: str, word: str | None, words: Sequence[str | None]) -> None:
    if word not in words:
        raise DitaError(f"{what} is {word!r}; expected one of {', '.join(map(str, words))}")


def _noun(garment: str, colour: str) -> str:
    if garment == "trousers":
        return f"{colour} trousers"
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {garment}"


def read_caption(caption: str) -> Scene | Clip:
    """Read a caption of the world back.

    Raises:
        DitaError: the text is not in the world's language.

    Example:
        >>> read_caption("an orange coat moving up")
        Clip(garment='coat', colour='orange', motion='moving up')
        >>> [item.place for item in read_caption("red trousers and a blue bag").items]
        [None, None]
    """
    words = caption.lower().strip()
    for motion in MOTIONS:
        if words.endswith(f" {motion}"):
            garment, colour = _read_noun(words.removesuffix(f" {motion}"), caption)
            return Clip(garment, colour, motion)
    items = []
    for part in words.split(" and "):
        noun, _, place = part.partition(" on the ")
        items.append(Item(*_read_noun(noun, caption), place or None))
    return Scene(tuple(items))


def _read_noun(noun: str, caption: str) -> tuple[str, str]:
    words = [word for word in noun.split() if word not in ("a", "an")]
    if len(words) != 2:
        raise DitaError(f"cannot read {noun!r} in {caption!r}; expected a colour and a garment, as in 'a red sneaker'")
    return words[1], words[0]


def vocabulary() -> list[str]:
    """All words that captions use, sorted.

    Example:
        >>> len(vocabulary())
        30
    """
    texts = [f"{_noun(garment, colour)} on the left and right" for garment in GARMENTS for colour in COLOURS]
    return sorted({word for text in (*texts, *MOTIONS) for word in text.split()})


def random_scene(generator: torch.Generator) -> Scene:
    """Draw a scene: three in four hold two garments; places are named, in either order."""
    places = list(PLACES) if _below(2, generator) else list(PLACES)[::-1]
    items = [Item(GARMENTS[_below(10, generator)], _NAMES[_below(8, generator)], place) for place in places]
    return Scene(tuple(items if _below(4, generator) else items[:1]))


def random_clip(generator: torch.Generator) -> Clip:
    """Draw a clip, each garment, colour and motion equally often."""
    motions = tuple(MOTIONS)
    return Clip(GARMENTS[_below(10, generator)], _NAMES[_below(8, generator)], motions[_below(5, generator)])


def captions(kind: str, count: int, seed: int = 0) -> list[str]:
    """Draw captions of the world.

    Args:
        kind: "scene" or "clip".
        count: how many.
        seed: the same seed gives the same captions; a longer list begins with the shorter one.

    Raises:
        DitaError: the kind is unknown.

    Example:
        >>> captions("clip", 2) == captions("clip", 3)[:2]
        True
    """
    _known("kind", kind, ("scene", "clip"))
    generator = torch.Generator().manual_seed(seed)
    drawn = random_scene if kind == "scene" else random_clip
    return [str(drawn(generator)) for _ in range(count)]


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))


class Renderer:
    """Draws scenes and clips with the garments of one split of Fashion-MNIST.

    Args:
        split: "train" or "test".
        root: see `load_fashion_mnist`.

    Example:
        >>> renderer = Renderer("test")  # doctest: +SKIP
        >>> generator = torch.Generator().manual_seed(0)
        >>> renderer.scenes([read_caption("a red bag on the left")], generator).shape  # doctest: +SKIP
        torch.Size([1, 3, 32, 64])
    """

    def __init__(self, split: str = "train", root: str | Path | None = None) -> None:
        images, labels = load_fashion_mnist(split, root)
        self.shades = (images + 1) / 2  # [N, 1, 32, 32] in [0, 1]
        self._small: dict[int, torch.Tensor] = {}
        self._members = [torch.nonzero(labels == index).flatten() for index in range(len(GARMENTS))]

    def scenes(self, scenes: Sequence[Scene], generator: torch.Generator) -> torch.Tensor:
        """Draw scenes; an item without a place takes one that is free.

        Returns:
            float32 [B, 3, 32, 64] in [-1, 1].
        """
        shades = torch.zeros(len(scenes), 2, 1, SIDE, SIDE)
        tints = torch.zeros(len(scenes), 2, 3)
        for row, scene in enumerate(scenes):
            for item, place in zip(scene.items, _placed(scene, generator), strict=True):
                shift = torch.randint(-_JITTER, _JITTER + 1, (2,), generator=generator).tolist()
                shades[row, place] = self._pick(self.shades, item.garment, generator).roll(shift, (1, 2))
                tints[row, place] = torch.tensor(COLOURS[item.colour])
        halves = _paint(shades, tints)
        return torch.cat([halves[:, 0], halves[:, 1]], dim=-1)

    def clips(
        self, clips: Sequence[Clip], generator: torch.Generator, frames: int = CLIP_FRAMES, side: int = SIDE
    ) -> torch.Tensor:
        """Draw clips. A garment stays inside the frame; over 13 frames it crosses between half and all of its room.

        Args:
            clips: what to draw.
            generator: of the garment, its path and its speed.
            frames: how many; fewer than 13 show the beginning of a 13-frame path.
            side: pixels; less than 32 draws the same at a lower resolution.

        Returns:
            float32 [B, 3, frames, side, side] in [-1, 1].
        """
        size = round(CLIP_GARMENT * side / SIDE)
        room = side - size
        small = self._scaled(size)
        shades = torch.stack([self._pick(small, clip.garment, generator) for clip in clips])
        directions = torch.tensor([MOTIONS[clip.motion] for clip in clips], dtype=torch.float32)
        travel = room * (0.5 + 0.5 * torch.rand(len(clips), 1, generator=generator))
        start = torch.rand(len(clips), 2, generator=generator) * (room - directions.abs() * travel)
        start = start + travel * (directions < 0)  # a garment that moves left starts as far right as it will travel
        time = torch.arange(frames) / (CLIP_FRAMES - 1)
        corner = start[:, None] + directions[:, None] * travel[:, None] * time[None, :, None]  # [B, T, 2] of (x, y)
        # Sampling position p of the garment is canvas position minus corner; grid_sample wants it in [-1, 1].
        centre = (corner + size / 2).flatten(0, 1)
        axis = torch.arange(side) + 0.5
        x = (axis[None] - centre[:, :1]) * 2 / size
        y = (axis[None] - centre[:, 1:]) * 2 / size
        grid = torch.stack([x[:, None].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], dim=-1)
        placed = F.grid_sample(shades.repeat_interleave(frames, 0), grid, align_corners=False)
        tints = torch.tensor([COLOURS[clip.colour] for clip in clips])
        painted = _paint(placed.unflatten(0, (len(clips), frames)), tints[:, None].expand(-1, frames, -1))
        return painted.transpose(1, 2).contiguous()

    def _pick(self, shades: torch.Tensor, garment: str, generator: torch.Generator) -> torch.Tensor:
        members = self._members[GARMENTS.index(garment)]
        return shades[members[_below(len(members), generator)]]

    def _scaled(self, size: int) -> torch.Tensor:
        if size not in self._small:
            tight = self.shades[:, :, 2:-2, 2:-2]
            self._small[size] = F.interpolate(tight, (size, size), mode="bilinear", antialias=True)
        return self._small[size]


def _placed(scene: Scene, generator: torch.Generator) -> list[int]:
    named = [PLACES.index(item.place) if item.place else None for item in scene.items]
    free = [place for place in torch.randperm(2, generator=generator).tolist() if place not in named]
    return [free.pop() if place is None else place for place in named]


def _paint(shades: torch.Tensor, tints: torch.Tensor) -> torch.Tensor:
    """Blend tints [..., 3] over the ground by shades [..., 1, H, W]: float [..., 3, H, W] in [-1, 1]."""
    pixels = GROUND + shades * (tints[..., None, None] - GROUND)
    return pixels * 2 - 1
