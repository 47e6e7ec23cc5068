"""Tiny instances of the pipelines of diffusers whose denoiser is a transformer, for the table of `docs/pipelines.md`.

Used by `benchmarks/pipeline_coverage.py` and its test. Nothing is downloaded; weights are seeded.
"""

from __future__ import annotations

from tiny_pipelines.base import TinyPipeline
from tiny_pipelines.film import FILMS
from tiny_pipelines.flux import FLUXES
from tiny_pipelines.image import IMAGES
from tiny_pipelines.sound import SOUNDS
from tiny_pipelines.tokens import TOKENS
from tiny_pipelines.wan import WANS

__all__ = ["TINY_PIPELINES", "TinyPipeline"]

TINY_PIPELINES: dict[str, TinyPipeline] = {
    tiny.key: tiny for tiny in (*FLUXES, *IMAGES, *TOKENS, *WANS, *FILMS, *SOUNDS)
}
"""By class and variant."""
