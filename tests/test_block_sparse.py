"""The contract of block-sparse attention on the CPU, against plain masked attention in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dita.errors import DitaError
from dita.kernels.block_mass import block_mass
from dita.kernels.block_sparse import block_sparse_attention, dense_attention, merge
from dita.kernels.masked_attention import masked_attention
from dita.kernels.plan import BlockPlan, arrange, block_count, put_back
from dita.kernels.sparse.layout import Cut, Layout
from dita.kernels.sparse.select import top_mass, top_per_head, top_per_row

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw(shape: tuple[int, ...], share: float = 0.4, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, bq: int, bk: int, **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token: which block a token is in decides what it sees."""
    order_q, order_k, valid = more.get("order_q"), more.get("order_k"), more.get("key_mask")
    (batch, heads, queries), keys = q.shape[:3], k.shape[2]
    seen = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            one = range(queries) if order_q is None else order_q.expand(batch, heads, -1)[b, h].tolist()
            two = range(keys) if order_k is None else order_k.expand(batch, heads, -1)[b, h].tolist()
            table = blocks[b % len(blocks), h % blocks.shape[1]]
            for place, token in enumerate(one):
                for spot, key in enumerate(two):
                    if min(token, key) >= 0 and table[place // bq, spot // bk]:
                        seen[b, h, token, key] = valid is None or bool(valid[b, key])
    return masked_attention(q.double(), k.double(), v.double(), seen)


def check(result: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    out, lse = result
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=max(5e-6, tolerance))
    assert lse.dtype == torch.float32


ORDERS = {
    "as they come": (None, None),
    "one order with empty places and a token left out": (
        torch.tensor([5, 4, -1, 3, 0, 1, 2, 7, 8]),
        torch.tensor([8, 0, 1, -1, 2, 10, 9, 3, 4, 5, 6]),
    ),
    "an order for every head": (
        torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(s)) for s in range(8)]).view(2, 4, 9),
        torch.stack([torch.randperm(11, generator=torch.Generator().manual_seed(s)) for s in range(8)]).view(2, 4, 11),
    ),
}


@pytest.mark.parametrize("backend", ["gather", "naive"])
@pytest.mark.parametrize("orders", ORDERS)
@pytest.mark.parametrize("masked", [False, True])
def test_against_masked_attention(backend: str, orders: str, masked: bool) -> None:
    """Ragged lengths, grouped keys, empty rows, strided views, orders, and keys that do not count."""
    order_q, order_k = ORDERS[orders]
    q = noise(2, 9, 4, 8).transpose(1, 2)
    k, v = noise(2, 11, 2, 8, seed=1).transpose(1, 2), noise(2, 2, 11, 8, seed=2)
    rows = block_count(9 if order_q is None else order_q.shape[-1], 4)
    columns = block_count(11 if order_k is None else order_k.shape[-1], 2)
    blocks = draw((2, 4, rows, columns))
    blocks[0, 1, 0] = False
    key_mask = draw((2, 11), 0.7) if masked else None
    plan = BlockPlan.of_mask(blocks, 4, 2, order_q, order_k)
    result = block_sparse_attention(q, k, v, plan, key_mask=key_mask, backend=backend)
    repeated = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    more = {"order_q": order_q, "order_k": order_k, "key_mask": key_mask}
    expected = by_hand(q, *repeated, blocks, 4, 2, **more)
    check(result, expected)
    assert (result[1] == -math.inf).any(), "the case has empty rows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 72, 80, 96, 128])
def test_head_widths_and_dtypes(width: int, dtype: torch.dtype) -> None:
    q, k, v = (noise(1, 2, 50, width, seed=s).to(dtype) for s in range(3))
    blocks = draw((1, 2, 4, 4), 0.6)
    result = block_sparse_attention(q, k, v, BlockPlan.of_mask(blocks, 16, 16))
    check(result, by_hand(q, k, v, blocks, 16, 16))


