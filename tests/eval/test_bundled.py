"""What ships: the trained pipelines load, fit their size, draw, and carry what their cards promise."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from dita.eval.judge import make_judge
from dita.eval.pipelines import BUNDLED, load_pipeline
from dita.eval.sampling import Sampling, check_pipeline, draw
from dita.eval.task import task_of


@pytest.fixture(scope="module", params=sorted(BUNDLED))
def name(request) -> str:
    return request.param


def test_files(name):
    folder = BUNDLED[name]
    weights = list(folder.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) <= 16e6
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["samples"] >= 500
    card = (folder / "README.md").read_text()
    accuracy = quality.get("class_accuracy", quality.get("semantic_accuracy"))
    assert f"{accuracy:.1%}" in card.replace("**", ""), "the card quotes the measurement"
    losses = [json.loads(line)["loss"] for line in (folder / "loss.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 2
    assert json.loads((folder / "training.json").read_text())["seed"] == 0


def test_it_draws_what_its_judge_can_read(name):
    pipe: Any = load_pipeline(name)
    task = task_of(BUNDLED[name])
    short, count, steps = ({"num_frames": 4}, 2, 4) if task.judge == "clip" else ({}, 4, 8)
    sampling = Sampling(count, count, steps, task.guidance, 0, task.prompts(count), {**task.call, **short})
    check_pipeline(pipe, sampling)
    drawn = draw(pipe, sampling, range(count))
    assert drawn.media.isfinite().all()
    assert drawn.media.std() > 0.05, "not blank"
    row = make_judge(task, False).summarise(make_judge(task, False).observe(drawn, None, sampling, range(count)))
    right = row.get("class_accuracy", row.get("colour_accuracy", 0.0))
    assert right >= 0.5
    again = draw(pipe, replace(sampling, steps=2), range(count))
    assert torch.equal(draw(pipe, replace(sampling, steps=2), range(count)).media, again.media)


def test_flux_is_guided_in_one_call_and_in_two():
    pipe: Any = load_pipeline("fashion-flux")
    task = task_of(BUNDLED["fashion-flux"])
    prompts = task.prompts(4)
    two_calls = {**task.call, "true_cfg_scale": 3.0, "negative_prompt": ""}
    one, two, none = (
        draw(pipe, Sampling(4, 4, 8, guidance, 0, prompts, call), range(4)).media
        for guidance, call in ((3.0, task.call), (1.0, two_calls), (1.0, task.call))
    )
    assert (one - two).square().mean() < (none - two).square().mean(), "it leads where two calls lead"
