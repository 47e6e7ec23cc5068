"""Features kept on the host give the same output; kept in half precision they take half the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import CACHING, configured
from pipelines import TINY

import dita
from dita.caching import TaylorSeer
from dita.caching.history import History
from dita.caching.storage import Storage
from dita.errors import DitaError


def run(method: str, **changes: Any) -> tuple[torch.Tensor, Any]:
    tiny = TINY["dit"]
    pipe = tiny.build()
    config = configured(method, "forced", "dit").replace(**changes)
    dita.accelerate_pipeline(pipe, config)
    return tiny.call(pipe), dita.report(pipe).last


@pytest.mark.parametrize("method", CACHING)
def test_every_method_keeps_features_anywhere(method: str) -> None:
    base, plain = run(method, keep_on="device")
    away, moved = run(method, keep_on="host")
    assert torch.equal(base, away) and moved.peak_cache_bytes == plain.peak_cache_bytes
    half, less = run(method, keep_on="device", keep_as="bf16")
    assert plain.peak_cache_bytes / 2 <= less.peak_cache_bytes < plain.peak_cache_bytes
    assert half.isfinite().all() and not torch.equal(half, base)
    assert (half - base).norm() < 0.1 * base.norm()


def test_settings_round_trip_and_refuse() -> None:
    config = TaylorSeer(keep_on="host", keep_as="fp16")
    assert TaylorSeer.from_json(config.to_json()) == config and "keep_on=host" in config.label()
    changes: tuple[dict[str, Any], ...] = ({"keep_on": "disk"}, {"keep_as": "int4"})
    for wrong in changes:
        with pytest.raises(DitaError, match="expected one of"):
            TaylorSeer(**wrong)


def test_history_in_half_precision_gives_back_the_dtype() -> None:
    history = History(2, storage=Storage("host", "bf16"))
    for step in range(3):
        history.push(step, (torch.full((2, 4), 1 + step / 4), None))
    forecast, none = history.combine([2.0, -1.0])
    assert none is None and forecast is not None and forecast.dtype == torch.float32
    assert forecast.eq(1.75).all() and history.bytes_held() == 2 * 8 * 2
    newest = history.newest[0]
    assert newest is not None and newest.dtype == torch.float32


def test_features_of_few_bits_are_kept_as_they_are() -> None:
    kept = Storage(precision="fp16").put((torch.ones(2, dtype=torch.bfloat16), torch.arange(3)), ())
    assert [t.dtype for t in kept if t is not None] == [torch.bfloat16, torch.int64]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_host_copies_survive_what_the_device_does_next() -> None:
    histories = [History(2, storage=Storage(place)) for place in ("device", "host")]
    feature = torch.randn(64, 1024, 256, device="cuda")
    for step in range(6):
        for history in histories:
            history.push(step, (feature,))
        feature.mul_(1.1).add_(0.01)
        if step:
            one, two = (history.combine([1.5, -0.5])[0] for history in histories)
            assert one is not None and two is not None and torch.equal(one, two)
    kept = histories[1].entries[0].features[0]
    assert kept is not None and kept.is_pinned()
