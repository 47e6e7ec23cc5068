"""The attention seam on every tiny pipeline: nothing changes unasked, and tokens are where the layout says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import plain
from pipelines import TINY

import dita
from dita.anatomy import Anatomy, Block, describe
from dita.attention_view import Attended, AttentionTaken, AttentionView
from dita.caching import FirstBlockCache, TaylorSeer
from dita.config import Method
from dita.errors import DitaError
from dita.kernels.block_sparse import block_sparse_attention
from dita.kernels.plan import BlockPlan
from dita.kernels.sparse import AdaSpa
from dita.kernels.sparse.handler import SparseHandler
from dita.kernels.sparse.layout import Cut
from dita.kernels.sparse.policy import Asked, Policy
from dita.seams import Call, Handler, Position, Site

JOINT = {
    "flux": True,
    "flux-cfg": True,
    "sd3": False,
    "qwen": True,
    "cogvideox": True,
    "hunyuan": False,
    "mochi": False,
}
"""Where the text is by the source of each model: True for first."""


@dataclass(frozen=True)
class Attach(Method):
    """Any policy, for these tests; not in the registry."""

    policy: Any = field(default=None)

    name = "attach"

    def handler(self, anatomy: Anatomy) -> Handler:
        return SparseHandler(self.policy, anatomy.attention_sites, anatomy.text_at)

    @classmethod
    def disabled(cls) -> Attach:
        return cls()


class Everything(Policy):
    """All blocks through the kernel, image tokens in a shuffled order with empty places."""

    def __init__(self) -> None:
        self.calls = 0

    def attend(self, asked: Asked) -> torch.Tensor:
        self.calls += 1
        order = torch.randperm(asked.layout.visual, generator=torch.Generator().manual_seed(0))
        order = torch.cat([order[:3], torch.tensor([-1, -1]), order[3:]])
        cut = Cut(asked.layout, 8, 4, order)
        plan = cut.plan(torch.ones(1, 1, cut.rows, cut.columns, dtype=torch.bool))
        assert plan.kept(asked.layout.tokens, asked.layout.tokens) == pytest.approx(1)
        asked.density = 0.99  # or the report would say that nothing was done
        return block_sparse_attention(asked.q, asked.k, asked.v, plan, asked.scale, asked.key_mask)[0]


@pytest.mark.parametrize("tiny", TINY)
def test_full_plans_through_the_kernel_are_dense_attention(tiny: str) -> None:
    pipe = TINY[tiny].build()
    policy = Everything()
    dita.accelerate_pipeline(pipe, Attach(policy=policy))
    out = TINY[tiny].call(pipe, steps=4)
    run = dita.report(pipe).last
    assert policy.calls and all(record.action == "sparse" for record in run.records), run.details()
    torch.testing.assert_close(out, plain(tiny, steps=4), rtol=1e-3, atol=1e-3)


class Watch(Policy):
    def __init__(self) -> None:
        self.seen: list[Asked] = []

    def attend(self, asked: Asked) -> torch.Tensor:
        self.seen.append(asked)
        return asked.dense()


@pytest.mark.filterwarnings("ignore::dita.DitaWarning")
@pytest.mark.parametrize("tiny", JOINT)
def test_text_tokens_are_where_the_layout_says(tiny: str) -> None:
    """Other text given to the first block moves the queries of its text tokens, and no others."""
    queries = []
    for change in (False, True):
        pipe = TINY[tiny].build()
        policy = Watch()
        dita.accelerate_pipeline(pipe, Attach(policy=policy))
        if change:
            _change_text(describe(pipe.transformer).blocks[0])
        TINY[tiny].call(pipe, steps=2)
        queries.append(policy.seen[0])
    one, two = queries
    layout = one.layout
    assert layout.text > 0 and layout.text_first is JOINT[tiny]
    differs = (one.q - two.q).abs().amax((0, 1, 3)) > 1e-5
    assert differs[layout.text_slice].all() and not differs[layout.visual_slice].any()


def _change_text(block: Block) -> None:
    def change(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        text = block.read(args, kwargs)[1]
        assert text is not None
        other = text.sin() + text.roll(1, -1)
        if block.entry.encoder in kwargs:
            return args, {**kwargs, block.entry.encoder: other}
        return tuple(other if value is text else value for value in args), kwargs

    block.module.register_forward_pre_hook(change, with_kwargs=True)


@pytest.mark.parametrize("tiny", TINY)
def test_every_family_offers_the_seam(tiny: str) -> None:
    model = TINY[tiny].build().components["transformer"]
    anatomy = describe(model)
    blocks = {block.number for block in anatomy.blocks}
    assert {site.block for site in anatomy.attention_sites} == blocks, "one or more in each block"
    assert dita.supports(model).seams["attention"][0]


# The mode


def test_a_view_inside_sees_what_is_taken_outside() -> None:
    q, seen = torch.randn(1, 2, 3, 4), []
    attention = torch.nn.functional.scaled_dot_product_attention
    with AttentionTaken(lambda given, plain: given.v * 2), AttentionView(seen.append):
        out = attention(q, q, q)
    assert torch.equal(out, 2 * q) and len(seen) == 1


def test_the_object_itself_is_computed_untouched_and_another_as_it_says() -> None:
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 6, 8)
    mask = torch.rand(1, 1, 5, 6) < 0.8
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = attention(q, k, k, mask, scale=0.5, enable_gqa=True)
    with AttentionTaken(lambda given, plain: plain(given)):
        assert torch.equal(attention(q, k, k, attn_mask=mask, scale=0.5, enable_gqa=True), expected)
    with AttentionTaken(lambda given, plain: plain(Attended(given.q, given.k, given.v, given.mask, given.scale))):
        torch.testing.assert_close(attention(q, k, k, attn_mask=mask, scale=0.5, enable_gqa=True), expected)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, None),
        (torch.tensor([True, False])[None, None, None], [[True, False]]),
        (torch.tensor([0.0, -torch.inf])[None, None, None], [[True, False]]),
        (torch.tensor([0.0, -3.0])[None, None, None], None),
        (torch.ones(1, 1, 2, 2, dtype=torch.bool), [[True, True]]),
        (torch.ones(1, 1, 2, 2, dtype=torch.bool).tril(), None),
    ],
)
def test_key_masks_are_told_from_other_masks(mask: torch.Tensor | None, expected: Any) -> None:
    q = torch.zeros(1, 1, 2, 4)
    found = Attended(q, q, q, mask).key_mask
    assert found is None if expected is None else found is not None and found.tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 1, 9, 4)}, "8 queries look at 9 keys"),
        ({"mask": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()}, "differs from query to query"),
        ({"causal": True}, "differs from query to query"),
    ],
)
def test_what_no_policy_can_answer_stays_as_it_is(change: dict[str, Any], message: str) -> None:
    site = Site("attention", "attention of it", block=0)
    policy = Watch()
    handler = SparseHandler(policy, (site,), "")
    x = torch.randn(1, 1, 8, 4)
    call = Call(Position(0, 4, 0, "cond", 0, 4, 0), grid=(1, 2, 4))
    handler.begin_call(call)
    given = Attended(**{"q": x, "k": x, "v": x, **change})
    handler.attend(site, 0, call, given, lambda seen: seen.q)
    handler.end_call(call)
    assert not policy.seen and message in call.sparsely and call.density == 1
    for grid, text in (((), "does not tell"), ((1, 2, 3), "8 tokens are not the 1 x 2 x 3")):
        call = Call(Position(0, 4, 0, "cond", 0, 4, 0), grid=grid)
        handler.begin_call(call)
        handler.attend(site, 0, call, Attended(x, x, x), lambda seen: seen.q)
        handler.end_call(call)
        assert not policy.seen and text in call.sparsely


# Composition with caching


@pytest.mark.parametrize(
    ("tiny", "cache", "sparse_first"),
    [
        ("wan", TaylorSeer(interval=2, warmup=2), True),
        ("flux", FirstBlockCache.forced(), False),
        ("hunyuan", TaylorSeer(interval=2, warmup=2), False),
        ("wan", FirstBlockCache.forced(), True),
    ],
    ids=lambda p: getattr(p, "name", p),
)
def test_sparse_attention_under_a_cache(tiny: str, cache: Method, sparse_first: bool) -> None:
    pipe = TINY[tiny].build()
    parts = (AdaSpa.forced(), cache) if sparse_first else (cache, AdaSpa.forced())
    dita.accelerate_pipeline(pipe, *parts)
    out = TINY[tiny].call(pipe)
    run = dita.report(pipe).last
    actions = {record.action for record in run.records}
    assert "sparse" in actions and actions & {"forecast", "reused", "partial"} and out.isfinite().all()
    assert torch.equal(TINY[tiny].call(pipe), out) and 0 < run.density < 1
    dita.restore_pipeline(pipe)
    assert torch.equal(TINY[tiny].call(pipe), plain(tiny))


def test_two_sparse_methods_exclude_each_other() -> None:
    pipe = TINY["wan"].build()
    with pytest.raises(DitaError, match="both decide about which attention is computed"):
        dita.accelerate_pipeline(pipe, AdaSpa(), AdaSpa(density=0.3))


def test_an_image_does_not_depend_on_its_batch_mates() -> None:
    for tiny in ("flux", "sd3"):
        pipe = dita.accelerate_pipeline(TINY[tiny].build(), AdaSpa.forced())
        both, alone = TINY[tiny].call(pipe, batch=2), TINY[tiny].call(pipe, batch=1, first=1)
        torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_plans_are_made_at_the_searches_and_forgotten_between_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = BlockPlan.of_mask.__func__

    def counted(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(BlockPlan, "of_mask", classmethod(counted))
    pipe = dita.accelerate_pipeline(TINY["flux"].build(), AdaSpa(density=0.3, block=4, search=(0.2, 0.6), cutoff=1.0))
    for _ in range(2):
        made.clear()
        TINY["flux"].call(pipe, steps=10)
        assert len(made) == 2 * 6, "two searches in each of six blocks"
        actions = "".join("s" if r.action == "sparse" else "d" for r in dita.report(pipe).last.records)
        assert actions == "dddsssssss", "dense to the first search, which is dense itself; the second changes the plan"
