"""Methods that score blocks, against their papers' algorithms written out with loops, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from dita.config import Method
from dita.errors import DitaError
from dita.kernels.block_mass import block_mass
from dita.kernels.masked_attention import masked_attention
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.blade import Blade, Sampled
from dita.kernels.sparse.draft_attention import DraftAttention
from dita.kernels.sparse.jenga import Jenga
from dita.kernels.sparse.layout import Cut, Layout
from dita.kernels.sparse.orders import gilbert, tiles, touching
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.sparge import SpargeAttn
from dita.kernels.sparse.xattention import XAttention, antidiagonal_mass

GRID = (3, 5, 7)  # 105 tokens: ragged for every block below
TEXT = {"no text": (0, False), "text first": (6, True), "padded text last": (6, False)}
CASES: dict[str, SparseMethod] = {
    "draft": DraftAttention(density=0.3, patch=(2, 3)),
    "sparge": SpargeAttn(keep=0.3, block_q=8, block_k=4),
    "sparge, 64 x 128": SpargeAttn(keep=0.2, block_q=4, block_k=8, curve=True, sink=True),
    "sparge, mass": SpargeAttn(mass=0.6, similarity=0.35, block_q=8, block_k=4),
    "xattention": XAttention(mass=0.4, stride=3, block=6),
    "jenga": Jenga(keep=(0.3, 0.2), mass=0.25, block=8),
    "jenga, alone": Jenga(keep=(0.3, 0.2), mass=0.25, block=8, neighbours=False),
    "blade": Blade(most=0.3, samples=3, group=4, block=8),
    "blade, one branch": Blade(energy=0.5, least=0.1, most=0.4, samples=5, block=8, pooled=False),
}
Blocks = list[list[int]]


def ask(layout: Layout, seed: int = 0, batch: int = 2, mask: bool = False, dtype: torch.dtype = torch.float32) -> Asked:
    """Random tokens, alike where they lie together; two query heads for one key head; the text may be padded."""
    generator = torch.Generator().manual_seed(seed)

    def smooth(heads: int) -> torch.Tensor:
        x = torch.randn(batch, heads, layout.tokens, 8, generator=generator)
        drift = torch.randn(batch, heads, layout.tokens, 8, generator=generator).cumsum(2) * 0.3
        return (x + drift).to(dtype)

    q, k, v = smooth(2), smooth(1), smooth(1)
    key_mask = None
    if mask:
        key_mask = torch.ones(batch, layout.tokens, dtype=torch.bool)
        key_mask[-1, -3:] = False

    def dense() -> torch.Tensor:
        seen = None if key_mask is None else key_mask[:, None, None]
        return masked_attention(q, k, v, seen)[0]

    return Asked(q, k, v, 1 / math.sqrt(8), key_mask, layout, 1, 4, 6, 10, {}, dense)


def engine(method: SparseMethod) -> Policy:
    policy: Any = method.policy(None)  # pyright: ignore[reportArgumentType]
    policy.begin_run()
    return policy


def pieces(order: list[int], size: int) -> Blocks:
    return [order[start : start + size] for start in range(0, len(order), size)]


def blocks_by_hand(method: Method) -> tuple[Blocks, Blocks]:
    """Image tokens of the blocks of queries and keys."""
    raster = list(range(math.prod(GRID)))
    if isinstance(method, DraftAttention):
        rows, columns = [[0], [1, 2], [3, 4]], [[0, 1], [2, 3], [4, 5, 6]]
        patches = [
            [frame * 35 + y * 7 + x for y in some for x in others]
            for frame, some, others in itertools.product(range(3), rows, columns)
        ]
        return patches, patches
    if isinstance(method, SpargeAttn):
        order = gilbert(GRID).tolist() if method.curve else raster
        return pieces(order, method.block_q), pieces(order, method.block_k)
    assert isinstance(method, (XAttention, Jenga, Blade))
    order = raster if isinstance(method, XAttention) else gilbert(GRID).tolist()
    return pieces(order, method.block), pieces(order, method.block)


def best(shares: torch.Tensor, count: int) -> list[bool]:
    chosen = sorted(range(len(shares)), key=lambda j: -float(shares[j]))[:count]
    return [j in chosen for j in range(len(shares))]


def reaching(shares: torch.Tensor, part: float) -> int:
    """How many of the largest it takes to hold a part of the sum."""
    total, held = float(shares.sum()), 0.0
    for count, share in enumerate(sorted(shares.tolist(), reverse=True), start=1):
        held += share
        if held >= part * total:
            return count
    return len(shares)


def pooled(q: torch.Tensor, k: torch.Tensor, rows: Blocks, columns: Blocks) -> torch.Tensor:
    means_q, means_k = (torch.stack([x[b].mean(0) for b in blocks]) for x, blocks in ((q, rows), (k, columns)))
    return means_q @ means_k.T / math.sqrt(8)


def cosine(x: torch.Tensor) -> float:
    products, norms = (x @ x.T).tolist(), x.norm(dim=1).tolist()
    pairs = [products[i][j] / (norms[i] * norms[j]) for i in range(len(x)) for j in range(len(x))]
    return sum(pairs) / len(pairs)


def mask_by_hand(
    method: Method, policy: Policy, asked: Asked, item: int, head: int, rows: Blocks, columns: Blocks
) -> torch.Tensor:
    """Bool [rows, columns] without the diagonal."""
    some = asked.layout.visual_slice
    q, k = asked.q[item, head, some].double(), asked.k[item, 0, some].double()
    if isinstance(method, DraftAttention):
        shares = pooled(q, k, rows, columns).softmax(-1).flatten()
        return torch.tensor(best(shares, math.ceil(0.3 * len(shares)))).view(len(rows), len(columns))
    if isinstance(method, SpargeAttn):
        valid = slice(None) if asked.key_mask is None else asked.key_mask[item]
        k = k - asked.k[item, 0, valid].double().mean(0)
        vague_q, vague_k = ([cosine(x[b]) <= method.similarity for b in part] for x, part in ((q, rows), (k, columns)))
        mask = []
        for i, logits in enumerate(pooled(q, k, rows, columns)):
            shares = logits.masked_fill(torch.tensor(vague_k), -math.inf).softmax(-1)
            within = sorted(shares.tolist(), reverse=True)
            count = sum(sum(within[: n + 1]) <= (method.mass or 0) for n in range(len(within)))
            count = int(method.keep * len(shares)) if method.mass is None else count
            row = best(shares, max(1, count))
            mask.append([
                vague_q[i] or vague_k[j] or (method.sink and j == 0) or row[j] for j in range(len(columns))
            ])  # fmt: skip
        return torch.tensor(mask)
    if isinstance(method, XAttention):
        groups = [pieces(block, method.stride) for block in rows]
        flat = [group for block in groups for group in block]
        products = (q @ k.T / math.sqrt(8)).tolist()
        sums = [[0.0] * len(flat) for _ in flat]
        for (i, one), (j, two) in itertools.product(enumerate(flat), repeat=2):
            for place in range(method.stride):
                mirror = method.stride - 1 - place
                if mirror < len(one) and place < len(two):
                    sums[i][j] += products[one[mirror]][two[place]] / method.stride
        logits = torch.tensor(sums, dtype=torch.float64)
        owner = torch.tensor([number for number, block in enumerate(groups) for _ in block])
        table = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        table.index_put_((owner[:, None].expand(logits.shape), owner.expand(logits.shape)), logits.softmax(-1), True)
        return torch.tensor([best(row, reaching(row, method.mass)) for row in table])
    if isinstance(method, Jenga):
        shares = pooled(q, k, rows, columns).softmax(-1)
        least = int(0.2 * len(rows))  # the step is past the switch
        mask = torch.tensor([best(row, max(least, reaching(row, method.mass))) for row in shares])
        return mask | neighbours_by_hand(rows) if method.neighbours else mask
    assert isinstance(method, Blade) and isinstance(policy, Sampled)
    places = policy.places(asked.step, asked.layer, 2)[:, head]
    tokens = [[b[min(p, len(b) - 1)] for b in rows for p in some.tolist()] for some in places]
    weights = (q[tokens[0]] @ k[tokens[1]].T / math.sqrt(8)).softmax(-1)
    table = weights.view(len(rows), method.samples, len(rows), method.samples).amax((1, 3))
    bounds = [max(1, int(share * len(rows))) for share in (method.least, method.most)]
    return torch.tensor([best(row, min(max(reaching(row, method.energy), bounds[0]), bounds[1])) for row in table])


def neighbours_by_hand(blocks: Blocks) -> torch.Tensor:
    def near(one: int, two: int) -> bool:
        places = [(token // 35, token // 7 % 5, token % 7) for token in (one, two)]
        return all(abs(a - b) <= 1 for a, b in zip(*places, strict=True))

    return torch.tensor([[any(near(a, b) for a in one for b in two) for two in blocks] for one in blocks])


def seen_by_hand(method: Method, policy: Policy, asked: Asked) -> torch.Tensor:
    """Bool [B, H, N, N]: text and a block's own tokens always."""
    rows, columns = blocks_by_hand(method)
    first = asked.layout.text if asked.layout.text_first else 0
    seen = torch.ones(2, 2, asked.layout.tokens, asked.layout.tokens, dtype=torch.bool)
    for item, head in itertools.product(range(2), range(2)):
        mask = mask_by_hand(method, policy, asked, item, head, rows, columns)
        assert not mask.all() and mask.any()
        for (i, one), (j, two) in itertools.product(enumerate(rows), enumerate(columns)):
            if not mask[i, j] and not set(one) & set(two):
                seen[item, head][torch.tensor(one)[:, None] + first, torch.tensor(two) + first] = False
    return seen


