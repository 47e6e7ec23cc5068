from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dita.errors import DitaError
from dita.eval import judge as judge_module
from dita.eval.judge import GarmentJudge, Judge, WorldJudge, make_judge
from dita.eval.metrics import Gaussian, frechet_distance, kernel_distance, psnr
from dita.eval.pipelines import BUNDLED
from dita.eval.sampling import Drawn, Sampling
from dita.eval.task import Task, task_of
from dita.eval.world import Renderer, captions, read_caption


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenes(texts: list[str], seed: int = 0) -> torch.Tensor:
    return (Renderer("test").scenes([read_caption(text) for text in texts], generator(seed)) + 1) / 2  # pyright: ignore[reportArgumentType]


def observe(judge: Judge, drawn: Drawn, plain: Drawn | None, sampling: Sampling) -> dict[str, torch.Tensor]:
    parts = [
        judge.observe(
            Drawn(*(None if x is None else x[i.start : i.stop] for x in drawn)),  # pyright: ignore[reportArgumentType]
            None if plain is None else Drawn(*(None if x is None else x[i.start : i.stop] for x in plain)),  # pyright: ignore[reportArgumentType]
            sampling,
            i,
        )
        for i in sampling.batches()
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("batch", [3, 8])
def test_numbers_do_not_depend_on_how_the_samples_are_dealt(batch):
    texts = captions("scene", 8)
    media, latents = scenes(texts), torch.randn(8, 4, 6, generator=generator())
    off = (media + 0.05 * torch.randn(media.shape, generator=generator())).clamp(0, 1)
    sampling = Sampling(8, batch, 5, 1.0, 0, tuple(texts))
    judge = WorldJudge(kind="scene")
    row = judge.summarise(observe(judge, Drawn(off, 0.9 * latents), Drawn(media, latents), sampling))
    assert row["psnr"] == pytest.approx(psnr(off, media).mean().item(), rel=1e-6)
    assert row["latent_l1"] == pytest.approx(0.1, rel=1e-4)
    assert row["latent_l2"] == pytest.approx(0.1, rel=1e-4)
    assert row["colour_accuracy"] == 1
    assert 0.3 < row["semantic_accuracy"] <= min(row["garment_accuracy"], row["place_accuracy"])
    features = judge.net.features(2 * off - 1)
    assert judge.reference is not None
    expected = frechet_distance(Gaussian.fit(features), judge.reference.test)
    assert row["fd_world"] == pytest.approx(expected, rel=1e-3)
    for name, (low, high) in row["intervals"].items():
        assert low <= row[name] <= high, name


def test_real_samples_score_as_real_ones():
    texts = captions("scene", 200, seed=5)
    judge, sampling = WorldJudge(kind="scene"), Sampling(200, 200, 5, 1.0, 0, tuple(texts))
    row = judge.summarise(observe(judge, Drawn(scenes(texts, 5), None), None, sampling))
    floor = judge.floor(200)
    assert row["semantic_accuracy"] == pytest.approx(floor["semantic_accuracy"], abs=0.08)
    assert row["fd_world"] == pytest.approx(floor["fd_world"], rel=0.3)
    swapped = Sampling(200, 200, 5, 1.0, 0, tuple(texts[1:] + texts[:1]))
    assert judge.summarise(observe(judge, Drawn(scenes(texts, 5), None), None, swapped))["semantic_accuracy"] < 0.1


def test_accuracy_is_compared_sample_by_sample():
    texts = captions("scene", 8)
    media = scenes(texts)
    sampling, judge = Sampling(8, 4, 5, 1.0, 0, tuple(texts)), WorldJudge(kind="scene")
    right = observe(judge, Drawn(media, None), None, sampling)["semantic_accuracy"]
    assert right.sum() >= 3
    blank = torch.zeros_like(media)
    lost = observe(judge, Drawn(blank, None), Drawn(media, None), sampling)["accuracy_change"]
    assert lost.equal(-right)
    assert observe(judge, Drawn(media, None), Drawn(blank, None), sampling)["accuracy_change"].equal(right)
    row = judge.summarise(observe(judge, Drawn(media, None), Drawn(media, None), sampling))
    assert row["accuracy_change"] == 0
    assert row["intervals"]["accuracy_change"] == [0, 0]


def test_videos_are_compared_over_time():
    reference = torch.rand(2, 6, 3, 16, 16, generator=generator())
    judge, sampling = Judge(), Sampling(2, 2, 5, 1.0, 0, ("a", "b"))
    same = judge.summarise(observe(judge, Drawn(reference, None), Drawn(reference, None), sampling))
    assert (same["psnr"], same["identical"]) == (None, 2)
    assert same["motion_consistency"] == 1
    assert "psnr" not in same["intervals"]
    still = reference[:, :1].expand_as(reference)
    row = judge.summarise(observe(judge, Drawn(still, None), Drawn(reference, None), sampling))
    assert math.isfinite(row["psnr"])
    assert row["flicker_difference"] < -0.2
    assert row["motion_consistency"] == 0


def test_fid_and_kid_are_taken_from_one_pass(untrained, judge, monkeypatch):
    real = torch.rand(40, 12, generator=generator(1))
    network = SimpleNamespace(real=real, features=lambda images: images.flatten(1)[:, :12])
    judge = GarmentJudge(fid=True, classifier=untrained, reference=judge.reference)
    judge._inception = network  # pyright: ignore[reportAttributeAccessIssue]
    media = torch.rand(20, 1, 32, 32, generator=generator(2))
    row = judge.summarise(observe(judge, Drawn(media, None), None, Sampling(20, 7, 5, 1.0, 0)))
    features = media.flatten(1)[:, :12]
    assert row["fid"] == pytest.approx(frechet_distance(Gaussian.fit(features), Gaussian.fit(real)))
    assert row["kid"] == pytest.approx(kernel_distance(features, real).mean)


def test_the_task_decides_who_judges(monkeypatch):
    assert type(make_judge(Task(), False)) is Judge
    assert isinstance(make_judge(Task("garment"), False), GarmentJudge)
    scene, clip = (make_judge(Task(kind), False) for kind in ("scene", "clip"))
    assert isinstance(scene, WorldJudge)
    assert isinstance(clip, WorldJudge)
    assert scene.identity != clip.identity
    monkeypatch.setattr(judge_module, "find_weights", lambda *args, **kwargs: (_ for _ in ()).throw(DitaError("none")))
    with pytest.raises(DitaError, match="none"):
        make_judge(Task(), True)
    assert not make_judge(Task(), None).lpips


def test_samples_of_another_size_are_compared_with_the_plain_run_only():
    task = task_of(BUNDLED["fashion-flux"])
    for call in ({}, {"height": 32}, {"height": 32, "width": 64, "true_cfg_scale": 5.0}):
        assert task.sized(call) is task
    other = task.sized({"height": 64})
    assert type(make_judge(other, False)) is Judge
    assert (other.steps, other.call) == (task.steps, task.call)
    assert Task("garment").sized({"height": 64}).judge == "garment"


def test_unfit_samples_are_refused(judge):
    with pytest.raises(DitaError, match=r"garment judge reads \[1, 32, 32\]"):
        judge.observe(Drawn(torch.rand(2, 3, 32, 32), None), None, Sampling(2, 2, 5, 1.0, 0), range(2))
