"""Re-ttention, SLA, VORTA and SageAttention, each against its algorithm written by hand."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import plain
from pipelines import TINY
from safetensors.torch import save_file

import dita
from dita.attention_view import Attended
from dita.config import Method
from dita.errors import DitaError
from dita.kernels.int8_attention import int8_attention
from dita.kernels.masked_attention import masked_attention
from dita.kernels.plan import block_count
from dita.kernels.sparse.coreset import coreset_attention, windows
from dita.kernels.sparse.layout import Layout
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.re_ttention import Reshaped, ReTtention, band
from dita.kernels.sparse.sage import Sage
from dita.kernels.sparse.sla import SLA, SparseLinear, load_projections
from dita.kernels.sparse.sla_training import measure_sla, train_sla
from dita.kernels.sparse.vorta import VORTA, Routed, sliding_plan
from dita.kernels.sparse.vorta_routing import by_router, cheapest

LAYOUTS = (Layout((3, 3, 5)), Layout((2, 4, 5), text=3, text_first=True), Layout((3, 2, 7), text=5))
on_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=("none", "first", "last"))


def ask(layout: Layout, step: int = 0, state: dict[str, Any] | None = None, seed: int = 0, **given: Any) -> Asked:
    """Random queries, keys and values [2, 3, N, 8], the last text token of sample 1 masked where there is text."""
    make = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, layout.tokens, 8, generator=make) for _ in range(3))
    mask = None
    if layout.text:
        mask = torch.ones(2, layout.tokens, dtype=torch.bool)
        mask[1, layout.text_slice.stop - 1 if layout.text_first else layout.tokens - 1] = False
    seen = Attended(q, k, v, None if mask is None else mask[:, None, None], 0.5)
    values = {"timestep": 0.0, **given}
    return Asked(q, k, v, 0.5, mask, layout, 0, 2, step, 10, {} if state is None else state, seen.attend, **values)


def image_numbers(layout: Layout) -> list[int]:
    """Places of the image tokens among all."""
    return list(range(layout.tokens))[layout.visual_slice]


def whole_mask(layout: Layout, image: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Token mask [B', H', N, N] of one over image tokens [B', H', V, V]: text sees and is seen by all."""
    mask = torch.ones(*image.shape[:2], layout.tokens, layout.tokens, dtype=torch.bool)
    numbers = torch.tensor(image_numbers(layout))
    mask[:, :, numbers[:, None], numbers] = image
    return mask if key_mask is None else mask & key_mask[:, None, None]


def policy_of(policy: Policy, dense_steps: float = 0.0) -> Policy:
    policy.dense_steps, policy.cutoff = dense_steps, 1.0
    return policy


# Re-ttention


