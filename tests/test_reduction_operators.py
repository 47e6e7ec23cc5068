"""Token reduction: operators, matching and AsymRnR's attention against loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from dita.kernels.reduction import AsymRnR
from dita.kernels.reduction.asymrnr import Asymmetric, TierTable, ratio_of
from dita.kernels.reduction.matching import Matching, cells, draw_destinations
from dita.kernels.reduction.operators import Merged, Mixed, Pruned
from dita.kernels.reduction.similarity import cover, unit, windows
from dita.kernels.reduction.toma import Destinations
from dita.kernels.sparse.layout import Layout
from dita.kernels.sparse.policy import Asked


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- operators


def a_pair(kind: type[Pruned] = Pruned) -> Pruned:
    return kind(torch.tensor([[4, 0, 2], [1, 3, 0]]), torch.tensor([[1, 1, 2, 1, 0], [2, 0, 0, 1, 1]]))


def test_pruning_and_merging_against_loops() -> None:
    x = draw(2, 5, 3)
    pruned, merged = a_pair(), a_pair(Merged)
    for b in range(2):
        for m in range(3):
            group = [n for n in range(5) if pruned.stand_in[b, n] == m]
            assert torch.equal(pruned.reduce(x)[b, m], x[b, pruned.positions[b, m]])
            torch.testing.assert_close(merged.reduce(x)[b, m], sum(x[b, n] for n in group) / len(group))
            assert all(torch.equal(pruned.restore(pruned.reduce(x))[b, n], x[b, pruned.positions[b, m]]) for n in group)


def by_hand(logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A x and U y of one window: logits [D, n], x [n, C], y [D, C]."""
    many, count = logits.shape
    weights = [[math.exp(logits[d, n]) for n in range(count)] for d in range(many)]
    down = [[w / sum(row) for w in row] for row in weights]
    columns = [sum(down[d][n] for d in range(many)) for n in range(count)]
    reduced = [sum(down[d][n] * x[n] for n in range(count)) for d in range(many)]
    restored = [sum(down[d][n] / columns[n] * y[d] for d in range(many)) for n in range(count)]
    return torch.stack(reduced), torch.stack(restored)  # pyright: ignore


def test_a_mixture_and_its_transpose_against_loops() -> None:
    logits, x, y = draw(2, 1, 3, 5), draw(2, 5, 4, seed=1), draw(2, 3, 4, seed=2)
    pair = Mixed.of(logits, torch.tensor([[0, 1, 2]]))
    for b in range(2):
        reduced, restored = by_hand(logits[b, 0], x[b], y[b])
        torch.testing.assert_close(pair.reduce(x)[b], reduced)
        torch.testing.assert_close(pair.restore(y)[b], restored)
    ones = torch.ones(2, 5, 4)
    torch.testing.assert_close(pair.restore(pair.reduce(ones)), ones)
    torch.testing.assert_close(pair.weighed().sum(1), torch.full((2,), 5.0))


def test_ragged_windows_mix_within_themselves() -> None:
    tokens = Asked_tokens(draw(2, 15, 8), (1, 3, 5))
    chosen = Destinations.of(tokens, 2, 0.5)
    pair = chosen.weights(tokens.x, 0.5, local=True)
    y, place = draw(2, pair.positions.shape[1], 8, seed=3), 0
    sizes = [len(members[members >= 0]) for members in chosen.members]
    assert sizes == [4, 4, 2, 2, 2, 1] and pair.positions.shape == (2, 8)
    for members in chosen.members:
        present = members[members >= 0]
        many = max(1, round(len(present) / 2))
        for b in range(2):
            here = pair.positions[b, place : place + many]
            assert set(here.tolist()) <= set(present.tolist()) and len(set(here.tolist())) == many
            logits = unit(tokens.x[b, here]) @ unit(tokens.x[b, present]).T / 0.5
            reduced, restored = by_hand(logits, tokens.x[b, present], y[b, place : place + many])
            torch.testing.assert_close(pair.reduce(tokens.x)[b, place : place + many], reduced)
            torch.testing.assert_close(pair.restore(y)[b, present], restored)
        place += many


def Asked_tokens(x: torch.Tensor, grid: tuple[int, int, int]) -> Any:
    from dita.kernels.reduction.handler import Tokens

    return Tokens(x, grid, 0, 1, 0, 8, {})


# --- destinations and matching


