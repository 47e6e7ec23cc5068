"""Tile sizes of the block-sparse kernel: a table by device, and what was measured on this one.

The table's entries were compiled for each device without one (`benchmarks/kernel_table.py`; results in `compiled.md`):
none spills registers and all fit the shared memory. None was timed. Which is fastest only a device can tell: `tune`
times the candidates there once, and `save_measured` keeps what it found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dita.errors import DitaError


class Config(NamedTuple):
    """Queries and keys of a tile, warps of a program, and stages of its pipeline."""

    tile_q: int
    tile_k: int
    warps: int
    stages: int


class Key(NamedTuple):
    """What a measured config belongs to. `bucket`: plans that keep at most 2^-bucket of the key blocks."""

    head_dim: int
    block_q: int
    block_k: int
    dtype: str
    capability: tuple[int, int]
    bucket: int


# KiB of shared memory that one program may have.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
# For 16 bits, by padded head dim: tiles of 128 queries and of 64.
HALF = {
    "ampere": {
        64: (Config(128, 64, 4, 3), Config(64, 64, 4, 3)),
        80: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
        96: (Config(128, 64, 8, 4), Config(64, 32, 4, 3)),
        128: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    },
    "ada": {
        64: (Config(128, 64, 4, 3), Config(64, 64, 4, 3)),
        80: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
        96: (Config(128, 64, 8, 4), Config(64, 32, 4, 3)),
        128: (Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
    },
    "hopper": {
        64: (Config(128, 64, 4, 3), Config(64, 64, 4, 3)),
        80: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
        96: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
        128: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    },
    "blackwell": {
        64: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
        80: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
        96: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
        128: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    },
}
FLOAT32 = {
    "ampere": Config(32, 32, 8, 2), "ada": Config(32, 32, 8, 2), "hopper": Config(64, 32, 8, 2),
    "blackwell": Config(64, 32, 8, 2),
}  # fmt: skip
MEASURED: dict[Key, Config] = {}


def split_head_dim(head_dim: int, least: int = 16) -> tuple[int, int]:
    """Two powers of two, or one and 0, that hold a head dim with the least padding.

    Args:
        head_dim: D.
        least: the smallest second part. Float32 takes 32: with 16 its three products spill registers.

    Example:
        >>> [split_head_dim(d) for d in (8, 32, 64, 72, 80, 96, 120, 128)]
        [(16, 0), (32, 0), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (128, 0)]
    """
    first = max(16, 1 << (head_dim.bit_length() - 1))
    if first >= head_dim:
        return first, 0
    second = max(least, 1 << (head_dim - first - 1).bit_length())
    return (2 * first, 0) if second >= first else (first, second)


def power_of_two_in(block: int) -> int:
    """The largest power of two that divides a block.

    Example:
        >>> power_of_two_in(384)
        128
    """
    return block & -block


def family(capability: tuple[int, int]) -> str:
    """Devices with the same instructions and shared memory, as far as the table goes.

    Raises:
        DitaError: a device before Ampere.

    Example:
        >>> family((8, 6)), family((12, 0))
        ('ada', 'ada')
    """
    if capability < (8, 0):
        raise DitaError(
            f"the Triton kernels need compute capability 8.0 or later, got {capability}; use another backend"
        )
    if capability in ((8, 6), (8, 9)) or capability[0] >= 12:
        return "ada"
    return {8: "ampere", 9: "hopper"}.get(capability[0], "blackwell")


def preferred(head_dim: int, block_q: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """The table: tile sizes for blocks of at least 64 queries and 64 keys.

    Example:
        >>> preferred(128, 128, torch.bfloat16, (9, 0))
        Config(tile_q=128, tile_k=64, warps=8, stages=3)
    """
    kind, width = family(capability), sum(split_head_dim(head_dim))
    if dtype == torch.float32:
        # A product in three parts of TF32 holds its factors three times.
        return Config(16, 32, 8 if width < 128 else 4, 2) if width > 64 else FLOAT32[kind]
    if width > 128:
        return Config(64, 32, 8, 2)
    tall, low = HALF[kind][next(limit for limit in (64, 80, 96, 128) if width <= limit)]
    return tall if block_q % 128 == 0 else low


def fitted(config: Config, block_q: int, block_k: int) -> Config:
    """The config with tiles cut down to divide the blocks, and warps with the queries.

    A warp then holds no more than before. 64 queries keep four warps, which issue a wgmma together, and fewer keep two.

    Example:
        >>> fitted(Config(128, 64, 8, 3), 64, 32)
        Config(tile_q=64, tile_k=32, warps=4, stages=3)
    """
    tile_q = min(config.tile_q, power_of_two_in(block_q))
    tile_k = min(config.tile_k, power_of_two_in(block_k))
    warps = max(config.warps * tile_q // config.tile_q, 4 if tile_q >= 64 else 2)
    return Config(tile_q, tile_k, warps, config.stages)


def config_for(
    head_dim: int, block_q: int, block_k: int, dtype: torch.dtype, capability: tuple[int, int] = (8, 0)
) -> Config:
    """The table's config for a kernel that was not measured.

    Args:
        head_dim, dtype: of q.
        block_q, block_k: tokens of the plan's blocks, multiples of 16.
        capability: of the device, as `torch.cuda.get_device_capability` gives it.

    Raises:
        DitaError: a device before Ampere (8, 0), or blocks that no tile divides.

    Example:
        >>> config_for(64, 128, 128, torch.float16, (8, 0))
        Config(tile_q=128, tile_k=64, warps=4, stages=3)
    """
    config = fitted(preferred(head_dim, block_q, dtype, capability), block_q, block_k)
    check_tiles(config, block_q, block_k)
    return config


def check_tiles(config: Config, block_q: int, block_k: int) -> None:
    """Raise `DitaError` unless tiles are powers of two from 16 up that divide the blocks.

    Example:
        >>> check_tiles(Config(64, 64, 4, 3), 128, 64)
    """
    for tile, block in ((config.tile_q, block_q), (config.tile_k, block_k)):
        if tile < 16 or tile & (tile - 1) or block % tile:
            raise DitaError(
                f"tiles are powers of two from 16 up that divide the blocks, got tiles of {config.tile_q} x "
                f"{config.tile_k} for blocks of {block_q} x {block_k}; use blocks that are multiples of 16"
            )


def candidates(
    head_dim: int, block_q: int, block_k: int, dtype: torch.dtype, capability: tuple[int, int]
) -> list[Config]:
    """What `tune` times: the table's config first, then others that fit the blocks.

    Example:
        >>> candidates(128, 64, 64, torch.float16, (8, 0))[0]
        Config(tile_q=64, tile_k=64, warps=4, stages=3)
    """
    shapes = [(128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 32, 4, 3), (64, 64, 4, 3), (64, 32, 4, 4)]
    if capability[0] >= 9:
        shapes += [(128, 128, 8, 2), (128, 128, 8, 3)]
    if dtype == torch.float32:
        shapes = [(64, 32, 8, 2), (32, 32, 8, 2), (32, 16, 4, 2), (16, 32, 4, 2), (16, 64, 4, 2)]
    fitting = [fitted(Config(*shape), block_q, block_k) for shape in shapes]
    return list(dict.fromkeys([config_for(head_dim, block_q, block_k, dtype, capability), *fitting]))


def key_of(q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor, block_q: int, block_k: int) -> Key:
    """What the measured config for these inputs is stored under.

    The bucket comes from the width of `indices`, which is known without waiting for the device; counts are not.
    """
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
    share = -(-k.shape[2] // block_k) / max(1, indices.shape[-1])
    return Key(
        q.shape[-1], block_q, block_k, str(q.dtype).removeprefix("torch."), capability,
        max(0, min(4, int(math.log2(max(1, share))))),
    )  # fmt: skip


def choose_config(q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor, block_q: int, block_k: int) -> Config:
    """The measured config, or else the table's.

    Example:
        >>> x = torch.zeros(1, 1, 64, 64)
        >>> choose_config(x, x, torch.zeros(1, 1, 1, 1, dtype=torch.int32), 64, 64)
        Config(tile_q=32, tile_k=32, warps=8, stages=2)
    """
    key = key_of(q, k, indices, block_q, block_k)
    return MEASURED.get(key) or config_for(key.head_dim, block_q, block_k, q.dtype, key.capability)


def tune(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    key_valid: torch.Tensor | None = None,
) -> Config:
    """Time the candidates on these inputs, once for each key, and use the fastest from now on.

    Arguments are those of `triton_block_sparse`.

    Raises:
        DitaError: not on a CUDA device: times of the interpreter mean nothing.

    Example:
        >>> tune(q, k, v, plan.counts, plan.indices, 128, 64)  # doctest: +SKIP
        Config(tile_q=128, tile_k=64, warps=8, stages=3)
    """
    if not q.is_cuda:
        raise DitaError(f"configs are measured on a CUDA device, got tensors on {q.device}")
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    from dita.kernels.block_sparse_triton import triton_block_sparse

    kernel: Any = triton_block_sparse
    key = key_of(q, k, indices, block_q, block_k)
    if key in MEASURED:
        return MEASURED[key]
    times: dict[Config, float] = {}
    for config in candidates(key.head_dim, block_q, block_k, q.dtype, key.capability):
        launch = partial(kernel, q, k, v, counts, indices, block_q, block_k, scale, key_valid, config=config)
        try:
            times[config] = float(do_bench(launch, return_mode="median"))  # pyright: ignore[reportArgumentType]
        except OutOfResources:
            continue
    if not times:
        raise DitaError(f"no candidate config fits the device for {key}; please report this")
    MEASURED[key] = min(times, key=times.__getitem__)
    return MEASURED[key]


def save_measured(path: str | Path) -> None:
    """Write what was measured in this process as JSON."""
    rows = [{**key._asdict(), **config._asdict()} for key, config in MEASURED.items()]
    Path(path).write_text(json.dumps(rows, indent=1) + "\n")


def load_measured(path: str | Path) -> None:
    """Add what was measured before; what this process measured itself is kept.

    Raises:
        DitaError: the file does not hold what `save_measured` writes.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_measured(f"{folder}/configs.json")
        ...     load_measured(f"{folder}/configs.json")
    """
    for key, config in read_rows(Path(path)):
        MEASURED.setdefault(key, config)


def read_rows(path: Path) -> Iterator[tuple[Key, Config]]:
    """Keys and configs of a file, checked."""
    try:
        for row in json.loads(path.read_text()):
            row["capability"] = tuple(row["capability"])
            key, config = Key(*(row[name] for name in Key._fields)), Config(*(row[name] for name in Config._fields))
            check_tiles(config, key.block_q, key.block_k)
            yield key, config
    except (ValueError, KeyError, TypeError) as error:
        raise DitaError(f"{path} is no file of measured configs ({error!r}); delete it and measure again") from None
