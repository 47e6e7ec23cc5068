"""Sparse VideoGen 1 and 2, Radial Attention, sliding tiles and VMoBA against their papers, written out by hand."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from pipelines import TINY

import dita
from dita.errors import DitaError, DitaWarning
from dita.kernels.masked_attention import masked_attention
from dita.kernels.sparse.layout import Layout
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.radial import Radial, block_for
from dita.kernels.sparse.sliding_tile import SlidingTile, SlidingTiles
from dita.kernels.sparse.svg import Bands, band_width
from dita.kernels.sparse.svg2 import Clusters, cluster_count
from dita.kernels.sparse.tiles import grouped, tile_counts, window_mask
from dita.kernels.sparse.vmoba import Mixture, select_blocks
from dita.kernels.sparse.window_search import Found, WindowSearch, WindowTable, window_choices

GRID = (3, 4, 5)
LAYOUTS = [Layout(GRID), Layout(GRID, text=7), Layout(GRID, text=7, text_first=True)]
on_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["no text", "text last", "text first"])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ask(layout: Layout, batch: int = 2, state: dict[str, Any] | None = None, **more: Any) -> Asked:
    """Four query heads on two key heads; with text, the last two words of the second item do not count."""
    n = layout.tokens
    q, k, v = noise(batch, 4, n, 8) * 2, noise(batch, 2, n, 8, seed=1) * 2, noise(batch, 2, n, 8, seed=2)
    key_mask = None
    if layout.text:
        key_mask = torch.ones(batch, n, dtype=torch.bool)
        key_mask[-1, layout.text_slice] = torch.arange(layout.text) < layout.text - 2
    settings = {"layer": 0, "layers": 6, "step": 0, "steps": 8, **more}
    asked = Asked(q, k, v, 0.4, key_mask, layout, state={} if state is None else state, dense=torch.empty, **settings)
    asked.dense = lambda: exact(asked, None)
    return asked


def exact(asked: Asked, image: torch.Tensor | None) -> torch.Tensor:
    """Attention under a mask over image tokens, bool [B', H', V, V]; text sees and is seen by all."""
    seen = None if asked.key_mask is None else asked.key_mask[:, None, None]
    if image is not None:
        whole = tokens_mask(asked.layout, image)
        seen = whole if seen is None else whole & seen
    return masked_attention(asked.q, asked.k, asked.v, seen, asked.scale)[0]


def tokens_mask(layout: Layout, image: torch.Tensor) -> torch.Tensor:
    whole = torch.ones(*image.shape[:2], layout.tokens, layout.tokens, dtype=torch.bool)
    whole[:, :, layout.visual_slice, layout.visual_slice] = image
    return whole


def check(policy: Policy, asked: Asked, image: torch.Tensor) -> None:
    """The answer and the density are those of the mask."""
    out = policy.attend(asked)
    torch.testing.assert_close(out, exact(asked, image), rtol=1e-4, atol=1e-5)
    assert asked.density == pytest.approx(tokens_mask(asked.layout, image).double().mean().item(), abs=1e-6)
    assert asked.density < 1


def look_apart(asked: Asked) -> None:
    """Let heads 0 and 1 look at their own frame, heads 2 and 3 at their own place in all frames."""
    size = asked.layout.visual // asked.layout.grid[0]
    for head, key in enumerate((torch.arange(asked.layout.visual) // size, torch.arange(asked.layout.visual) % size)):
        sign = 4 * noise(size, 8, seed=5).sign()[key]
        asked.k[:, head, asked.layout.visual_slice] = sign
        asked.q[:, 2 * head : 2 * head + 2, asked.layout.visual_slice] = sign


def places(grid: tuple[int, int, int] = GRID) -> list[tuple[int, int, int]]:
    return [(f, r, c) for f in range(grid[0]) for r in range(grid[1]) for c in range(grid[2])]


# --- Sparse VideoGen


def band_by_hand(layout: Layout, temporal: bool, density: float, block: int, sink: bool) -> torch.Tensor:
    frames, size = layout.grid[0], layout.grid[1] * layout.grid[2]
    order = [f * size + p for p in range(size) for f in range(frames)] if temporal else list(range(layout.visual))
    length = layout.tokens
    width = length * (1 - math.sqrt(1 - (density * length**2 - 2 * length * layout.text) / length**2))
    position = {token: place for place, token in enumerate(order)}
    keys = [t for t in order if t < size] + [t for t in order if t >= size] if sink else order
    cut_q, cut_k = ([o[i : i + block] for i in range(0, len(o), block)] for o in (order, keys))
    mask = torch.zeros(layout.visual, layout.visual, dtype=torch.bool)
    for one, other in itertools.product(cut_q, cut_k):
        here, there = [position[t] for t in one], [position[t] for t in other]
        near = abs(sum(here) / len(here) - sum(there) / len(there)) < width
        shared = min(here) <= max(there) and min(there) <= max(here)
        if near or shared or (sink and any(t < size for t in other)):
            mask[torch.tensor(one)[:, None], torch.tensor(other)] = True
    return mask


@on_layouts
@pytest.mark.parametrize("sink", [False, True])
def test_svg_chooses_the_better_band(layout: Layout, sink: bool) -> None:
    policy = Bands(0.5, 4, 8, sink)
    asked = ask(layout, step=3, layer=2)
    look_apart(asked)
    both = torch.stack([band_by_hand(layout, temporal, 0.5, 4, sink) for temporal in (False, True)])
    drawn = torch.randperm(60, generator=torch.Generator().manual_seed(3 * 6 + 2))[:8]
    wanted = exact(asked, None)[:, :, layout.visual_slice][:, :, drawn]
    errors = [exact(asked, m[None, None])[:, :, layout.visual_slice][:, :, drawn] - wanted for m in both]
    chosen = torch.stack([e.square().mean((2, 3)) for e in errors]).argmin(0)
    assert chosen.tolist() == [[0, 0, 1, 1]] * 2
    check(policy, asked, both[chosen])
    assert torch.equal(asked.state["chosen"], chosen)


@pytest.mark.parametrize(("density", "text"), [(0.3, 0), (0.25, 0), (0.25, 30)])
def test_svg_width_gives_the_density(density: float, text: int) -> None:
    """Band and text rows and columns keep the density asked for, up to the corners that the formula counts twice."""
    tokens = 600
    width = band_width(density, tokens, text)
    place = torch.arange(tokens)
    band = (place[:, None] - place).abs() < width
    kept = band.double().mean().item() + 2 * text / tokens
    assert kept == pytest.approx(density, abs=2 / tokens)


# --- Sparse VideoGen 2


def k_means_by_hand(x: torch.Tensor, centroids: torch.Tensor, iterations: int) -> tuple[list[int], torch.Tensor]:
    labels: list[int] = []
    centroids = centroids.clone()
    for _ in range(iterations):
        labels = torch.stack([(x - mean).square().sum(-1) for mean in centroids]).argmin(0).tolist()
        for cluster in range(len(centroids)):
            members = [place for place, label in enumerate(labels) if label == cluster]
            if members:
                centroids[cluster] = x[members].mean(0)
    return labels, centroids


@on_layouts
def test_svg2_clusters_and_goes_on_from_the_last_centroids(layout: Layout) -> None:
    policy = Clusters(0.6, 0.2, (16380 // 6, 16380 // 5), (4, 2), (4, 2))
    first = ask(layout, layer=3)
    second = ask(layout, layer=3, step=1, state=first.state)
    second.q, second.k = second.q + noise(*second.q.shape, seed=8), second.k + noise(*second.k.shape, seed=9)
    counts = [cluster_count(count, 60) for count in policy.clusters]
    assert counts == [5, 6]
    held: dict[Any, torch.Tensor] = {}
    for asked, iterations in ((first, 4), (second, 2)):
        image = torch.zeros(2, 4, 60, 60, dtype=torch.bool)
        for b, h in itertools.product(range(2), range(4)):
            sides = []
            for which, x in enumerate((asked.q[b, h], asked.k[b, h // 2])):
                points, key = x[layout.visual_slice], (b, h, which)
                drawn = torch.randperm(60, generator=torch.Generator().manual_seed(6 + which))[: counts[which]]
                labels, held[key] = k_means_by_hand(points, held.get(key, points[drawn]), iterations)
                sides.append((labels, held[key]))
            (labels_q, means_q), (labels_k, means_k) = sides
            sizes = torch.tensor([labels_k.count(cluster) for cluster in range(6)]).float()
            for cluster, mean in enumerate(means_q):
                shares = sizes * (means_k @ mean * asked.scale).exp()
                ranked = shares.argsort(descending=True)
                total = shares[ranked].cumsum(0) / shares.sum()
                chosen = set(ranked[: max(1, int((total < 0.6).sum()) + 1)].tolist())
                columns = torch.tensor([label in chosen for label in labels_k])
                image[b, h, torch.tensor(labels_q) == cluster] = columns
        check(policy, asked, image)
        for which in range(2):
            kept = asked.state[f"centroids {which}"]
            torch.testing.assert_close(kept[1, -1], held[1, 3, which], rtol=1e-4, atol=1e-5)


def test_grouped_blocks_hold_one_group_each() -> None:
    labels = torch.randint(-1, 5, (2, 3, 40), generator=torch.Generator().manual_seed(0))
    order, owner = grouped(labels, 6, 4)
    for b, h in itertools.product(range(2), range(3)):
        named = order[b, h].tolist()
        assert sorted(t for t in named if t >= 0) == [t for t in range(40) if labels[b, h, t] >= 0]
        for number, group in enumerate(owner[b, h].tolist()):
            tokens = [t for t in named[4 * number : 4 * number + 4] if t >= 0]
            assert bool(tokens) == (group >= 0) and all(labels[b, h, t] == group for t in tokens)


# --- Radial Attention


@functools.cache
def radial_by_hand(grid: tuple[int, int, int], block: int, decay: float, sink: bool, adjacent: float) -> torch.Tensor:
    frames, size = (grid[0], grid[1] * grid[2]) if grid[0] > 1 else (grid[1], grid[2])
    tokens = frames * size
    kept = torch.zeros(tokens, tokens, dtype=torch.bool)
    for one, other in itertools.product(range(tokens), range(tokens)):
        distance, apart = abs(one // size - other // size), abs(one % size - other % size)
        length = 2 ** (len(bin(size)) - 2) / 2 ** (len(bin(distance)) - 2 if distance else 0)
        near = apart <= max(length * decay, block) and (length >= block or distance % int(block / length) == 0)
        near = near if distance > 1 else distance == 0 or apart <= int(size * adjacent)
        kept[one, other] = near or (sink and other < size)
    mask = torch.zeros_like(kept)
    for row, column in itertools.product(range(0, tokens, block), range(0, tokens, block)):
        rows, columns = slice(row, row + block), slice(column, column + block)
        shares = [part.double().mean().item() for part in kept[rows, columns].T if part.any()]
        full = sum(share > 1 / 3 for share in shares)
        mask[rows, columns] = full > 0.6 * len(shares) or row == column
    return mask


@on_layouts
@pytest.mark.parametrize(
    ("grid", "block", "decay", "sink", "adjacent"),
    [
        ((9, 3, 3), 4, 0.2, True, 1.0),
        ((9, 3, 3), 4, 0.2, False, 0.5),
        ((6, 3, 4), 1, 0.4, False, 0.25),
        ((1, 9, 5), 2, 0.2, None, 0.25),
    ],
)
def test_radial_pattern(layout: Layout, grid: Any, block: int, decay: float, sink: Any, adjacent: float) -> None:
    layout = Layout(grid, layout.text, layout.text_first)
    image = radial_by_hand(grid, block, decay, bool(sink), adjacent)
    policy = Radial(decay, block, sink, adjacent)
    check(policy, ask(layout), image[None, None])
    assert block_for(3600, 128) == 128 and block_for(32 * 32, 128) == 128


# --- Sliding Tile Attention


@functools.cache
def tiles_by_hand(grid: Any, tile: Any, window: Any) -> torch.Tensor:
    spots = []
    for size, part, extent in zip(grid, tile, window, strict=True):
        count = min(4, size) if size // part < 3 else math.ceil(size / part)
        wide = min(extent, count)
        first = [min(max(number - wide // 2, 0), count - wide) for number in range(count)]
        spots.append([(place * count // size, first, wide) for place in range(size)])
    mask = torch.ones(math.prod(grid), math.prod(grid), dtype=torch.bool)
    for (one, here), (other, there) in itertools.product(enumerate(places(grid)), enumerate(places(grid))):
        for axis in range(3):
            number, first, wide = spots[axis][here[axis]]
            mask[one, other] &= first[number] <= spots[axis][there[axis]][0] < first[number] + wide
    return mask


@on_layouts
@pytest.mark.parametrize(
    ("grid", "tile", "window"),
    [((3, 4, 5), (1, 2, 2), (3, 3, 1)), ((5, 6, 4), (2, 2, 1), (1, 2, 3)), ((1, 7, 6), (6, 2, 2), (3, 3, 3))],
)
def test_sliding_tiles(layout: Layout, grid: Any, tile: Any, window: Any) -> None:
    layout = Layout(grid, layout.text, layout.text_first)
    check(SlidingTiles(window, tile, 4, None), ask(layout), tiles_by_hand(grid, tile, window)[None, None])


def test_published_tiles_and_sparsity() -> None:
    """HunyuanVideo's canvas of 30 x 48 x 80: windows from 58 to 91 % sparsity, whole axes at (5, 6, 10)."""
    counts = tile_counts((30, 48, 80), (6, 8, 8))
    assert counts == (5, 6, 10) and tile_counts((18, 48, 80), (6, 8, 8)) == (3, 6, 10)
    assert window_mask(counts, (3, 3, 3)).double().mean() == pytest.approx(0.09)
    assert window_mask(counts, (5, 6, 10)).all()
    plan = SlidingTiles((3, 3, 3), (6, 8, 8), 128, None).planned(Layout((30, 48, 80)), (3, 3, 3), "cpu")
    assert plan.kept(30 * 48 * 80, 30 * 48 * 80) == pytest.approx(0.09) and not plan.holes


