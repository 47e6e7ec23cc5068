"""Choosing and moving tokens, looking at attention, and running modules on some tokens."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from helpers import THREE
from pipelines import TINY
from torch import nn

import dita
from dita import attention_view
from dita.anatomy import describe
from dita.attention_view import Attended, AttentionView
from dita.caching import ClusCa, DuCa, ToCa
from dita.caching.base import CachingMethod
from dita.caching.clusca import Ladder, LadderForecast
from dita.caching.engine import Recipe
from dita.caching.forecast import Forecast
from dita.caching.history import History
from dita.caching.policy import Policy, Verdict, View
from dita.caching.storage import Storage
from dita.caching.tokenwise import SPREADS, TokenSettings, TokenWise, layout_of, plan_steps
from dita.errors import DitaError, DitaWarning
from dita.kernels import tokens as kernel
from dita.seams import Fresh, Position


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("batch", "count", "width", "some"), [(1, 1, 1, 1), (2, 7, 3, 4), (3, 16, 5, 0), (2, 5, 2, 5)])
def test_choose_gather_scatter(batch: int, count: int, width: int, some: int) -> None:
    x, scores = noise(batch, count, width), noise(batch, count, seed=1).round()
    index = kernel.choose(scores, some)
    rows = noise(batch, some, width, seed=2)
    taken, put, before = kernel.gather_tokens(x, index), kernel.scatter_tokens(x, index, rows), x.clone()
    for b in range(batch):
        ranked = sorted(range(count), key=lambda n: (-scores[b, n].item(), n))[:some]  # noqa: B023
        assert index[b].tolist() == ranked, "ties go to the earlier token"
        for k, n in enumerate(ranked):
            assert torch.equal(taken[b, k], x[b, n]) and torch.equal(put[b, n], rows[b, k])
        rest = [n for n in range(count) if n not in ranked]
        assert torch.equal(put[b, rest], x[b, rest])
    assert torch.equal(x, before), "scattering is into a copy"


def test_misfitting_tokens_are_refused() -> None:
    x, index = noise(2, 4, 3), torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(DitaError, match="count up to N"):
        kernel.choose(noise(2, 4), 5)
    with pytest.raises(DitaError, match=r"expected tokens .* got \(2, 4, 3\) and \(1, 1\)"):
        kernel.gather_tokens(x, index[:1])
    with pytest.raises(DitaError, match="expected rows"):
        kernel.scatter_tokens(x, index, x)
    with pytest.raises(DitaError, match="does not hold 5"):
        kernel.cell_bonus(noise(1, 5), (2, 2), 0.5)


@pytest.mark.parametrize(
    ("frames", "rows", "columns", "cell"), [(1, 4, 4, 2), (3, 2, 5, 2), (2, 5, 7, 4), (1, 1, 3, 2)]
)
def test_cell_bonus(frames: int, rows: int, columns: int, cell: int) -> None:
    scores = noise(2, frames * rows * columns)
    expected = scores.clone()
    for b in range(2):
        cells: dict[tuple[int, int, int], list[int]] = {}
        for n in range(scores.shape[1]):
            frame, row, column = n // (rows * columns), n // columns % rows, n % columns
            cells.setdefault((frame, row // cell, column // cell), []).append(n)
        for members in cells.values():
            best = max(members, key=lambda n: scores[b, n].item())  # noqa: B023
            expected[b, best] += 0.6 * scores[b, best].abs()
    torch.testing.assert_close(kernel.cell_bonus(scores, (frames, rows, columns), 0.6, cell), expected)


def test_clusters_draw_without_touching_the_random_state() -> None:
    labels = torch.tensor([[0, 2, 2, 0, 2, -1], [2, 2, 2, 2, 2, 2]])
    before = torch.get_rng_state()
    draws = {tuple(kernel.draw_per_cluster(labels, 3, seed).flatten().tolist()) for seed in range(40)}
    assert torch.equal(torch.get_rng_state(), before) and len(draws) > 4
    for a, b, c, d, e, f in draws:
        assert a in (0, 3) and c in (1, 2, 4) and b in (a, c), "an empty cluster draws what another has drawn"
        assert d == e == f
    again = kernel.draw_per_cluster(labels[:1], 3, 7)
    assert torch.equal(again, kernel.draw_per_cluster(labels, 3, 7)[:1]), "batch mates do not matter"


def test_spreading_moves_tokens_towards_their_representative() -> None:
    x, labels, index = noise(2, 6, 3), torch.tensor([[0, 1, 1, -1, 0, 1]] * 2), torch.tensor([[4, 1]] * 2)
    moved = kernel.spread_to_clusters(x, index, labels, 0.25)
    for n, source in enumerate([4, 1, 1, None, 4, 1]):
        target = x[:, n] if source is None else x[:, source]
        torch.testing.assert_close(moved[:, n], 0.75 * x[:, n] + 0.25 * target)


def naive_map(seen: Attended) -> torch.Tensor:
    """[B, N, M], by torch's own attention on an identity in place of the values."""
    eye = torch.eye(seen.k.shape[2]).expand(*seen.k.shape[:2], -1, -1)
    attend = nn.functional.scaled_dot_product_attention
    grouped = seen.q.shape[1] != seen.k.shape[1]
    return attend(seen.q, seen.k, eye, attn_mask=seen.mask, scale=seen.scale, enable_gqa=grouped).mean(1)


