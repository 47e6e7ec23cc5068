from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dita.eval
from dita.errors import DitaError
from dita.eval.environment import code_version, device_name, library_versions
from dita.eval.pipelines import fingerprint, load_pipeline

ROOT = Path(__file__).resolve().parents[2]


def test_importing_eval_is_light():
    heavy = ["diffusers", "torchmetrics", "matplotlib", "torchvision", "scipy", "skimage"]
    code = f"import sys, dita.eval; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", dita.eval.__all__)
def test_every_public_name_loads(name):
    assert getattr(dita.eval, name) is not None
    assert name in dir(dita.eval)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        dita.eval.nonsense  # noqa: B018


def test_load_pipeline_from_a_folder(tiny_folder):
    pipe = load_pipeline(tiny_folder, dtype=torch.bfloat16)
    assert type(pipe).__name__ == "DiTPipeline"
    assert pipe.transformer.dtype == torch.bfloat16  # pyright: ignore[reportAttributeAccessIssue]


def test_load_pipeline_says_what_is_wrong(tmp_path):
    with pytest.raises(DitaError, match="'flux' is neither .* bundled are fashion-dit"):
        load_pipeline("flux")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(DitaError, match="could not load"):
        load_pipeline(tmp_path)


def test_fingerprint_follows_the_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("words do not count")
    (tmp_path / "quality.json").write_text('{"nor": "what it scored"}')
    assert fingerprint(tmp_path) == first
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "quality.json").write_text("{}")
    assert fingerprint(tmp_path) != first
    first = fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert fingerprint(tmp_path) != first


def test_environment_names_machine_and_versions():
    assert device_name("cpu").startswith("cpu: ")
    assert library_versions()["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    assert re.match(r"\d+\.\d+\.\d+", code_version())


def test_step_cost_gates_and_times(tiny):
    spec = importlib.util.spec_from_file_location("step_cost", ROOT / "benchmarks" / "step_cost.py")
    assert spec is not None and spec.loader is not None
    step_cost = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step_cost)
    sampling = step_cost.Sampling(2, 2, 8, 3.0, 0)
    row = step_cost.bench(tiny, "taylorseer", sampling, repeats=2)
    assert row["gate"] == "disabled is bit-identical"
    assert row["calls"]["plain"] == 16
    assert row["calls"]["computed"] + row["calls"]["skipped"] == 16
    assert row["calls"]["skipped"] > 0
    assert row["skipped_step_ms"] > 0
    assert row["skipped_over_plain"] == pytest.approx(row["skipped_step_ms"] / row["plain_step_ms"])