def test_window_search_takes_the_best_window_of_every_head() -> None:
    layout, tile, found = LAYOUTS[2], (1, 1, 2), Found()
    counts = tile_counts(GRID, tile)
    choices = window_choices(counts, 0.4)
    assert all(math.prod(choice) <= 0.4 * math.prod(counts) for choice in choices) and len(choices) > 2
    plans = SlidingTiles((3, 3, 3), tile, 4, None)
    search = WindowSearch(lambda _: choices, plans.planned, 2, 0.25, 0, found)
    masks = [tiles_by_hand(GRID, tile, choice)[None, None] for choice in choices]
    errors: dict[Any, torch.Tensor] = {}
    for step, layer in itertools.product(range(8), range(2)):
        asked = ask(layout, step=step, layer=layer, layers=2)
        look_apart(asked)
        asked.q = asked.q + noise(*asked.q.shape, seed=10 * step + layer)
        assert torch.equal(search.attend(asked), exact(asked, None)) and asked.density == 1
        if step >= 2:
            squares = [(exact(asked, mask) - exact(asked, None)).square().mean((0, 2, 3)) for mask in masks]
            key = (step // 4, layer)
            errors[key] = errors.get(key, torch.zeros(1)) + torch.stack(squares)
    table = found.table(2, "Net:0")
    wanted = [[[choices[i] for i in errors[part, layer].argmin(0)] for layer in range(2)] for part in range(2)]
    assert table.windows == tuple(tuple(tuple(heads) for heads in layers) for layers in wanted)
    assert len({window for layers in table.windows for heads in layers for window in heads}) > 1
    policy = SlidingTiles((3, 3, 3), tile, 4, table)
    asked = ask(layout, step=5, layer=1, layers=2)
    check(policy, asked, torch.stack([tiles_by_hand(GRID, tile, window) for window in wanted[1][1]])[None])


def test_sliding_tile_calibrates_saves_loads_and_refuses(tmp_path: Any) -> None:
    wan = TINY["wan"]
    pipe = wan.build()
    before = wan.call(pipe)
    path = tmp_path / "windows.json"
    found: Any = dita.calibrate(pipe, SlidingTile.forced(), wan.call, save=path, parts=2, budget=0.2)
    assert torch.equal(wan.call(pipe), before), "the pipeline comes back as it was"
    assert dita.load_method(path) == found
    assert len(found.table.windows) == 2 and all(len(layers) == 4 for layers in found.table.windows)
    dita.accelerate_pipeline(pipe, found)
    out = wan.call(pipe)
    assert dita.report(pipe).last.reused > 0 and not torch.equal(out, before) and torch.equal(wan.call(pipe), out)
    with pytest.warns(DitaWarning, match="calibrate again"):
        wan.call(pipe, size="large")
    with pytest.raises(DitaError, match="searched for Wan"):
        dita.accelerate_pipeline(TINY["ltx"].build(), found)
    with pytest.raises(DitaError, match="must run the pipeline"):
        dita.calibrate(pipe, "sliding-tile", lambda p: None)
    with pytest.raises(DitaError, match="not a table of windows"):
        WindowTable.from_dict({"windows": [[[[1, 2]]]]})


# --- VMoBA


def picks_by_hand(gate: list[list[float]], own: list[int], threshold: float, scope: str, top: int) -> list[set[int]]:
    """Blocks that each query of one head picks, from gate[query][block]."""
    blocks = len(gate[0])
    groups = [[(i, c) for c in range(blocks)] for i in range(len(gate))]
    groups = [sum(groups, [])] if scope == "head_global" else groups
    picks = [{block} for block in own]
    for pairs in groups:
        low, high = min(gate[i][c] for i, c in pairs), max(gate[i][c] for i, c in pairs)
        share = {(i, c): (gate[i][c] - low) / (high - low) for i, c in pairs}
        others = sorted((p for p in pairs if own[p[0]] != p[1]), key=lambda p: -share[p])
        selves, total = [p for p in pairs if own[p[0]] == p[1]], sum(share.values())
        held, taken = sum(share[p] for p in selves), 0
        for pair in others:
            done = len(selves) + taken >= top * len(selves) if top else taken and held >= threshold * total
            if done:
                break
            picks[pair[0]].add(pair[1])
            held, taken = held + share[pair], taken + 1
    return picks


@on_layouts
@pytest.mark.parametrize(("threshold", "top"), [(0.25, 0), (0.6, 0), (0.0, 2)])
@pytest.mark.parametrize("scope", ["query_head", "head_global"])
def test_vmoba_exact_selection_by_query(layout: Layout, threshold: float, top: int, scope: str) -> None:
    policy = Mixture(threshold, scope, top, ((2, 1, 1), (1, 3, 2), (2, 2, 2)), 4)
    for layer, parts in ((3, (2, 1, 1)), (1, (1, 3, 2)), (5, (2, 2, 2))):
        asked = ask(layout, layer=layer)
        number = [
            sum(
                p * n // s * w
                for p, n, s, w in zip(place, parts, GRID, (parts[1] * parts[2], parts[2], 1), strict=True)
            )
            for place in places()
        ]
        q, k = asked.q[:, :, layout.visual_slice], asked.k[:, :, layout.visual_slice]
        image = torch.zeros(2, 4, 60, 60, dtype=torch.bool)
        for b, h in itertools.product(range(2), range(4)):
            means = [k[b, h // 2][[n == c for n in number]].mean(0) for c in range(math.prod(parts))]
            gate = (q[b, h] @ torch.stack(means).T).tolist()
            for i, picked in enumerate(picks_by_hand(gate, number, threshold, scope, top)):
                image[b, h, i] = torch.tensor([n in picked for n in number])
        if image.all():
            policy.attend(asked)
            assert asked.density == 1 and "everything" in asked.reason
        else:
            check(policy, asked, image)


def test_vmoba_keeps_the_own_block_and_another() -> None:
    gate = noise(1, 2, 6, 3, seed=4)
    own = torch.arange(6)[:, None] // 2 == torch.arange(3)
    seen = select_blocks(gate, own, 0.0)
    assert (seen & own).any(-1).all() and (seen.sum(-1) == 2).all()
    assert select_blocks(gate, own, 1.0).sum(-1).min() >= 2


# --- All


DENSE = {
    "svg": Bands(1.0, 4, 8, False),
    "svg2": Clusters(1.0, 0.1, (3000, 3000), (4, 4), (3, 2)),
    "radial": Radial(1.0, 60, False, 1.0),
    "sliding-tile": SlidingTiles((4, 4, 5), (1, 1, 1), 4, None),
    "vmoba": Mixture(0.25, "query_head", 4, ((2, 1, 1), (1, 2, 2), (1, 2, 2)), 4),
}
SPARSE = {
    "svg": Bands(0.4, 4, 8, None),
    "svg2": Clusters(0.5, 0.1, (3000, 3000), (4, 4), (3, 2)),
    "radial": Radial(0.2, 1, None, 0.25),
    "sliding-tile": SlidingTiles((1, 2, 3), (1, 1, 1), 4, None),
    "vmoba": Mixture(0.25, "head_global", 0, ((2, 1, 1), (1, 2, 2), (1, 2, 2)), 4),
}


@pytest.mark.parametrize("name", DENSE)
@on_layouts
def test_a_setting_that_keeps_everything_is_dense(name: str, layout: Layout) -> None:
    asked = ask(layout)
    assert torch.equal(DENSE[name].attend(asked), exact(asked, None)) and asked.density == 1


@pytest.mark.parametrize("name", SPARSE)
@on_layouts
def test_an_image_does_not_depend_on_its_batch_mates(name: str, layout: Layout) -> None:
    asked = ask(layout, batch=3, layer=1)
    together = SPARSE[name].attend(asked)
    assert asked.density < 1
    for item in range(3):
        alone = ask(layout, batch=3, layer=1)
        alone.q, alone.k, alone.v = (x[item : item + 1] for x in (alone.q, alone.k, alone.v))
        alone.key_mask = None if alone.key_mask is None else alone.key_mask[item : item + 1]
        torch.testing.assert_close(SPARSE[name].attend(alone), together[item : item + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("svg", {"density": 1.2}, "density is 1.2"),
        ("svg2", {"key_clusters": 0}, "key_clusters is 0"),
        ("radial", {"adjacent": -1}, "adjacent is -1"),
        ("sliding-tile", {"window": (3, 3)}, "three whole numbers"),
        ("vmoba", {"scope": "block"}, "query_head, head_global"),
    ],
)
def test_settings_are_checked(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DitaError, match=message):
        dita.registry.get(name)(**settings)
