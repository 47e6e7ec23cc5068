"""Under torch.compile: whole transformers and repeated blocks, before and after.

Everything here is compiled by the backend "eager", which traces and cuts graphs as every backend does and only leaves
out the making of machine code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import plain
from pipelines import TINY

import dita
from dita.caching import DBCache, TaylorSeer
from dita.errors import DitaError
from dita.kernels.sparse import AdaSpa

FLUX = TINY["flux"]
STEPS = 3
SPANS = DBCache(fn=1, warmup=0, threshold=1e9)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compile_blocks(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)


def compile_in_place(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")


def compile_wrapped(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def accelerated(method: Any) -> torch.Tensor:
    return FLUX.call(dita.accelerate_pipeline(FLUX.build(), method), steps=STEPS)


def held(pipe: Any) -> list[Any]:
    """What hangs on the modules of a transformer, in the places that compiling and accelerating use."""
    names = ("forward", "_compiled_call_impl", "_dita_owner")
    return [vars(module).get(name) for module in pipe.transformer.modules() for name in names]


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("how", "method", "first"),
    [
        (compile_blocks, SPANS, "attach"),
        (compile_blocks, SPANS, "compile"),
        (compile_in_place, SPANS, "attach"),
        (compile_wrapped, TaylorSeer(interval=2, warmup=1, granularity="model"), "compile"),
    ],
    ids=["blocks-after", "blocks-before", "whole-after", "wrapped-before"],
)
def test_compiled_pipelines_skip_and_come_back(how: Any, method: Any, first: str) -> None:
    pipe = FLUX.build()
    if first == "attach":
        dita.accelerate_pipeline(pipe, method)
        how(pipe)
        before = []
    else:
        how(pipe)
        before = held(pipe)
        dita.accelerate_pipeline(pipe, method)
    output = FLUX.call(pipe, steps=STEPS)
    assert torch.equal(output, accelerated(method)) and dita.report(pipe).last.reused > 0
    if how is compile_blocks:
        assert graphs() <= 4, "whole graphs of the two kinds of blocks"
    elif how is compile_wrapped:
        assert graphs() == 1, "the model in one graph, the method outside of it"
    assert torch.equal(FLUX.call(pipe, steps=STEPS), output)
    dita.restore_pipeline(pipe)
    if first == "compile":
        assert all(now is then for now, then in zip(held(pipe), before, strict=True))
    assert not any("_dita_owner" in vars(module) for module in pipe.transformer.modules())
    assert torch.equal(FLUX.call(pipe, steps=STEPS), plain("flux", steps=STEPS))


@pytest.mark.parametrize("method", [TaylorSeer(interval=2, warmup=1), AdaSpa.forced()], ids=lambda m: m.name)
def test_hooks_inside_of_compiled_blocks_cut_their_graphs(method: Any) -> None:
    pipe = dita.accelerate_pipeline(FLUX.build(), method)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    assert torch.equal(FLUX.call(pipe, steps=STEPS), accelerated(method)) and dita.report(pipe).last.reused > 0
    assert 2 < graphs() < 30, "what lies between the hooks is compiled, and nothing of dita"
    dita.restore_pipeline(pipe)
    assert torch.equal(FLUX.call(pipe, steps=STEPS), plain("flux", steps=STEPS))


def test_whole_graphs_refuse_hooks_inside_at_attach_time() -> None:
    pipe = FLUX.build()
    compile_blocks(pipe)
    before = held(pipe)
    with pytest.raises(DitaError, match=r"transformer_blocks.0.attn is inside of .* fullgraph=True"):
        dita.accelerate_pipeline(pipe, TaylorSeer(interval=2))
    assert all(now is then for now, then in zip(held(pipe), before, strict=True))
