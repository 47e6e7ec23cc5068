from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, WanPipeline

from dita.errors import DitaError
from dita.eval.pipelines import load_pipeline
from dita.eval.sampling import Sampling, draw
from dita.eval.task import Task, task_of
from dita.eval.training import fashion_flux, fashion_wan
from dita.eval.training.flow import (
    FlowTraining,
    arguments,
    flow_loss,
    noise_levels,
    save_pipeline,
    schedule,
    two_noise_levels,
)
from dita.eval.training.listening import exchanged, listen, words_heard
from dita.eval.training.muon import Muon, orthogonalised
from dita.eval.training.reading import answers, learn_to_read
from dita.eval.training.words import build_t5, build_tokenizer
from dita.eval.world import captions, read_caption


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (1, 24, 24)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape):
    matrices = torch.randn(shape, generator=generator())
    result = orthogonalised(matrices)
    assert result.shape == shape
    for before, after in zip(matrices, result, strict=True):
        left, values, right = torch.linalg.svd(before, full_matrices=False)
        turned = left.T @ after @ right.T
        assert (turned - turned.diag().diag()).abs().max() < 1e-3
        kept = values > 0.05 * values.max()
        assert (turned.diag()[kept] - 1).abs().max() < 0.45


def test_muon_agrees_with_torchs_own_up_to_its_rounding():
    start, target = torch.randn(12, 20, generator=generator()), torch.randn(12, 20, generator=generator(1))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    one = Muon([ours], lr=0.02, weight_decay=0.1)
    two = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for parameter, optimizer in ((ours, one), (theirs, two)):
            (parameter - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved, "torch orthogonalises in bfloat16"


def test_noise_levels_are_logit_normal_and_stratified():
    levels = torch.cat([noise_levels(100, generator(seed)) for seed in range(50)])
    logits = levels.logit()
    assert logits.mean().abs() < 0.02
    assert (logits.std() - 1).abs() < 0.03
    assert all((noise_levels(4, generator(seed)).diff() > 0).all() for seed in range(20))
    shifted = noise_levels(1000, generator(), shift=3.0)
    torch.testing.assert_close(shifted.median(), torch.tensor(0.75), rtol=0, atol=0.01)


def test_half_of_the_levels_are_shifted_further():
    levels = two_noise_levels(2000, generator(), (1.0, 8.0))
    torch.testing.assert_close(levels[0::2].median(), torch.tensor(0.5), rtol=0, atol=0.02)
    torch.testing.assert_close(levels[1::2].median(), torch.tensor(8 / 9), rtol=0, atol=0.01)
    assert two_noise_levels(3, generator(), (1.0, 8.0)).shape == (3,)


def test_the_text_encoder_starts_with_a_sense_of_order():
    texts = [f"a {one} on the left and a {two} on the right" for one, two in (("red bag", "blue coat"),) * 2]
    texts[1] = "a blue coat on the left and a red bag on the right"
    tokens = build_tokenizer()(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        one, two = build_t5()(tokens).last_hidden_state.mean(1)
    assert (one - two).norm() > 0.05 * one.norm(), "the same words in another order look the same"


def test_text_encoders_learn_to_read():
    assert answers([read_caption(c) for c in ("a red bag on the left and a blue coat on the right",)]).tolist() == [  # pyright: ignore
        [8, 0, 4, 5]
    ]
    embedding = torch.nn.Embedding(40, 64)
    layers = torch.nn.Sequential(torch.nn.Linear(16 * 64, 128), torch.nn.ReLU())
    tokenizer = build_tokenizer()

    def encode(texts: list[str]) -> tuple[torch.Tensor]:
        ids = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids
        return (layers(embedding(ids).flatten(1)),)

    nets = torch.nn.ModuleList([embedding, layers])
    before = learn_to_read(encode, nets, (128,), 0.01, generator())
    after = learn_to_read(encode, nets, (128,), 4, generator())
    assert before < 0.4 < 0.6 < after
    assert math.isnan(learn_to_read(encode, nets, (128,), 0, generator()))


def test_a_word_that_is_not_used_is_not_heard():
    asked = [read_caption(text) for text in captions("clip", 20)]
    clean = torch.randn(20, 3, 2, generator=generator())

    def deaf_to_garments(noisy: torch.Tensor, level: torch.Tensor, texts: list[str]) -> torch.Tensor:
        shift = torch.tensor([float("left" in text) + 2 * float("red" in text) for text in texts])
        return noisy + shift.view(-1, 1, 1)

    for row in words_heard(deaf_to_garments, clean, asked, (0.5, 1.0)):
        assert row["garment"] == 0
        assert row["motion"] != 0 != row["colour"]

    def said(texts: list[str]) -> torch.Tensor:
        return torch.tensor([float("left" in text) for text in texts]).view(-1, 1, 1)

    shown = said([str(clip) for clip in asked]).expand(20, 3, 2)
    hears_left = lambda noisy, level, texts: (noisy - said(texts)) / level.view(-1, 1, 1)  # noqa: E731
    (row,) = words_heard(hears_left, shown, asked, (0.5,))
    assert row["loss"] < 1e-10
    wrong = [str(exchanged(clip, generator())["motion"]) for clip in asked]
    assert all(one != str(clip) for one, clip in zip(wrong, asked, strict=True))
    assert row["motion"] > 0.1 and max(row["garment"], row["colour"]) < 1e-10


def test_fashion_flux_hears_colours_and_places():
    (row,) = listen("fashion-flux", samples=12, levels=(0.9,), threads=1)
    assert row["colour"] > 0.02 and row["place"] > 0.02 and 0 < row["loss"] < 1


def test_listening_wants_a_pipeline_of_the_world():
    with pytest.raises(DitaError, match="scenes or clips"):
        listen("fashion-dit")


def test_the_target_is_the_velocity_from_clean_to_noise():
    clean, noise = torch.randn(2, 4, 4, generator=generator()), torch.randn(2, 4, 4, generator=generator(1))
    level = torch.tensor([0.3, 0.8]).view(-1, 1, 1)
    step = 1e-3
    velocity = (torch.lerp(clean, noise, level + step) - torch.lerp(clean, noise, level)) / step
    assert flow_loss(velocity, clean, noise) < 1e-5
    assert flow_loss(-velocity, clean, noise) > 1


def test_the_rate_rises_stays_and_falls():
    assert [schedule(step, 0.1, 10, 0.25) for step in (0, 4, 9, 100)] == [0.1, 0.5, 1, 1]
    assert [schedule(100, progress, 10, 0.2) for progress in (0.8, 0.9, 1.0, 1.1)] == pytest.approx([1, 0.5, 0, 0])


def weight_of(nets: Any) -> torch.Tensor:
    return nets["net"].weight


class Line(FlowTraining):
    """Learns y = 3x with one weight; its clock ticks once a step."""

    trained = ("net",)
    task = Task()

    def build(self):
        class Pipe:
            def __init__(self):
                self.net = torch.nn.Linear(1, 1, bias=False)

            def to(self, dtype):
                self.net = self.net.to(dtype)
                return self

            def save_pretrained(self, folder: Path):
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(self.net.state_dict(), folder / "net.pt")
                (folder / "model_index.json").write_text("{}")

        return Pipe()

    def load(self, folder):
        pipe = self.build()
        pipe.net.load_state_dict(torch.load(folder / "net.pt", weights_only=True))
        return pipe

    def loss(self, progress):
        x = torch.randn(8, 1, generator=self.generator)
        return (self.nets["net"](x) - 3 * x).square().mean(), 8

    def held_out(self):
        return (weight_of(self.ema).item() - 3) ** 2

    def _clock(self):
        return float(self.step)


def options(out: Path, minutes: float, *more: str) -> argparse.Namespace:
    given = ["--out", str(out), "--minutes", str(minutes), "--lr", "0.05", "--warmup", "5", "--log-every", "10", *more]
    return arguments("", "", 1, 8, 0.1).parse_args(given)


def test_training_learns_logs_and_saves(tmp_path):
    run = Line(options(tmp_path, 3))
    run.run()
    assert (run.step, run.samples) == (180, 1440)
    rows = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(10, 181, 10))
    assert rows[-1]["held_out"] < 0.05 < rows[0]["held_out"]
    assert json.loads((tmp_path / "training.json").read_text())["minutes_trained"] == 3
    saved = torch.load(tmp_path / "pipeline" / "net.pt", weights_only=True)["weight"]
    assert saved.dtype == torch.float16
    assert saved.item() == pytest.approx(weight_of(run.ema).item(), rel=1e-3)
    flat = torch.load(tmp_path / "checkpoint-flat.pt", weights_only=True)
    assert flat["step"] == 126, "kept where the rate begins to fall, at 0.7 of the budget"


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = Line(options(tmp_path / "whole", 1))
    whole.run()
    first: Any = Line(options(tmp_path / "parts", 1))
    original, first.loss = first.loss, lambda progress: original(progress) if first.step < 25 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        first.run()
    first.save()
    second = Line(options(tmp_path / "parts", 1))
    second.run()
    assert (second.step, second.samples) == (whole.step, whole.samples)
    assert torch.equal(weight_of(second.nets), weight_of(whole.nets))
    assert torch.equal(weight_of(second.ema), weight_of(whole.ema))


def test_training_can_start_from_a_pipeline(tmp_path):
    run = Line(options(tmp_path / "one", 1))
    run.run()
    other = Line(options(tmp_path / "two", 1, "--init-from", str(tmp_path / "one" / "pipeline")))
    assert weight_of(other.nets).item() == pytest.approx(weight_of(run.ema).item(), rel=1e-3)
    assert other.step == 0


def test_captions_fit_the_tokenizer():
    tokenizer = build_tokenizer()
    for kind in ("scene", "clip"):
        for text in captions(kind, 200):
            ids = tokenizer(text, padding="max_length", max_length=tokenizer.model_max_length).input_ids
            assert len(ids) == tokenizer.model_max_length, text
            assert tokenizer.unk_token_id not in ids
            assert ids.count(tokenizer.eos_token_id) == 1
            assert tokenizer.decode([i for i in ids if i > 3]) == text
    assert tokenizer("a pink bag").input_ids[1] == tokenizer.unk_token_id


@pytest.mark.parametrize(("script", "kind"), [(fashion_flux, FluxPipeline), (fashion_wan, WanPipeline)])
def test_the_pipelines_are_stock_and_small(script, kind, tmp_path):
    torch.manual_seed(0)
    pipe = script.build_pipeline()
    assert type(pipe) is kind
    training = script.FluxTraining if script is fashion_flux else script.WanTraining
    save_pipeline(copy.deepcopy(pipe).to(torch.float16), tmp_path, training.task)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert 2e6 < size < 16e6
    task = task_of(tmp_path)
    assert task == training.task
    loaded = load_pipeline(tmp_path)
    drawn = draw(loaded, Sampling(1, 1, 1, 1.0, 0, task.prompts(1), task.call), range(1))
    assert drawn.media.shape == ((1, 3, 32, 64) if kind is FluxPipeline else (1, 13, 3, 32, 32))
    assert drawn.latents is not None