def answer_by_hand(method: Method, asked: Asked, seen: torch.Tensor) -> torch.Tensor:
    """Masked attention; for BLADE joined with the means of groups of keys, each counted as often as it has keys."""
    if asked.key_mask is not None:
        seen = seen & asked.key_mask[:, None, None]
    q, k, v = (x.double().expand(2, 2, -1, -1) for x in (asked.q, asked.k, asked.v))
    if not isinstance(method, Blade) or not method.pooled:
        return masked_attention(q, k, v, seen)[0]
    weights = (q @ k.transpose(-2, -1) / math.sqrt(8)).exp() * seen
    total, out = weights.sum(-1, keepdim=True), weights @ v
    some = asked.layout.visual_slice
    for group in pieces(gilbert(asked.layout.grid).tolist(), method.group):
        mean_k, mean_v = (x[:, :, some][:, :, group].mean(2, keepdim=True) for x in (k, v))
        weight = len(group) * (q[:, :, some] @ mean_k.transpose(-2, -1) / math.sqrt(8)).exp()
        total[:, :, some] += weight
        out[:, :, some] += weight * mean_v
    return out / total


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("name", CASES)
def test_answer_is_the_papers_algorithm(name: str, text: str) -> None:
    method = CASES[name]
    layout = Layout(GRID, *TEXT[text])
    asked, policy = ask(layout, mask=text == "padded text last"), engine(method)
    seen = seen_by_hand(method, policy, asked)
    out = policy.attend(asked)
    torch.testing.assert_close(out.double(), answer_by_hand(method, asked, seen), rtol=1e-5, atol=1e-5)
    extra = 0.0
    if isinstance(method, Blade) and method.pooled:
        extra = layout.visual * math.ceil(layout.visual / method.group) / layout.tokens**2
    computed = float(seen.double().mean()) + extra
    assert computed < 0.97
    if text == "no text" and not isinstance(method, DraftAttention):
        assert asked.density == pytest.approx(computed)  # no empty places
    else:
        assert computed - 1e-9 <= asked.density < computed + 0.6


