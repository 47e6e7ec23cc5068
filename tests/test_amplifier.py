"""Jenga's text amplifier by itself; with the stages around it it stands in test_resolution.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import TINY

import dita
from dita.anatomy import describe
from dita.attention_view import Attended
from dita.errors import DitaError
from dita.kernels.sparse import AdaSpa
from dita.schedulers.resolution import ProgressiveResolution
from dita.schedulers.resolution.amplifier import TextAmplifier
from dita.seams import Call, Position


@pytest.mark.parametrize(("tiny", "text_slice"), [("flux", slice(0, 3)), ("sd3", slice(4, 7))])
def test_the_amplifier_weighs_text_alone_and_only_at_reduced_resolution(tiny: str, text_slice: slice) -> None:
    handler = TextAmplifier("m", describe(TINY[tiny].build().transformer))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, 8, generator=generator) for _ in range(3))
    padding = torch.ones(1, 1, 1, 7, dtype=torch.bool)
    padding[..., text_slice.start] = False

    def answered(seen: Attended, tokens: Any) -> Any:
        call = Call(Position(0, 8, 0, "all", 0, 8, 0), tokens=tokens)
        given_on: Any = lambda given: given  # noqa: E731
        return handler.attend(handler.sites[0], 0, call, seen, given_on)

    for mask in (None, padding, torch.zeros(padding.shape).masked_fill(~padding, -torch.inf)):
        seen = Attended(q, k, v, mask)
        weights = (q @ k.mT / 8**0.5).exp()
        weights[..., text_slice] *= 4  # 4 of 64 tokens are left
        if mask is not None:
            weights[..., text_slice.start] = 0
        expected = weights / weights.sum(-1, keepdim=True) @ v
        torch.testing.assert_close(answered(seen, (4, 64)).attend(), expected)
        assert answered(seen, None) is seen and answered(seen, (4, 4)) is seen
        assert answered(seen, (7, 28)) is seen, "image tokens alone"


def test_the_amplifier_excludes_other_methods_on_attention() -> None:
    pipe, config = TINY["flux"].build(), ProgressiveResolution((0.5, 1.0))
    with pytest.raises(DitaError, match="both decide about which attention is computed"):
        dita.accelerate_pipeline(pipe, AdaSpa.forced(), config.replace(amplify=True))
    dita.accelerate_pipeline(pipe, AdaSpa.forced(), config)
