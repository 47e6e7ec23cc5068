from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dita.errors import DitaError
from dita.eval import timing
from dita.eval.flops import count_flops
from dita.eval.sampling import Sampling, draw
from dita.eval.timing import measure, pinned_threads, timed


def test_threads_are_put_back_even_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="inside"), pinned_threads(before + 1) as threads:
        assert threads == torch.get_num_threads() == before + 1
        raise ValueError("inside")
    assert torch.get_num_threads() == before
    with pinned_threads(0) as threads:
        assert threads == before
    with pytest.raises(DitaError, match="-1"), pinned_threads(-1):
        pass


def test_calls_take_turns_and_the_warmup_is_dropped(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) ** 2)
    order = []
    one, two = measure(lambda: order.append(1), lambda: order.append(2), repeats=3, warmup=2)
    assert order == [1, 2] * 5
    assert one.seconds == (17, 25, 33)
    assert two.seconds == (21, 29, 37)
    assert one.median == 25


def test_time_is_that_of_the_call():
    slow = timed(lambda: timing.time.sleep(0.02))
    assert 0.02 <= slow < 2


@pytest.mark.parametrize(("calls", "options"), [(0, {}), (1, {"repeats": 0}), (1, {"warmup": -1})])
def test_senseless_repeats_are_refused(calls, options):
    with pytest.raises(DitaError, match="expected"):
        measure(*[lambda: None] * calls, **options)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_linear_layer_by_hand(mode):
    layer, batch = torch.nn.Linear(16, 24), torch.ones(3, 5, 16)
    with mode():
        flops, result = count_flops(lambda: layer(batch))
    assert flops == 2 * 15 * 16 * 24
    assert result.shape == (3, 5, 24)


def test_attention_by_hand():
    q, k = torch.ones(2, 3, 7, 8), torch.ones(2, 3, 11, 8)
    with torch.no_grad():
        flops, _ = count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k))
    assert flops == 2 * 2 * (2 * 3) * 7 * 11 * 8


def test_pipeline_count_is_torchs_own_plus_cpu_attention(tiny):
    sampling = Sampling(2, 2, 3, 3.0, 0)
    plain = draw(tiny, sampling, range(2))
    flops, images = count_flops(lambda: draw(tiny, sampling, range(2)))
    with FlopCounterMode(display=False) as counter:
        draw(tiny, sampling, range(2))
    tokens, heads, width, blocks, guided, steps = 16, 2, 8, 2, 4, 3
    attention = steps * blocks * guided * heads * 4 * tokens * tokens * width
    assert torch.equal(images.media, plain.media)
    assert flops == counter.get_total_flops() + attention


def test_every_step_costs_the_same(tiny):
    sampling = Sampling(1, 1, 6, 3.0, 0)
    three, six, nine = (count_flops(lambda n=n: draw(tiny, sampling, range(1), steps=n))[0] for n in (3, 6, 9))
    assert nine - six == six - three > 0
