from __future__ import annotations

import functools
import json
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_snapshot, snapshot
from pipelines import TINY

import dita
from dita.errors import DitaError, DitaWarning
from dita.eval.peers import Counter, base, get_peer, peers, supports
from dita.eval.peers.cache_dit import DBCache
from dita.eval.peers.diffusers_attention import FasterCache, PyramidBroadcast, halves_exchanged
from dita.eval.peers.diffusers_hooks import FirstBlock, MagCache
from dita.eval.peers.diffusers_taylorseer import TaylorSeer, TaylorSeerLite, module_patterns
from dita.eval.peers.grid import grid
from dita.eval.settings import varying

STEPS = 12
NAMES = (
    "diffusers firstblock",
    "diffusers magcache",
    "diffusers taylorseer",
    "diffusers taylorseer lite",
    "diffusers pab",
    "diffusers fastercache",
    "cache-dit dbcache",
    "cache-dit dbcache+taylorseer",
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("dit", {}),
    "flux": ("flux", {}),
    "flux true CFG": ("flux", {"true_cfg_scale": 3.0}),
    "wan": ("wan", {}),
}
HOOKED = {"dit": (4, 4, 8, 5, 4, 5), "flux": (6, 6, 18, 7, 6, 7), "wan": (4, 4, 12, 5, 8, 5)}
MODELS = {"dit": "DiTTransformer2DModel", "flux": "FluxTransformer2DModel", "wan": "WanTransformer3DModel"}

# FasterCache makes coordinate grids in every call; torch warns of it once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(params=NAMES)
def peer(request) -> type[base.Peer]:
    """Each peer in turn, skipped where its package is missing."""
    return installed(request.param)


def installed(name: str) -> type[base.Peer]:
    found = get_peer(name)
    try:
        found.version()
    except DitaError as error:
        pytest.skip(str(error))
    return found


def draw(case: str, pipe: Any, steps: int = STEPS, **extra: Any) -> torch.Tensor:
    tiny, own = CASES[case]
    return TINY[tiny].call(pipe, steps=steps, **own, **extra)


@functools.cache
def plain(case: str) -> torch.Tensor:
    return draw(case, build(case))


def build(case: str) -> Any:
    return TINY[CASES[case][0]].build()


def strongest(peer: type[base.Peer], case: str, pipe: Any) -> base.Peer:
    return peer.ladder()[-1].calibrated(pipe, lambda p: draw(case, p))


def draw_with(config: base.Peer, case: str, pipe: Any, **extra: Any) -> tuple[torch.Tensor, Counter]:
    with config.attached(pipe) as counter:
        return draw(case, pipe, **extra), counter


def attach(config: base.Peer, pipe: Any) -> None:
    with config.attached(pipe):
        pass


class Picture:
    """Everything of a pipeline that a peer could leave its mark on."""

    def __init__(self, pipe: Any) -> None:
        modules = list(pipe.transformer.modules())
        self.attributes = snapshot(pipe)
        self.order = [name for name, _ in pipe.transformer.named_modules()], list(pipe.transformer.state_dict())
        self.classes = {cls: dict(vars(cls)) for cls in {type(pipe), *map(type, modules)}}
        self.hooks = [list(vars(m)["_diffusers_hook"].hooks) for m in modules if "_diffusers_hook" in vars(m)]

    def assert_same(self, pipe: Any) -> None:
        now = Picture(pipe)
        assert_same_snapshot(self.attributes, now.attributes)
        assert now.order == self.order
        assert now.hooks == self.hooks
        for cls, before in self.classes.items():
            assert now.classes[cls].keys() == before.keys(), cls
            assert all(now.classes[cls][name] is value for name, value in before.items()), cls


@every_case
def test_runs_skips_and_leaves_no_trace(peer, case):
    pipe = build(case)
    assert torch.equal(draw(case, pipe), plain(case))
    config = strongest(peer, case, pipe)
    before = Picture(pipe)
    with config.attached(pipe) as counter:
        first = draw(case, pipe)
        again = draw(case, pipe)
    before.assert_same(pipe)
    assert counter.runs == 2
    assert counter.calls == STEPS * (2 if case in ("flux true CFG", "wan") else 1)
    assert 0 < counter.computed_fraction < 0.8
    assert 0 < counter.full_calls_fraction < 0.8
    assert first.isfinite().all()
    assert not torch.equal(first, plain(case))
    assert torch.equal(first, again), "the second run started from the first one's state"
    assert torch.equal(draw(case, pipe), plain(case))
    assert torch.equal(draw(case, build(case)), plain(case)), "a fresh pipeline of the class"


