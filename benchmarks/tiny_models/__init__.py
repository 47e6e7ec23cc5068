"""A tiny instance of every transformer class of diffusers, with configurations of our own, and a loop that samples.

Used by `benchmarks/model_coverage.py` and its test. Nothing is downloaded; weights are seeded.
"""

from __future__ import annotations

from tiny_models.audio import OTHERS, SOUNDS
from tiny_models.base import TinyModel
from tiny_models.image import IMAGES
from tiny_models.streams import STREAMS
from tiny_models.video import FILMS
from tiny_models.wan import WANS

__all__ = ["TINY_MODELS", "TinyModel"]

TINY_MODELS: dict[str, TinyModel] = {
    tiny.name: tiny for tiny in sorted((*IMAGES, *STREAMS, *FILMS, *WANS, *SOUNDS, *OTHERS), key=lambda tiny: tiny.name)
}
