"""Bytes held: a formula per method, counted by hand, foretold and measured; and what a memory budget makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import CACHING, THREE, assert_same_snapshot, configured, plain, snapshot
from pipelines import TINY

import dita
from dita.anatomy import Anatomy, describe
from dita.caching import ABCache, CGTaylor, DBCache, TaylorSeer
from dita.caching.budget import Seen, expected_bytes
from dita.caching.engine import CacheHandler
from dita.errors import DitaError
from dita.seams import Site

FLOAT = 4
SETTINGS = [{"keep_as": "bf16"}, {"granularity": "last-block"}, {"granularity": "model", "keep_as": "bf16"}]
FEW = [
    TaylorSeer(interval=3, warmup=1, order=2),
    DBCache.forced().replace(order=2),
    CGTaylor.forced(),
    ABCache(interval=2, warmup=3, points=3),
]


@dataclass(frozen=True)
class Numbers:
    """Numbers in the tensors of one branch of a tiny pipeline: B samples, N image and T text tokens of width C."""

    branches: int
    batch: int
    tokens: int
    text_tokens: int
    latents: tuple[int, ...]
    output: tuple[int, ...]
    attentions: int
    modules: int
    blocks: int
    width: int = 32

    @property
    def image(self) -> int:
        return self.batch * self.tokens * self.width

    @property
    def text(self) -> int:
        return self.batch * self.text_tokens * self.width

    @property
    def out(self) -> int:
        return torch.Size(self.output).numel()

    @property
    def into(self) -> int:
        return torch.Size(self.latents).numel()

    def of(self, site: Site, anatomy: Anatomy) -> Seen:
        """What passes through a site, by hand."""
        image, text = (self.batch, self.tokens, self.width), (self.batch, self.text_tokens, self.width)
        both = (self.batch, self.tokens + self.text_tokens, self.width)
        if site.kind == "model":
            return _seen(site, [self.latents], [self.output])
        if site.kind == "entry":
            return _seen(site, [], [image])
        streams = [image, text] if self.text_tokens else [image]
        if site.kind == "span":
            return _seen(site, streams, streams)
        if site.role == "linear":
            layer: Any = next(part.module for part in anatomy.linears if part.site == site)
            on_text = "add_" in site.name or "ff_context" in site.name
            rows = both[:2] if site.name.startswith("single") else text[:2] if on_text else image[:2]
            if "attn2.to_k" in site.name or "attn2.to_v" in site.name:
                rows = (self.batch, 6)
            return _seen(site, [(*rows, layer.in_features)], [(*rows, layer.out_features)])
        if site.name.startswith("single"):
            return _seen(site, [], [both])
        if site.role == "attention":
            return _seen(site, [], streams)
        return _seen(site, [], [text if "context" in site.name else image])


def _seen(site: Site, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]]) -> Seen:
    make = [tuple(torch.empty(shape, device="meta") for shape in shapes) for shapes in (inputs, outputs)]
    return Seen(site, *make)


_FLUX_LINEARS = sum([
    3 * 2 * 4 * (16 + 6) * 32,  # double blocks, in and out: query, key, value and projection of image and text
    3 * 2 * (16 + 6) * (32 + 128),  # both layers of the MLP of image and text
    3 * 3 * 2 * 22 * 32,  # single blocks: query, key and value of both
    3 * 22 * ((32 + 128) + (160 + 32)),  # into the MLP, and the projection that joins it with attention
])  # fmt: skip
TINIES = {
    # Two guidance halves in one call; four blocks of attention and MLP.
    "dit": Numbers(1, 2, 16, 0, (2, 4, 8, 8), (2, 8, 8, 8), 4 * 1024, 8 * 1024, 4),
    # Three blocks of joint attention and two MLPs (22 tokens of image and text), three of one module on all tokens.
    "flux": Numbers(1, 1, 16, 6, (1, 16, 64), (1, 16, 64), 6 * 704, 3 * 2 * 704 + 3 * 704, 6),
    # Two calls a step; four blocks of self-attention, attention to the text, and MLP.
    "wan": Numbers(2, 1, 32, 0, (1, 4, 2, 8, 8), (1, 4, 2, 8, 8), 8 * 1024, 12 * 1024, 4),
}
LINEARS = {
    "dit": 4 * (4 * 2 * 1024 + 2 * 2 * 16 * (32 + 128)),
    "flux": _FLUX_LINEARS,
    "wan": 4 * (4 * 2 * 1024 + 2 * 2 * 1024 + 2 * 2 * 6 * 32 + 2 * 32 * (32 + 64)),
}

# What ToCa keeps of modules: in Flux's single blocks (three) attention, the way into the MLP and the projection apart.
APART = {"dit": 8 * 1024, "flux": 3 * 2 * 704 + 3 * 22 * (32 + 128 + 32), "wan": 12 * 1024}
# Scores of tokens: one per attention block, two per MLP.
SCORES = {"dit": 4 * 2 * 16 * 3, "flux": 6 * 22 + 3 * 2 * (16 + 6) + 3 * 2 * 22, "wan": 4 * 32 * 3}
# int64 labels of image and text; at most 16 centroids per sample and stream.
CLUSTERS = {
    "dit": 2 * (2 * 16 + 16 * 32),
    "flux": 2 * 16 + 16 * 32 + 2 * 6 + 6 * 32,
    "wan": 2 * 32 + 16 * 32,
}

# Settings whose run of 8 steps computes as many as there are anchors.
ENOUGH: dict[str, dict[str, Any]] = {"fitted": {"full": 5}, "dicache": {"retention": 0.5}, "speca": {"most": 2}}

# In the words of the papers' own accounts where they have one. At the end of the trunk the text is not kept, since the
# three models read only the image there.
FORMULAS: dict[str, tuple[str, Callable[[Numbers, Any, str], int]]] = {
    "taylorseer": ("(order + 1) tensors per module", lambda n, m, _: (m.order + 1) * n.modules),
    "hicache": ("(order + 1) per module, as TaylorSeer", lambda n, m, _: (m.order + 1) * n.modules),
    "speca": ("TaylorSeer's; the real last block is not kept", lambda n, m, _: (m.order + 1) * n.modules),
    "foca": ("4 per module: two newest, two newest computed", lambda n, m, _: 4 * n.modules),
    "hyca": ("3 per module", lambda n, m, _: 3 * n.modules),
    "cg-taylor": (
        "(probe order + 1) and (order + 1) hidden states",
        lambda n, m, _: (m.probe_order + 1 + m.order + 1) * n.image,
    ),
    "freqca": (
        "(order + 1) residuals whatever the depth; the authors keep as many per band",
        lambda n, m, _: (m.order + 1) * n.image,
    ),
    "fitted": ("the last `anchors` outputs", lambda n, m, _: m.anchors * n.out),
    "ab-cache": ("the last `points` outputs", lambda n, m, _: m.points * n.out),
    "teacache": ("one residual and one indicator", lambda n, m, _: 2 * n.image),
    "magcache": ("one residual", lambda n, m, _: n.image),
    "easycache": (
        "a few latents: what was added; latents of two steps; an output",
        lambda n, m, _: 2 * n.out + 2 * n.into,
    ),
    "dicache": (
        "two residuals; of the probe two residuals, and its last input and output",
        lambda n, m, _: 6 * n.image,
    ),
    "adacache": (
        "one residual, where the authors have two per block; one attention's output",
        lambda n, m, tiny: n.image + n.attentions // {"dit": 4, "flux": 6, "wan": 8}[tiny],
    ),
    "foresight": ("each block's output", lambda n, m, _: n.blocks * (n.image + n.text) - n.text),
    "bwcache": ("the trunk's output, and every block's for the indicator", lambda n, m, _: (1 + n.blocks) * n.image),
    "fbcache": ("probe and residual; the text's too where blocks follow", lambda n, m, _: 2 * n.image),
    "dbcache": ("probe and (order + 1) residuals", lambda n, m, _: (1 + m.order + 1) * n.image),
    "delta-dit": ("a residual of the front (with text) and of the rear", lambda n, m, _: 2 * n.image + n.text),
    "smoothcache": ("one tensor per module", lambda n, m, _: n.modules),
    "bac": ("one per module", lambda n, m, _: n.modules),
    "efficientvla": ("one per module", lambda n, m, _: n.modules),
    "pab": ("one per attention module", lambda n, m, _: n.attentions),
    "fastercache": (
        "two per self-attention",
        lambda n, m, tiny: 2 * (n.attentions // 2 if tiny == "wan" else n.attentions),
    ),
    "cachequant": ("one residual", lambda n, m, _: n.image),
    "icc": ("input and output of every linear layer", lambda n, m, tiny: LINEARS[tiny]),
    "lightcache": ("one trunk output", lambda n, m, _: n.image),
    "harmonica": ("one per module", lambda n, m, _: n.modules),
    "profilingdit": ("one residual per run of blocks; all blocks are one", lambda n, m, _: n.image),
    "qandc": ("one per module; mu and K belong to the table", lambda n, m, _: n.modules),
    "toca": (
        "every module and a score per token and attention; per MLP the score again, and with its age",
        lambda n, m, tiny: APART[tiny] + SCORES[tiny],
    ),
    "duca": ("ToCa's, and the last block's output", lambda n, m, tiny: APART[tiny] + SCORES[tiny] + n.image),
    "clusca": (
        "TaylorSeer's; per token the cluster (8 bytes), and the centroids, of the last block that has MLPs apart",
        lambda n, m, tiny: (m.order + 1) * n.modules + CLUSTERS[tiny],
    ),
}


def run(tiny: str, method: Any, **call: Any) -> tuple[torch.Tensor, Any]:
    pipe = dita.accelerate_pipeline(TINY[tiny].build(), method)
    output = TINY[tiny].call(pipe, **call)
    return output, dita.report(pipe).last


@pytest.mark.parametrize(("name", "tiny"), [(m, THREE[(i + k) % 3]) for i, m in enumerate(CACHING) for k in range(2)])
def test_bytes_held_are_the_formulas(name: str, tiny: str) -> None:
    pipe = TINY[tiny].build()
    method: Any = configured(name, "forced", tiny).replace(**ENOUGH.get(name, {}))
    numbers, anatomy = TINIES[tiny], describe(pipe.transformer)
    words, formula = FORMULAS[name]
    by_hand = FLOAT * numbers.branches * formula(numbers, method, tiny)
    handler = method.handler(anatomy)
    seen = numbers.branches * [numbers.of(site, anatomy) for site in handler.sites]
    assert expected_bytes(handler, seen).total == by_hand, words
    assert run(tiny, method)[1].peak_cache_bytes == by_hand, words


@pytest.mark.parametrize("tiny", THREE)
@pytest.mark.parametrize("granularity", ["last-block", "model"])
def test_taylorseers_other_granularities(tiny: str, granularity: str) -> None:
    numbers = TINIES[tiny]
    _, last = run(tiny, TaylorSeer(interval=2, warmup=1, order=2, granularity=granularity))
    kept = numbers.image if granularity == "last-block" else numbers.out
    assert last.peak_cache_bytes == FLOAT * numbers.branches * 3 * kept
    assert 0 < last.reused < len(last.records)


def test_half_precision_halves_anchors_and_not_indicators() -> None:
    method = CGTaylor.forced().replace(keep_as="bf16")
    assert run("dit", method)[1].peak_cache_bytes == 2 * 1024 * FLOAT + 2 * 1024 * FLOAT // 2


@pytest.mark.parametrize(
    ("method", "tiny"), list(zip(FEW, ("wan", "dit", "flux", "dit"), strict=True)), ids=lambda p: getattr(p, "name", p)
)
def test_no_budget_is_passed(method: Any, tiny: str) -> None:
    free, unlimited = run(tiny, method)
    needed, fitted = unlimited.peak_cache_bytes, []
    for limit in (10**9, needed, needed - 1, needed // 3, needed // 10, 40):
        try:
            output, last = run(tiny, method.replace(max_cache_bytes=limit))
        except DitaError as error:
            assert "as set needs" in str(error)
            fitted.append(False)
            continue
        fitted.append(True)
        (note,) = last.memory.values()
        assert note.endswith("was taken") and ": as set needs" in note and note in str(last)
        assert 0 < last.peak_cache_bytes <= limit and last.reused > 0
        assert torch.equal(output, free) == (limit >= needed), "what fits is left alone, and nothing else"
    assert fitted == sorted(fitted, reverse=True) and fitted[2] and not fitted[-1]


def test_the_first_form_that_fits_is_taken() -> None:
    """DiT: a module's tensors are 4 KiB, of which order 1 keeps 16, the last block 2, the output (1 KiB x 4) 2."""
    taken = {}
    for limit in (65536, 65535, 32768, 32767, 8192, 8191, 4096, 4095, 2048):
        _, last = run("dit", TaylorSeer(interval=3, max_cache_bytes=limit))
        taken[limit] = last.memory["transformer"].split(", ")[-1].removeprefix("over 1 branch: ")
    assert taken[65536] == "as set needs 64.00 KiB and was taken"
    assert taken[65535] == taken[32768] == "keep_as=bf16 needs 32.00 KiB and was taken"
    assert taken[32767] == taken[8192] == "granularity=last-block needs 8.00 KiB and was taken"
    assert taken[8191] == taken[4096] == "keep_as=bf16 granularity=last-block needs 4.00 KiB and was taken"
    assert taken[4095] == taken[2048] == "keep_as=bf16 order=0 granularity=model needs 2.00 KiB and was taken"


