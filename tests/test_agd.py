"""Adapter guidance distillation: adapters by hand, who is adapted and who is not, training, and what ships."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_snapshot, snapshot
from pipelines import TINY

import dita
from dita.anatomy import describe
from dita.caching import TaylorSeer
from dita.errors import DitaError, DitaWarning
from dita.eval.calibrations import FOLDER, with_bundled
from dita.eval.settings import plan
from dita.eval.training.agd import main
from dita.loop import Request
from dita.schedulers.guidance.agd import AGD, UNTRAINED, Distilled, DistilledLoop
from dita.schedulers.guidance.agd_adapters import Conditions
from dita.schedulers.guidance.agd_states import Recorder, State, record_states
from dita.schedulers.guidance.agd_training import mean_error, train_adapters, train_agd
from dita.schedulers.guidance.agd_weights import AdapterSet, load_adapters, output_layers
from dita.seams import Position
from dita.watching import watched

SCALES = {"dit": "guidance_scale", "sd3": "guidance_scale", "wan": "guidance_scale", "flux-cfg": "true_cfg_scale"}


def guided(tiny: str, steps: int = 4, batch: int = 1) -> Callable[[Any, float], torch.Tensor]:
    """A call for the training, from other noise each time."""
    seeds = iter(range(100))

    def call(pipe: Any, scale: float) -> torch.Tensor:
        return TINY[tiny].call(pipe, steps=steps, seed=next(seeds), batch=batch, **{SCALES[tiny]: scale})

    return call


def random_adapters(tiny: str, path: Path, kind: str = "auto") -> str:
    """A file of adapters that add something, whatever it is."""
    pipe = TINY[tiny].build()
    states = record_states(pipe, guided(tiny, steps=1), 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapters = AdapterSet.for_call(describe(pipe.transformer), states[0].arguments, kind, 8, scales=(1.0, 20.0))
        for adapter in adapters.adapters:
            torch.nn.init.normal_(adapter.get_parameter("out.weight"), std=0.2)
    adapters.save(path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("agd")
    found = {tiny: random_adapters(tiny, folder / f"{tiny}.safetensors") for tiny in SCALES}
    return {**found, "cross": random_adapters("dit", folder / "cross.safetensors", "cross")}


def by_hand(tensors: dict[str, torch.Tensor], number: int, w: float, t: float, label: torch.Tensor) -> torch.Tensor:
    """The offset adapter as the paper has it, but for how numbers become sines and cosines."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return tensors[f"adapters.{number}.{name}.weight"] @ x + tensors[f"adapters.{number}.{name}.bias"]

    def normalized(x: torch.Tensor, name: str) -> torch.Tensor:
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return x * tensors[f"adapters.{number}.{name}.weight"] + tensors[f"adapters.{number}.{name}.bias"]

    def scalar(value: float, unit: float, name: str) -> torch.Tensor:
        turns = [value / unit / 100 ** (i / 4) for i in range(4)]
        x = torch.tensor([math.sin(turn) for turn in turns] + [math.cos(turn) for turn in turns])
        return normalized(linear(linear(x, f"{name}.net.0").relu(), f"{name}.net.2"), f"{name}.net.3")

    summed = scalar(w, 0.5, "scale") + scalar(t, 20.0, "timestep") + linear(label, "sources.labels")
    return linear(normalized(linear(summed, "hidden.0").relu(), "hidden.2"), "out")


def final_latents(pipe: Any, call: Callable[[], Any]) -> torch.Tensor:
    """What the scheduler's last step puts out."""
    step, seen = pipe.scheduler.step, []

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        seen.append(step(*args, **kwargs))
        return seen[-1]

    before = dict(vars(pipe.scheduler))
    vars(pipe.scheduler)["step"] = watched_step
    try:
        call()
    finally:
        vars(pipe.scheduler).pop("step")
        vars(pipe.scheduler).update({k: v for k, v in before.items() if k == "step"})
    return seen[-1].prev_sample if hasattr(seen[-1], "prev_sample") else seen[-1][0]