def test_one_destination_in_every_whole_cell() -> None:
    state = torch.random.get_rng_state()
    grid, cell = (5, 4, 7), (2, 2, 3)
    drawn = [draw_destinations(grid, cell, seed, shifted=True) for seed in range(30)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(len(d) == 2 * 2 * 2 == len(set(d.tolist())) for d in drawn)
    frames = {int(t) // 28 for d in drawn for t in d}
    assert frames == set(range(5)), "leftover borders move"
    kept = draw_destinations(grid, cell, 0)
    where = {int(t): n for n, members in enumerate(cells(grid, cell)) for t in members}
    assert sorted(where[int(t)] for t in kept) == list(range(8))
    assert torch.equal(kept, draw_destinations(grid, cell, 0)) and not torch.equal(
        kept, draw_destinations(grid, cell, 1)
    )


@pytest.mark.parametrize("elements", [1, 2**25])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_matching_against_loops(ratio: float, elements: int) -> None:
    x, destinations = draw(2, 12, 4), torch.tensor([7, 2, 9])
    kept = max(0, math.floor(12 * (1 - ratio)) - 3)
    pair = Matching.of(x, destinations, elements).pair(kept, weigh=True)
    for b in range(2):
        nearest: dict[int, tuple[float, int]] = {}
        for j in (n for n in range(12) if n not in destinations):
            nearest[j] = min((float((x[b, i] - x[b, j]).square().sum()), int(i)) for i in destinations)
        far = sorted(nearest, key=lambda j: -nearest[j][0])[:kept]
        assert pair.positions[b].tolist() == [*far, 7, 2, 9]
        back = pair.positions[b][pair.stand_in[b]].tolist()
        assert back == [j if j in far or j in (7, 2, 9) else nearest[j][1] for j in range(12)]
        assert pair.sizes is not None and pair.sizes[b].tolist() == [back.count(int(p)) for p in pair.positions[b]]
    if ratio == 0:
        assert torch.equal(pair.restore(pair.reduce(x)), x)


def test_facility_location_against_loops() -> None:
    members = windows((2, 3, 4), 3)
    assert [sorted(w[w >= 0].tolist()) for w in members][1] == [3, 7, 11]
    x, present = unit(draw(2, 24, 5)[:, members.clamp_min(0)]), members >= 0
    counts = torch.tensor([4, 1, 5, 2])
    found = cover(x @ x.transpose(-2, -1), present, counts)
    for b in range(2):
        for w, count in enumerate(counts.tolist()):
            tokens = range(int(present[w].sum()))
            best, taken = [-1.0] * len(tokens), []
            for _ in range(count):
                gains = {
                    v: sum(max(float(x[b, w, j] @ x[b, w, v]) - best[j], 0) for j in tokens)
                    for v in tokens if v not in taken
                }  # fmt: skip
                top = max(gains.values())
                taken.append(next(v for v, gain in gains.items() if gain > top - 1e-5))
                best = [max(best[j], float(x[b, w, j] @ x[b, w, taken[-1]])) for j in tokens]
            assert found[b, w, :count].tolist() == taken


# --- AsymRnR inside one attention


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("text", [0, 3])
def test_asymmetric_attention_against_loops(text: int, text_first: bool) -> None:
    layout, count = Layout((1, 3, 5), text, text_first), 15 + text
    q, k, v = (draw(2, 2, count, 8, seed=n) for n in range(3))
    mask = torch.ones(2, count, dtype=torch.bool)
    if text:
        mask[1, layout.text_slice.start or 0] = False
    asked = Asked(
        q, k, v, 8**-0.5, mask if text else None, layout, 0, 1, 4, 8, {},
        lambda: functional.scaled_dot_product_attention(q, k, v, mask[:, None, None]),
    )  # fmt: skip
    settings = AsymRnR(q=0.6, kv=0.4, chunk=(1, 2, 2))
    out = Asymmetric(settings, None).attend(asked)
    assert asked.density == (6 + text) * (9 + text) / count**2
    first = text if text_first else 0
    drawn = {
        name: (Matching(*asked.state[name][1]).destinations[0] + first).tolist() for name in ("q", "kv")
    }  # which are random; all the rest follows
    assert all(len(d) == 2 for d in drawn.values())
    image = range(first, first + 15)
    for b in range(2):
        for h in range(2):
            back: dict[str, dict[int, int]] = {}
            for name, x, kept in (("q", q[b, h], 4), ("kv", v[b, h], 7)):
                nearest = {
                    j: min((float((x[i] - x[j]).square().sum()), i) for i in drawn[name])
                    for j in image if j not in drawn[name]
                }  # fmt: skip
                far = sorted(nearest, key=lambda j: -nearest[j][0])[:kept]  # noqa: B023
                back[name] = {j: j for j in (*far, *drawn[name])}
                back[name] |= {j: nearest[j][1] for j in image if j not in back[name]}
            keys = [j for j in range(count) if (j not in image or back["kv"][j] == j) and mask[b, j]]
            for n in range(count):
                query = q[b, h, n if n not in image else back["q"][n]]
                weights = torch.softmax(k[b, h, keys] @ query / 8**0.5, 0)
                torch.testing.assert_close(out[b, h, n], weights @ v[b, h, keys], rtol=1e-4, atol=1e-5)


def test_nothing_to_reduce_is_the_attention_itself() -> None:
    q = draw(1, 2, 16, 8)
    dense = draw(1, 2, 16, 8, seed=1)
    asked = Asked(q, q, q, 1.0, None, Layout((1, 4, 4)), 0, 1, 0, 8, {}, lambda: dense)
    assert Asymmetric(AsymRnR(q=0.0, kv=0.0), None).attend(asked) is dense and asked.density == 1
    assert Asymmetric(AsymRnR(q=0.01, kv=0.05), None).attend(asked) is not dense and asked.density < 1


def test_a_matching_serves_three_steps_and_tiers_choose_the_ratio() -> None:
    table = TierTable({"q": ((0, 6, 7, 9),), "kv": ((8, 8, 0, 0),)})
    settings = AsymRnR(q_tiers=((6, 0.4), (7, 0.8)), kv_tiers=((8, 0.3),))
    policy = Asymmetric(settings, table)
    x, state = draw(1, 1, 16, 4), {}

    def asked(step: int, steps: int) -> Asked:
        return Asked(x, x, x, 1.0, None, Layout((1, 4, 4)), 0, 1, step, steps, state, lambda: x)

    seen = []
    for step in range(4):
        seen.append(policy.ratios(asked(step, 4)))
    assert seen == [(0.0, 0.3), (0.4, 0.3), (0.8, 0.0), (0.8, 0.0)]
    assert ratio_of(9, ()) == 0.0
    drawn = []
    for step in range(7):
        Asymmetric(AsymRnR(), None).attend(asked(step, 7))
        drawn.append(state["q"][1][0].tolist())
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3] == drawn[5] != drawn[6]