@pytest.mark.parametrize("tiny", THREE)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_budget_gives_what_the_setting_itself_gives(tiny: str, setting: dict[str, str]) -> None:
    """At a warm-up of 3, since the first step is then an anchor of none."""
    method = TaylorSeer(interval=3)
    wanted, direct = run(tiny, method.replace(**setting))
    output, last = run(tiny, method.replace(max_cache_bytes=direct.peak_cache_bytes))
    label = " ".join(f"{name}={value}" for name, value in sorted(setting.items(), reverse=True))
    if label in last.memory["transformer"]:  # on DiT and Flux an output is as large as a block's: not a form of its own
        assert torch.equal(output, wanted) and last.peak_cache_bytes == direct.peak_cache_bytes
    else:
        assert setting.get("granularity") == "model" and tiny != "wan"
    assert [r.action for r in last.records] == [r.action for r in direct.records]


@pytest.mark.parametrize("tiny", ["flux", "wan"])
def test_a_budget_keeps_the_invariants(tiny: str) -> None:
    pipe = TINY[tiny].build()
    TINY[tiny].call(pipe)
    before = snapshot(pipe)
    limit = run(tiny, TaylorSeer(interval=3))[1].peak_cache_bytes // 2
    dita.accelerate_pipeline(pipe, TaylorSeer(interval=3, max_cache_bytes=limit))
    first = TINY[tiny].call(pipe)
    TINY[tiny].call(pipe, batch=2)
    larger = dita.report(pipe).last
    assert "last-block" in larger.memory["transformer"] and larger.peak_cache_bytes <= limit
    assert (
        torch.equal(TINY[tiny].call(pipe), first) and "last-block" not in dita.report(pipe).last.memory["transformer"]
    )
    dita.restore_pipeline(pipe)
    assert_same_snapshot(before, snapshot(pipe))
    assert torch.equal(TINY[tiny].call(pipe), plain(tiny))