@pytest.mark.parametrize("elements", [2**22, 50])
@pytest.mark.parametrize("masked", ["", "bool", "added", "per row"])
def test_attention_is_read_off_in_chunks(elements: int, masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_view, "_ELEMENTS", elements)
    mask = {"": None, "bool": noise(4, 1, 1, 5) > -0.5, "added": noise(4, 1, 1, 5), "per row": noise(1, 1, 7, 5)}[
        masked
    ]
    heads = 1 if masked == "added" else 2
    seen = Attended(noise(4, 2, 7, 3), noise(4, heads, 5, 3, seed=1), noise(4, heads, 5, 3, seed=2), mask, 0.4)
    whole = naive_map(seen)
    torch.testing.assert_close(seen.column_mass(), whole.sum(1))
    entropy = lambda rows: -(rows * (rows + 1e-7).log()).sum(-1)  # noqa: E731
    torch.testing.assert_close(seen.row_entropy(), entropy(whole))
    mean = (whole[:2] + whole[2:]) / 2
    torch.testing.assert_close(seen.row_entropy(halves=True), entropy(mean).repeat(2, 1))
    lack = (1 - seen.v.norm(dim=-1)).sum(1)
    torch.testing.assert_close(seen.value_lack(), lack)
    torch.testing.assert_close(seen.value_lack(halves=True), ((lack[:2] + lack[2:]) / 2).repeat(2, 1))


@pytest.mark.parametrize("tiny", [*THREE, "pixart", "mochi"])
def test_every_processor_is_seen_and_left_alone(tiny: str) -> None:
    pipe = TINY[tiny].build()
    module = describe(pipe.components["transformer"]).attentions()[0].module
    seen: list[Attended] = []
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with AttentionView(seen.append):
            inside = original(*args, **kwargs)
        outside = original(*args, **kwargs)
        pairs = zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (inside, outside)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        return outside

    vars(module)["forward"] = forward
    TINY[tiny].call(pipe, steps=2)
    assert seen and all(s.q.ndim == 4 and s.k.shape[2] == s.v.shape[2] for s in seen)


@dataclass(frozen=True)
class Halfway(CachingMethod):
    """Attention reused as in ToCa's schedule, MLPs run on all tokens or, with `rows`, on the first few."""

    interval: int = 2
    rows: int = 0

    name: ClassVar[str] = "halfway"
    arxiv: ClassVar[str] = "none"

    def recipe(self, anatomy: Any) -> Recipe:
        interval, rows = self.interval, self.rows

        class Some(Policy):
            def decide(self, view: View) -> Verdict:
                if plan_steps(view.position.steps, interval, SPREADS["even"])[view.position.step] == "full":
                    return Verdict(True, "due")
                if not rows:
                    return Verdict(False, "MLPs", computes=lambda site: "attention" not in site.role)
                pick = lambda site, shape: Fresh(torch.arange(rows).repeat(shape[0], 1))  # noqa: E731
                return Verdict(False, "rows", fresh=pick)

        sites = tuple(part.site for part in anatomy.apart)
        return Recipe(what="module", when=Some, keep="output", sites=sites)

    @classmethod
    def disabled(cls) -> Halfway:
        return cls(interval=1)