def test_one_branch_with_offsets_on_the_attention_modules(files: dict[str, str]) -> None:
    from safetensors.torch import load_file

    pipe: Any = TINY["dit"].build()
    tensors, w = load_file(files["dit"]), 2.5
    model, scheduler, labels = pipe.transformer, pipe.scheduler, torch.tensor([5])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    dita.accelerate_pipeline(pipe, AGD(files["dit"]))
    got = final_latents(
        pipe,
        lambda: pipe(
            class_labels=[5],
            guidance_scale=w,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
        ),
    )
    dita.restore_pipeline(pipe)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        hooks = []
        for number, block in enumerate(model.transformer_blocks):
            row = block.norm1.emb.class_embedder.embedding_table.weight[labels[0]]
            offset = by_hand(tensors, number, w, float(t), row)
            hooks.append(block.attn1.register_forward_hook(lambda m, i, o, offset=offset: o + offset))
        with torch.no_grad():
            output = model(latents, t.reshape(1), labels).sample[:, :4]
        for hook in hooks:
            hook.remove()
        latents = scheduler.step(output, t, latents).prev_sample
    # The pipeline steps both halves of its batch.
    torch.testing.assert_close(got, latents.detach().expand_as(got), rtol=1e-4, atol=1e-5)


def test_cross_attention_sees_the_embeddings_and_no_masked_text() -> None:
    pipe = TINY["pixart"].build()
    anatomy = describe(pipe.transformer)
    assert all(".attn2." in part.site.name for part in output_layers(anatomy))
    torch.manual_seed(0)
    adapters = AdapterSet(anatomy, "cross", 8, {"text": 6})
    adapter: Any = adapters.adapters[0]
    torch.nn.init.normal_(adapter.out.weight)
    output, text = torch.randn(2, 5, 32), torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    numbers = torch.tensor([100.0, 300.0]), torch.tensor([2.0, 4.0])
    conditions = Conditions.of({"encoder_hidden_states": text, "encoder_attention_mask": mask}, *numbers)
    with torch.no_grad():
        got = adapters.add(0, output, conditions) - output
        for row, count in ((0, 2), (1, 4)):
            memory = torch.stack(
                [adapter.scale(numbers[1])[row], adapter.timestep(numbers[0])[row]]
                + [adapter.sources["text"](token) for token in text[row, :count]]
            )
            attended = torch.nn.functional.scaled_dot_product_attention(
                adapter.query(output[row])[None], adapter.key(memory)[None], adapter.value(memory)[None]
            )
            torch.testing.assert_close(got[row], adapter.out(attended)[0], rtol=1e-4, atol=1e-5)
        folded = adapters.add(0, output.reshape(2 * 5, 1, 32), conditions) - output.reshape(10, 1, 32)
        torch.testing.assert_close(folded.reshape(got.shape), got, rtol=1e-4, atol=1e-5)


def test_offsets_are_the_same_for_all_tokens_and_nothing_before_the_training() -> None:
    anatomy = describe(TINY["dit"].build().transformer)
    arguments = {"hidden_states": torch.zeros(2, 4, 8, 8), "class_labels": torch.tensor([1, 2])}
    adapters = AdapterSet.for_call(anatomy, arguments, width=8)
    conditions = Conditions.of(arguments, torch.tensor([5.0, 5.0]), torch.tensor([3.0, 3.0]))
    output = torch.randn(2, 16, 32)
    assert adapters.kind == "offset" and torch.equal(adapters.add(0, output, conditions), output)
    torch.nn.init.normal_(adapters.adapters[0].get_parameter("out.weight"))
    added = (adapters.add(0, output, conditions) - output).detach()
    torch.testing.assert_close(added, added[:, :1].expand_as(added), rtol=0, atol=1e-5)
    assert not torch.allclose(added[0], added[1], atol=1e-2), "the two have other classes"
    # Two perceptrons of numbers, the class, the hidden layer with its norm, and the output.
    scalar = (8 * 32 + 32) + (32 * 8 + 8) + 16
    assert sum(p.numel() for p in adapters.adapters[0].parameters()) == (
        2 * scalar + (32 * 8 + 8) + (8 * 8 + 8 + 16) + (8 * 32 + 32)
    )


@pytest.mark.parametrize("tiny", SCALES)
def test_only_the_conditional_branch_runs_and_it_is_adapted(tiny: str, files: dict[str, str]) -> None:
    pipe, call = TINY[tiny].build(), TINY[tiny].call
    plain, before = call(pipe, steps=3), snapshot(pipe)
    dita.accelerate_pipeline(pipe, AGD(files[tiny]))
    output = call(pipe, steps=3)
    run = dita.report(pipe).last
    assert torch.equal(call(pipe, steps=3), output) and output.isfinite().all()
    assert {(r.branch, r.action) for r in run.records} == {("cond", "computed"), ("uncond", "skipped")}
    assert len(run.records) == 6 and {r.reason for r in run.records} == {"adapters stand for guidance"}
    dita.accelerate_pipeline(pipe, AGD(UNTRAINED))
    alone = call(pipe, steps=3)
    assert not torch.allclose(alone, output, atol=1e-3) and not torch.allclose(alone, plain, atol=1e-3)
    dita.restore_pipeline(pipe)
    assert_same_snapshot(before, snapshot(pipe))
    assert torch.equal(call(pipe, steps=3), plain)


