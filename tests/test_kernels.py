"""The weighted sum against float64, in plain PyTorch and, under the interpreter, in Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dita.errors import DitaError
from dita.kernels.weighted_sum import naive_weighted_sum, weighted_sum

ROOT = Path(__file__).parent.parent
SHAPES = [(1,), (7,), (2, 63, 5), (1, 1024), (3, 1025), (2, 17, 130)]


def inputs(shape: tuple[int, ...], terms: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[float]]:
    generator = torch.Generator().manual_seed(terms)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(terms + 1)]
    return tensors, torch.randn(terms, generator=generator).mul(3).tolist()


def oracle(tensors: list[torch.Tensor], weights: list[float], base: torch.Tensor | None) -> torch.Tensor:
    total = sum(t.double() * w for t, w in zip(tensors, weights, strict=True))
    total = total if base is None else base.double() + total
    return total.to(tensors[0].dtype)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_base", [False, True])
def test_weighted_sum(shape: tuple[int, ...], terms: int, dtype: torch.dtype, with_base: bool) -> None:
    (*tensors, base), weights = inputs(shape, terms, dtype)
    expected = oracle(tensors, weights, base if with_base else None)
    kept = [t.clone() for t in tensors]
    for function in (weighted_sum, naive_weighted_sum):
        result = function(tensors, weights, base if with_base else None)
        torch.testing.assert_close(result, expected)
        assert all(result is not t for t in tensors)
    assert all(torch.equal(t, k) for t, k in zip(tensors, kept, strict=True)), "inputs stay as they are"


FORECASTS = [[6.0, -5.0], [1.0, 0.0], [0.0, 1.0], [2.25, -1.5, 0.25], [3.0, -3.0, 1.0], [4.0, -6.0, 4.0, -1.0]]
"""Extrapolations, also those whose first weights cancel."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", FORECASTS, ids=str)
@pytest.mark.parametrize("with_base", [False, True])
def test_forecasts_are_rounded_once(
    weights: list[float], dtype: torch.dtype, with_base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64, with an error of float32 times the sum of what is added, and one rounding to half precision."""
    monkeypatch.setattr("dita.kernels.weighted_sum._PIECE", 50)  # several pieces, the last one shorter
    (*tensors, base), _ = inputs((2, 9, 7), len(weights), dtype)
    tensors = [tensor.mT if number == 1 else tensor.mT.contiguous() for number, tensor in enumerate(tensors)]
    start = base.mT if with_base else None
    exact = torch.stack([t.double() * w for t, w in zip(tensors, weights, strict=True)]).sum(0)
    exact = exact + start.double() if start is not None else exact
    size = sum(abs(w) * t.double().abs() for w, t in zip(weights, tensors, strict=True)) + 1
    allowed = 8 * 2.0**-24 * size + exact.abs() * (0.51 * torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    table = torch.tensor(weights)[:, None].expand(-1, 9)
    for given in (weights, table):
        result = weighted_sum(tensors, given, start)
        assert result.dtype == dtype and ((result.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_base", [False, True])
def test_weights_per_channel(shape: tuple[int, ...], dtype: torch.dtype, with_base: bool) -> None:
    (*tensors, base), _ = inputs(shape, 3, dtype)
    table = torch.randn(3, shape[-1], generator=torch.Generator().manual_seed(9))
    total = sum(t.double() * row.double() for t, row in zip(tensors, table, strict=True))
    expected = (total + base.double() if with_base else total).to(dtype)  # pyright: ignore
    result = weighted_sum(tensors, table, base if with_base else None)
    torch.testing.assert_close(result, expected, rtol=1.6e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)


def test_weighted_sum_accumulates_in_float32() -> None:
    """1 + 2^-9 - 1 vanishes when every partial sum is rounded to bfloat16."""
    one = torch.ones(4, dtype=torch.bfloat16)
    small = torch.full((4,), 2.0**-9, dtype=torch.bfloat16)
    assert weighted_sum([one, small, one], [1.0, 1.0, -1.0]).tolist() == [2.0**-9] * 4


@pytest.mark.parametrize(
    ("tensors", "weights", "message"),
    [
        ([], [], "1 to 8 tensors"),
        ([torch.ones(2)], [1.0, 2.0], "a weight each, got 1 and 2"),
        ([torch.ones(2), torch.ones(3)], [1.0, 2.0], "one shape"),
        ([torch.ones(2), torch.ones(2)], torch.ones(2, 3), "expected .2, 2."),
    ],
)
def test_weighted_sum_refuses(tensors: list[torch.Tensor], weights: Any, message: str) -> None:
    with pytest.raises(DitaError, match=message):
        weighted_sum(tensors, weights)


INTERPRETED = """
import sys
sys.path.insert(0, "tests")
import torch
from test_kernels import SHAPES, inputs, oracle
from dita.kernels.weighted_sum_triton import triton_weighted_sum
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for shape in SHAPES:
        for terms in (1, 2, 8):
            (*tensors, base), weights = inputs(shape, terms, dtype)
            for start in (None, base):
                result = triton_weighted_sum(tensors, weights, start)
                torch.testing.assert_close(result, oracle(tensors, weights, start))
for shape in SHAPES:
    (*tensors, base), _ = inputs(shape, 3, torch.float32)
    table = torch.randn(3, shape[-1], generator=torch.Generator().manual_seed(9))
    expected = sum(t.double() * row.double() for t, row in zip(tensors, table))
    torch.testing.assert_close(triton_weighted_sum(tensors, table), expected.float())
    torch.testing.assert_close(triton_weighted_sum(tensors, table, base), (expected + base.double()).float())
strided = torch.randn(4, 6).t()
torch.testing.assert_close(triton_weighted_sum([strided], [2.0]), strided * 2)
print("agreed")
"""


def test_triton_kernel_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip().endswith("agreed"), done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_kernel_on_the_device(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        (*tensors, base), weights = inputs(shape, 3, dtype)
        result = weighted_sum([t.cuda() for t in tensors], weights, base.cuda())
        torch.testing.assert_close(result.cpu(), oracle(tensors, weights, base))
        table = torch.randn(3, shape[-1])
        expected = naive_weighted_sum(tensors, table, base)
        result = weighted_sum([t.cuda() for t in tensors], table, base.cuda())
        torch.testing.assert_close(result.cpu(), expected)