@pytest.mark.parametrize("tiny", ["dit", "flux", "sd3", "wan", "cogvideox", "hunyuan"])
def test_all_tokens_are_the_whole_module(tiny: str) -> None:
    """With a ratio of 1, ToCa is attention reused and MLPs run: nothing is lost in gathering and scattering."""
    outputs = []
    for config in (ToCa(interval=2, ratio=1.0, preset="even"), Halfway()):
        pipe = dita.accelerate_pipeline(TINY[tiny].build(), config)
        outputs.append(TINY[tiny].call(pipe, steps=6))
        assert {record.action for record in dita.report(pipe).last.records} == {"computed", "partial"}
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_what_mixes_tokens_never_runs_on_some() -> None:
    class Mixing(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.mix = nn.Conv1d(width, width, 3, padding=1)

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.mix(hidden_states.transpose(1, 2)).transpose(1, 2)

    pipe = TINY["dit"].build()
    blocks: Any = pipe.components["transformer"].transformer_blocks
    for block in blocks[:-1]:
        block.ff = Mixing(32)
    for config in (ToCa(interval=2, ratio=1.0, preset="even"), ClusCa.forced()):
        TINY["dit"].call(dita.accelerate_pipeline(pipe, config))
        assert "partial" in {record.action for record in dita.report(pipe).last.records}
    dita.accelerate_pipeline(pipe, Halfway(rows=2))
    with pytest.raises(DitaError, match=r"transformer_blocks\.0\.ff .* cannot run on some"):
        TINY["dit"].call(pipe)
    blocks[-1].ff = Mixing(32)
    for name in ("toca", "duca", "clusca"):
        with pytest.raises(DitaError, match=f"{name} found no MLP .* by itself"):
            dita.accelerate_pipeline(pipe, name)


def test_chunked_mlps_are_refused() -> None:
    for config in (ToCa.forced(), ClusCa.forced()):
        pipe = dita.accelerate_pipeline(TINY["dit"].build(), config)
        for block in pipe.components["transformer"].transformer_blocks:  # pyright: ignore
            block.set_chunk_feed_forward(8, dim=1)
        with pytest.raises(DitaError, match="several chunks"):
            TINY["dit"].call(pipe)


def test_attention_that_cannot_be_seen_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention backend of its own never calls torch's."""
    monkeypatch.setattr("dita.caching.tokenwise.TokenWise.attended", lambda *args: None)
    pipe = dita.accelerate_pipeline(TINY["dit"].build(), ToCa.forced())
    with pytest.raises(DitaError, match="choose torch's own attention backend"):
        TINY["dit"].call(pipe)


def test_unknown_places_of_text_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dita.discovery.BLOCKS", {})
    pipe = TINY["flux"].build()
    with pytest.raises(DitaError, match="whether text comes first or last"):
        dita.accelerate_pipeline(pipe, "toca")
    with pytest.raises(DitaError, match="no cross-attention inside the blocks of Flux"):
        dita.accelerate_pipeline(pipe, "toca", score="cross")


def policy_of(tiny: str, **changes: Any) -> TokenWise:
    layout = layout_of(describe(TINY[tiny].build().components["transformer"]), "toca", changes.pop("score", "auto"))
    return TokenWise(TokenSettings(3, 0.25, "auto", 0.25, SPREADS["even"]), layout)


def view(step: int, latents: torch.Tensor, grid: tuple[int, ...] = ()) -> View:
    return View(Position(step, 20, 0, "all", step, 20, step), latents=latents, grid=grid)


@pytest.mark.parametrize("tiny", ["flux", "cogvideox", "sd3", "hunyuan"])
def test_text_and_image_get_their_own_columns(tiny: str) -> None:
    """Flux and CogVideoX put text first, SD3 and HunyuanVideo last, whatever order their blocks return."""
    policy = policy_of(tiny)
    policy._scores[0] = torch.arange(22.0)[None]
    site = next(s for s in policy.layout.sites if s.block == 0 and s.role == "mlp" and not s.text)
    image = policy._scores_of(site, 16, 16)
    first = tiny in ("flux", "cogvideox")
    assert image is not None and image[0, 0] == (6 if first else 0)
    texts = [s for s in policy.layout.sites if s.block == 0 and s.text]
    assert len(texts) == (tiny != "cogvideox"), "CogVideoX's MLP reads both"
    for other in texts:
        found = policy._scores_of(other, 6, 16)
        assert found is not None and found[0, 0] == (0 if first else 16)
        assert policy._scores_of(other, 5, 16) is None


def test_the_halves_of_batched_guidance_share_tokens() -> None:
    """PixArt and others with cross-attention only, and only if the halves are those of one guidance."""
    policy = policy_of("pixart")
    site = policy.layout.scored[0]
    assert site.role == "cross-attention"
    seen = Attended(noise(4, 2, 9, 3), noise(4, 2, 5, 3, seed=1), noise(4, 2, 5, 3, seed=2))
    latents = noise(2, 4, 3, 3)
    for both, same in ((torch.cat([latents, latents]), True), (torch.cat([latents, latents + 1]), False)):
        now = view(2, both)
        policy.attended(site, seen, now)
        policy.attended(site, seen, now)  # an image prompt, attended to besides
        policy.computed(now)
        scores = policy._scores[0]
        assert scores.shape == (4, 9) and torch.equal(scores[:2], scores[2:]) is same


def test_the_bonus_reaches_image_tokens_only() -> None:
    policy = policy_of("cogvideox")
    site = next(s for s in policy.layout.sites if s.role == "mlp")
    scores = torch.ones(1, 14)
    raised = policy._with_bonus(scores, site, (2, 2, 2)) > 1
    assert raised.nonzero()[:, 1].tolist() == [6, 10], "one of each frame's cell, behind six text tokens"
    assert torch.equal(policy._with_bonus(scores, site, ()), scores)


@pytest.mark.parametrize("config", [ToCa.forced(), DuCa.forced(), ClusCa(interval=2, warmup=1, clusters=4, share=0.3)])
def test_an_image_does_not_depend_on_its_batch_mates(config: CachingMethod) -> None:
    outputs = []
    before = torch.get_rng_state()
    for rows in ({"batch": 2}, {"batch": 1, "first": 1}):
        pipe = dita.accelerate_pipeline(TINY["dit"].build(), config)
        outputs.append(TINY["dit"].call(pipe, **rows)[-1])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), before), "the global random state is left alone"


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_ladder_is_taylors_sum(order: int) -> None:
    ladder, raw = LadderForecast(order).make_history(Storage()), History(order + 1)
    for step in (2, 5, 9, 14):
        for history in (ladder, raw):
            history.push(step, (noise(2, 3, seed=step), None))
    assert isinstance(ladder, Ladder) and len(ladder.steps) == order + 1
    found = ladder.combine(LadderForecast(order).weights(17, ladder.steps))[0]
    expected = raw.combine(Forecast(order).weights(17, raw.steps))[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("place", "precision"), [("device", ""), ("host", ""), ("device", "bf16")])
