"""Int8 attention, pooled top-k and the gated forecast against their oracles, and those against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_block_sparse_triton import inputs, random_plan, run_interpreted

from dita.errors import DitaError
from dita.kernels.gated_forecast import gated_forecast, naive_gated_forecast
from dita.kernels.int8_attention import int8_attention, key_mean, naive_int8_attention, quantise_rows
from dita.kernels.masked_attention import masked_attention, naive_block_sparse
from dita.kernels.plan import BlockPlan
from dita.kernels.pooled_scores import naive_pooled_topk, pooled_scores, pooled_topk

GROUPS: dict[str, Callable[[str], None]] = {}


def group(function: Callable[[str], None]) -> Callable[[str], None]:
    GROUPS[function.__name__] = function
    return function


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def check_int8(
    device: str,
    head_dim: int,
    dtype: torch.dtype,
    pv: str,
    granularity: str,
    block: int,
    plan: bool,
    masked: bool = True,
) -> None:
    """The kernel against its emulation, tightly, and against exact attention, loosely."""
    from dita.kernels.int8_attention_triton import triton_int8_attention

    q, k, v = inputs(50, 90, head_dim, device, dtype, key_heads=1)
    k = k + 2  # what smoothing is for
    kept = random_plan(50, 90, block, block, device) if plan else None
    if kept is not None:
        kept.counts[:, 0, 0] = 0
    valid = None
    if masked:
        valid = torch.rand(1, 1, 90, generator=torch.Generator().manual_seed(0)).to(device) < 0.8
        k = k.masked_fill(~valid[..., None], 1e4)  # padding must not widen a scale
    arguments: list[Any] = [
        q,
        k,
        v,
        kept and kept.counts,
        kept and kept.indices,
        block,
        block,
        None,
        valid,
        pv,
        granularity,
    ]
    out, lse = triton_int8_attention(*arguments)
    emulated, emulated_lse = naive_int8_attention(*arguments)
    # Triton's interpreter truncates to bfloat16; a device may fuse a product and a sum, which tips a rounding.
    limit = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 1e-2}[dtype]
    difference = error(out, emulated)
    assert difference <= (limit if device == "cpu" else max(limit, 2e-3)), difference
    torch.testing.assert_close(lse, emulated_lse, rtol=1e-6, atol=1e-5)
    wide = q.double(), k.double(), v.double()
    if kept is not None:
        true, true_lse = naive_block_sparse(*wide, kept, None, None if valid is None else valid[:, 0])
        assert (lse[:, 0, : min(block, 50)] == -math.inf).all() and not out[:, 0, : min(block, 50)].any()
    else:
        true, true_lse = masked_attention(*wide, None if valid is None else valid[:, :, None])
    assert error(out, true) <= (0.05 if pv == "fp8" else 0.02)
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=0.03)


@group
def int8(device: str) -> None:
    check_int8(device, 16, torch.float32, "fp16", "block", 32, plan=True)
    check_int8(device, 72, torch.float16, "fp16", "warp", 64, plan=False)
    check_int8(device, 128, torch.bfloat16, "fp16", "block", 64, plan=False, masked=False)
    if device == "cpu" or torch.cuda.get_device_capability() >= (8, 9):
        check_int8(device, 64, torch.float32, "fp8", "warp", 32, plan=True)
        check_int8(device, 96, torch.float16, "fp8", "block", 64, plan=False)


@group
def pooled(device: str) -> None:
    """Whole numbers, so that sums in any order are equal and ties are frequent."""
    from dita.kernels.pooled_topk_triton import triton_pooled_topk

    generator = torch.Generator().manual_seed(0)
    for heads, key_heads, keys, block_k, keep, masked in (
        (1, 1, 64, 16, 2, 0),
        (2, 1, 90, 8, 5, 2),
        (2, 1, 40, 16, 3, 1),
    ):
        q = torch.randint(-2, 3, (1, heads, 45, 12), generator=generator).to(device, torch.float16)
        k = torch.randint(-2, 3, (1, key_heads, keys, 12), generator=generator).to(device, torch.float16)
        valid = torch.arange(keys, device=device).expand(1, masked, keys) // block_k != 1
        arguments: list[Any] = [q, k, 15, block_k, keep, 0.5, valid if masked else None]
        torch.testing.assert_close(triton_pooled_topk(*arguments), naive_pooled_topk(*arguments), rtol=0, atol=0)


@group
def gated(device: str) -> None:
    from dita.kernels.gated_forecast_triton import triton_gated_forecast

    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        *tensors, residual = torch.randn(9, 2, 30, 40, device=device).to(dtype)
        for gate in (torch.randn(2, 1, 40), torch.randn(2, 30, 40), torch.randn(1, 1, 40)):
            gate = gate.to(device)
            for weights in ([0.3], [2.0, -1.0, 0.5], torch.randn(8, 40, device=device)):
                terms = tensors[: len(weights)]
                expected = naive_gated_forecast(residual.double(), gate, terms, weights)
                assert error(triton_gated_forecast(residual, gate, terms, weights), expected) <= limit


def test_under_the_interpreter() -> None:
    names = ", ".join(repr(name) for name in GROUPS)
    run_interpreted(f"import test_fused_kernels as t\nfor name in ({names},): t.GROUPS[name]('cpu')")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", GROUPS)
def test_on_the_device(name: str) -> None:
    GROUPS[name]("cuda")


@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("granularity", ["block", "warp"])
def test_int8_emulation(pv: str, granularity: str) -> None:
    """Near exact attention, far from it without smoothing, for dense and sparse, and any scale."""
    q, k, v = inputs(150, 140, 64, "cpu", key_heads=1)
    k = k + 20 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    for scale in (None, -0.1, 0.0):
        out, lse = int8_attention(q, k, v, scale=scale, pv=pv, granularity=granularity)
        true, true_lse = masked_attention(q.double(), k.double(), v.double(), None, scale)
        assert error(out, true) < (0.05 if pv == "fp8" else 0.03)
        torch.testing.assert_close(lse.double(), true_lse, rtol=1e-4, atol=0.05)
    plan = random_plan(150, 140, 32, 32, "cpu")
    out, lse = int8_attention(q, k, v, plan.counts, plan.indices, 32, 32, pv=pv, granularity=granularity)
    true, true_lse = naive_block_sparse(q.double(), k.double(), v.double(), plan)
    assert error(out, true) < (0.05 if pv == "fp8" else 0.03)
    finite = true_lse > -math.inf
    torch.testing.assert_close(lse[finite].double(), true_lse[finite], rtol=1e-4, atol=0.05)
    assert torch.equal(lse == -math.inf, ~finite)


def test_smoothing_is_what_keeps_the_offset_keys_exact() -> None:
    q, k, _ = inputs(64, 64, 64, "cpu")
    k = k + 20 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    logits = q @ k.transpose(-2, -1)
    mean = key_mean(k, None)[:, :, None]
    q8, scale_q = quantise_rows(q, 64)
    rough, smooth = (quantise_rows(x, 64) for x in (k, k - mean))
    errors = []
    for (k8, scale_k), offset in ((rough, 0), (smooth, q @ mean.transpose(-2, -1))):
        product = (q8.float() @ k8.float().transpose(-2, -1)) * (scale_q * scale_k)[..., None]
        errors.append(float((product + offset - logits).std()))
    assert errors[1] < errors[0] / 5


def test_pooled_topk_makes_a_plan() -> None:
    q, k, _ = inputs(50, 70, 16, "cpu")
    counts, indices = pooled_topk(q, k, 16, 16, 3)
    plan = BlockPlan(counts, indices, 16, 16)
    scores = pooled_scores(q, k, 16, 16)
    assert scores.shape == (1, 2, 4, 5) and (plan.counts == 3).all() and (indices.diff(dim=-1) > 0).all()
    assert torch.equal(plan.mask(5), scores >= scores.topk(3).values[..., -1:])
    expected = q[0, 1, 48:].double().mean(0) @ k[0, 1, 64:].double().mean(0) / 4
    torch.testing.assert_close(scores[0, 1, 3, 4].double(), expected, rtol=1e-5, atol=1e-6)
    equal = torch.ones(1, 1, 64, 8)
    assert pooled_topk(equal, equal, 16, 16, 2)[1][0, 0].tolist() == [[0, 1]] * 4, "of equal blocks the earlier"
    valid = torch.arange(64)[None, None] >= 16
    assert pooled_topk(equal, equal, 16, 16, 4, key_valid=valid)[0].tolist() == [[[3] * 4]]


def test_refusals() -> None:
    x = torch.zeros(1, 2, 32, 16)
    for call, message in (
        (lambda: int8_attention(x, x, x, pv="int4"), "expected pv fp16 or fp8"),
        (lambda: int8_attention(x, x, x, torch.ones(1, 1, 1, dtype=torch.int32)), "counts or indices alone"),
        (lambda: pooled_topk(x, x, 16, 16, 3), "from 1 to the 2 blocks"),
        (lambda: pooled_scores(x, x[..., :8], 16, 16), "expected q"),
        (lambda: gated_forecast(x[0], x[0], [x[0, :, :5]], [1.0]), "expected all of shape"),
        (lambda: gated_forecast(x[0], x[0, :, :5], [x[0]], [1.0]), "gate of shape .* does not fit"),
        (lambda: gated_forecast(x[0], x[0], [x[0]], [1.0, 2.0]), "got 1 and 2"),
    ):
        with pytest.raises(DitaError, match=message):
            call()
