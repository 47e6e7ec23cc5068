"""Every method inside a layer on a tiny Wan, HunyuanVideo, CogVideoX, LTX-Video, Mochi and Flux.

Text stands first in two of them, last in two, and apart in two; that it sees and is seen by all is in the methods' own
tests, against algorithms written by hand.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from helpers import INSIDE, assert_same_snapshot, snapshot
from pipelines import TINY
from torch import nn

import dita
from dita import registry

SIX = ("wan", "hunyuan", "cogvideox", "ltx", "mochi", "flux")
STEPS = 3


@functools.cache
def pipeline(tiny: str) -> tuple[Any, torch.Tensor]:
    """One pipeline of two blocks of each kind for all tests, and its plain output."""
    pipe: Any = TINY[tiny].build()
    for name in ("transformer_blocks", "single_transformer_blocks", "blocks"):
        held = getattr(pipe.transformer, name, None)
        if isinstance(held, nn.ModuleList) and len(held) > 2:
            setattr(pipe.transformer, name, nn.ModuleList([held[0], held[-1]]))
    return pipe, TINY[tiny].call(pipe, steps=STEPS)


def method_for(name: str, tiny: str, pipe: Any) -> Any:
    """Small blocks, from the second step on."""
    config: Any = registry.get(name).forced()
    if hasattr(config, "dense_steps"):
        config = config.replace(dense_steps=1 / STEPS)
    return config.calibrated(pipe, lambda p: TINY[tiny].call(p, steps=STEPS)) if config.needs_calibration else config


@pytest.mark.parametrize("tiny", SIX)
@pytest.mark.parametrize("name", INSIDE)
def test_every_method_on_six_models(name: str, tiny: str) -> None:
    pipe, plain = pipeline(tiny)
    before = snapshot(pipe)
    dita.accelerate_pipeline(pipe, method_for(name, tiny, pipe))
    output = TINY[tiny].call(pipe, steps=STEPS)
    run = dita.report(pipe).last
    assert output.isfinite().all() and output.shape == plain.shape and not torch.equal(output, plain)
    did = [r for r in run.records if r.action in ("sparse", "low-bit", "partial")]
    assert run.finished and did and all(record.reason for record in did)
    assert name == "sage" or 0 < run.density < 1
    dita.restore_pipeline(pipe)
    assert_same_snapshot(before, snapshot(pipe))
    assert torch.equal(TINY[tiny].call(pipe, steps=STEPS), plain)