@pytest.mark.parametrize("case", ["dit", "flux true CFG"])
def test_an_exception_in_the_middle_leaves_no_trace(peer, case):
    pipe = build(case)
    draw(case, pipe)
    config = strongest(peer, case, pipe)
    before = Picture(pipe)
    count = 0
    with pytest.raises(RuntimeError, match="lamp"), config.attached(pipe):
        first = draw(case, pipe)
        hooked = pipe.scheduler.step

        def broken(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count % STEPS == 7:
                raise RuntimeError("the lamp went out")
            return hooked(*args, **kwargs)

        vars(pipe.scheduler)["step"] = broken
        with pytest.raises(RuntimeError, match="lamp"):
            draw(case, pipe, seed=3)
        vars(pipe.scheduler)["step"] = hooked
        assert torch.equal(draw(case, pipe), first)
        vars(pipe.scheduler)["step"], count = broken, 0
        draw(case, pipe)
    del vars(pipe.scheduler)["step"]
    before.assert_same(pipe)
    assert torch.equal(draw(case, pipe), plain(case))


def test_an_error_inside_the_transformer_is_named_and_leaves_no_trace(peer):
    pipe = build("dit")
    config = strongest(peer, "dit", pipe)
    before = Picture(pipe)
    count = 0

    def fail(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise ValueError("a tensor went missing")

    handle = pipe.transformer.transformer_blocks[-1].ff.net[0].register_forward_pre_hook(fail)
    with pytest.raises(DitaError, match=f"{re.escape(peer.name)}.*failed on DiT.*ValueError: a tensor went missing"):
        draw_with(config, "dit", pipe)
    handle.remove()
    before.assert_same(pipe)
    assert torch.equal(draw("dit", pipe), plain("dit"))


@pytest.mark.parametrize("tiny", MODELS)
def test_support_table(tiny):
    pipe = TINY[tiny].build()
    before = Picture(pipe)
    expected = {
        name: (True, f"{count} hooks on {MODELS[tiny]}")
        for name, count in zip(NAMES, HOOKED[tiny], strict=False)  # cache-dit has no hooks
    }
    contexts = (True, f"1 cache contexts on {MODELS[tiny]}")
    expected |= {name: contexts for name in NAMES[6:] if get_peer(name) in peers()}
    assert {peer.name: supports(peer, pipe) for peer in peers()} == expected
    before.assert_same(pipe)
    assert [peer.name for peer in peers(pipe)] == list(expected)


def test_what_is_not_supported_says_why():
    pipe = TINY["sd3"].build()
    assert supports(FasterCache, pipe)[1] == (
        "diffusers fastercache must know how StableDiffusion3Pipeline arranges guidance; known are DiTPipeline, "
        "FluxPipeline, WanPipeline"
    )
    assert supports(FirstBlock, TINY["wan-2"].build())[1].startswith("WanPipeline has transformer, transformer_2;")
    del pipe.transformer.transformer_blocks[1:]
    ok, reason = supports(FirstBlock, pipe)
    assert not ok
    assert "does not attach to StableDiffusion3Pipeline: IndexError: pop from empty list" in reason
    assert supports(FirstBlock(), object())[1].startswith("expected a diffusers pipeline")


def test_lite_needs_a_last_projection():
    pipe = build("dit")
    pipe.transformer.forecast, pipe.transformer.proj_out_2 = pipe.transformer.proj_out_2, None
    del pipe.transformer.proj_out_2
    assert "has no proj_out" in supports(TaylorSeerLite, pipe)[1]


def test_cache_dit_refuses_more_blocks_than_there_are():
    installed("cache-dit dbcache")
    pipe = build("dit")
    with pytest.raises(DitaError, match="AssertionError: Fn_compute_blocks 8 must be less than"):
        draw_with(DBCache(fn=8), "dit", pipe)


def test_every_part_is_counted_once(peer):
    pipe = build("dit")
    config = strongest(peer, "dit", pipe)
    rows = 0

    def count(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    inside = [b for block in pipe.transformer.transformer_blocks for b in (block.attn1.to_q, block.ff.net[0].proj)]
    handles = [layer.register_forward_pre_hook(count) for layer in inside]
    counter = draw_with(config, "dit", pipe, batch=2)[1]
    for handle in handles:
        handle.remove()
    assert counter.parts == 8
    assert counter.expected == STEPS * 8 * 4
    assert counter.computed == rows


def test_parallel_parts_are_counted_apart():
    pipe = build("flux")
    counter = draw_with(FirstBlock(threshold=0.5), "flux", pipe)[1]
    assert counter.parts == 3 * 3 + 3 * 3, "attention and two feed-forwards; attention, its MLP, their projection"


def test_counter_without_a_run():
    with pytest.raises(DitaError, match="inside the with block"):
        _ = Counter(3).computed_fraction


def test_a_run_that_skips_nothing_warns_and_is_the_plain_one(peer):
    idle = {
        "diffusers firstblock": {"threshold": 0.0},
        "diffusers magcache": {"threshold": 0.0, "ratios": (1.5,) * STEPS},
        "diffusers pab": {"window": (0, 0)},
        "diffusers fastercache": {"attention_until": -1, "unconditional_until": -1},
        "cache-dit dbcache": {"threshold": 0.0},
        "cache-dit dbcache+taylorseer": {"threshold": 0.0},
    }
    config = peer(**idle.get(peer.name, {"warmup": STEPS}))
    pipe = build("flux")
    with pytest.warns(DitaWarning, match=f"{re.escape(peer.name)}.*skipped nothing in a run of {STEPS} calls"):
        output, counter = draw_with(config, "flux", pipe)
    assert counter.computed_fraction == counter.full_calls_fraction == 1
    assert torch.equal(output, plain("flux"))


@pytest.mark.parametrize(("interval", "computed"), [(5, {0, 1, 2, 4, 9}), (3, {0, 1, 2, 4, 7, 10})])
def test_taylorseer_keeps_the_schedule_of_diffusers(interval, computed):
    pipe = build("wan")
    counter = draw_with(TaylorSeerLite(interval), "wan", pipe)[1]
    assert counter.full_calls == 2 * len(computed)
    assert counter.computed_fraction == counter.full_calls_fraction


@pytest.mark.parametrize("name", ["FirstBlock", "TaylorSeer", "PyramidAttentionBroadcast", "Faster"])
def test_on_flux_it_is_what_diffusers_does_alone(name):
    from diffusers import hooks

    pipe = build("flux")
    now: dict[str, Any] = {"current_timestep_callback": lambda: pipe.current_timestep}
    configs: dict[str, tuple[base.Peer, dict[str, Any]]] = {
        "FirstBlock": (FirstBlock(0.5), {"threshold": 0.5}),
        "TaylorSeer": (TaylorSeerLite(4), {"cache_interval": 4, "use_lite_mode": True}),
        "PyramidAttentionBroadcast": (PyramidBroadcast(), {"spatial_attention_block_skip_range": 2, **now}),
        "Faster": (FasterCache(), {"is_guidance_distilled": True, **now}),
    }
    ours, arguments = configs[name]
    if name == "TaylorSeer":
        arguments["taylor_factors_dtype"] = torch.float32
    config = getattr(hooks, f"{name}{'' if name.startswith('Pyramid') else 'Cache'}Config")
    pipe.transformer.enable_cache(config(**arguments))
    alone = draw("flux", pipe)
    assert not torch.equal(alone, plain("flux"))
    assert torch.equal(draw_with(ours, "flux", build("flux"))[0], alone)


def test_taylorseer_patterns():
    wan, flux = (dita.anatomy.describe(build(case).transformer) for case in ("wan", "flux"))
    attention, skipped = module_patterns(wan, "attention")
    assert attention[:2] == [r"blocks\.0\.attn1", r"blocks\.0\.attn2"]
    assert not skipped
    cached, skipped = module_patterns(flux, "all")
    assert r"single_transformer_blocks\.2\.proj_out" in cached
    assert set(skipped[-2:]) == {rf"single_transformer_blocks\.2\.{name}" for name in ("attn", "proj_mlp")}
    assert r"single_transformer_blocks\.2\.attn" in module_patterns(flux, "attention")[0]
    with pytest.raises(DitaError, match="'norms'; expected 'attention' or 'all'"):
        module_patterns(flux, "norms")


@pytest.mark.parametrize("case", ["flux", "wan"])
def test_magcache_is_calibrated_as_diffusers_prints(case, capsys):
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    config = MagCache().calibrated(build(case), lambda pipe: draw(case, pipe))
    assert capsys.readouterr().out == ""
    pipe = build(case)
    apply_mag_cache(pipe.transformer, MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    draw(case, pipe)
    printed = re.findall(r"^\[[\d., e-]+\]$", capsys.readouterr().out, re.MULTILINE)
    assert len(printed) == (2 if case == "wan" else 1)
    assert isinstance(config, MagCache)
    assert list(config.ratios or ()) == pytest.approx(json.loads(printed[0]), rel=1e-6)
    assert len(config.to_dict()["settings"]["ratios"]) == STEPS


def test_magcache_wants_its_ratios_and_their_number_of_steps():
    pipe = build("flux")
    with pytest.raises(DitaError, match="has no ratios"):
        attach(MagCache(), pipe)
    with pytest.raises(DitaError, match="11 steps, but the hooks were made for 12"):
        draw_with(MagCache(ratios=(1.0,) * STEPS), "flux", pipe, steps=11)
    with pytest.raises(DitaError, match="measured nothing"):
        MagCache().calibrated(pipe, lambda _: None)


@pytest.mark.parametrize("config", [PyramidBroadcast(), FasterCache()], ids=lambda config: config.name)
def test_one_state_for_each_branch_is_nearer_to_the_plain_run(config):
    errors = {}
    for per_branch in (True, False):
        pipe = build("wan")
        output = draw_with(type(config)(per_branch=per_branch), "wan", pipe)[0]
        errors[per_branch] = (output - plain("wan")).norm()
    assert errors[True] < 0.5 * errors[False]


def test_fastercache_exchanges_the_halves():
    seen: dict[str, Any] = {}

    class Output:
        def __init__(self, sample: torch.Tensor) -> None:
            self.sample = sample

    def forward(states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> Output:
        seen.update(states=states.tolist(), labels=class_labels.tolist())
        return Output(states * 10)

    labels = torch.tensor([3, 4, 1000, 1000])
    arguments = {"timestep": torch.ones(4), "class_labels": labels}
    result = halves_exchanged(forward, (torch.arange(4),), arguments)
    assert seen == {"states": [2, 3, 0, 1], "labels": [1000, 1000, 3, 4]}
    assert result.sample.tolist() == [0, 10, 20, 30]
    with pytest.raises(DitaError, match="guidance_scale above 1"):
        draw_with(FasterCache(), "dit", build("dit"), guidance_scale=1.0)


@every_case
def test_cache_dit_is_told_how_many_calls_a_step_has(case):
    installed("cache-dit dbcache")
    pipe = build(case)
    with DBCache(threshold=1.0, warmup=4, most=3).attached(pipe):
        draw(case, pipe)
        kept = vars(pipe.transformer)
        steps, others = kept["_cached_steps"], kept["_cfg_cached_steps"]
    assert steps == [4, 5, 6, 8, 9, 10]
    assert others == (steps if case in ("flux true CFG", "wan") else [])


def test_what_is_attached_already_is_refused():
    pipe = build("flux")
    with FirstBlock(0.5).attached(pipe), pytest.raises(DitaError, match="has diffusers firstblock attached already"):
        attach(TaylorSeer(), pipe)
    with dita.accelerated(pipe, "fbcache"), pytest.raises(DitaError, match="has dita attached already"):
        attach(TaylorSeer(), pipe)
    from diffusers.hooks import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    assert "has a cache of its own attached already" in supports(TaylorSeer, pipe)[1]


def test_ladders_can_be_told_apart_and_written(peer):
    ladder = peer.ladder()
    assert 5 <= len(ladder) <= 7
    assert len(set(varying(ladder))) == len({config.label() for config in ladder}) == len(ladder)
    for config in ladder:
        written = json.loads(json.dumps(config.to_dict()))
        assert written["method"] == peer.name
        assert written["version"] == peer.version()
        assert peer(**{k: tuple(v) if isinstance(v, list) else v for k, v in written["settings"].items()}) == config
    assert all(config.calibrated(None, print) is config for config in ladder if not peer.needs_calibration)


def test_a_missing_package_is_left_out(monkeypatch):
    def version(package: str) -> str:
        if package == "cache-dit":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(base, "installed_version", version)
    assert [peer.name for peer in peers()] == list(NAMES[:6])
    pipe = build("dit")
    with pytest.raises(DitaError, match=r"needs cache-dit, which is missing: pip install \"dita\[peers\]\""):
        attach(DBCache(), pipe)
    with pytest.raises(DitaError, match="no peer 'cache-dit'; known: diffusers firstblock"):
        get_peer("cache-dit")


def test_the_table_of_settings_is_what_the_peers_say() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "peers.md").read_text(encoding="utf-8")
    _, table, _ = re.split(r"<!-- peers:(?:start|end) -->\n", page)
    assert table == grid()
    for peer in peers():
        line = next(line for line in table.splitlines() if line.startswith(f"| {peer.name} |"))
        assert line.count("`") == 2 * len(peer.ladder())