def test_fresh_rows_are_kept(place: str, precision: str) -> None:
    history = History(1, storage=Storage(place, precision))
    history.push(0, (torch.zeros(1, 3, 2),))
    history.refresh(Fresh(torch.tensor([[2]])), (torch.ones(1, 1, 2),))
    history.refresh(Fresh(torch.tensor([[0]])), (torch.ones(1, 1, 2),))
    newest = history.newest[0]
    assert newest is not None and newest.dtype == torch.float32 and newest[0, :, 0].tolist() == [1, 0, 1]
    labels = torch.tensor([[0, 0, 1]])
    history.refresh(Fresh(torch.tensor([[0, 2]]), labels, 0.5), (torch.tensor([[[4.0] * 2, [1.0] * 2]]),))
    newest = history.newest[0]
    assert newest is not None and newest[0, :, 0].tolist() == [4, 2, 1]


def test_low_precision_and_the_host_serve_fresh_rows() -> None:
    outputs = []
    choices: tuple[dict[str, Any], ...] = ({}, {"keep_on": "host"}, {"keep_as": "bf16"})
    for options in choices:
        pipe = dita.accelerate_pipeline(TINY["dit"].build(), "clusca", interval=3, clusters=4, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error", DitaWarning)
            outputs.append(TINY["dit"].call(pipe))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert (outputs[0] - outputs[2]).abs().mean() < 0.05 * outputs[0].abs().mean()


@pytest.mark.parametrize("cls", [ToCa, DuCa, ClusCa])
def test_settings_out_of_range(cls: Any) -> None:
    wrong: dict[str, Any] = {"interval": 0}
    wrong |= {"clusters": 0, "share": 1.5, "order": 9, "seed": -1} if cls is ClusCa else {}
    wrong |= {} if cls is ClusCa else {"ratio": 1.5, "score": "loud", "preset": "sdxl", "staleness": math.nan}
    for name, value in wrong.items():
        with pytest.raises(DitaError, match=name):
            cls(**{name: value})
