"""A tiny DiT that draws 32x32 grey noise, and an untrained judge: enough to drive the whole sweep in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from pipelines_base import seed_weights

from dita.eval.classifier import FashionClassifier
from dita.eval.judge import GarmentJudge
from dita.eval.metrics import Gaussian, garment_features
from dita.eval.pipelines import load_pipeline
from dita.eval.reference import Reference
from dita.eval.training.identity_vae import build_identity_vae


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """Folder of a DiTPipeline with two blocks of width 16."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        sample_size=32,
        patch_size=8,
        num_embeds_ada_norm=1000,
    )
    seed_weights(transformer, 0)
    folder = tmp_path_factory.mktemp("tiny-dit")
    parts: dict[str, Any] = {"vae": build_identity_vae(1), "scheduler": DDIMScheduler()}
    DiTPipeline(transformer=transformer, **parts).save_pretrained(folder)
    (folder / "sampling.json").write_text('{"judge": "garment", "steps": 5}')
    return folder


@pytest.fixture
def tiny(tiny_folder) -> Any:
    """A fresh copy of the tiny pipeline."""
    return load_pipeline(tiny_folder)


@pytest.fixture(scope="session")
def untrained() -> FashionClassifier:
    """A classifier with random weights."""
    torch.manual_seed(0)
    return FashionClassifier().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def judge(untrained) -> GarmentJudge:
    """A judge on noise instead of garments."""
    images = torch.rand(200, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    features = garment_features(images, untrained)
    return GarmentJudge(classifier=untrained, reference=Reference(Gaussian.fit(features), 0.1, features))
