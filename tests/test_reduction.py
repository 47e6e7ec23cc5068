"""Token reduction: positions that travel, every method on tiny pipelines, settings and refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from helpers import plain
from pipelines import TINY
from torch.nn import functional

import dita
from dita import registry
from dita.anatomy import Anatomy, describe
from dita.attention_view import AttentionView
from dita.caching import TaylorSeer
from dita.config import Method
from dita.errors import DitaError
from dita.kernels.reduction import AsymRnR, SADAToken, TokenTransforming, ToMA, ToMe
from dita.kernels.reduction.matching import draw_destinations
from dita.kernels.reduction.operators import Merged, Pruned
from dita.kernels.reduction.sada_token import momentum, on_tokens
from dita.seams import Call, Handler, Reducer, Site
from dita.token_input import TokenInput

FAMILIES = ("dit", "pixart", "sd3", "flux", "qwen", "wan", "cogvideox", "hunyuan", "ltx", "mochi")
TURNED = ("flux", "qwen", "wan", "ltx", "mochi")  # one for every form that tables of positions take


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- positions


class Shuffle(Handler):
    """Reduces nothing, but hands the tokens on in another order, each sample's its own."""

    def __init__(self, sites: tuple[Site, ...], honest: bool) -> None:
        self.sites, self.honest = sites, honest

    def reducer(self, site: Site, occurrence: int, call: Call, tokens: torch.Tensor, text: int) -> Reducer:
        batch, count = tokens.shape[:2]
        order = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(b)) for b in range(batch)])
        pair = Pruned(order, order.argsort(1))
        return pair if self.honest else Lying(pair)


class Lying:
    sizes = None

    def __init__(self, pair: Pruned) -> None:
        self.reduce, self.restore = pair.reduce, pair.restore
        self.positions = pair.positions.sort(1).values


@dataclass(frozen=True)
class Shuffled(Method):
    blocks: bool = False
    honest: bool = True
    name: ClassVar[str] = "shuffled"

    def handler(self, anatomy: Anatomy) -> Handler:
        return Shuffle(anatomy.block_inputs if self.blocks else anatomy.input_sites, self.honest)

    @classmethod
    def disabled(cls) -> Shuffled:
        return cls()


@pytest.mark.filterwarnings("ignore:0 of:dita.DitaWarning")
@pytest.mark.parametrize("blocks", [False, True], ids=["attention", "blocks"])
@pytest.mark.parametrize("tiny", FAMILIES)
def test_positions_travel_with_their_tokens(tiny: str, blocks: bool) -> None:
    """In another order the same comes out; with the positions of other tokens it does not."""
    call, wanted = TINY[tiny].call, plain(tiny, steps=2, batch=2)
    scale = wanted.abs().max()

    def error(honest: bool) -> float:
        with dita.accelerated(TINY[tiny].build(), Shuffled(blocks, honest)) as pipe:
            return float((call(pipe, steps=2, batch=2) - wanted).abs().max() / scale)

    assert error(True) < 2e-5
    if tiny in TURNED and not blocks:
        assert error(False) > 1e-3


def test_masks_are_cropped_like_the_keys() -> None:
    """[B, 1, 1, V + T]: each sample its own, in one call or, with positions for all, one by one."""
    batch, image, text = 2, 6, 3
    x, mask = (
        draw(batch, image, 4),
        draw(batch, 1, 1, image + text) < 0.3,
    )
    table = (draw(image, 4), draw(image, 4, seed=1))
    pair = Pruned(torch.tensor([[4, 1], [0, 3]]), torch.zeros(2, image, dtype=torch.int64))
    seen: list[Any] = []

    def module(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs)
        return args[0]

    names = ("hidden_states", "encoder_hidden_states", "attention_mask", "image_rotary_emb")
    given = {"encoder_hidden_states": draw(batch, text, 4), "attention_mask": mask, "temb": draw(batch, image, 5)}
    for more in ({}, {"image_rotary_emb": table}):
        seen.clear()
        found = TokenInput.read("attn", names, (x,), given | more, (1, 2, 3), "last")
        assert isinstance(found, TokenInput)
        found.run(module, pair)
        assert len(seen) == (2 if more else 1)
        cropped, temb = (torch.cat([kwargs[name] for kwargs in seen]) for name in ("attention_mask", "temb"))
        for b in range(batch):
            rows = pair.positions[b].tolist()
            assert cropped[b, 0, 0].tolist() == mask[b, 0, 0, [*rows, 6, 7, 8]].tolist()
            assert torch.equal(temb[b], given["temb"][b, rows])
            assert not more or torch.equal(seen[b]["image_rotary_emb"][1], table[1][rows])