def test_what_does_not_fit_is_refused_with_every_need_and_leaves_nothing() -> None:
    pipe = TINY["wan"].build()
    dita.accelerate_pipeline(pipe, TaylorSeer(interval=3, max_cache_bytes=2047))
    with pytest.raises(DitaError) as caught:
        TINY["wan"].call(pipe)
    message = str(caught.value)
    for part in ("2.00 KiB", "over 2 branches", "as set needs 192.00 KiB", "keep_as=bf16 needs 96.00 KiB", "order=0"):
        assert part in message, part
    assert dita.report(pipe).last.peak_cache_bytes == 0
    dita.restore_pipeline(pipe)
    assert torch.equal(TINY["wan"].call(pipe), plain("wan"))


def test_branches_that_give_way_together_skip_together() -> None:
    """The second branch breaks the budget; the first one's step is then lost too, and both begin at the next."""
    method = TaylorSeer(interval=3, warmup=1, max_cache_bytes=32 * 1024 + 8)
    _, last = run("wan", method)
    steps = [[r.step for r in records if r.action == "computed"] for records in last.streams().values()]
    assert steps == [[0, 1, 3, 6]] * 2 and "over 2 branches" in last.memory["transformer"]
    reasons = {r.reason for r in last.records if r.step == 0}
    assert reasons == {"first step", "a coarser form begins at the next step"} or reasons == {"first step"}


