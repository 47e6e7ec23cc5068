"""The block-sparse kernel against float64: under Triton's interpreter, and on a device where there is one.

Each group of checks is one function of a device. The interpreter must be chosen before triton is imported, so a group
runs in a process of its own.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dita.errors import DitaError
from dita.kernels import block_sparse_configs as configs
from dita.kernels.block_sparse import block_sparse_attention, merge
from dita.kernels.block_sparse_configs import Config, Key
from dita.kernels.masked_attention import masked_attention, naive_block_sparse
from dita.kernels.plan import BlockPlan, block_count

ROOT = Path(__file__).parent.parent
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
GROUPS: dict[str, Callable[[str], None]] = {}


def group(function: Callable[[str], None]) -> Callable[[str], None]:
    GROUPS[function.__name__] = function
    return function


def inputs(
    queries: int,
    keys: int,
    head_dim: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    heads: int = 2,
    key_heads: int = 2,
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries + head_dim)
    shapes = [(batch, heads, queries), (batch, key_heads, keys), (batch, key_heads, keys)]
    return [torch.randn(*shape, head_dim, generator=generator).to(device, dtype) for shape in shapes]


def random_plan(
    queries: int, keys: int, block_q: int, block_k: int, device: str, batch: int = 1, heads: int = 2, share: float = 0.5
) -> BlockPlan:
    generator = torch.Generator().manual_seed(keys)
    shape = (batch, heads, block_count(queries, block_q), block_count(keys, block_k))
    return BlockPlan.of_mask((torch.rand(shape, generator=generator) < share).to(device), block_q, block_k)


def launch(q: Any, k: Any, v: Any, plan: BlockPlan, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from dita.kernels.block_sparse_triton import triton_block_sparse

    return triton_block_sparse(q, k, v, plan.counts, plan.indices, plan.block_q, plan.block_k, **more)


def agree(result: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], limit: float) -> None:
    """Outputs within `limit` of the norm and log-sum-exps within 4e-6 of float64's; -inf where that has it."""
    (out, lse), (right, right_lse) = result, expected
    assert out.isfinite().all() and not lse.isnan().any()
    assert lse.dtype == torch.float32 and torch.equal(lse == -math.inf, right_lse == -math.inf)
    error = (out.double() - right).norm() / right.norm().clamp_min(1e-30)
    assert error <= limit, f"error {error:.2e} above {limit}"
    torch.testing.assert_close(lse.double(), right_lse, rtol=2e-6, atol=4e-6)


def exact(q: Any, k: Any, v: Any, plan: BlockPlan, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    return naive_block_sparse(q.double(), k.double(), v.double(), plan, scale)


@group
def accuracy(device: str) -> None:
    """All dtypes and head dims, counts from 0 up, ragged ends, more keys than queries."""
    for dtype, head_dims in (
        (torch.float32, (8, 32, 72, 96)),
        (torch.float16, (16, 80, 128)),
        (torch.bfloat16, (64, 72)),
    ):
        for head_dim in head_dims:
            q, k, v = inputs(50, 70, head_dim, device, dtype)
            plan = random_plan(50, 70, 32, 16, device)
            assert 0 < plan.density < 1
            result = launch(q, k, v, plan)
            assert result[0].dtype == dtype
            agree(result, exact(q, k, v, plan), LIMITS[dtype])


@group
def special_plans(device: str) -> None:
    """The full plan is dense attention; one block per row; empty rows; what follows the counts is not read."""
    q, k, v = inputs(40, 64, 16, device)
    plan = BlockPlan.of_mask(torch.ones(1, 1, 3, 2, dtype=torch.bool, device=device), 16, 32)
    out, lse = launch(q, k, v, plan)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=2e-6)
    if device == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        torch.testing.assert_close(lse, flash[1], rtol=2e-6, atol=2e-6)

    one = BlockPlan.of_mask(torch.eye(3, dtype=torch.bool, device=device)[None, None], 16, 32)
    q, k, v = inputs(48, 96, 16, device)
    agree(launch(q, k, v, one), exact(q, k, v, one), 2e-6)

    mask = torch.ones(1, 2, 3, 3, dtype=torch.bool, device=device)
    mask[:, 0, 1] = False
    mask[:, 1] = False
    empty = BlockPlan.of_mask(mask, 16, 32)
    out, lse = result = launch(q, k, v, empty)
    agree(result, exact(q, k, v, empty), 2e-6)
    assert not out[:, 0, 16:32].any() and not out[:, 1].any() and (lse[:, 1] == -math.inf).all()

    plan = random_plan(48, 96, 16, 32, device)
    junk = plan.indices.clone()
    junk[torch.arange(3, device=device) >= plan.counts[..., None]] = 2**30
    torch.testing.assert_close(
        launch(q, k, v, BlockPlan(plan.counts, junk, 16, 32)), launch(q, k, v, plan), rtol=0, atol=0
    )


