"""The fitted forecast on whole pipelines: its calibration, its files, its gate."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_snapshot, configured, plain, snapshot
from pipelines import TINY

import dita
from dita.caching import Fitted, FittedTable, fitted_calibration
from dita.caching.fitted_table import equal_steps, read_fit


@pytest.fixture(scope="module")
def found() -> Fitted:
    result = dita.calibrate(TINY["dit"].build(), calls=[TINY["dit"].call], budget=3)
    assert isinstance(result, Fitted)
    return result


def test_file_keeps_everything(found: Fitted, tmp_path: Any) -> None:
    path = tmp_path / "x.safetensors"
    found.save(path)
    table, settings = read_fit(path)
    assert table == found.table and settings == {"full": 3, "speedup": 0.0, "anchors": 5, "warmup": 1}
    assert dita.Method.from_json(found.to_json()) == found == dita.load_method(path)
    outputs = []
    for method in (found, Fitted(calibration=str(path)), dita.load_method(path)):
        pipe = TINY["dit"].build()
        with dita.accelerated(pipe, method):
            outputs.append(TINY["dit"].call(pipe))
            assert sum(r.action == "computed" for r in dita.report(pipe).runs[-1].records) == 3
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    pipe = TINY["dit"].build()
    with dita.accelerated(pipe, "fitted", calibration=path, full=4):
        TINY["dit"].call(pipe)
        assert sum(r.action == "computed" for r in dita.report(pipe).runs[-1].records) == 4


def damaged(path: Any, kind: str) -> None:
    """Spoil a saved fit."""
    from safetensors.torch import load_file, save_file

    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "text":
        path.write_text("not a fit")
    elif kind == "pickle":
        torch.save({"gram": torch.ones(3, 3)}, path)
    else:
        tensors = load_file(path)
        head = {
            "format": "dita fitted 1",
            "settings": {},
            "values": {"seconds": [0, 1, 0]},
            "model": "",
            "scheduler": "",
        }
        head |= {"shape": [], "steps": len(tensors["timesteps"])}
        if kind == "shape":
            tensors["gram"] = tensors["gram"][:-1].contiguous()
        elif kind == "infinite":
            tensors["gram"] = tensors["gram"] * float("inf")
        elif kind == "other format":
            head["format"] = "dita fitted 99"
        elif kind == "no head":
            head = {}
        elif kind == "missing":
            del tensors["unrest"]
        elif kind == "strange":
            head["values"] = {"seconds": [0, None, 0]}
        save_file(tensors, path, {"dita": json.dumps(head)})


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "text",
        "pickle",
        "shape",
        "infinite",
        "other format",
        "no head",
        "missing",
        "strange",
        "none",
    ],
)
def test_a_damaged_file_is_refused_and_changes_nothing(kind: str, found: Fitted, tmp_path: Any) -> None:
    path = tmp_path / "x.safetensors"
    if kind != "none":
        found.save(path)
        damaged(path, kind)
    pipe = TINY["dit"].build()
    before = snapshot(pipe)
    with pytest.raises(dita.DitaError, match=r"x\.safetensors|damaged"):
        dita.accelerate_pipeline(pipe, "fitted", calibration=str(path))
    assert_same_snapshot(snapshot(pipe), before)


def test_what_is_read_is_what_was_saved(found: Fitted, tmp_path: Any) -> None:
    path = tmp_path / "x.safetensors"
    method = found.replace(anchors=3, warmup=2, full=4)
    method.save(path)
    assert dita.load_method(path) == method


def test_a_gate_leaves_longer_runs_alone(found: Fitted) -> None:
    pipe = TINY["dit"].build()
    with dita.accelerated(pipe, found, gate=1.01):
        assert torch.isfinite(TINY["dit"].call(pipe, steps=12)).all()
        assert len(dita.report(pipe).runs[-1].computed_steps) == 3


def test_a_fit_of_another_model_is_refused(found: Fitted) -> None:
    pipe = TINY["pixart"].build()
    with pytest.raises(dita.DitaError, match="was measured on DiTTransformer2DModel"):
        dita.accelerate_pipeline(pipe, found)


def test_what_is_present_is_the_default(found: Fitted, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITA_CALIBRATIONS", str(tmp_path))
    pipe = TINY["dit"].build()
    assert "fbcache" in str(dita.report(dita.accelerate_pipeline(pipe)))
    dita.restore_pipeline(pipe)
    dita.calibrate(pipe, call=TINY["dit"].call, budget=3, save=True)
    (path,) = tmp_path.iterdir()
    assert "fitted" in str(dita.report(dita.accelerate_pipeline(pipe)))
    other = TINY["pixart"].build()
    assert "fbcache" in str(dita.report(dita.accelerate_pipeline(other)))
    path.write_bytes(b"spoilt")
    with pytest.warns(dita.DitaWarning, match="passed over"):
        dita.accelerate_pipeline(pipe)
    assert "fbcache" in str(dita.report(pipe))


def test_a_calibration_beside_the_pipeline_comes_first(found: Fitted, tmp_path: Any) -> None:
    pipe: Any = TINY["dit"].build()
    pipe.save_pretrained(tmp_path)
    found.save(tmp_path / "dita.safetensors")
    loaded: Any = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    report = str(dita.report(dita.accelerate_pipeline(loaded)))
    assert "fitted" in report and "dita.safetensors" in report


@pytest.mark.parametrize("tiny", ["dit", "flux", "flux-cfg", "wan", "wan-2", "sd3", "cogvideox"])
def test_one_calibration_serves_other_runs(tiny: str) -> None:
    pipe = TINY[tiny].build()
    fitted = dita.calibrate(pipe, call=TINY[tiny].call, budget=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", dita.DitaWarning)
        dita.accelerate_pipeline(pipe, fitted)
        for steps in (8, 5, 12, 8):
            output = TINY[tiny].call(pipe, steps=steps)
            assert torch.isfinite(output).all() and output.shape == plain(tiny, steps=steps).shape
            last = dita.report(pipe).runs[-1]
            computed = len(last.computed_steps)
            assert 4 <= computed <= 5 if tiny == "wan-2" else computed == 4
    dita.restore_pipeline(pipe)
    assert torch.equal(TINY[tiny].call(pipe), plain(tiny))


def test_an_image_to_image_run_takes_the_fit_of_whole_runs() -> None:
    pipe, whole = TINY["flux-img2img"].build(), TINY["flux"].build()
    fitted = dita.calibrate(whole, call=TINY["flux"].call, budget=3)
    with dita.accelerated(pipe, fitted):
        assert torch.isfinite(TINY["flux-img2img"].call(pipe)).all()
        last = dita.report(pipe).runs[-1]
        assert len(last.computed_steps) == 3 < last.steps < 8


def test_psnr_is_reached_with_few_steps() -> None:
    pipe = TINY["dit"].build()
    wanted = TINY["dit"].call(pipe)
    fitted: Any = dita.calibrate(pipe, call=TINY["dit"].call, psnr=30)
    assert 2 <= fitted.full < 8

    def reached(full: int) -> float:
        with dita.accelerated(pipe, fitted, full=full):
            return float(-10 * (TINY["dit"].call(pipe) - wanted).square().mean().log10())

    assert reached(fitted.full) >= 30 and (fitted.full == 2 or reached(fitted.full - 1) < 30)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"speedup": 3.0, "psnr": 30.0}, "give one of them"),
        ({"calls": (), "call": None}, "needs a call"),
        ({"call": lambda p: None}, "no whole sampling loop"),
        ({"calls": [lambda p: TINY["dit"].call(p, steps=5)]}, "different timesteps"),
        ({"call": lambda p: TINY["dit"].call(p, steps=2)}, "at least 3 steps"),
        ({"psnr": 200.0}, "no step can be left out"),
        ({"method": "magcache", "psnr": 30.0}, "only fitted"),
        ({"method": "magcache", "beside": ["cfg-zero"]}, "only fitted"),
        ({"method": "magcache", "save": "x.safetensors"}, "saved as JSON"),
        ({"speedup": 0.5}, "at least 1"),
        ({"budget": -1}, "whole number"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_bad_input_is_told(change: dict[str, Any], match: str) -> None:
    pipe = TINY["dit"].build()
    before = snapshot(pipe)
    with pytest.raises(dita.DitaError, match=match):
        dita.calibrate(pipe, **{"call": TINY["dit"].call, **change})
    assert_same_snapshot(snapshot(pipe), before)


def test_a_call_that_draws_other_noise_is_told() -> None:
    pipe = TINY["dit"].build()
    generator = torch.Generator().manual_seed(0)

    def call(p: Any) -> Any:
        return p(class_labels=[1], num_inference_steps=6, guidance_scale=2.0, generator=generator, output_type="np")

    with pytest.warns(dita.DitaWarning, match="other noise"):
        fitted: Any = dita.calibrate(pipe, call=call)
    assert not any(fitted.table.values["unrest"])


def test_a_gate_is_a_number() -> None:
    with pytest.raises(dita.DitaError, match="gate"):
        Fitted(gate=-1.0)


def test_a_gate_decides_for_each_sample_by_itself(found: Fitted) -> None:
    pipe, call = TINY["dit"].build(), TINY["dit"].call
    pipe.vae.enable_slicing()  # images are decoded one by one too
    dita.accelerate_pipeline(pipe, found, gate=0.5, per_sample=True)
    both, run = call(pipe, batch=3), dita.report(pipe).last
    steps = [{r.step for r in run.records if r.action == "computed" and f"[{n}]" in r.branch} for n in range(3)]
    assert len({*map(frozenset, steps)}) > 1  # or the samples would say nothing
    for sample in range(3):
        assert torch.equal(both[sample : sample + 1], call(pipe, batch=1, first=sample))
        assert set(dita.report(pipe).runs[-1].computed_steps) == steps[sample]


def test_without_a_calibration_it_says_so() -> None:
    pipe = TINY["dit"].build()
    with dita.accelerated(pipe, Fitted(speedup=2)), pytest.warns(dita.DitaWarning, match="no calibration"):
        TINY["dit"].call(pipe)


def test_seconds_tell_the_steps_of_a_speedup() -> None:
    table = FittedTable({"seconds": (1.0, 0.5, 0.1)}, steps=20)
    for speedup in (1.0, 1.5, 2.0):
        full = table.full_for(speedup, 20)
        assert table.speedup(full) >= speedup - 1e-9 and (full == 20 or table.speedup(full + 1) < speedup)
    # Out of reach, because of what is not in the steps: half of what the number of steps alone would ask for.
    assert table.full_for(50.0, 20) == 2 and table.full_for(3.0, 20) == 4
    assert np.allclose(equal_steps(4)[-1, :4], 0.25)


GUIDANCE = ("guidance-interval", "cfg-cache", "cfg-zero")


@pytest.mark.parametrize(
    ("tiny", "other"),
    [*((tiny, name) for tiny in ("dit", "wan") for name in GUIDANCE), ("wan", "radial"), ("wan", "adaspa")],
)
def test_goes_with_guidance_and_sparse_attention(tiny: str, other: str) -> None:
    pipe = TINY[tiny].build()
    TINY[tiny].call(pipe)
    beside, before = configured(other, "forced", tiny) if other not in GUIDANCE else other, snapshot(pipe)
    alone = dita.calibrate(pipe, call=TINY[tiny].call, budget=4)
    fitted = dita.calibrate(pipe, call=TINY[tiny].call, budget=4, beside=[beside])
    assert_same_snapshot(snapshot(pipe), before)
    assert isinstance(alone, Fitted) and isinstance(fitted, Fitted) and alone.table and fitted.table
    assert alone.table.values["gram"] != fitted.table.values["gram"]
    # With cfg-zero the first outputs are zero, so that nothing is off at the only computed step after the first.
    assert any(fitted.table.values["unrest"]) == (other != "cfg-zero")
    dita.accelerate_pipeline(pipe, fitted, beside)
    first = TINY[tiny].call(pipe)
    assert torch.isfinite(first).all() and torch.equal(first, TINY[tiny].call(pipe))
    run = dita.report(pipe).runs[-1]
    assert run.reused and (other in GUIDANCE or "sparse" in {r.action for r in run.records})
    dita.restore_pipeline(pipe)
    assert torch.equal(TINY[tiny].call(pipe), plain(tiny))


def test_goes_with_a_solver_that_leaves_out_steps() -> None:
    pipe, sada = TINY["dit"].build(), configured("sada", "forced", "dit")
    fitted = dita.calibrate(pipe, call=TINY["dit"].call, budget=4)
    dita.accelerate_pipeline(pipe, fitted, sada)
    first = TINY["dit"].call(pipe)
    assert torch.isfinite(first).all() and torch.equal(first, TINY["dit"].call(pipe))
    assert {"computed", "forecast", "skipped"} <= {record.action for record in dita.report(pipe).last.records}


@pytest.mark.parametrize(("slow", "outside"), [(1.0, 2.0), (9.0, 0.0)])
def test_time_outside_of_steps_is_told_from_slow_steps(
    slow: float, outside: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that other work on the machine slows down does not count as time that no forecast can save."""
    clock, calls = [0.0], [0]
    monkeypatch.setattr(fitted_calibration, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    pipe = TINY["wan"].build()

    def took(*_: Any) -> None:
        clock[0] += slow if calls[0] == 4 else 1.0
        calls[0] += 1

    def call(pipe: Any) -> Any:
        clock[0] += outside
        return TINY["wan"].call(pipe)

    handle = pipe.transformer.register_forward_hook(took)
    fitted = dita.calibrate(pipe, call=call, budget=4)
    handle.remove()
    assert isinstance(fitted, Fitted) and fitted.table
    assert fitted.table.values["seconds"][:2] == pytest.approx([outside, 2.0])  # two branches a step