@pytest.mark.parametrize(
    "odd",
    [
        {"image_rotary_emb": (torch.zeros(5, 4),) * 2}, {"attention_mask": torch.zeros(1, 6, 6)},
        {"modulate_index": [0, 1]}, {"token_ids": torch.zeros(1, 6, dtype=torch.int64)},
        {"image_rotary_emb": torch.zeros(1, 2, 6, 4)}, {"more": {"attention_mask": torch.zeros(1, 4)}},
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(odd: dict[str, Any]) -> None:
    found = TokenInput.read("blocks.0.attn", ("hidden_states",), (draw(1, 6, 4),), odd, (1, 2, 3), "")
    assert isinstance(found, TokenInput)
    with pytest.raises(DitaError, match="does not know how it belongs to the 6 image and 0 text tokens"):
        found.run(lambda *args, **kwargs: args[0], Pruned(torch.tensor([[1, 2]]), torch.zeros(1, 6, dtype=torch.int64)))


def test_a_token_counts_for_as_many_as_it_stands_for() -> None:
    """Merging equal tokens with log(size) on their logits changes nothing; without it the attention shifts."""
    text, image = draw(2, 3, 8), draw(2, 2, 8, seed=1).repeat_interleave(torch.tensor([4, 2]), 1)
    stand_in = torch.tensor([[0, 0, 0, 0, 1, 1]])

    def attention(hidden_states: torch.Tensor) -> torch.Tensor:
        heads = hidden_states[:, None]
        # One sample at a time, as Mochi attends.
        return torch.cat([functional.scaled_dot_product_attention(h, h, h) for h in heads.split(1)])[:, 0]

    for text_at, x in (("first", torch.cat([text, image], 1)), ("last", torch.cat([image, text], 1))):
        found = TokenInput.read("attn", ("hidden_states",), (x,), {}, (1, 2, 3), text_at)
        assert isinstance(found, TokenInput)
        positions = torch.tensor([[0, 4]]).expand(2, -1)
        weighed = Merged(positions, stand_in, torch.tensor([[4.0, 2.0]]).expand(2, -1))
        torch.testing.assert_close(found.run(attention, weighed), attention(x))
        assert not torch.allclose(found.run(attention, Merged(positions, stand_in)), attention(x), atol=1e-3)


# --- the methods


@pytest.mark.parametrize(
    ("method", "tiny"),
    [("tome", t) for t in ("flux", "mochi")]
    + [("toma", t) for t in ("hunyuan", "sd3")]
    + [("token-transforming", t) for t in ("ltx", "dit")]
    + [("asymrnr", t) for t in ("flux", "mochi", "cogvideox")]
    + [("sada-token", t) for t in ("qwen", "wan", "mochi")],
)
def test_every_method_on_pipelines(method: str, tiny: str) -> None:
    """Something is left out, the report says how much, and an image does not depend on its batch mates."""
    call, pipe = TINY[tiny].call, TINY[tiny].build()
    config = registry.get(method).forced()
    if method == "sada-token":
        config = config.replace(interval=4)
    with dita.accelerated(pipe, config):
        two = call(pipe, steps=5, batch=2, first=3)
        one = call(pipe, steps=5, batch=1, first=4)
        run = dita.report(pipe).last
    assert 0 < run.density < 1 and 0 < run.reused < len(run.records) and all(r.reason for r in run.records)
    if method == "tome":
        share = {"flux": 14 / 22, "mochi": 22 / 38}[tiny]
        assert run.records[-1].density == pytest.approx(share**2)
    assert one.isfinite().all() and not torch.equal(one, plain(tiny, steps=5, first=4))
    torch.testing.assert_close(two[1:], one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def seen_by_attention(tiny: str, config: Method | None) -> list[Any]:
    pipe, seen = TINY[tiny].build(), []
    if config is not None:
        dita.accelerate_pipeline(pipe, config)
    with AttentionView(lambda given: seen.append((given.q.clone(), given.k.clone()))):
        TINY[tiny].call(pipe, steps=1)
    return seen


@pytest.mark.parametrize("method", [ToMe(), ToMA(window=4), TokenTransforming(rank="contrast")], ids=lambda m: m.name)
def test_text_is_left_alone(method: Method) -> None:
    """The first attention of FLUX: the text's queries and keys, which come first, are bit for bit the model's."""
    (queries, keys), (whole, _) = seen_by_attention("flux", method)[0], seen_by_attention("flux", None)[0]
    assert whole.shape[2] == 22 and queries.shape[2] == keys.shape[2] == 14
    assert torch.equal(queries[:, :, :6], whole[:, :, :6])


def test_merging_equals_the_paper_by_hand_in_the_first_attention_of_dit() -> None:
    """What the first attention reads is what ToMe makes of what it would read: cells, cosine, r, mean."""
    pipe = TINY["dit"].build()
    attention, read = pipe.transformer.transformer_blocks[0].attn1, []
    handle = attention.register_forward_pre_hook(lambda module, args, kwargs: read.append(args[0]), with_kwargs=True)
    TINY["dit"].call(pipe, steps=1)
    handle.remove()
    x = read[0]
    reads = attention.to_q.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    dita.accelerate_pipeline(pipe, ToMe(ratio=0.5))
    TINY["dit"].call(pipe, steps=1)
    reads.remove()
    merged = read[1]
    from dita.kernels.reduction.matching import seed_of

    drawn = draw_destinations((1, 4, 4), (1, 2, 2), seed_of(0, 0, 0)).tolist()
    for b in range(len(x)):
        score = {
            j: max((float(functional.cosine_similarity(x[b, i], x[b, j], dim=0)), -i) for i in drawn)
            for j in range(16) if j not in drawn
        }  # fmt: skip
        gone = sorted(score, key=lambda j: -score[j][0])[:8]
        means = [torch.stack([x[b, i], *(x[b, j] for j in gone if -score[j][1] == i)]).mean(0) for i in drawn]
        wanted = {tuple(t.tolist()) for t in (*means, *(x[b, j] for j in score if j not in gone))}
        distance = torch.cdist(torch.tensor(sorted(wanted)), merged[b]).min(1).values
        assert merged.shape[1] == len(wanted) == 8 and distance.max() < 1e-4


def test_destinations_by_representation_shift() -> None:
    """The first attention has no shift yet; later ones merge into what the MLP changed most."""
    pipe = TINY["sd3"].build()
    outputs = []
    for choice in ("random", "shift"):
        with dita.accelerated(pipe, ToMe(destinations=choice)):
            outputs.append(TINY["sd3"].call(pipe, steps=3))
    assert not torch.equal(*outputs)
    with dita.accelerated(pipe, TokenTransforming(ratio=0.25)):
        TINY["sd3"].call(pipe, steps=3)
        first, second, _ = dita.report(pipe).last.records
    assert "2 x nothing to reduce" in first.reason  # attn and attn2 of the first block
    assert "nothing" not in second.reason
    assert first.density > second.density
    with pytest.raises(DitaError, match="ranks tokens by how MLPs change them"):
        only_parallel = TINY["flux"].build()
        only_parallel.transformer.transformer_blocks = torch.nn.ModuleList()
        dita.accelerate_pipeline(only_parallel, ToMe(destinations="shift"))


def test_destinations_and_weights_of_toma_are_renewed_in_time() -> None:
    """One set for all layers; chosen every 4 steps, weighed every 2."""
    tiny, made = TINY["dit"], []
    pipe = dita.accelerate_pipeline(tiny.build(), ToMA(window=2, reuse=4, refresh=2))
    handler = dita.session.session_of(pipe).runtimes[0].handlers[0]
    ask = handler.reducer

    def noted(*args: Any) -> Any:
        found = ask(*args)
        made.append(found)
        return found

    handler.reducer = noted  # type: ignore
    tiny.call(pipe, steps=8)
    weights = [id(pair.down) for pair in made]
    assert [len(set(weights[4 * n : 4 * n + 4])) for n in range(8)] == [1] * 8
    steps = made[::4]
    changes = [not torch.equal(a.down, b.down) for a, b in zip(steps, steps[1:], strict=False)]
    assert changes == [False, True, False, True, False, True, False]
    moved = [not torch.equal(a.positions, b.positions) for a, b in zip(steps, steps[1:], strict=False)]
    assert moved[:3] == [False] * 3 and moved[4:] == [False] * 3


# --- SADA


@pytest.mark.filterwarnings("ignore:0 of:dita.DitaWarning")
@pytest.mark.parametrize("tiny", ["sd3", "flux", "wan", "cogvideox"])
def test_all_tokens_unstable_is_the_whole_model(tiny: str) -> None:
    """Blocks then run on all tokens in another order, with their positions, and nothing is reused."""
    with dita.accelerated(TINY[tiny].build(), SADAToken(interval=8, unstable=1.0, start=0.5, stop=1.0)) as pipe:
        out = TINY[tiny].call(pipe, steps=6)
        reasons = [record.reason for record in dita.report(pipe).last.records]
    count = 16 if tiny in ("sd3", "flux") else 32
    assert reasons[-1] == f"{count} of {count} tokens computed" and reasons[0] == "all tokens computed"
    torch.testing.assert_close(out, plain(tiny, steps=6), rtol=1e-4, atol=1e-4)


def test_momentum_by_hand_and_on_tokens() -> None:
    times, generator = [1000.0, 800.0, 500.0, 400.0], torch.Generator().manual_seed(0)
    x = [torch.randn(1, 2, 2, 4, 4, generator=generator) for _ in times]  # CogVideoX: frames before channels
    found = momentum(list(zip(times, x, strict=True)))
    assert found is not None and momentum(list(zip(times, x, strict=True))[:3]) is None
    f = [(x[n + 1] - x[n]) / (times[n + 1] - times[n]) for n in range(3)]
    torch.testing.assert_close(found, -((f[2] - f[1]) - (f[1] - f[0])))
    model = TINY["cogvideox"].build().transformer
    films = torch.randn(1, 3, 4, 4, 6, generator=generator)
    scores = on_tokens(model, films, (3, 2, 3))
    assert scores is not None and scores.shape == (1, 18)
    token = films[0, 1, :, 2:4, 4:6].mean()  # frame 1, row 1, column 2
    torch.testing.assert_close(scores[0, 6 + 3 + 2], token)
    assert on_tokens(model, films, (3, 3, 3)) is None and on_tokens(model, torch.zeros(1, 5, 2), (1, 2, 2)) is None


def test_tokens_left_out_keep_the_outputs_of_the_last_full_step() -> None:
    """The last block of a DiT: rows computed change, the others stay as they were."""
    pipe, outputs = TINY["dit"].build(), []
    dita.accelerate_pipeline(pipe, SADAToken(interval=3, unstable=0.0, cell=2, start=0.0, stop=1.0))
    last = pipe.transformer.norm_out.register_forward_pre_hook(lambda module, args: outputs.append(args[0].clone()))
    TINY["dit"].call(pipe, steps=7)
    last.remove()
    changed = [int((a != b).any(-1).sum(1).max()) for a, b in zip(outputs, outputs[1:], strict=False)]
    assert changed == [4, 4, 16, 4, 4, 16]
    reasons = [record.reason for record in dita.report(pipe).last.records]
    assert reasons == ["all tokens computed", *["4 of 16 tokens computed"] * 2] * 2 + ["all tokens computed"]


# --- settings, company, refusals


def test_tiers_are_measured_kept_and_read() -> None:
    tiny = TINY["wan"]
    method = dita.calibrate(tiny.build(), AsymRnR(chunk=(1, 2, 2)), tiny.call)
    assert isinstance(method, AsymRnR) and method.table is not None and method.table.steps == 8
    rows = [row for name in ("q", "kv") for row in method.table.values[name]]
    assert len(rows) == 8 and all(len(row) == 8 for row in rows)
    assert {min(t for row in rows[:4] for t in row), max(t for row in rows[:4] for t in row)} == {0, 9}
    assert Method.from_json(method.to_json()) == method
    pipe = dita.accelerate_pipeline(tiny.build(), method.replace(q_tiers=((9, 0.5),), kv_tiers=()))
    tiny.call(pipe)
    run = dita.report(pipe).last
    reduced = sum(tier == 9 for row in rows[:4] for tier in row)
    layers = sum(int(r.reason.split(", ")[1].split(" of ")[0]) for r in run.records)
    assert layers == 2 * reduced > 0, "cond and uncond"
    with pytest.raises(DitaError, match="measured on"):
        dita.accelerate_pipeline(TINY["dit"].build(), method)


def test_company() -> None:
    tiny = TINY["flux"]
    with pytest.raises(DitaError, match="exclude each other"):
        dita.accelerate_pipeline(tiny.build(), ToMe(), ToMA())
    with pytest.raises(DitaError, match="exclude each other"):
        dita.accelerate_pipeline(tiny.build(), "asymrnr", "adaspa")
    with pytest.raises(DitaError, match="exclude each other"):
        dita.accelerate_pipeline(tiny.build(), "sada-token", "taylorseer")
    pipe = dita.accelerate_pipeline(tiny.build(), ToMe(), TaylorSeer(interval=3, warmup=1))
    tiny.call(pipe, steps=4)
    assert [r.action == "sparse" for r in dita.report(pipe).last.records] == [True, False, False, True]
    with pytest.raises(DitaError, match="toca ranks .* of which tome reduces .*asymrnr goes with both"):
        dita.accelerate_pipeline(tiny.build(), ToMe(), registry.get("toca").forced())
    with pytest.raises(DitaError, match="changes from step to step which tokens transformer_blocks.0.attn reads"):
        dita.accelerate_pipeline(tiny.build(), ToMe(), registry.get("icc").disabled())
    with dita.accelerated(tiny.build(), "asymrnr", registry.get("toca").forced()) as both:
        tiny.call(both, steps=4)


def test_models_of_unknown_positions_are_refused() -> None:
    model = TINY["flux"].build().transformer
    anatomy = describe(model)
    stranger = Anatomy(model, "", anatomy.blocks, anatomy.segments, anatomy.modules, anatomy.inner)
    for name in ("tome", "toma", "token-transforming", "sada-token"):
        with pytest.raises(DitaError, match="how FluxTransformer2DModel passes these dita does not know"):
            registry.get(name)().handler(stranger)
    assert registry.get("asymrnr")().handler(stranger).sites


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tome", {"ratio": 1.5}), ("tome", {"destinations": "best"}), ("tome", {"cell": 0}),
        ("toma", {"ratio": 1.0}), ("toma", {"tau": 0.0}), ("toma", {"local": 1}), ("token-transforming", {"rank": "x"}),
        ("asymrnr", {"chunk": (2, 2)}), ("asymrnr", {"q_tiers": (7, 0.9)}), ("asymrnr", {"kv": -0.1}),
        ("sada-token", {"start": 0.9, "stop": 0.1}), ("sada-token", {"interval": 0}), ("tome", {"proportional": 1}),
    ],
)  # fmt: skip
def test_settings_out_of_range(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(DitaError, match="expected"):
        registry.get(name)(**settings)
