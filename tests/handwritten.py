"""DiT's own forward written out by hand, so that a paper's algorithm can be run on it without anything of dita."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pipelines import TINY

import dita

STEPS = 14

Module = Callable[[tuple[int, str], Callable[[], torch.Tensor]], torch.Tensor]
"""Given (block number, "attention" or "mlp") and how to compute its output, returns what to use."""


class HandBlock:
    """One block: `block(h)` runs it, `block(h, module)` lets `module` stand in for attention and MLP outputs."""

    def __init__(self, number: int, block: Any, timestep: Any, labels: Any) -> None:
        self.number, self.block, self.condition = number, block, (timestep, labels)

    def entry(self, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the attention reads, and the modulation of the rest."""
        return self.block.norm1(h, *self.condition, hidden_dtype=h.dtype)

    def __call__(self, h: torch.Tensor, module: Module = lambda key, run: run()) -> torch.Tensor:
        normed, gate, shift, scale, gate_mlp = self.entry(h)
        h = h + gate[:, None] * module((self.number, "attention"), lambda: self.block.attn1(normed))
        modulated = self.block.norm3(h) * (1 + scale[:, None]) + shift[:, None]
        return h + gate_mlp[:, None] * module((self.number, "mlp"), lambda: self.block.ff(modulated))


Trunk = Callable[[torch.Tensor, list[HandBlock]], torch.Tensor]


class HandWritten:
    """DiT's forward around a trunk that a paper's algorithm replaces: trunk(h, blocks) -> H, once per step."""

    def __init__(self, pipe: Any, trunk: Trunk) -> None:
        self.model, self.trunk = pipe.transformer, trunk

    def __call__(self, hidden_states: torch.Tensor, timestep: Any = None, class_labels: Any = None, **_: Any) -> Any:
        model = self.model
        h = model.pos_embed(hidden_states)
        blocks = [HandBlock(n, block, timestep, class_labels) for n, block in enumerate(model.transformer_blocks)]
        h = self.trunk(h, blocks)
        emb = model.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=h.dtype)
        shift, scale = model.proj_out_1(torch.nn.functional.silu(emb)).chunk(2, dim=1)
        h = model.proj_out_2(model.norm_out(h) * (1 + scale[:, None]) + shift[:, None])
        side, patch, out = int(h.shape[1] ** 0.5), model.patch_size, model.out_channels
        h = h.reshape(-1, side, side, patch, patch, out)
        h = torch.einsum("nhwpqc->nchpwq", h).reshape(-1, out, side * patch, side * patch)
        return type("Output", (), {"sample": h})


def by_hand(trunk: Trunk) -> torch.Tensor:
    """The pipeline's output with a hand-written trunk."""
    pipe = TINY["dit"].build()
    vars(pipe.transformer)["forward"] = HandWritten(pipe, trunk).__call__
    return TINY["dit"].call(pipe, steps=STEPS, batch=2)


def by_dita(config: Any) -> tuple[torch.Tensor, Any]:
    """The output under a method, calibrated on the same run where it must be, and the run's report."""
    pipe = TINY["dit"].build()
    if config.needs_calibration:
        config = config.calibrated(pipe, lambda p: TINY["dit"].call(p, steps=STEPS, batch=2))
    dita.accelerate_pipeline(pipe, config)
    output = TINY["dit"].call(pipe, steps=STEPS, batch=2)
    return output, dita.report(pipe).last


def assert_same(config: Any, make: Callable[[list[int]], Trunk], schedule: list[int] | None = None) -> None:
    """The method gives the hand-written output, and computes the same steps, neither none nor all of them.

    Args:
        config: the method.
        make: builds a trunk that appends each step it computes to the given list.
        schedule: the steps it must compute, where the paper says.
    """
    computed: list[int] = []
    expected = by_hand(make(computed))
    output, run = by_dita(config)
    assert list(run.computed_steps) == computed and 1 < len(computed) < STEPS, (run.computed_steps, computed)
    assert schedule is None or computed == schedule
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def relative(new: torch.Tensor, old: torch.Tensor) -> float:
    """Largest over samples of mean |new - old| / mean |old|."""
    return max(((n - o).abs().mean() / o.abs().mean()).item() for n, o in zip(new, old, strict=True))


def run_all(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
    """The plain trunk."""
    for block in blocks:
        h = block(h)
    return h


def record_modules() -> dict[tuple[int, str], list[torch.Tensor]]:
    """Every module's outputs over one full run, by block number and kind."""
    features: dict[tuple[int, str], list[torch.Tensor]] = {}

    def measuring(h: torch.Tensor, blocks: list[HandBlock]) -> torch.Tensor:
        def module(key: tuple[int, str], run: Callable[[], torch.Tensor]) -> torch.Tensor:
            features.setdefault(key, []).append(run())
            return features[key][-1]

        for block in blocks:
            h = block(h, module)
        return h

    by_hand(measuring)
    return features