@group
def tiles(device: str) -> None:
    """Blocks of several tiles, blocks that are no power of two, any order of the programs, the same bits every time."""
    q, k, v = inputs(100, 90, 16, device)
    for block_q, block_k, config in (
        (64, 64, Config(16, 32, 2, 2)),
        (32, 64, Config(32, 16, 2, 3)),
        (48, 96, Config(16, 32, 1, 2)),
        (64, 32, None),
    ):
        plan = random_plan(100, 90, block_q, block_k, device, share=0.7)
        results = [launch(q, k, v, plan, config=config, balance=balance) for balance in (True, False, True)]
        agree(results[0], exact(q, k, v, plan), 2e-6)
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@group
def heads_and_strides(device: str) -> None:
    """Grouped heads 4:2 and 4:1, shared plans, views of [B, N, H, D], padded head strides."""
    q, k, v = inputs(32, 48, 16, device, batch=2, heads=4, key_heads=2)
    whole = random_plan(32, 48, 16, 16, device, batch=2, heads=4)
    agree(launch(q, k, v, whole), exact(q, k, v, whole), 2e-6)
    for batch, heads in ((1, 4), (2, 1), (1, 1)):
        plan = random_plan(32, 48, 16, 16, device, batch, heads)
        agree(launch(q, k, v, plan), exact(q, k, v, plan), 2e-6)
    q, k, v = inputs(32, 48, 16, device, heads=4, key_heads=1)
    plan = random_plan(32, 48, 16, 16, device, heads=4)
    agree(launch(q, k, v, plan), exact(q, k, v, plan), 2e-6)

    packed = torch.randn(1, 40, 3, 2, 24, device=device)  # as one projection gives q, k and v
    q, k, v = packed.transpose(1, 3).unbind(2)
    plan = random_plan(40, 40, 16, 16, device)
    agree(launch(q, k, v, plan), exact(q, k, v, plan), 2e-6)
    q, k, v = torch.randn(3, 1, 40, 2, 17, device=device)[..., :16].transpose(2, 3).unbind()
    out, lse = launch(q, k, v, plan)
    agree((out, lse), exact(q, k, v, plan), 2e-6)
    view = torch.randn(1, 40, 2, 16, device=device).transpose(1, 2)
    assert launch(view, view, view, plan)[0].stride() == view.stride(), "a view of [B, N, H, D] gives such a view"
    turned = torch.randn(1, 2, 16, 40, device=device).transpose(2, 3)
    agree(launch(turned, turned, turned, plan), exact(turned, turned, turned, plan), 2e-6)


@group
def masks_and_scales(device: str) -> None:
    """Keys that do not count, tiles in which none does, logits of +-80, scales that are not positive."""
    q, k, v = inputs(32, 70, 16, device)
    plan = BlockPlan.of_mask(torch.ones(1, 1, 1, 3, dtype=torch.bool, device=device), 32, 32)
    valid = torch.rand(1, 2, 70, generator=torch.Generator().manual_seed(0)).to(device) < 0.5
    valid[:, :, :32] = False
    valid[:, 1, 32:] = False
    for rows in (valid, valid[:, :1]):
        expected = masked_attention(q.double(), k.double(), v.double(), rows[..., None, :])
        agree(launch(q, k, v, plan, key_valid=rows), expected, 2e-6)
    assert (launch(q, k, v, plan, key_valid=valid)[1][:, 1] == -math.inf).all()

    signs = torch.where(torch.arange(70, device=device) % 3 == 0, 1.0, -1.0)
    steep = torch.ones(1, 2, 70, 16, device=device) * signs[:, None] * 5
    large = torch.ones_like(q)
    agree(launch(large, steep, v, plan, scale=1.0), exact(large, steep, v, plan, 1.0), 2e-6)
    for scale in (-0.3, 0.0):
        agree(launch(q, k, v, plan, scale=scale), exact(q, k, v, plan, scale), 2e-6)


@group
def identities(device: str) -> None:
    """Two halves of the blocks merge into the whole; permuted tokens give the permuted result."""
    q, k, v = inputs(48, 64, 16, device)
    halves = random_plan(48, 64, 16, 16, device).mask(4)
    parts = [launch(q, k, v, BlockPlan.of_mask(mask, 16, 16)) for mask in (halves, ~halves)]
    out, lse = merge(parts[0], parts[1])
    agree((out, lse), masked_attention(q.double(), k.double(), v.double()), 2e-6)

    generator = torch.Generator().manual_seed(1)
    order_q, order_k = (torch.randperm(n, generator=generator).to(device) for n in (48, 64))
    plan = BlockPlan.of_mask(halves, 16, 16, order_q, order_k)
    agree(block_sparse_attention(q, k, v, plan, backend="triton"), exact(q, k, v, plan), 2e-6)
    holes = torch.cat([order_k[:30], order_k.new_full((2,), -1), order_k[30:62]])
    plan = BlockPlan.of_mask(halves, 16, 16, order_q, holes)
    agree(block_sparse_attention(q, k, v, plan, backend="triton"), exact(q, k, v, plan), 2e-6)