def test_full_plan_is_dense_attention() -> None:
    q, k, v = (noise(2, 2, 40, 16, seed=s) for s in range(3))
    plan = BlockPlan.of_mask(torch.ones(1, 1, 3, 5, dtype=torch.bool), 16, 8)
    out, lse = block_sparse_attention(q, k, v, plan)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(out, dense), "gathering all keys is torch's own attention, bit for bit"
    assert torch.equal(lse, dense_attention(q, k, v)[1])
    exact, whole = masked_attention(q.double(), k.double(), v.double())
    check((out, lse), (exact, whole))
    naive = block_sparse_attention(q, k, v, plan, backend="naive")
    check(naive, (exact, whole))


def test_large_logits_and_junk_after_the_counts() -> None:
    q, k = 30 * noise(1, 1, 32, 8), 30 * noise(1, 1, 32, 8, seed=1)
    v = noise(1, 1, 32, 8, seed=2)
    blocks = draw((1, 1, 4, 4), 0.5)
    plan = BlockPlan.of_mask(blocks, 8, 8)
    place = torch.arange(4) >= plan.counts[..., None]
    junk = BlockPlan(plan.counts, plan.indices.masked_fill(place, 3), 8, 8)
    expected = by_hand(q, k, v, blocks, 8, 8)
    for chosen in (plan, junk):
        out, lse = block_sparse_attention(q, k, v, chosen)
        torch.testing.assert_close(out.double(), expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-4)
    assert torch.equal(junk.mask(4), blocks)


def test_merging_two_halves_of_the_keys_is_the_whole() -> None:
    q, k, v = (noise(1, 2, 48, 8, seed=s) for s in range(3))
    whole, part = draw((1, 2, 3, 6), 0.8), draw((1, 2, 3, 6), 0.5, seed=5)
    one, two = (block_sparse_attention(q, k, v, BlockPlan.of_mask(m, 16, 8)) for m in (whole & part, whole & ~part))
    check(merge(one, two), by_hand(q, k, v, whole, 16, 8))


@pytest.mark.parametrize("heads", [1, 2])
def test_a_plan_keeps_how_its_blocks_go_together(monkeypatch: pytest.MonkeyPatch, heads: int) -> None:
    from dita.kernels import block_sparse_cpu

    made: list[int] = []
    work_out = block_sparse_cpu._group
    monkeypatch.setattr(block_sparse_cpu, "_group", lambda *given: made.append(1) or work_out(*given))
    q, k, v = noise(2, 4, 50, 8), noise(2, heads, 41, 8, seed=1), noise(2, heads, 41, 8, seed=2)
    blocks = draw((2, 4, 7, 6))
    plan = BlockPlan.of_mask(blocks, 8, 8)
    mask, other = draw((2, 41), 0.7), draw((2, 41), 0.7, seed=9)
    for number, key_mask in enumerate((None, mask, mask.clone(), other, None)):
        fresh = block_sparse_attention(q, k, v, BlockPlan.of_mask(blocks, 8, 8), key_mask=key_mask)
        made.clear()
        kept = block_sparse_attention(q, k, v, plan, key_mask=key_mask)
        assert len(made) == (number != 2), "another mask is worked out anew, an equal one is not"
        assert all(torch.equal(a, b) for a, b in zip(fresh, kept, strict=True))
    made.clear()
    fewer = [x[:1].contiguous() for x in (q, k, v)]
    one = BlockPlan.of_mask(blocks[:1], 8, 8)
    for _ in range(2):
        block_sparse_attention(fewer[0], fewer[1], fewer[2], one)
    assert len(made) == 1 and plan.to("cpu").grouping is None


def test_same_result_twice_and_inputs_untouched() -> None:
    q, k, v = (noise(1, 2, 48, 8, seed=s) for s in range(3))
    copies = [t.clone() for t in (q, k, v)]
    plan = BlockPlan.of_mask(draw((1, 1, 3, 6)), 16, 8)
    first, second = (block_sparse_attention(q, k, v, plan) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True))


