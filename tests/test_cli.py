"""The command line, run in process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import dita
from dita import DitaError, registry
from dita.cli import app


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, list(arguments))


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved DiT pipeline whose weights are then removed: doctor must not need them."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=2, sample_size=8
    )
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=4)
    folder = tmp_path_factory.mktemp("dit")
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


def write_index(folder: Path, **components: list[str | None]) -> Path:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "SomePipeline", **components}))
    return folder


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"{dita.__version__}\n")


def test_no_command_prints_the_commands() -> None:
    output = invoke().output
    assert all(command in output for command in ("demo", "sweep", "methods", "doctor"))


def test_methods_lists_the_registry() -> None:
    result = invoke("methods", "--json")
    assert result.exit_code == 0
    rows = json.loads(result.output)
    assert tuple(row["name"] for row in rows) == registry.names()
    for row in rows:
        cls = registry.get(row["name"])
        assert row["title"] == cls.title
        assert row["arxiv"] == cls.arxiv
        assert row["axes"] == cls.axes
        assert row["needs_calibration"] == cls.needs_calibration


def test_methods_prints_a_table() -> None:
    result = invoke("methods")
    assert result.exit_code == 0
    for name in registry.names():
        (line,) = [line for line in result.output.splitlines() if line.split()[:1] == [name]]
        assert registry.get(name).title.split()[0] in line


def test_doctor_on_a_saved_pipeline(dit_folder: Path) -> None:
    result = invoke("doctor", str(dit_folder))
    assert result.exit_code == 0, result.output
    assert "DiTPipeline" in result.output
    assert "transformer: DiTTransformer2DModel" in result.output
    assert all(word in result.output for word in ("block", "module", *registry.names()))


def test_doctor_reports_what_supports_says(dit_folder: Path) -> None:
    from diffusers import DiTTransformer2DModel

    result = invoke("doctor", str(dit_folder), "--json")
    (found,) = json.loads(result.output)["transformers"]
    model = DiTTransformer2DModel.from_config(json.loads((dit_folder / "transformer" / "config.json").read_text()))
    expected = dita.supports(model)
    assert {name: (row["ok"], row["reason"]) for name, row in found["seams"].items()} == expected.seams
    assert {name: (row["ok"], row["reason"]) for name, row in found["methods"].items()} == expected.methods


def test_doctor_on_a_bare_transformer_folder(dit_folder: Path) -> None:
    result = invoke("doctor", str(dit_folder / "transformer"), "--json")
    assert result.exit_code == 0
    assert json.loads(result.output)["transformers"][0]["component"] == "model"


def test_doctor_on_a_pipeline_without_transformer(tmp_path: Path) -> None:
    folder = write_index(tmp_path, unet=["diffusers", "UNet2DConditionModel"], safety_checker=[None, None])
    result = invoke("doctor", str(folder))
    assert result.exit_code == 1
    assert "SomePipeline has no transformer" in result.output
    assert "unet (UNet2DConditionModel)" in result.output


def test_doctor_on_an_unknown_transformer_class(tmp_path: Path) -> None:
    folder = write_index(tmp_path, transformer=["mine", "MyTransformer"])
    result = invoke("doctor", str(folder))
    assert result.exit_code == 1
    assert "no class of this name" in result.output


def test_doctor_on_a_model_without_blocks(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    UNet2DModel(
        sample_size=8,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=1,
        attention_head_dim=4,
    ).save_pretrained(tmp_path / "transformer")
    folder = write_index(tmp_path, transformer=["diffusers", "UNet2DModel"])
    result = invoke("doctor", str(folder), "--json")
    (found,) = json.loads(result.output)["transformers"]
    assert not found["seams"]["block"]["ok"]
    assert found["seams"]["block"]["reason"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "no folder, nor a hub id"),
        ("no-slash", "no folder, nor a hub id"),
        ("dita-contributors/no-such-pipeline", "could not be read from the Hugging Face hub"),
    ],
)
def test_doctor_says_what_it_cannot_find(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = invoke("doctor", source)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_doctor_refuses_a_folder_without_configuration(tmp_path: Path) -> None:
    result = invoke("doctor", str(tmp_path))
    assert result.exit_code == 2
    assert "model_index.json" in result.stderr
    (tmp_path / "model_index.json").write_text("not json")
    assert "is not JSON" in invoke("doctor", str(tmp_path)).stderr


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The options of each `run_sweep` call; the sweep itself is tested with dita.eval."""
    calls: list[dict[str, Any]] = []

    def run_sweep(**options: Any) -> Path:
        calls.append(options)
        report = tmp_path / "report.html"
        report.write_text("")
        return report

    monkeypatch.setattr("dita.eval.sweep.run_sweep", run_sweep)
    return calls


def test_sweep_passes_its_options_on(sweeps: list[dict[str, Any]], tmp_path: Path) -> None:
    arguments = ["--quick", "-m", "taylorseer, magcache", "-m", "bwcache", "--samples", "4", "--steps", "9"]
    more = ["--seed", "3", "--threads", "1", "--batch", "2", "--guidance", "1.5", "--out", str(tmp_path)]
    result = invoke("sweep", *arguments, *more)
    assert result.exit_code == 0, result.output
    assert sweeps == [
        {
            "out": tmp_path,
            "quick": True,
            "methods": ["taylorseer", "magcache", "bwcache"],
            "samples": 4,
            "steps": 9,
            "seed": 3,
            "threads": 1,
            "batch": 2,
            "guidance": 1.5,
        }
    ]
    assert str(tmp_path / "report.html") in result.output


def test_demo_is_the_quick_sweep(sweeps: list[dict[str, Any]]) -> None:
    assert invoke("demo").exit_code == 0
    assert invoke("sweep", "--model", "fashion-dit", "--quick", "--out", "runs/quick").exit_code == 0
    assert sweeps[0] == sweeps[1]


def test_a_sweep_file_is_read_and_options_go_over_it(sweeps: list[dict[str, Any]], tmp_path: Path) -> None:
    file, prompts = tmp_path / "sweep.yaml", tmp_path / "prompts.txt"
    file.write_text("model: fashion-flux\nsamples: 8\nsettings:\n  - taylorseer: {interval: [3, 4]}\n")
    more = ["--samples", "4", "--prompts", str(prompts), "--device", "cuda", "--dtype", "bf16", "--peers"]
    assert invoke("sweep", str(file), *more, "-c", "height=512", "-c", "negative_prompt=dull").exit_code == 0
    assert sweeps == [
        {
            "model": "fashion-flux",
            "out": Path("runs/sweep"),
            "settings": [{"taylorseer": {"interval": [3, 4]}}],
            "peers": True,
            "samples": 4,
            "prompts": prompts,
            "device": "cuda",
            "dtype": "bf16",
            "call": {"height": 512, "negative_prompt": "dull"},
        }
    ]
    file.write_text("settings: []\nsample: 3\n")
    refused = invoke("sweep", str(file))
    assert refused.exit_code == 2
    assert "unknown keys sample" in " ".join(refused.output.split())
    refused = invoke("sweep", "-c", "height:512")
    assert refused.exit_code == 2
    assert "expected name=value" in " ".join(refused.output.split())


def test_errors_are_one_message_and_status_two(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_sweep(**options: Any) -> Path:
        raise DitaError("there is no pipeline 'x'")

    monkeypatch.setattr("dita.eval.sweep.run_sweep", run_sweep)
    result = invoke("sweep", "--model", "x")
    assert result.exit_code == 2
    assert result.stderr == "dita: there is no pipeline 'x'\n"


def test_help_needs_no_torch() -> None:
    program = "import sys; import dita.cli; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