@group
def far_offsets(device: str) -> None:
    """Offsets beyond 2^31 elements, in memory that is reserved but never touched in between."""
    for axis, stride in ((0, 2**30), (1, 2**30), (2, 2**27)):
        shape = [3 if axis == 0 else 1, 3 if axis == 1 else 1, 32, 16]
        strides = [32 * 16, 32 * 16, 16, 1]
        strides[axis] = stride
        extent = (shape[axis] - 1) * stride + 32 * 16
        assert extent >= 2**31
        x = torch.empty(extent, dtype=torch.float16, device=device).as_strided(shape, strides)
        x.copy_(inputs(32, 32, 16, device, torch.float16, shape[0], shape[1], shape[1])[1])
        plan = random_plan(32, 32, 16, 16, device, shape[0], shape[1], share=1.0)
        agree(launch(x, x, x, plan), exact(x, x, x, plan), 1e-3)
        del x


def run_interpreted(call: str) -> None:
    """Run a call of a test module in a process where triton interprets."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", f"{call}\nprint('agreed')"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip().endswith("agreed"), done.stderr[-3000:]


def test_under_the_interpreter() -> None:
    names = ", ".join(repr(name) for name in GROUPS)
    run_interpreted(f"import test_block_sparse_triton as t\nfor name in ({names},): t.GROUPS[name]('cpu')")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", GROUPS)
def test_on_the_device(name: str) -> None:
    GROUPS[name]("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tuning_on_the_device(tmp_path: Path) -> None:
    q, k, v = inputs(1024, 1024, 64, "cuda", torch.bfloat16)
    plan = random_plan(1024, 1024, 128, 64, "cuda")
    best = configs.tune(q, k, v, plan.counts, plan.indices, 128, 64)
    assert configs.choose_config(q, k, plan.indices, 128, 64) == best
    configs.save_measured(tmp_path / "configs.json")
    configs.load_measured(tmp_path / "configs.json")


def test_refusals() -> None:
    pytest.importorskip("triton")
    q, k, v = inputs(32, 32, 16, "cpu")
    plan = random_plan(32, 32, 16, 16, "cpu")
    for arguments, message in (
        ((q, k[..., :8], v[..., :8], plan), "expected q"),
        ((q, k.half(), v, plan), "float16, torch.float32"),
        ((q, k, v, random_plan(64, 32, 16, 16, "cpu")), "4 rows of 16 queries do not fit 32"),
        ((q, k, v, random_plan(32, 32, 16, 8, "cpu")), "multiples of 16"),
        ((q, k, v, random_plan(32, 32, 16, 16, "cpu", heads=3)), "fit neither batch 1 and 2 heads"),
    ):
        with pytest.raises(DitaError, match=message):
            launch(*arguments)
    with pytest.raises(DitaError, match="got tensors on cpu"):
        configs.tune(q, k, v, plan.counts, plan.indices, 16, 16)
    with pytest.raises(DitaError, match="compute capability 8.0"):
        configs.config_for(64, 128, 128, torch.float16, (7, 5))


def test_measured_configs_outlive_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "MEASURED", {})
    q, k, _ = inputs(64, 64, 16, "cpu")
    indices = torch.zeros(1, 2, 2, 1, dtype=torch.int32)
    key, config = Key(16, 32, 32, "float32", (8, 0), 1), Config(16, 16, 1, 2)
    assert configs.key_of(q, k, indices, 32, 32) == key, "half of the key blocks at most"
    assert configs.choose_config(q, k, indices, 32, 32) != config
    configs.MEASURED[key] = config
    assert configs.choose_config(q, k, indices, 32, 32) == config
    path = tmp_path / "configs.json"
    configs.save_measured(path)
    configs.MEASURED.clear()
    configs.load_measured(path)
    assert configs.MEASURED[key] == config and len(configs.MEASURED) == 1
    path.write_text(path.read_text().replace('"tile_q": 16', '"tile_q": 24'))
    with pytest.raises(DitaError, match="tiles are powers of two"):
        configs.load_measured(path)
    path.write_text("[{}]")
    with pytest.raises(DitaError, match="measure again"):
        configs.load_measured(path)