def test_two_experts_share_a_budget() -> None:
    _, free = run("wan-2", TaylorSeer(interval=3, warmup=1))
    limit = free.peak_cache_bytes - 1
    _, last = run("wan-2", TaylorSeer(interval=3, warmup=1, max_cache_bytes=limit))
    assert set(last.memory) == {"transformer", "transformer_2"} and 0 < last.peak_cache_bytes <= limit
    assert "transformer_2: memory budget" in str(last) and "transformer_2: memory budget" in last._repr_html_()


def test_the_host_is_a_form_where_the_model_is_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dita.caching.budget._on_gpu", lambda features: True)
    base, _ = run("dit", CGTaylor.forced().replace(keep_as="bf16"))
    output, last = run("dit", CGTaylor.forced().replace(max_cache_bytes=2 * 1024 * FLOAT))
    assert torch.equal(output, base)
    note = last.memory["transformer"]
    assert "keep_as=bf16 needs 12.00 KiB, keep_on=host keep_as=bf16 needs 8.00 KiB and was taken" in note
    assert note.endswith("(4.00 KiB wait in host memory)")


def test_settings_are_checked_and_plain_handlers_stay_plain() -> None:
    anatomy = describe(TINY["dit"].build().transformer)
    assert isinstance(TaylorSeer().handler(anatomy), CacheHandler)
    config = TaylorSeer(max_cache_bytes=10)
    assert TaylorSeer.from_json(config.to_json()) == config and config.label() == "max_cache_bytes=10"
    assert len(config.sites(anatomy)) == 8 + 1 + 1
    wrong: Any
    for wrong in (-1, 2.5, True, "1 GiB"):
        with pytest.raises(DitaError, match="max_cache_bytes is .*whole number from 0"):
            TaylorSeer(max_cache_bytes=wrong)