def static_window(layout: Layout, block: int, density: float) -> torch.Tensor:
    """Blocks of tokens ordered by their place in a frame, at most `reach` blocks apart, by loops."""
    frames, cells = layout.grid[0], layout.grid[1] * layout.grid[2]
    order = [frame * cells + cell for cell in range(cells) for frame in range(frames)]
    blocks = block_count(len(order), block)
    reach, best = 0, 0
    while reach < blocks:
        if sum(abs(a - b) <= reach for a in range(blocks) for b in range(blocks)) <= density * blocks**2:
            best = reach
        reach += 1
    mask = torch.zeros(1, 1, len(order), len(order), dtype=torch.bool)
    for i, one in enumerate(order):
        for j, other in enumerate(order):
            mask[0, 0, one, other] = abs(i // block - j // block) <= best
    return mask


@on_layouts
def test_re_ttention_is_its_formula_on_a_static_window(layout: Layout) -> None:
    policy = policy_of(Reshaped(0.5, 6, every=4, growth=0.3), dense_steps=0.2)
    state: dict[str, Any] = {}
    rho, residual = torch.zeros(()), torch.zeros(())
    for step in range(10):
        asked = ask(layout, step, state, seed=step)
        mask = whole_mask(layout, static_window(layout, 6, 0.5), asked.key_mask)
        every = torch.ones_like(mask) if asked.key_mask is None else asked.key_mask[:, None, None].expand_as(mask)
        out, lse = masked_attention(asked.q, asked.k, asked.v, mask, 0.5)
        dense, lse_dense = masked_attention(asked.q, asked.k, asked.v, every, 0.5)
        answer = policy.attend(asked)
        if step in (0, 1, 4, 8):
            assert asked.density == 1 and "dense" in asked.reason
            rho = (lse - lse_dense).exp()
            residual = dense - rho[..., None] * out
            torch.testing.assert_close(answer, dense, atol=1e-5, rtol=1e-5)
        else:
            torch.testing.assert_close(answer, rho[..., None] * out + residual, atol=1e-5, rtol=1e-5)
            rho = (rho + 0.3).clamp_max(1)
            image = layout.visual / layout.tokens
            kept = static_window(layout, 6, 0.5).float().mean().item()
            assert asked.density == pytest.approx(1 - image**2 * (1 - kept))
    assert state["rho"].shape == (2, 3, layout.tokens) and state["residual"].shape == (2, 3, layout.tokens, 8)


def test_re_ttention_keeps_an_unchanged_attention_exactly() -> None:
    """With growth 0 and the same input the residual makes up for all that the window leaves out."""
    layout, state = LAYOUTS[2], {}
    policy = policy_of(Reshaped(0.3, 4, every=5, growth=0.0))
    dense = policy.attend(ask(layout, 0, state))
    sparse = ask(layout, 1, state)
    torch.testing.assert_close(policy.attend(sparse), dense, atol=1e-5, rtol=1e-5)
    assert sparse.density < 1


def test_re_ttention_keeps_nothing_that_no_sparse_step_needs() -> None:
    policy, state = policy_of(Reshaped(0.3, 4, every=5, growth=0.0), dense_steps=0.3), {}
    for step in (0, 1):
        policy.attend(ask(LAYOUTS[0], step, state))
        assert not state
    policy.attend(ask(LAYOUTS[0], 2, state))
    assert state


@pytest.mark.parametrize(("blocks", "density"), [(7, 0.5), (52, 0.1), (5, 0.0), (4, 1.0)])
def test_band_is_the_widest_that_fits(blocks: int, density: float) -> None:
    share = band(blocks, density).float().mean().item()
    assert share <= max(density, 1 / blocks) + 1e-6
    wider = (
        torch.ones(blocks, blocks).triu(-int(band(blocks, density)[0].sum())).tril(int(band(blocks, density)[0].sum()))
    )
    assert share == 1 or wider.mean().item() > density


# SLA


def top_blocks(asked: Asked, block: int, density: float) -> torch.Tensor:
    """SLA's mask over image tokens, by loops over blocks."""
    numbers = image_numbers(asked.layout)
    q, k = asked.q[:, :, numbers], asked.k[:, :, numbers]
    pieces = [list(range(i, min(i + block, len(numbers)))) for i in range(0, len(numbers), block)]
    keep = max(1, int(density * len(pieces)))
    mask = torch.zeros(2, 3, len(numbers), len(numbers), dtype=torch.bool)
    smooth = k - asked.k.mean(2, keepdim=True)
    for b in range(2):
        for h in range(3):
            for i, rows in enumerate(pieces):
                scores = [float(q[b, h, rows].mean(0) @ smooth[b, h, columns].mean(0)) for columns in pieces]
                best = sorted(range(len(pieces)), key=lambda j, s=scores: -s[j])[:keep]
                for j in {*best, i}:
                    for row in rows:
                        mask[b, h, row, pieces[j]] = True
    return mask


@on_layouts
@pytest.mark.parametrize("trained", [False, True])
def test_sla_is_top_blocks_and_a_linear_branch(layout: Layout, trained: bool) -> None:
    make = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(8, 8, generator=make), torch.randn(8, generator=make)
    policy = policy_of(SparseLinear(0.4, 4, {0: (weight, bias)} if trained else {1: (weight, bias)}))
    asked = ask(layout)
    mask = whole_mask(layout, top_blocks(asked, 4, 0.4), asked.key_mask)
    wanted, _ = masked_attention(asked.q, asked.k, asked.v, mask, 0.5)
    if trained:
        for b in range(2):
            valid = torch.ones(layout.tokens) if asked.key_mask is None else asked.key_mask[b].float()
            for h in range(3):
                for i in image_numbers(layout):
                    phi = asked.q[b, h, i].softmax(0)
                    weights = torch.stack([phi @ key.softmax(0) for key in asked.k[b, h]]) * valid
                    wanted[b, h, i] += weight @ ((weights @ asked.v[b, h]) / (1e-5 + weights.sum())) + bias
    torch.testing.assert_close(policy.attend(asked), wanted, atol=1e-4, rtol=1e-4)
    free = whole_mask(layout, top_blocks(asked, 4, 0.4), None)
    assert asked.density == pytest.approx(free.float().mean().item())


def test_sla_training_lowers_the_error_and_changes_nothing_of_the_model(tmp_path: Path) -> None:
    tiny, method = TINY["wan"], SLA(density=0.1, block=8, dense_steps=0.0)
    pipe, file, call = tiny.build(), tmp_path / "sla.safetensors", functools.partial(tiny.call, steps=4)
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    before = measure_sla(pipe, call, method)
    trained = train_sla(pipe, call, method, file, runs=3, rate=0.01)
    after = measure_sla(pipe, call, trained)
    assert trained.weights == str(file) and after < 0.9 * before
    assert all(torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items())
    assert torch.equal(tiny.call(pipe), plain("wan"))
    assert all(p.grad is None and p.requires_grad for p in pipe.transformer.parameters())
    dita.accelerate_pipeline(pipe, trained)
    with_branch = tiny.call(pipe)
    density = dita.report(pipe).last.density
    dita.accelerate_pipeline(pipe, method)
    assert not torch.equal(tiny.call(pipe), with_branch)
    # Only whether the diagonal is among the best blocks differs.
    assert dita.report(pipe).last.density == pytest.approx(density, abs=0.03)
    assert set(load_projections(file, 4)) == {0, 1, 2, 3}
    other = TINY["hunyuan"].build()
    with pytest.raises(DitaError, match=r"were trained on WanTransformer3DModel:\w+, not on HunyuanVideo"):
        dita.accelerate_pipeline(other, trained)
    with pytest.raises(DitaError, match="were trained on WanTransformer3DModel"):
        measure_sla(other, call, trained)


def test_sla_refuses_other_weights(tmp_path: Path) -> None:
    pipe = TINY["wan"].build()
    with pytest.raises(DitaError, match="cannot read SLA's projections"):
        dita.accelerate_pipeline(pipe, SLA(weights=str(tmp_path / "none.safetensors")))
    save_file({"weight": torch.zeros(3, 4, 4), "bias": torch.zeros(3, 4)}, tmp_path / "three.safetensors")
    with pytest.raises(DitaError, match="for L = 4 layers"):
        dita.accelerate_pipeline(pipe, SLA(weights=str(tmp_path / "three.safetensors")))
    save_file({"weight": torch.zeros(4, 4, 4), "bias": torch.zeros(4, 4)}, tmp_path / "narrow.safetensors")
    dita.accelerate_pipeline(pipe, SLA(weights=str(tmp_path / "narrow.safetensors"), block=4, cutoff=1.0))
    with pytest.raises(DitaError, match="heads of 4 channels"):
        TINY["wan"].call(pipe)


# VORTA


def coreset_by_hand(seen: Attended, layout: Layout) -> torch.Tensor:
    """Window by window, head by head."""
    (frames, rows, columns), numbers = layout.grid, image_numbers(layout)
    boxes: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    for f in range(frames):
        for r in range(rows):
            for c in range(columns):
                boxes.setdefault((f // 2, r // 3, c // 2), []).append((f, r, c))
    out = torch.zeros_like(seen.q)
    for b in range(len(seen.q)):
        for h in range(seen.q.shape[1]):
            staying, copies = [], {}
            for (f0, r0, c0), members in boxes.items():
                size = [len({member[axis] for member in members}) for axis in range(3)]
                middle = (2 * f0 + size[0] // 2, 3 * r0 + size[1] // 2, 2 * c0 + size[2] // 2)
                place = {m: numbers[(m[0] * rows + m[1]) * columns + m[2]] for m in members}
                margins = [place[m] for m in members if m != middle]
                q = seen.q[b, h]
                margins.sort(key=lambda i, q=q, c=place[middle]: float(torch.cosine_similarity(q[i], q[c], dim=0)))
                stay = max(0, len(members) // 2 - 1)
                staying += [place[middle], *margins[:stay]]
                copies |= dict.fromkeys(margins[stay:], place[middle])
            staying += [i for i in range(layout.tokens) if i not in numbers]
            key_mask = seen.key_mask
            mask = None if key_mask is None else key_mask[b, staying][None, None, None]
            q, k, v = (x[b : b + 1, h : h + 1, staying] for x in (seen.q, seen.k, seen.v))
            out[b, h, staying] = masked_attention(q, k, v, mask, seen.scale)[0][0, 0]
            for token, centre in copies.items():
                out[b, h, token] = out[b, h, centre]
    return out


def sliding_by_hand(layout: Layout, tile: tuple[int, int, int]) -> torch.Tensor:
    """Mask over image tokens: windows of three tiles, pushed back inside at the rim; tiles as even as can be."""
    shares = []
    for cells, most in zip(layout.grid, tile, strict=True):
        count = block_count(cells, min(most, max(1, cells // 4)))
        starts = [part * cells // count for part in range(count + 1)]
        owner = [sum(start <= cell for start in starts[1:]) for cell in range(cells)]
        share = torch.zeros(cells, cells, dtype=torch.bool)
        for i in range(cells):
            centre = min(max(owner[i], 1), max(count - 2, 0)) if count > 1 else 0
            for j in range(cells):
                share[i, j] = abs(owner[j] - centre) <= 1
        shares.append(share)
    return torch.kron(torch.kron(shares[0], shares[1]), shares[2])[None, None]


@pytest.mark.parametrize(
    "layout", [Layout((3, 8, 9)), Layout((4, 5, 6), text=3, text_first=True), Layout((3, 7, 5), text=5)], ids=str
)
def test_vorta_branches_by_hand(layout: Layout) -> None:
    policy = policy_of(Routed(lambda asked: (1, 2, 0), (2, 2, 2)))
    asked = ask(layout)
    answer = policy.attend(asked)
    mask = None if asked.key_mask is None else asked.key_mask[:, None, None]
    wanted = coreset_by_hand(Attended(asked.q, asked.k, asked.v, mask, 0.5), layout)
    torch.testing.assert_close(answer[:, 0], wanted[:, 0], atol=1e-5, rtol=1e-5)
    sliding = whole_mask(layout, sliding_by_hand(layout, (2, 2, 2)), asked.key_mask)
    wanted, _ = masked_attention(asked.q, asked.k, asked.v, sliding, 0.5)
    torch.testing.assert_close(answer[:, 1], wanted[:, 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answer[:, 2], asked.dense()[:, 2], atol=1e-5, rtol=1e-5)
    share = whole_mask(layout, sliding_by_hand(layout, (2, 2, 2)), None).float().mean().item()
    staying = windows(layout.grid, (2, 3, 2)).tokens + layout.text
    assert asked.density == pytest.approx((1 + share + (staying / layout.tokens) ** 2) / 3)


def test_vorta_published_sizes() -> None:
    """Wan at 77 frames of 720p: half of the tokens, tiles of 5 x 9 x 8, windows of 27 of 200 tiles."""
    layout = Layout((20, 45, 80))
    half = windows(layout.grid, (2, 3, 2))
    assert half.places.shape == (6000, 12) and set(half.kept.sum(1).tolist()) == {5}
    assert half.tokens / layout.tokens == 0.5
    plan = sliding_plan(layout, (5, 9, 8))
    assert plan.counts.shape[-1] == 200 and set(plan.counts.flatten().tolist()) == {27}
    assert plan.kept(layout.tokens, layout.tokens) == pytest.approx(0.135)


def test_vorta_coreset_of_like_tokens_is_dense() -> None:
    layout = LAYOUTS[0]
    x = torch.randn(1, 2, 1, 8).expand(-1, -1, layout.tokens, -1)
    out = coreset_attention(Attended(x, x, x), layout, windows(layout.grid, (2, 3, 2)))
    torch.testing.assert_close(out, x.clone())


def test_vorta_groups_heads_that_share_keys() -> None:
    layout = LAYOUTS[1]
    one = ask(layout)
    asked = ask(layout)
    asked.k, asked.v = (x[:, :1] for x in (asked.k, asked.v))
    one.k, one.v = (x[:, :1].expand(-1, 3, -1, -1).contiguous() for x in (one.k, one.v))
    policy = policy_of(Routed(lambda asked: (1, 2, 1), (2, 2, 2)))
    torch.testing.assert_close(policy.attend(asked), policy.attend(one))


def test_vorta_sample_does_not_depend_on_its_mates() -> None:
    policy = policy_of(Routed(lambda asked: (1, 2, 0), (2, 2, 2)))
    both, alone = ask(LAYOUTS[2]), ask(LAYOUTS[2])
    alone.q, alone.k, alone.v = (x[1:] for x in (alone.q, alone.k, alone.v))
    assert alone.key_mask is not None
    alone.key_mask = alone.key_mask[1:]
    torch.testing.assert_close(policy.attend(both)[1:], policy.attend(alone))


def test_cheapest_is_the_best_of_all_choices_on_the_hull() -> None:
    make = torch.Generator().manual_seed(0)
    errors = {f"{layer}/0": torch.rand(2, 2, generator=make, dtype=torch.float64).tolist() for layer in range(2)}
    costs = (1.0, 0.25, 0.4)

    def total(choice: list[int]) -> tuple[float, float]:
        flat = [errors["0/0"], errors["0/0"], errors["1/0"], errors["1/0"]]
        error = sum(0.0 if b == 0 else e[b - 1][i % 2] for i, (b, e) in enumerate(zip(choice, flat, strict=True)))
        return sum(costs[b] for b in choice) / 4, error

    every = [total([a, b, c, d]) for a in range(3) for b in range(3) for c in range(3) for d in range(3)]
    for budget in (0.25, 0.4, 0.55, 0.7, 0.9, 1.0):
        routes = cheapest(errors, costs[1:], budget)
        density, error = total([*routes["0/0"], *routes["1/0"]])
        assert density <= budget + 1e-9
        assert not [1 for other, wrong in every if other <= density + 1e-12 and wrong < error - 1e-9]
    assert cheapest(errors, costs[1:], 1.0) == {"0/0": (0, 0), "1/0": (0, 0)}
    assert cheapest(errors, costs[1:], 0.0) == {"0/0": (1, 1), "1/0": (1, 1)}


def test_vorta_calibrates_to_a_budget_and_travels_as_json() -> None:
    tiny = TINY["wan"]
    pipe = tiny.build()
    config = VORTA(budget=0.6, ranges=2).calibrated(pipe, tiny.call)
    assert torch.equal(tiny.call(pipe), plain("wan")) and config.table is not None
    assert set(config.table.values) == {"densities", *(f"{layer}/{part}" for layer in range(4) for part in range(2))}
    assert all(
        0 < error < 4 for key, rows in config.table.values.items() if "/" in key for row in rows for error in row
    )
    assert Method.from_json(config.to_json()) == config
    errors = {}
    for budget in (0.3, 0.6, 0.8):
        dita.accelerate_pipeline(pipe, config.replace(budget=budget))
        errors[budget] = (tiny.call(pipe) - plain("wan")).square().mean().item()
        run = dita.report(pipe).last
        sparse = [record.density for record in run.records if record.action == "sparse"]
        assert sparse and sum(sparse) / len(sparse) <= budget + 1e-6
    assert errors[0.8] < errors[0.6] < errors[0.3]
    with pytest.raises(DitaError, match="measured on"):
        dita.accelerate_pipeline(TINY["ltx"].build(), config)
    with pytest.raises(DitaError, match=r"dita\.calibrate"):
        dita.accelerate_pipeline(pipe, VORTA())


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_vorta_reads_the_published_router(tmp_path: Path, suffix: str) -> None:
    pipe, file = TINY["wan"].build(), tmp_path / f"router.{suffix}"
    model, make = pipe.transformer, torch.Generator().manual_seed(1)
    heads, width = 2, model.condition_embedder.time_proj.in_features
    tensors = {}
    for layer in range(4):
        tensors[f"blocks.{layer}.router.linear.weight"] = torch.randn(3 * heads, width, generator=make)
        tensors[f"blocks.{layer}.router.linear.bias"] = torch.randn(3 * heads, generator=make)
    save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    with torch.no_grad():
        route = by_router(file, model, 4, tau=0.5)
        text = torch.zeros(1, 3, model.config.text_dim)
        seen = set()
        for timestep in (999.0, 400.0, 3.0):
            embedding = model.condition_embedder(torch.tensor([timestep]), text)[0]
            for layer in range(4):
                linear = torch.nn.Linear(width, 3 * heads)
                linear.weight.data = tensors[f"blocks.{layer}.router.linear.weight"]
                linear.bias.data = tensors[f"blocks.{layer}.router.linear.bias"]
                scores = linear(torch.nn.functional.silu(embedding)).unflatten(1, (heads, 3)).softmax(-1)[0]
                wanted = [int(row.argmax()) if row.max() >= 0.5 else 0 for row in scores]
                asked = ask(LAYOUTS[0], timestep=timestep)
                asked.layer = layer
                assert list(route(asked)) == wanted
                seen |= set(wanted)
        assert seen == {0, 1, 2}
    dita.accelerate_pipeline(pipe, VORTA(router=str(file), dense_steps=0.0))
    TINY["wan"].call(pipe)
    assert dita.report(pipe).last.reused > 0
    with pytest.raises(DitaError, match="does not embed its time step as Wan does"):
        dita.accelerate_pipeline(TINY["hunyuan"].build(), VORTA(router=str(file)))
    with pytest.raises(DitaError, match="cannot read VORTA's router"):
        by_router(tmp_path / "none.safetensors", model, 4, 0.3)


# 8 bits


@pytest.mark.parametrize(("pv", "granularity"), [("fp16", "block"), ("fp8", "warp")])
def test_sage_rounds_every_attention_and_says_so(pv: str, granularity: str) -> None:
    tiny = TINY["hunyuan"]  # its text is padded
    pipe = dita.accelerate_pipeline(tiny.build(), Sage(pv=pv, granularity=granularity, dense_steps=0.25))
    out, exact = tiny.call(pipe), plain("hunyuan")
    run = dita.report(pipe).last
    assert [record.action for record in run.records] == ["computed"] * 2 + ["low-bit"] * 6
    assert run.density == 1 and run.reused == 6 and run.computed_steps == tuple(range(8)) and run.computed_fraction == 1
    assert (
        run.records[-1].reason == "6 of 6 attentions in 8 bits" and "6 low-bit" in str(run) and "##======" in str(run)
    )
    assert "low-bit" in dita.report(pipe)._repr_html_()
    assert 0 < (out - exact).norm() / exact.norm() < 0.1


def test_sage_is_int8_attention() -> None:
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 70, 16, generator=make) for _ in range(3))
    mask = torch.rand(2, 70, generator=make) > 0.3
    from dita.kernels.sparse.sage import LowBitHandler
    from dita.seams import Call, Position, Site

    site, other = (Site("attention", name) for name in ("one", "two"))
    handler = LowBitHandler((other, site), 0.0, 1, "fp16", "block")
    call = Call(Position(0, 4, 0, "all", 0, 4, 0))
    handler.begin_call(call)
    wanted = int8_attention(q, k, v, key_valid=mask[:, None])[0]
    seen = Attended(q, k, v, mask[:, None, None])
    assert torch.equal(handler.attend(site, 0, call, seen, lambda seen: seen.q), wanted)
    assert handler.attend(other, 0, call, seen, lambda seen: seen.q) is q, "a layer that stays dense"
    full = Attended(q, k, v, torch.ones(1, 1, 70, 70, dtype=torch.bool).tril())
    assert handler.attend(site, 0, call, full, lambda seen: seen.q) is q, "a mask by query"
    handler.end_call(call)
    assert call.sparsely == "1 of 3 attentions in 8 bits" and call.fewer_bits and call.action == "computed"


@pytest.mark.parametrize(
    "method", [SLA(density=0.3, block=16), ReTtention(density=0.3, block=16)], ids=lambda m: m.name
)
def test_any_plan_can_multiply_in_8_bits(method: Any) -> None:
    tiny, outs = TINY["wan"], {}
    for qk in ("same", "int8"):
        pipe = dita.accelerate_pipeline(tiny.build(), method.replace(cutoff=1.0, qk=qk))
        outs[qk] = tiny.call(pipe)
        assert dita.report(pipe).last.density < 1
    distance = (outs["same"] - outs["int8"]).norm() / outs["same"].norm()
    assert 0 < distance < 0.05
    with pytest.raises(DitaError, match="qk is"):
        method.replace(qk="int4")


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (ReTtention, {"every": 0}), (ReTtention, {"growth": -1}), (ReTtention, {"density": 2}), (SLA, {"block": 0}),
        (SLA, {"density": math.nan}), (VORTA, {"budget": 1.5}), (VORTA, {"tile": (1, 2)}), (VORTA, {"ranges": 0}),
        (VORTA, {"tile": (1, 2, 0)}), (Sage, {"pv": "fp4"}), (Sage, {"granularity": "row"}),
        (Sage, {"dense_layers": -1}),
    ],
)  # fmt: skip
def test_settings_out_of_range(cls: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(DitaError, match="expected"):
        cls(**settings)