@pytest.mark.slow
def test_compiled_flex_attention_agrees_and_new_plans_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo as dynamo

    q, k, v = (noise(1, 2, 100, 16, seed=s) for s in range(3))
    for seed in range(3):
        blocks = draw((1, 2, 4, 4), 0.5, seed)
        plan = BlockPlan.of_mask(blocks, 32, 32)
        before = dynamo.utils.counters["stats"]["unique_graphs"]
        out, lse = block_sparse_attention(q, k, v, plan, backend="flex", need_lse=False)
        compiled = dynamo.utils.counters["stats"]["unique_graphs"] - before
        assert compiled == (1 if seed == 0 else 0)
        torch.testing.assert_close(out.double(), by_hand(q, k, v, blocks, 32, 32)[0], rtol=2e-6, atol=2e-6)
        assert lse.isnan().all(), "no log-sum-exp is to be had, and none is made up"
    monkeypatch.setattr("dita.kernels.block_sparse_cpu._MAX_SHAPES", 1)
    with pytest.raises(DitaError, match="compiled for 1 shapes already"):
        plan = BlockPlan.of_mask(draw((1, 2, 2, 4)), 32, 32)
        block_sparse_attention(q[:, :, :64], k, v, plan, backend="flex", need_lse=False)


def test_who_reads_the_log_sum_exp_is_never_given_flex() -> None:
    q, plan = noise(1, 1, 32, 16), BlockPlan.of_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool), 32, 32)
    with pytest.raises(DitaError, match="returns no log-sum-exp on a CPU"):
        block_sparse_attention(q, q, q, plan, backend="flex")
    assert not block_sparse_attention(q, q, q, plan)[1].isnan().any(), "auto"


