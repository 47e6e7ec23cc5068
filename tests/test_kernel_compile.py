"""What the Triton kernels compile to for devices that are not there; the committed table has all configs."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dita.kernels.block_sparse_configs import config_for

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
table = import_module("kernel_table")
TENSOR_CORES = {80: "HMMA", 90: "GMMA", 100: "UTC"}


@pytest.mark.parametrize(
    ("kernel", "cc", "head_dim", "dtype", "blocks"),
    [
        ("block_sparse", 80, 64, "bf16", (128, 128)),
        ("block_sparse", 80, 128, "fp16", (128, 128)),
        ("block_sparse", 80, 72, "bf16", (64, 64)),
        ("block_sparse", 80, 96, "fp32", (128, 128)),
        ("block_sparse", 90, 128, "bf16", (128, 128)),
        ("block_sparse", 100, 64, "bf16", (128, 128)),
        ("int8", 80, 128, "fp16", (128, 128)),
        ("int8", 90, 64, "fp8", (128, 128)),
    ],
    ids=str,
)
def test_attention_kernels(kernel: str, cc: int, head_dim: int, dtype: str, blocks: tuple[int, int]) -> None:
    entry = getattr(table, kernel)(cc, head_dim, dtype, blocks)
    assert not table.faults(entry), entry
    assert TENSOR_CORES[cc] in entry.mma, entry
    assert entry.copies >= 8, "keys and values are fetched ahead"
    committed = json.loads((ROOT / "kernels" / "compiled.json").read_text())
    if committed["triton"] == table.triton.__version__:
        assert entry._asdict() in committed["rows"], "run benchmarks/kernel_table.py"


def test_a_config_that_spills_is_found() -> None:
    """128 x 64 with four warps does not fit the registers at head dim 128."""
    entry = table.block_sparse(80, 128, "bf16", (128, 128), table.Config(128, 64, 4, 3))
    assert entry.stack > 0 and entry.local > 0 and table.faults(entry)[0].startswith("spills")


def test_the_committed_table_is_of_these_configs() -> None:
    committed = json.loads((ROOT / "kernels" / "compiled.json").read_text())
    rows = [table.Compiled(**row) for row in committed["rows"]]
    assert not [row for row in rows if table.faults(row)]
    markdown = (ROOT / "kernels" / "compiled.md").read_text()
    assert f"Triton {committed['triton']}" in markdown and markdown.count("\n| ") == len(rows) + 1
    for row in rows:
        block_q, block_k = map(int, row.blocks.split("x"))
        if row.kernel == "block_sparse":
            config = config_for(row.head_dim, block_q, block_k, table.TYPES[row.dtype], divmod(row.cc, 10))
        else:
            config = import_module("dita.kernels.int8_attention_triton").int8_config(row.head_dim, block_q, block_k)
        assert (row.tile, row.warps, row.stages) == (f"{config.tile_q}x{config.tile_k}", config.warps, config.stages), (
            row
        )


def test_the_other_kernels() -> None:
    """No spills in what rounds, pools, selects and adds."""
    fused, pooled, int8 = (
        import_module(f"dita.kernels.{name}_triton") for name in ("gated_forecast", "pooled_topk", "int8_attention")
    )
    pointers: dict[str, str] = {"x": "*bf16", "mean": "*fp32", "valid": "*u8", "out": "*fp32", "counted": "*fp32"}
    cases: list[tuple[Any, dict[str, str], dict[str, Any], int]] = [
        (
            int8.quantise_kernel,
            {**pointers, "out": "*i8", "scales": "*fp32", "offset": "*fp32"},
            {"unit": 8, "head_dim": 128, "padded": 128, "width": 128, "group": 128, "smooth": True, "has_valid": True},
            8,
        ),
        (
            pooled.pool_kernel,
            pointers,
            {"head_dim": 128, "width": 128, "block": 128, "chunk": 32, "has_valid": True},
            4,
        ),
        (
            pooled.select_kernel,
            {
                "means_q": "*fp32",
                "means_k": "*fp32",
                "counted": "*fp32",
                "counts": "*i32",
                "indices": "*i32",
                "scale": "fp32",
            },
            {"head_dim": 128, "width": 512, "rows": 4},
            8,
        ),
        (
            fused.gated_forecast_kernel,
            {f"x{i}": "*bf16" for i in range(8)}
            | {f"w{i}": "fp32" for i in range(8)}
            | {"table": "*fp32", "residual": "*bf16", "gate": "*fp32", "out": "*bf16"},
            {"terms": 8, "per_channel": True, "block": 1024},
            4,
        ),
    ]
    for kernel, types, constants, warps in cases:
        signature = dict.fromkeys(kernel.arg_names, "i32") | types
        instructions, use = table.build(kernel, signature, constants, 80, warps, 3)
        assert use["STACK"] == 0 and instructions["STL"] == instructions["LDL"] == 0, kernel
        assert use["SHARED"] <= table.SHARED_KIB[80]
