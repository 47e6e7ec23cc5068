"""How fast block-sparse attention is: backends against dense attention, by tokens, density and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dita.errors import DitaError
from dita.eval.timing import measure, timed
from dita.kernels.block_sparse import block_sparse_attention
from dita.kernels.masked_attention import naive_block_sparse
from dita.kernels.plan import BlockPlan, block_count
from dita.kernels.sparse.select import top_per_row

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2, "fp16": 4e-3}


def random_plan(tokens: int, heads: int, block: int, density: float, seed: int = 0) -> BlockPlan:
    """A plan whose rows keep equally many blocks at random, the diagonal among them.

    Args:
        tokens: queries and keys.
        heads: each has a pattern of its own.
        block: tokens of a block.
        density: share of the blocks of a row, rounded to at least one block.
        seed: of the draw.

    Example:
        >>> random_plan(256, 2, 64, 0.5).counts.unique()
        tensor([2], dtype=torch.int32)
    """
    count = block_count(tokens, block)
    scores = torch.rand(1, heads, count, count, generator=torch.Generator().manual_seed(seed))
    scores = scores.masked_fill(torch.eye(count, dtype=torch.bool), 2.0)
    return BlockPlan.of_mask(top_per_row(scores, max(1, round(density * count))), block, block)


def gate(backend: str, dtype: str, device: torch.device, block: int, head_dim: int) -> float:
    """Compare a backend with the oracle on ragged lengths.

    Returns:
        The largest absolute error of the output.

    Raises:
        DitaError: it is above the dtype's tolerance.

    Example:
        >>> gate("gather", "fp32", torch.device("cpu"), 16, 32) < TOLERANCE["fp32"]
        True
    """
    tokens = 5 * block + block // 2
    q, k, v = _inputs(tokens, 2, head_dim, dtype, device)
    plan = random_plan(tokens, 2, block, 0.4).to(device)
    out, _ = block_sparse_attention(q, k, v, plan, backend=backend, need_lse=False)
    exact, _ = naive_block_sparse(q.double(), k.double(), v.double(), plan)
    error = float((out.double() - exact).abs().max())
    if not error <= TOLERANCE[dtype]:
        raise DitaError(f"the {backend} backend in {dtype} is {error:.2g} off the oracle; at most {TOLERANCE[dtype]:g}")
    return error


def time_attention(
    tokens: Sequence[int],
    densities: Sequence[float],
    dtypes: Sequence[str] = ("fp32",),
    backends: Sequence[str] = ("gather", "flex"),
    block: int = 128,
    heads: int = 4,
    head_dim: int = 64,
    repeats: int = 5,
    device: str = "cpu",
    advance: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Time dense attention and every backend in turn, after a gate for each backend and dtype.

    Args:
        tokens, densities, dtypes, backends: of which all combinations are measured.
        block, heads, head_dim: of the attention; one sample.
        repeats: rounds; the median counts.
        device: "cpu" or "cuda".
        advance: told what comes next.

    Returns:
        One row of JSON values for each combination. `speedup` is the median over rounds of dense / own seconds;
        `target` is 0.75 / density, what an implementation without any overhead to speak of would reach.

    Raises:
        DitaError: a backend fails its gate, or a dtype is unknown.

    Example:
        >>> row = time_attention([256], [0.5], backends=["gather"], block=64, head_dim=16, repeats=1)[0]
        >>> row["density"], row["speedup"] > 0
        (0.5, True)
    """
    unknown = sorted(set(dtypes) - set(DTYPES))
    if unknown:
        raise DitaError(f"unknown dtypes {', '.join(unknown)}; expected {', '.join(DTYPES)}")
    place, rows = torch.device(device), []
    for dtype in dtypes:
        errors = {backend: gate(backend, dtype, place, block, head_dim) for backend in backends}
        for count in tokens:
            q, k, v = _inputs(count, heads, head_dim, dtype, place)
            dense = lambda q=q, k=k, v=v: torch.nn.functional.scaled_dot_product_attention(q, k, v)  # noqa: E731
            for density in densities:
                advance(f"{dtype}, {count} tokens, density {density:g}")
                plan = random_plan(count, heads, block, density).to(place)
                calls = [
                    lambda b=backend, p=plan, q=q, k=k, v=v: block_sparse_attention(
                        q, k, v, p, backend=b, need_lse=False
                    )
                    for backend in backends
                ]
                first = [timed(call, place) for call in calls]  # compiles, where a backend does
                base, *own = measure(dense, *calls, repeats=repeats, device=place)
                kept = plan.kept(count, count)
                for backend, timing, start in zip(backends, own, first, strict=True):
                    ratios = sorted(a / b for a, b in zip(base.seconds, timing.seconds, strict=True))
                    rows.append(
                        {
                            "backend": backend,
                            "dtype": dtype,
                            "tokens": count,
                            "density": kept,
                            "block": block,
                            "heads": heads,
                            "head_dim": head_dim,
                            "dense_ms": 1e3 * base.median,
                            "ms": 1e3 * timing.median,
                            "first_ms": 1e3 * start,
                            "speedup": _middle(ratios),
                            "slowest": ratios[0],
                            "fastest": ratios[-1],
                            "target": 0.75 / kept,
                            "error": errors[backend],
                        }  # fmt: skip
                    )
    return rows


def _inputs(tokens: int, heads: int, head_dim: int, dtype: str, device: torch.device) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    shape = (1, heads, tokens, head_dim)
    return tuple(torch.randn(shape, generator=generator).to(device, DTYPES[dtype]) for _ in range(3))


def _middle(ordered: Sequence[float]) -> float:
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return math.sqrt(low * high)