@pytest.mark.parametrize("tiny", ["dit", "wan"])
def test_two_branches_are_left_as_they_are(tiny: str, files: dict[str, str]) -> None:
    """Before `begin` no adapter acts, and none in a run without guidance."""
    pipe, call = TINY[tiny].build(), TINY[tiny].call
    plain = call(pipe, steps=4)
    dita.accelerate_pipeline(pipe, AGD(files[tiny], begin=0.9))
    with pytest.warns(DitaWarning, match="guided up to 0.9 of the run"):
        late = call(pipe, steps=4)
    assert [r.action for r in dita.report(pipe).last.records] == ["computed"] * 8
    torch.testing.assert_close(late, plain, rtol=1e-4, atol=1e-5)
    dita.accelerate_pipeline(pipe, AGD(files[tiny]))
    with pytest.warns(DitaWarning, match="this run has none"):
        unguided = call(pipe, steps=4, **{SCALES[tiny]: 1.0})
    dita.restore_pipeline(pipe)
    assert torch.equal(unguided, call(pipe, steps=4, **{SCALES[tiny]: 1.0}))


def test_untrained_is_the_conditional_branch_alone() -> None:
    pipe, alone = TINY["wan"].build(), TINY["wan"].call
    dita.accelerate_pipeline(pipe, AGD(UNTRAINED))
    output = alone(pipe, steps=3)
    dita.restore_pipeline(pipe)
    torch.testing.assert_close(output, alone(pipe, steps=3, guidance_scale=1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tiny", ["dit", "sd3"])
def test_an_image_does_not_depend_on_its_batch_mates(tiny: str, files: dict[str, str]) -> None:
    pipe, call = TINY[tiny].build(), TINY[tiny].call
    dita.accelerate_pipeline(pipe, AGD(files[tiny]))
    both = call(pipe, steps=2, batch=2)
    for row in (0, 1):
        torch.testing.assert_close(both[row : row + 1], call(pipe, steps=2, first=row), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("order", [("uncond", "cond"), ("cond", "uncond")])
def test_adapters_stay_out_where_the_unconditional_branch_came_first(order: tuple[str, str]) -> None:
    anatomy = describe(TINY["dit"].build().transformer)
    loop, seen = DistilledLoop(Distilled(0.0), "agd"), []

    def run(request: Request) -> Any:
        seen.append((request.roles[0], request.scale))
        return (torch.zeros(1),)

    for step in range(2):
        for role in order:
            position = Position(step, 2, 0, role, step, 2, step)
            request = Request(position, (role,), ("hidden_states",), (torch.zeros(1, 1),), {}, anatomy, 4.0)
            loop.model(request, run)
    assert seen == ([("cond", 4.0)] * 2 if order[0] == "cond" else [("uncond", None), ("cond", None)] * 2)
    position = Position(0, 2, 0, "call 0", 0, 2, 0)
    roles, latents = ("uncond", "cond", "third"), (torch.zeros(3, 1),)
    loop.model(Request(position, roles, ("hidden_states",), latents, {}, anatomy, 4.0), run)
    assert seen[-1] == ("uncond", None)
    shared = Request(position, ("cond",), ("hidden_states",), (torch.zeros(1, 1),), {}, anatomy, 4.0, entries=(0, 1))
    with pytest.raises(DitaError, match="several steps"):
        DistilledLoop(Distilled(0.0), "agd").model(shared, run)


@pytest.mark.parametrize("tiny", ["dit", "flux-cfg"])
def test_a_cache_that_skips_the_module_skips_the_adapter(
    tiny: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call = TINY[tiny].build(), TINY[tiny].call
    plain, before = call(pipe), snapshot(pipe)
    added: list[int] = []
    add = AdapterSet.add
    monkeypatch.setattr(
        AdapterSet, "add", lambda self, number, *rest: (added.append(number), add(self, number, *rest))[1]
    )
    outputs = []
    for methods in ((TaylorSeer(interval=2), AGD(files[tiny])), (AGD(files[tiny]), TaylorSeer(interval=2))):
        added.clear()
        dita.accelerate_pipeline(pipe, *methods)
        outputs.append(call(pipe))
        run = dita.report(pipe).last
        actions = [r.action for r in run.records if r.branch == "cond"]
        computed, layers = actions.count("computed"), 4 if tiny == "dit" else 6
        assert 0 < computed < 8 and {r.action for r in run.records if r.branch == "uncond"} == {"skipped"}
        # In the three single blocks of Flux the adapter shares a layer with the cache, outside of it.
        always = 0 if tiny == "dit" else 3
        assert len(added) == (layers - always) * computed + always * 8
    assert torch.equal(*outputs) and outputs[0].isfinite().all() and not torch.equal(outputs[0], plain)
    dita.restore_pipeline(pipe)
    assert_same_snapshot(before, snapshot(pipe))
    assert torch.equal(call(pipe), plain)


def test_methods_that_take_the_same_layers_exclude_each_other(files: dict[str, str]) -> None:
    pipe = TINY["dit"].build()
    icc = dita.calibrate(pipe, "icc", TINY["dit"].call)
    before = snapshot(pipe)
    for methods in ((icc, AGD(files["dit"])), (AGD(files["dit"]), icc)):
        with pytest.raises(DitaError, match="two methods act on the output of transformer_blocks.0.attn1.to_out.0"):
            dita.accelerate_pipeline(pipe, *methods)
        assert_same_snapshot(before, snapshot(pipe))
    with pytest.raises(DitaError, match="exclude each other: both decide about guidance"):
        dita.accelerate_pipeline(pipe, AGD(UNTRAINED), "guidance-interval")


def test_what_cannot_be_attached(files: dict[str, str], tmp_path: Path) -> None:
    wan, dit = TINY["wan"].build(), TINY["dit"].build()
    before = snapshot(dit)
    for weights, message in (
        ("", "agd has no adapters for DiTTransformer2DModel: train them"),
        (str(tmp_path / "none.safetensors"), "cannot read AGD's adapters"),
        (files["wan"], "were trained on WanTransformer3DModel:.*, not on DiTTransformer2DModel:"),
    ):
        with pytest.raises(DitaError, match=message):
            dita.accelerate_pipeline(dit, AGD(weights))
        assert_same_snapshot(before, snapshot(dit))
    with pytest.raises(DitaError, match="trained for one transformer, and this pipeline has 2"):
        dita.accelerate_pipeline(TINY["wan-2"].build(), AGD(files["wan"]))
    with pytest.raises(DitaError, match="begin is 2"):
        AGD(begin=2)
    assert dita.supports(dit, "agd") and len(AGD().sites(describe(wan.transformer))) == 4
    dita.accelerate_pipeline(dit, AGD(files["dit"]))
    with pytest.warns(DitaWarning, match="for guidance scales from 1 to 20, not for 30"):
        TINY["dit"].call(dit, steps=2, guidance_scale=30.0)


@pytest.mark.parametrize("tiny", ["dit", "wan", "pixart"])
def test_recorded_targets_are_what_the_pipeline_steps_with(tiny: str) -> None:
    pipe, recorder, stepped = TINY[tiny].build(), Recorder(), []

    class Both(Recorder):
        def model(self, request: Any, run: Any) -> Any:
            return recorder.model(request, run)

        def step(self, step: Any, solve: Any) -> torch.Tensor:
            stepped.append((step.output, step.position.timestep))
            return solve(step.output, step.sample)

    with watched(pipe, Both()):
        TINY[tiny].call(pipe, steps=3, batch=2)
    assert len(recorder.states) == 6
    for number, state in enumerate(recorder.states):
        output, timestep = stepped[number // 2]
        row = output[number % 2]
        assert state.timestep == timestep and state.arguments["hidden_states"].shape[0] == 1
        torch.testing.assert_close(state.target[0][: len(row)], row, rtol=1e-4, atol=1e-5)
    texts = [s.arguments.get("encoder_hidden_states") for s in recorder.states]
    assert texts[0] is texts[2] is texts[4], "what does not change is kept once"


@pytest.mark.parametrize("tiny", ["dit", "wan"])
def test_training_learns_and_leaves_the_pipeline_alone(tiny: str, tmp_path: Path) -> None:
    pipe, call = TINY[tiny].build(), TINY[tiny].call
    plain, before = call(pipe, steps=1), snapshot(pipe)
    state = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    generator = torch.get_rng_state()
    agd = train_agd(
        pipe, guided(tiny, steps=2), tmp_path / "a.safetensors", runs=2, updates=6, width=8, rate=4e-2, batch=4
    )
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same_snapshot(before, snapshot(pipe))
    assert all(torch.equal(value, state[name]) for name, value in pipe.transformer.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in pipe.transformer.parameters())
    assert torch.equal(call(pipe, steps=1), plain)
    states = record_states(pipe, guided(tiny, steps=2), 1)
    trained = load_adapters(agd.weights, describe(pipe.transformer))
    untrained = AdapterSet(describe(pipe.transformer), trained.kind, 8, trained.sources)
    assert (trained.kind, trained.scales) == ("offset" if tiny == "dit" else "cross", (1.0, 6.0))
    assert mean_error(pipe, states, trained) < 0.9 * mean_error(pipe, states, untrained)
    dita.accelerate_pipeline(pipe, agd)
    assert not torch.equal(call(pipe, steps=1, **{SCALES[tiny]: 3.0}), plain)


def test_training_goes_on_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dita.schedulers.guidance.agd_training.KEPT_EVERY", 2)
    pipe = TINY["dit"].build()
    states = record_states(pipe, guided("dit", steps=2), 1)

    def fresh() -> AdapterSet:
        torch.manual_seed(0)
        return AdapterSet.for_call(describe(pipe.transformer), states[0].arguments, width=4)

    whole = train_adapters(pipe, states, fresh(), 5, batch=2)
    updates: list[int] = []

    def stopped(update: int, error: float) -> None:
        updates.append(update)
        if update == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_adapters(pipe, states, fresh(), 5, batch=2, checkpoint=tmp_path / "c.pt", told=stopped)
    rest = train_adapters(
        pipe, states, fresh(), 5, batch=2, checkpoint=tmp_path / "c.pt", told=lambda u, e: updates.append(u)
    )
    assert updates == [0, 1, 2, 3, 2, 3, 4]
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(rest.state_dict()[name], value, rtol=0, atol=0)


def test_what_cannot_be_trained() -> None:
    with pytest.raises(DitaError, match="has 2"):
        record_states(TINY["wan-2"].build(), lambda p, w: None, 1)
    pipe = TINY["flux"].build()
    with pytest.raises(DitaError, match="no guided step"):
        record_states(pipe, lambda p, w: TINY["flux"].call(p, steps=2), 1)
    dit = TINY["dit"].build()
    states = record_states(dit, guided("dit", steps=1), 1)
    other = dataclasses.replace(states[0], arguments={**states[0].arguments, "added": torch.ones(3)})
    another = dataclasses.replace(states[0], arguments={**states[0].arguments, "added": torch.zeros(3)})
    adapters = AdapterSet.for_call(describe(dit.transformer), states[0].arguments)
    with pytest.raises(DitaError, match="differ in added"):
        mean_error(dit, [other, another], adapters)
    with torch.inference_mode(), pytest.raises(DitaError, match="inference_mode"):
        train_adapters(dit, states, adapters, 1)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--runs", "1", "--images", "1", "--steps", "2", "--updates", "2", "--batch", "2", "--width", "8"]
    options = [*small, "--work", str(tmp_path / "work"), "--save", str(tmp_path / "agd.safetensors")]
    with torch.random.fork_rng(devices=[]):
        agd = main(options)
        assert main(options) == agd == AGD(str(tmp_path / "agd.safetensors"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("offset adapters of") and lines[-1] == lines[1]
    kept = [State(**state) for state in torch.load(tmp_path / "work" / "states.pt", weights_only=True)]
    assert len(kept) == 2 and kept[0].arguments["hidden_states"].shape == (1, 1, 32, 32)


def test_the_shipped_adapters_stand_for_guidance() -> None:
    from dita.eval.metrics import psnr
    from dita.eval.pipelines import load_pipeline
    from dita.eval.sampling import Sampling, draw

    path = FOLDER / "fashion-dit" / "agd.safetensors"
    assert path.stat().st_size < 2 * 2**20
    pipe: Any = load_pipeline("fashion-dit")
    own = sum(p.numel() for p in load_adapters(path, describe(pipe.transformer)).parameters())
    assert 0.01 < own / sum(p.numel() for p in pipe.transformer.parameters()) < 0.05
    sampling = Sampling(4, 4, 10, 3.0, 0)
    plain, found = draw(pipe, sampling, range(4)).media, {}
    for weights in (UNTRAINED, str(path)):
        with dita.accelerated(pipe, AGD(weights)):
            found[weights] = psnr(draw(pipe, sampling, range(4)).media, plain).mean().item()
    assert found[str(path)] > found[UNTRAINED] + 1, found


def test_sweeps_take_the_shipped_adapters() -> None:
    settings = plan(50, ["agd"])
    taken = [setting.config for setting in with_bundled(settings, "fashion-dit")[1:]]
    assert taken == [AGD(str(FOLDER / "fashion-dit" / "agd.safetensors"), config.begin) for config in AGD.ladder()]
    assert with_bundled(settings, "fashion-wan") == settings
    own = [dataclasses.replace(settings[1], config=AGD("other.safetensors"))]
    assert with_bundled(own, "fashion-dit") == own
