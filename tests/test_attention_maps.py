"""Attention maps in pieces against whole ones, and what a module really attends with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from pipelines import TINY
from torch.nn import functional

import dita
from dita.attention_view import Attended, AttentionView
from dita.caching.engine import Recipe
from dita.caching.table import Measurement, Recorder, measure
from dita.errors import DitaError
from dita.seams import Site


def tensors(*shape: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.1},
    "causal": {"is_causal": True},
    "float mask": {"attn_mask": torch.linspace(-2, 2, 2 * 7).reshape(2, 1, 1, 7)},
    "bool mask": {"attn_mask": torch.tensor([True] * 5 + [False, True]).expand(2, 1, 7, 7)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("elements", [1, 100, 10**6])
def test_rows_times_values_is_the_attention(case: str, elements: int) -> None:
    query, key, value = tensors(2, 3, 7, 4)
    wanted = functional.scaled_dot_product_attention(query, key, value, **CASES[case])
    seen: list[Attended] = []
    with AttentionView(seen.append):
        out = functional.scaled_dot_product_attention(query, key, value, **CASES[case])
    assert torch.equal(out, wanted) and len(seen) == 1
    pieces = list(seen[0].rows(elements=elements))
    assert len(pieces) == {1: 7, 100: 4, 10**6: 1}[elements] and all(p.dtype == torch.float32 for p in pieces)
    torch.testing.assert_close(torch.cat(pieces, 2) @ value, wanted)
    torch.testing.assert_close(seen[0].received(), torch.cat(pieces, 2).mean((1, 2)))
    some = slice(2, 5)
    torch.testing.assert_close(torch.cat(list(seen[0].rows(some)), 2) @ value, wanted[:, :, some])


def test_few_keys_serve_many_queries() -> None:
    query, (key, value) = tensors(1, 4, 5, 8, count=1)[0], tensors(1, 2, 6, 8, count=2)
    wanted = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    rows = torch.cat(list(Attended(query, key, value).rows()), 2)
    torch.testing.assert_close(rows @ value.repeat_interleave(2, 1), wanted)


def test_a_query_barred_from_all_keys_gives_to_none() -> None:
    query, key, value = tensors(1, 1, 3, 4)
    attention = Attended(query, key, value, mask=torch.tensor([[True] * 3, [False] * 3, [True] * 3]))
    assert attention.received().sum().item() == pytest.approx(2 / 3)


def test_a_diffusers_module_is_seen_only_inside() -> None:
    module = DiffusersAttention(query_dim=16, heads=2, dim_head=8).eval()
    hidden, seen = tensors(1, 9, 16, count=1)[0], []
    with torch.no_grad():
        with AttentionView(seen.append):
            module(hidden)
        module(hidden)
    assert [tuple(a.q.shape) for a in seen] == [(1, 2, 9, 8)]
    torch.testing.assert_close(seen[0].q[0, 1], module.to_q(hidden)[0, :, 8:])


class _Heads(Recorder):
    def attended(self, site: Site, attention: Attended, view: Any) -> None:
        kept = self.sink.seen.setdefault(site.name, [])
        kept.append((view.position.step, attention.q.shape[1], attention.received().sum(1)))


@pytest.mark.parametrize("tiny", list(TINY))
def test_a_policy_sees_the_self_attention_of_every_family(tiny: str) -> None:
    """Each attention module, at each step, for each guidance branch; what a key receives sums to 1."""
    pipe = TINY[tiny].build()

    def build(anatomy: Any, sink: Measurement) -> Recipe:
        attend = tuple(part.site for part in anatomy.attentions(cross=False))
        return Recipe(what="model", when=lambda: _Heads(sink), keep="output", attend=attend)

    plain = TINY[tiny].call(TINY[tiny].build(), steps=3)
    outputs: list[torch.Tensor] = []
    sink = measure(pipe, lambda p: outputs.append(TINY[tiny].call(p, steps=3)), build)
    assert torch.equal(outputs[0], plain), "watching changed the output"
    assert len(sink.seen) > 1
    for kept in sink.seen.values():
        assert {step for step, _, _ in kept} == {0, 1, 2} and kept[0][1] > 1
        torch.testing.assert_close(torch.cat([total for *_, total in kept]), torch.ones(sum(len(k[2]) for k in kept)))


class _Queries(Recorder):
    def attended(self, site: Site, attention: Attended, view: Any) -> None:
        if view.position.step == 0:
            self.sink.seen.setdefault("first", (attention.q.clone(), math.prod(view.grid)))


def first_queries(tiny: str, **extra: Any) -> tuple[torch.Tensor, int, str]:
    """Queries of the first self-attention of a run, the number of image tokens, and where the text is declared."""
    where: list[str] = []

    def build(anatomy: Any, sink: Measurement) -> Recipe:
        where.append(anatomy.text_at)
        attend = (anatomy.attentions(cross=False)[0].site,)
        return Recipe(what="model", when=lambda: _Queries(sink), keep="output", attend=attend)

    query, tokens = measure(TINY[tiny].build(), lambda p: TINY[tiny].call(p, steps=2, **extra), build).seen["first"]
    return query, tokens, where[0]


@pytest.mark.parametrize("tiny", ["sd3", "flux", "qwen", "cogvideox", "hunyuan", "mochi"])
def test_text_stands_where_it_is_declared(tiny: str) -> None:
    """Other noise leaves the first block's text queries as they are, and no other queries."""
    (query, tokens, where), (other, _, _) = first_queries(tiny), first_queries(tiny, seed=1)
    same, count = (query == other).all(3).all(1).all(0).tolist(), query.shape[2]
    assert count > tokens and where in ("first", "last")
    assert same == [n < count - tokens if where == "first" else n >= tokens for n in range(count)]


def test_linear_attention_has_no_map() -> None:
    """A model that never calls scaled_dot_product_attention is refused, not labelled from nothing."""
    pipe = TINY["dit"].build()
    for block in pipe.transformer.transformer_blocks:
        vars(block.attn1)["forward"] = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(DitaError, match="scaled_dot_product_attention"):
        dita.calibrate(pipe, "profilingdit", TINY["dit"].call)
