"""Tiny random-weight instances of stock diffusers pipelines, for tests that need the real call path.

Text encoders and tokenizers are absent: prompts enter as embeddings. Latents are returned wherever the pipeline can
do so, and a VAE exists only for DiT, which always decodes. Nothing is downloaded.
"""

from __future__ import annotations

from pipelines_base import TinyPipeline
from pipelines_image import IMAGE
from pipelines_video import VIDEO

__all__ = ["TINY", "TinyPipeline"]

TINY: dict[str, TinyPipeline] = {tiny.name: tiny for tiny in (*IMAGE, *VIDEO)}