@pytest.mark.parametrize(
    ("shapes", "plan", "more", "message"),
    [
        (((1, 2, 8, 4), (1, 2, 8, 5)), (1, 1, 2, 2), {}, "expected q .B, H, N, D."),
        (((1, 3, 8, 4), (1, 2, 8, 4)), (1, 1, 2, 2), {}, "must divide that of query heads"),
        (((1, 2, 8, 4), (1, 2, 8, 4)), (3, 1, 2, 2), {}, "a plan for batch 3"),
        (((1, 2, 8, 4), (1, 2, 8, 4)), (1, 1, 3, 2), {}, "a plan of 3 blocks of 4 queries does not fit 8"),
        (((1, 2, 8, 4), (1, 2, 8, 4)), (1, 1, 2, 3), {}, "up to 3 blocks of 4 keys does not fit 8"),
        (((1, 2, 8, 4), (1, 2, 8, 4)), (1, 1, 2, 2), {"backend": "cuda"}, "no backend 'cuda'"),
        (((1, 2, 8, 4), (1, 2, 8, 4)), (1, 1, 2, 2), {"key_mask": torch.ones(8)}, "expected a bool key mask"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: Any, plan: Any, more: dict[str, Any], message: str) -> None:
    q, k = torch.zeros(shapes[0]), torch.zeros(shapes[1])
    with pytest.raises(DitaError, match=message):
        block_sparse_attention(q, k, k, BlockPlan.of_mask(torch.ones(plan, dtype=torch.bool), 4, 4), **more)


def test_plans_check_themselves() -> None:
    with pytest.raises(DitaError, match="bool mask"):
        BlockPlan.of_mask(torch.ones(1, 1, 2, 2), 4, 4)
    with pytest.raises(DitaError, match="int32"):
        BlockPlan(torch.ones(1, 1, 2).long(), torch.ones(1, 1, 2, 2).int(), 4, 4)
    with pytest.raises(DitaError, match="at least one token"):
        BlockPlan.of_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 0, 4)


def test_put_back_undoes_arrange() -> None:
    x = noise(2, 3, 7, 4)
    order = torch.tensor([3, -1, 6, 0, 1, -1, 2, 5, 4])
    assert torch.equal(put_back(arrange(x, order), order, 7), x)


# Layouts


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize(
    ("text", "grid", "sizes"), [(0, (2, 3, 3), (4, 4)), (5, (2, 3, 3), (8, 4)), (5, (2, 2, 4), (4, 8))]
)
@pytest.mark.parametrize("ordered", [False, True])
def test_a_cut_keeps_text_and_the_diagonal(
    text: int, grid: tuple[int, int, int], sizes: tuple[int, int], text_first: bool, ordered: bool
) -> None:
    """An empty mask leaves every image token its own block and all text; text sees everything."""
    layout = Layout(grid, text, text_first)
    order = torch.randperm(layout.visual, generator=torch.Generator().manual_seed(0)) if ordered else None
    cut = Cut(layout, *sizes, order)
    plan = cut.plan(torch.zeros(1, 1, cut.rows, cut.columns, dtype=torch.bool))
    # The values tell which keys a query saw.
    q = torch.zeros(1, 1, layout.tokens, layout.tokens)
    out, _ = block_sparse_attention(q, q, torch.eye(layout.tokens)[None, None], plan)
    seen = out[0, 0] > 0
    visual = torch.arange(layout.visual) if order is None else order
    place = torch.empty(layout.tokens, dtype=torch.long)
    place[layout.visual_slice][visual] = torch.arange(layout.visual)
    is_text = torch.zeros(layout.tokens, dtype=torch.bool)
    is_text[layout.text_slice] = text > 0
    large = max(sizes)
    together = place[:, None] // large == place // large
    # A large block of one kind covers several of the other, so own blocks are those within the larger.
    expected = (together & ~is_text[:, None] & ~is_text) | is_text[:, None] | is_text
    assert torch.equal(seen, expected)
    assert plan.kept(layout.tokens, layout.tokens) == pytest.approx(float(expected.float().mean()), abs=1e-6)


def test_blocks_and_means_of_image_tokens() -> None:
    layout = Layout((1, 3, 3), 2, text_first=True)
    x = torch.arange(11.0).view(1, 1, 11, 1)
    order = torch.tensor([8, 0, 1, 2, -1, 3, 4, 5, 6, 7])
    cut = Cut(layout, 4, 4, order)
    tokens, present = cut.blocks(x, 4)
    assert tokens.shape == (1, 1, 3, 4, 1) and present.sum() == 9
    assert tokens[0, 0, 1].flatten().tolist() == [0, 5, 6, 7]
    assert cut.means(x, 4).flatten().tolist() == [(10 + 2 + 3 + 4) / 4, (5 + 6 + 7) / 3, (8 + 9) / 2]


def test_block_mass_is_the_sum_of_the_attention_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dita.kernels.block_mass._ELEMENTS", 100)  # a few rows at a time
    layout = Layout((1, 3, 5), 3)
    q, k = noise(2, 4, 18, 8), noise(2, 2, 18, 8, seed=1)
    key_mask = torch.ones(2, 18, dtype=torch.bool)
    key_mask[1, 4] = key_mask[0, 16] = False
    _, lse = dense_attention(q, k, k, 0.5, key_mask)
    cut = Cut(layout, 4, 4)
    (queries, present), (keys, _) = cut.blocks(q, 4), cut.blocks(k, 4)
    rows = cut.blocks(lse[..., None], 4)[0][..., 0]
    mass = block_mass(queries, keys, present, cut.valid(key_mask, present), rows, 0.5)
    logits = q @ k.repeat_interleave(2, 1).mT * 0.5
    attention = logits.masked_fill(~key_mask[:, None, None], -math.inf).softmax(-1)[:, :, :15, :15]
    padded = torch.nn.functional.pad(attention, (0, 1, 0, 1)).view(2, 4, 4, 4, 4, 4).sum((3, 5))
    torch.testing.assert_close(mass, padded)


def test_selectors_against_sorting_by_hand() -> None:
    scores = torch.randint(0, 6, (2, 3, 5, 7), generator=torch.Generator().manual_seed(0)).float()
    kept = top_per_row(scores, torch.arange(5))
    for row in range(5):
        for one, mask in zip(scores[0, :, row], kept[0, :, row], strict=True):
            best = sorted(range(7), key=lambda i: (-float(one[i]), i))[:row]
            assert sorted(best) == mask.nonzero()[:, 0].tolist()
    shares = scores / scores.sum(-1, keepdim=True)
    chosen = top_mass(shares, 0.6, least=2, most=4)
    for one, mask in zip(shares.view(-1, 7), chosen.view(-1, 7), strict=True):
        total, count = 0.0, 0
        for share in one.sort(descending=True).values:
            if total < 0.6 * float(one.sum()) - 1e-6:
                total, count = total + float(share), count + 1
        assert mask.sum() == min(4, max(2, count))
    assert top_mass(torch.full((3, 9), 1 / 9), 1.0).all() and top_mass(torch.eye(4), 0.99).sum() == 4
    assert top_per_head(scores, 0.5).sum((-2, -1)).unique().tolist() == [math.ceil(17.5)]
    with pytest.raises(DitaError, match="from 0 to 1"):
        top_mass(shares, 1.1)
