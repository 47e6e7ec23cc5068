"""Predicted against measured time of a denoising step over the number of tokens, on a small Wan with random weights.

    python benchmarks/cost_model.py --threads 1

The step time of each size is the least of the repeats, all sizes in turn: other work on the machine can only lengthen
it. On a machine that is never idle, --clock process counts processor time instead, which with one thread on a CPU is
what an idle machine would take, less the effect of shared caches. The sizes marked "fit" are what the cost
model is fitted to; the others are predicted, and beside them what one would guess from time in proportion to tokens,
fitted to the same sizes. One guidance pass, float32 unless --dtype says otherwise.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from dita.errors import DitaError
from dita.eval.costmodel import CostModel, ModelShape, step_flops, tokens
from dita.eval.environment import code_version, device_name, library_versions
from dita.eval.timing import pinned_threads, synchronize

SIZES = ((1, 128), (5, 128), (5, 192), (9, 192), (9, 256), (17, 256), (17, 320), (25, 384))
"""Frames and pixels of the square clips, from 64 to 4032 tokens."""

FITTED = (0, 1, 2, 3)
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}
TEXT_TOKENS = 64


def build(width: int, layers: int, device: str, dtype: torch.dtype) -> WanTransformer3DModel:
    """Build a Wan transformer with random weights."""
    torch.manual_seed(0)
    model: Any = WanTransformer3DModel(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=128,
        ffn_dim=4 * width,
        num_layers=layers,
        rope_max_seq_len=64,
    )
    model = model.eval().to(device)
    return model if dtype == torch.float32 else model.to(dtype)


def step(model: WanTransformer3DModel, frames: int, pixels: int) -> None:
    """Run one pass on noise for a clip of this size."""
    latent = (1, 16, (frames - 1) // 4 + 1, pixels // 8, pixels // 8)
    options: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    with torch.no_grad():
        model(
            hidden_states=torch.zeros(latent, **options),
            timestep=torch.zeros(1, device=model.device),
            encoder_hidden_states=torch.zeros(1, TEXT_TOKENS, 128, **options),
        )


def fastest(model: WanTransformer3DModel, repeats: int, clock: Callable[[], float]) -> list[float]:
    """Time every size in turn, `repeats` times after a round to warm up; the least seconds of each."""
    seconds: list[list[float]] = [[] for _ in SIZES]
    for _ in range(repeats + 1):
        for kept, size in zip(seconds, SIZES, strict=True):
            synchronize(model.device)
            start = clock()
            step(model, *size)
            synchronize(model.device)
            kept.append(clock() - start)
    return [min(kept[1:]) for kept in seconds]


def bench(model: WanTransformer3DModel, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Measure all sizes, fit on some, predict all.

    Returns:
        The fitted model, and a row per size with tokens, operations, seconds, and both predictions in seconds.
    """
    shape = ModelShape.of(model)
    rows: list[dict[str, Any]] = []
    for index, ((frames, pixels), seconds) in enumerate(zip(SIZES, fastest(model, repeats, clock), strict=True)):
        count = tokens(pixels, pixels, frames, shape.patch)
        flops = step_flops(shape, count, TEXT_TOKENS, guidance_calls=1)
        row = {"frames": frames, "pixels": pixels, "tokens": count, "flops": flops, "fit": index in FITTED}
        rows.append({**row, "seconds": seconds})
    chosen = [row for row in rows if row["fit"]]
    cost = CostModel.fit([(row["flops"], row["seconds"]) for row in chosen])
    shares = torch.tensor([row["tokens"] / row["seconds"] for row in chosen], dtype=torch.float64)
    per_token = (shares.sum() / shares.square().sum()).item()
    for row in rows:
        row["predicted"] = cost.seconds(row["flops"])
        row["by_tokens"] = per_token * row["tokens"]
    return {"model": cost, "rows": rows}


def table(rows: list[dict[str, Any]], power: float | None, cost: CostModel) -> str:
    """Format the rows as a Markdown table; energy in joules if the power in watts is given."""
    heads = ["clip", "tokens", "GFLOP", "", "measured ms", "predicted ms", "error", "by tokens ms", "error"]
    lines = [heads + ["J"] if power else heads]
    for row in rows:
        cells = [f"{row['frames']}x{row['pixels']}x{row['pixels']}", f"{row['tokens']}", f"{row['flops'] / 1e9:.2f}"]
        cells += ["fit" if row["fit"] else "held out", f"{1000 * row['seconds']:.1f}"]
        for name in ("predicted", "by_tokens"):
            cells += [f"{1000 * row[name]:.1f}", f"{row[name] / row['seconds'] - 1:+.0%}"]
        lines.append(cells + [f"{cost.energy(row['flops'], power):.2f}"] if power else cells)
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    """Parse the command line and print the machine, the fitted model and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--power", type=float, default=None, help="watts that the device draws, for energies")
    args = parser.parse_args()
    if args.clock == "process" and (args.threads != 1 or args.device != "cpu"):
        raise DitaError("--clock process adds up threads and does not see a GPU; expected --threads 1 --device cpu")
    model = build(args.width, args.layers, args.device, getattr(torch, args.dtype))
    with pinned_threads(args.threads) as threads:
        machine = {"device": device_name(args.device), "threads": threads, "dtype": args.dtype, "clock": args.clock}
        versions = {"code": code_version(), "versions": library_versions()}
        print(json.dumps({**machine, "repeats": args.repeats, **versions}))
        found = bench(model, args.repeats, CLOCKS[args.clock])
    cost = found["model"]
    print(f"{cost.rate / 1e9:.2f} GFLOP/s and {1000 * cost.overhead:.2f} ms a call, fitted to the sizes marked fit\n")
    print(table(found["rows"], args.power, cost))


if __name__ == "__main__":
    main()
