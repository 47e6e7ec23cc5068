"""What the Triton kernels compile to, for devices that need not be there: `kernels/compiled.md` and `compiled.json`.

    python benchmarks/kernel_table.py            # all configs, some minutes
    python benchmarks/kernel_table.py --check    # compare with the committed table instead of writing it

Triton's own ptxas, cuobjdump and nvdisasm give registers, stack, shared memory and the instructions. That tells whether
a config spills or does not fit, and whether it uses tensor cores and asynchronous copies. It does not tell its speed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dita.kernels.block_sparse_configs import SHARED_KIB, Config, config_for, split_head_dim

FOLDER = Path(__file__).resolve().parents[1] / "kernels"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEVICES = (80, 89, 90, 100)
HEAD_DIMS = (64, 72, 80, 96, 128)
BLOCKS = ((128, 128), (64, 64), (16, 16))


class Compiled(NamedTuple):
    """One row. `mma`: tensor-core instructions by name; `copies`: cp.async and TMA; `local`: spill loads and stores."""

    kernel: str
    cc: int
    head_dim: int
    dtype: str
    blocks: str
    tile: str
    warps: int
    stages: int
    registers: int
    stack: int
    local: int
    shared_kib: float
    mma: str
    copies: int


def build(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], cc: int, warps: int, stages: int
) -> tuple[Counter[str], dict[str, float]]:
    """Compile a kernel; pointers are taken to be aligned to 16 bytes, integers not to be divisible by anything.

    Args:
        kernel: a function under `triton.jit`.
        types: Triton's type of each argument that is no constant.
        constants: the others.
        cc: compute capability, such as 80.

    Returns:
        how often each instruction occurs, and registers, stack in bytes and shared memory in KiB.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    compiled = triton.compile(
        ASTSource(kernel, signature, values, aligned),
        target=GPUTarget("cuda", cc, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", binary)
        code = tool("nvdisasm", "-c", binary)
    use = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}  # pyright: ignore
    instructions = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", code, re.MULTILINE))
    return instructions, {**use, "SHARED": compiled.metadata.shared / 1024}


def tool(name: str, *arguments: object) -> str:
    """The output of one of Triton's binaries."""
    command = [str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def row(
    name: str, cc: int, head_dim: int, dtype: str, blocks: tuple[int, int], config: Config, built: tuple[Any, Any]
) -> Compiled:
    """A row of the table from what `build` returned."""
    instructions, use = built
    mma = {key: n for key, n in sorted(instructions.items()) if re.fullmatch(r"[HIQ]G?MMA|UTC\w*MMA", key)}
    return Compiled(
        name, cc, head_dim, dtype, f"{blocks[0]}x{blocks[1]}", f"{config.tile_q}x{config.tile_k}", config.warps,
        config.stages, use["REG"], use["STACK"], instructions["STL"] + instructions["LDL"], round(use["SHARED"], 1),
        " ".join(f"{n} {key}" for key, n in mma.items()), instructions["LDGSTS"] + instructions["UTMALDG"],
    )  # fmt: skip


def block_sparse(cc: int, head_dim: int, dtype: str, blocks: tuple[int, int], config: Config | None = None) -> Compiled:
    """The block-sparse kernel in its largest form: short last block, keys that may not count, ordered programs."""
    from dita.kernels import block_sparse_triton as module

    config = config or config_for(head_dim, *blocks, TYPES[dtype], divmod(cc, 10))
    d1, d2 = split_head_dim(head_dim, 32 if dtype == "fp32" else 16)
    constants = {
        "unit": 8, "head_dim": head_dim, "d1": d1, "d2": d2, "block_q": blocks[0], "block_k": blocks[1],
        "tile_q": config.tile_q, "tile_k": config.tile_k, "even": False, "has_valid": True, "balanced": True,
        "precision": module.PRECISION, "upcast": False,
    }  # fmt: skip
    types = dict.fromkeys(module.block_sparse_kernel.arg_names, "i32")
    types |= dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | dict.fromkeys(("counts", "indices", "order"), "*i32")
    types |= {"valid": "*i64", "lse": "*fp32", "scale": "fp32"}
    built = build(module.block_sparse_kernel, types, constants, cc, config.warps, config.stages)
    return row("block_sparse", cc, head_dim, dtype, blocks, config, built)


def int8(cc: int, head_dim: int, pv: str, blocks: tuple[int, int], config: Config | None = None) -> Compiled:
    """The int8 kernel with an output in bfloat16, in its largest form."""
    from dita.kernels import int8_attention_triton as module

    config = config or module.int8_config(head_dim, *blocks)
    d1, d2 = split_head_dim(head_dim)
    p1, p2 = split_head_dim(-(-head_dim // 32) * 32)
    constants = {
        "unit": 8, "head_dim": head_dim, "p1": p1, "p2": p2, "d1": d1, "d2": d2, "block_q": blocks[0],
        "block_k": blocks[1], "tile_q": config.tile_q, "tile_k": config.tile_k, "group_q": min(128, blocks[0]),
        "even": False, "has_valid": True, "balanced": True, "fp8": pv == "fp8", "interpreted": False,
    }  # fmt: skip
    types = dict.fromkeys(module.int8_kernel.arg_names, "i32")
    types |= dict.fromkeys(("q", "k"), "*i8") | dict.fromkeys(
        ("scale_q", "scale_k", "scale_v", "offset", "lse"), "*fp32"
    )
    types |= dict.fromkeys(("counts", "indices", "order"), "*i32")
    types |= {"valid": "*i64", "v": "*fp8e4nv" if pv == "fp8" else "*fp16", "out": "*bf16", "scale": "fp32"}
    built = build(module.int8_kernel, types, constants, cc, config.warps, config.stages)
    return row("int8", cc, head_dim, f"int8 + {pv}", blocks, config, built)


def faults(entry: Compiled) -> list[str]:
    """What disqualifies a config: spills, too much shared memory, no tensor cores, no asynchronous copies."""
    found = []
    if entry.stack or entry.local:
        found.append(f"spills {entry.stack} bytes")
    if entry.shared_kib > SHARED_KIB[entry.cc]:
        found.append(f"needs {entry.shared_kib} of {SHARED_KIB[entry.cc]} KiB")
    if not entry.mma:
        found.append("no tensor-core instruction")
    if not entry.copies:
        found.append("no asynchronous copy")
    return found


def table() -> Iterator[Compiled]:
    """All rows."""
    for cc in DEVICES:
        for head_dim in HEAD_DIMS:
            for dtype in TYPES:
                for blocks in BLOCKS if dtype != "fp16" else BLOCKS[:1]:
                    yield block_sparse(cc, head_dim, dtype, blocks)
            for pv in ("fp16", "fp8") if cc >= 89 else ("fp16",):
                for blocks in BLOCKS[:2]:
                    yield int8(cc, head_dim, pv, blocks)


def markdown(rows: list[Compiled]) -> str:
    """The table, with what it was made with."""
    names = ("kernel", "cc", "head dim", "dtype", "blocks", "tile", "warps", "stages", "registers", "stack B", "spill",
             "shared KiB", "tensor core", "async copies")  # fmt: skip
    lines = [
        "# What the kernels compile to",
        "",
        f"Made by `benchmarks/kernel_table.py` with Triton {triton.__version__} and its ptxas. Instructions are static",
        "counts. Every kernel is in its largest form: a short last block, keys that may not count, ordered programs.",
        "Nothing here was timed.",
        "",
        f"| {' | '.join(names)} |",
        "|" + "---|" * len(names),
        *(f"| {' | '.join(map(str, entry))} |" for entry in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table, or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a row differs")
    check = parser.parse_args().check
    rows = []
    for entry in table():
        print(*entry, *faults(entry), flush=True)
        rows.append(entry)
    bad = [entry for entry in rows if faults(entry)]
    content = {"triton": triton.__version__, "rows": [entry._asdict() for entry in rows]}
    if check:
        same = json.loads((FOLDER / "compiled.json").read_text()) == content
        raise SystemExit(0 if same and not bad else "the committed table differs, or a config has a fault")
    (FOLDER / "compiled.json").write_text(json.dumps(content, indent=1) + "\n")
    (FOLDER / "compiled.md").write_text(markdown(rows))
    if bad:
        raise SystemExit(f"{len(bad)} configs have a fault")


if __name__ == "__main__":
    main()