@pytest.mark.parametrize("name", CASES)
def test_an_item_does_not_depend_on_its_batch_mates_nor_on_the_global_generator(name: str) -> None:
    asked, method = ask(Layout(GRID)), CASES[name]
    both = engine(method).attend(asked)
    torch.manual_seed(12345)
    alone = ask(Layout(GRID))
    alone.q, alone.k, alone.v = (x[1:] for x in (alone.q, alone.k, alone.v))
    before = torch.get_rng_state()
    torch.testing.assert_close(engine(method).attend(alone), both[1:], rtol=1e-5, atol=1e-5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "method",
    [
        DraftAttention(density=1.0), SpargeAttn(keep=1.0), SpargeAttn(mass=1.0, similarity=-1.0, block_q=8, block_k=4),
        XAttention(mass=1.0), Jenga(keep=(1.0, 1.0), block=8), Jenga(mass=1.0, block=8), Blade(least=1.0, most=1.0),
    ],
    ids=lambda method: method.label(),
)  # fmt: skip
def test_keeping_all_is_dense_attention(method: SparseMethod) -> None:
    asked = ask(Layout(GRID, 6))
    assert torch.equal(engine(method).attend(asked), asked.dense())
    assert asked.density == 1


@pytest.mark.parametrize("name", ["draft", "sparge", "blade"])
def test_half_precision(name: str) -> None:
    """Scores are made in float32; the answer keeps the model's dtype."""
    half = ask(Layout(GRID, 6), dtype=torch.bfloat16)
    full = ask(Layout(GRID, 6))
    full.q, full.k, full.v = (x.float() for x in (half.q, half.k, half.v))
    out, expected = engine(CASES[name]).attend(half), engine(CASES[name]).attend(full)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.03)


def unit_steps(frames: int, rows: int, columns: int) -> None:
    grid = (frames, rows, columns)
    order = gilbert(grid)
    assert torch.equal(order.sort().values, torch.arange(math.prod(grid)))
    places = torch.stack([order // (grid[1] * grid[2]), order // grid[2] % grid[1], order % grid[2]], 1)
    assert bool(((places[1:] - places[:-1]).abs().sum(1) == 1).all()), grid


def test_the_curve_visits_each_token_once_in_unit_steps() -> None:
    for grid in itertools.product(range(1, 8), repeat=3):
        unit_steps(*grid)
    for grid in ((13, 16, 16), (21, 30, 45), (9, 11, 13), (5, 1, 31), (2, 3, 50), (1, 45, 81), (17, 2, 2)):
        unit_steps(*grid)


def test_the_curve_is_hilberts_in_a_cube() -> None:
    """Every eighth of an eighth of the way fills a cube."""
    order = gilbert((8, 8, 8))
    places = torch.stack([order // 64, order // 8 % 8, order % 8], 1)
    for side in (2, 4):
        runs = places.view(-1, side**3, 3)
        assert bool((runs.amax(1) - runs.amin(1) == side - 1).all())


def test_blocks_of_the_curve_touch_where_their_tokens_do() -> None:
    assert torch.equal(touching(GRID, 8), neighbours_by_hand(pieces(gilbert(GRID).tolist(), 8)))


def test_patches_are_those_of_the_official_code() -> None:
    """HunyuanVideo at 768p: 33 frames of 48 x 80 tokens are 990 patches of 128, along rows of patches."""
    order, places = tiles((33, 48, 80), (1, 8, 16))
    assert places == 128 and order.shape == (990 * 128,)
    starts = order.view(990, 128)[:, 0]
    assert starts[:6].tolist() == [0, 16, 32, 48, 64, 8 * 80]
    assert torch.equal(order[128:256].view(8, 16), torch.arange(8)[:, None] * 80 + torch.arange(16, 32))


def test_frames_that_patches_do_not_divide_are_cut_evenly() -> None:
    order, places = tiles((2, 45, 80), (1, 8, 16))
    sizes = (order.view(-1, places) >= 0).sum(1)
    assert places == 128 and sizes.unique().tolist() == [7 * 16, 8 * 16]
    assert torch.equal(order[order >= 0].sort().values, torch.arange(2 * 45 * 80))
    assert tiles((1, 30, 52), (1, 8, 16))[1] == 112  # 8 x 13, and up to a multiple of 16
    with pytest.raises(DitaError, match="expected a tile"):
        tiles((1, 4, 4), (1, 0, 4))


def test_antidiagonals_of_single_tokens_are_the_exact_mass() -> None:
    cut, asked = Cut(Layout(GRID), 8, 8), ask(Layout(GRID))
    queries, present = cut.blocks(asked.q, 8)
    keys, _ = cut.blocks(asked.k.expand(-1, 2, -1, -1), 8)
    lse, _ = cut.blocks(masked_attention(asked.q, asked.k, asked.v, None, asked.scale)[1][..., None], 8)
    exact = block_mass(queries, keys, present, present, lse[..., 0], asked.scale)
    torch.testing.assert_close(antidiagonal_mass(queries, keys, present, present, asked.scale, 1), exact)


def test_sparge_keeps_what_it_cannot_judge() -> None:
    """A block of unlike tokens keeps its row and column, in the setting that judges."""
    assert (SpargeAttn.cdf().mass, SpargeAttn.cdf().similarity) == (0.98, 0.6)
    asked = ask(Layout((4, 4, 4)), batch=1)
    ramp = torch.eye(8)[torch.arange(64) // 8 % 8] * 20
    asked.q, asked.k = ramp.expand(1, 2, 64, 8).clone(), ramp.expand(1, 1, 64, 8).clone()
    for x in (asked.q, asked.k):
        x[:, :, 24:32] = torch.eye(8) * 20  # all different
    method = SpargeAttn(mass=0.5, similarity=0.6, block_q=8, block_k=8)
    policy = engine(method)
    plan = policy.plan(asked)
    assert plan is not None
    expected = torch.eye(8, dtype=torch.bool)
    expected[3] = expected[:, 3] = True
    assert torch.equal(plan.mask(8), expected.expand(1, 2, 8, 8))


def test_blade_clamps_the_energy() -> None:
    """Of 24 blocks 5 % to 17 % is one to four: even scores ask for more, a single peak for less."""
    method = Blade(block=4, samples=4)
    for peak, expected in ((0.0, 4), (50.0, 1)):
        asked = ask(Layout((4, 4, 6)), batch=1)
        asked.q, asked.k = torch.ones(1, 2, 96, 8), torch.zeros(1, 1, 96, 8)
        asked.k[:, :, gilbert((4, 4, 6))[:4]] = peak
        policy: Any = engine(method)
        mask = policy.mask(asked, policy.cut(asked))
        assert mask.sum(-1).unique().tolist() == [expected]
        assert bool(mask[..., 0].all())


def test_blades_second_branch_is_exact_for_equal_keys() -> None:
    """With keys equal inside groups and nothing else kept, it is dense attention: + log g is the right weight."""
    method = Blade(group=4, block=4, samples=4)
    asked = ask(Layout((1, 4, 8)), batch=1)
    order = gilbert((1, 4, 8))
    for x in (asked.k, asked.v):
        x[:, :, order] = x[:, :, order].unflatten(2, (8, 4)).mean(3).repeat_interleave(4, 2)
    policy: Any = engine(method)
    nothing = torch.zeros_like(asked.q), torch.full(asked.q.shape[:3], -math.inf)
    asked.density = 0.0
    out = policy.finish(asked, policy.plan(asked), *nothing)
    torch.testing.assert_close(out, masked_attention(asked.q, asked.k, asked.v)[0], rtol=1e-5, atol=1e-5)
    assert asked.density == 0.25


def test_blades_places_differ_between_steps_layers_and_heads_but_not_runs() -> None:
    one, other = (Sampled(Blade(seed=seed)) for seed in (0, 1))
    drawn = [one.places(0, 0, 2), one.places(1, 0, 2), one.places(0, 1, 2), other.places(0, 0, 2)]
    assert drawn[0].shape == (2, 2, 32)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    assert not torch.equal(drawn[0][0, 0], drawn[0][0, 1])
    assert torch.equal(drawn[0], Sampled(Blade()).places(0, 0, 2))
    assert all(len(set(places.tolist())) == 32 for places in drawn[0].flatten(0, 1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DraftAttention(patch=(8, 0)), "expected rows and columns"),
        (lambda: SpargeAttn(block_q=48, block_k=32), "multiple of the other"),
        (lambda: XAttention(block=100), "multiple of the stride, 16"),
        (lambda: Jenga(keep=(0.25,)), "before and after"),  # pyright: ignore[reportArgumentType]
        (lambda: Blade(least=0.5), "not to be above most"),
        (lambda: Blade(block=16), "no more than a block holds, 16"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_say_so(build: Any, message: str) -> None:
    with pytest.raises(DitaError, match=message):
        build()
