"""Wheel, editable install and checkout are the same package, and nothing hides Hugging Face's `kernels`."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path, PurePosixPath

import pytest
from setuptools.config.pyprojecttoml import load_file

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "caching", "schedulers", "eval")
INNER = (
    "kernels.sparse",
    "kernels.reduction",
    "schedulers.guidance",
    "schedulers.resolution",
    "schedulers.solvers",
    "schedulers.timesteps",
)
SITE_PACKAGES = sysconfig.get_paths()["purelib"]
BUILD_INPUTS = ("pyproject.toml", "README.md", "LICENSE", "dita", *ROOMS)

# What each installation must agree on: every module's name and public names, and the registry.
_INVENTORY = """
import importlib, json, sys
names = json.loads(sys.argv[1])
modules = {name: importlib.import_module(name) for name in names}
from dita import registry
print("INVENTORY" + json.dumps({
    "origin": modules["dita"].__file__,
    "public": {name: sorted(getattr(module, "__all__", [])) for name, module in modules.items()},
    "exported": sorted(name for name in modules["dita"].__all__ if getattr(modules["dita"], name) is not None),
    "methods": registry.names(),
    "classes": {name: registry.get(name).__module__ for name in registry.names()},
    "version": modules["dita"].__version__,
}))
"""


def module_files() -> dict[str, str]:
    """Every Python file of the package: path in the wheel -> module name."""
    found = {}
    for folder, prefix in ((ROOT / "dita", "dita"), *((ROOT / room, f"dita/{room}") for room in ROOMS)):
        pattern = "*.py" if prefix == "dita" else "**/*.py"
        for file in folder.glob(pattern):
            path = PurePosixPath(prefix, *file.relative_to(folder).parts)
            parts = path.with_suffix("").parts
            found[str(path)] = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return found


def modules() -> list[str]:
    return sorted(name for name in module_files().values() if not name.endswith("__main__"))


def clean_environment(*paths: str | Path) -> dict[str, str]:
    """The environment without the checkout on the path and without Python settings of the caller."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(arguments: list[str], folder: Path, *paths: str | Path) -> str:
    done = subprocess.run(arguments, cwd=folder, env=clean_environment(*paths), capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments[:4]} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def inventory(folder: Path, *paths: str | Path, preamble: str = "") -> dict:
    """Import everything in a fresh interpreter that sees this environment's packages but none of its .pth files."""
    program = ["-S", "-c", preamble + _INVENTORY, json.dumps(modules())]
    output = run([sys.executable, *program], folder, *paths, SITE_PACKAGES)
    return json.loads(output.split("INVENTORY", 1)[1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that building leaves nothing in the checkout and finds no leftovers there."""
    copy = tmp_path_factory.mktemp("source")
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)], out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def checkout_inventory(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return inventory(tmp_path_factory.mktemp("elsewhere"), ROOT)


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    models = {
        f"dita/eval/{file.relative_to(ROOT / 'eval').as_posix()}"
        for folder in ("models", "templates")
        for file in (ROOT / "eval" / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert held == {*module_files(), "dita/py.typed", *models}


def test_wheel_says_who_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(f"{info}/METADATA").decode()
    version = re.search(r"__version__ = \"(.+)\"", (ROOT / "dita" / "__init__.py").read_text(encoding="utf-8"))
    assert version is not None
    assert f"\nVersion: {version[1]}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in archive.namelist())
    assert "dita = dita.cli:app" in archive.read(f"{info}/entry_points.txt").decode()


def test_wheel_and_checkout_import_the_same(wheel: Path, checkout_inventory: dict, tmp_path: Path) -> None:
    target = tmp_path / "target"
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)], tmp_path)
    installed = inventory(tmp_path, target)
    assert Path(installed.pop("origin")).is_relative_to(target)
    assert Path(checkout_inventory["origin"]).is_relative_to(ROOT)
    assert installed == {key: value for key, value in checkout_inventory.items() if key != "origin"}
    assert installed["methods"]


def test_editable_install_and_checkout_import_the_same(source: Path, checkout_inventory: dict, tmp_path: Path) -> None:
    target = tmp_path / "target"
    options = ["--no-deps", "--no-build-isolation", "--target", str(target)]
    run([sys.executable, "-m", "pip", "install", *options, "--editable", str(source)], tmp_path)
    # First on the path too: an environment with an editable dita of its own holds a finder module of the same name.
    installed = inventory(tmp_path, target, preamble=f"import site; site.addsitedir({str(target)!r})")
    assert Path(installed.pop("origin")).is_relative_to(source)
    assert installed == {key: value for key, value in checkout_inventory.items() if key != "origin"}


def test_every_folder_with_modules_is_listed() -> None:
    table = load_file(ROOT / "pyproject.toml")["tool"]["setuptools"]
    folders = {str(PurePosixPath(path).parent).replace("/", ".") for path in module_files()}
    assert {*folders, *(f"dita.{room}" for room in ROOMS)} == set(table["packages"])
    folders = {f"dita.{room}": room.replace(".", "/") for room in (*ROOMS, *INNER)}
    assert table["package-dir"] == {"dita": "dita", **folders}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_linked_by_relative_links(room: str) -> None:
    link = ROOT / "dita" / room
    assert link.is_symlink(), f"dita/{room} must be a link; git writes links only where the file system has them"
    assert os.readlink(link) == f"../{room}"


def test_kernels_is_no_regular_package() -> None:
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def imported_by(file: Path) -> set[str]:
    """The top-level names that a Python file imports absolutely."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_rooms_are_imported_under_dita() -> None:
    files = [file for folder in ("dita", *ROOMS, "tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > len(module_files())
    offenders = {str(file.relative_to(ROOT)): found for file in files if (found := imported_by(file) & set(ROOMS))}
    assert not offenders


def test_every_third_party_import_is_declared() -> None:
    project = load_file(ROOT / "pyproject.toml")["project"]
    extra = [line for lines in project["optional-dependencies"].values() for line in lines]
    name = re.compile(r"[A-Za-z0-9_.-]+")
    declared, optional = (
        {match[0].lower().replace("_", "-") for line in lines if (match := name.match(line))}
        for lines in (project["dependencies"], extra)
    )
    distributions = packages_distributions()
    imported = set().union(*(imported_by(ROOT / file) for file in module_files()))
    needed = {
        distribution.lower().replace("_", "-")
        for module in imported - set(sys.stdlib_module_names) - {"dita"}
        for distribution in distributions.get(module, [module])
    }
    assert needed <= declared | optional
    assert declared <= needed


# The names that transformers and diffusers take from an accepted release of Hugging Face's package.
_FAKE_KERNELS = """
class _Anything:
    def __init__(self, *args, **kwargs): pass

CUDAProperties = ROCMProperties = Device = LayerRepository = LocalLayerRepository = FuncRepository = _Anything
KernelizeFallback = _Anything
IS_THE_FAKE = True

class Mode:
    TRAINING = INFERENCE = "mode"

def _decorate(*args, **kwargs):
    return lambda target: target

def get_kernel(*args, **kwargs):
    raise RuntimeError("the fake has no kernels")

kernelize = get_kernel
register_kernel_mapping = use_kernel_mapping = replace_kernel_forward_from_hub = _decorate
use_kernel_forward_from_hub = use_kernel_func_from_hub = use_kernelized_func = _decorate
"""

_PROBE = """
import importlib.util, json, sys
sys.path.insert(1, sys.argv[1])
from diffusers import FluxPipeline
from transformers import T5EncoderModel
from transformers.utils import is_kernels_available
import dita
spec = importlib.util.find_spec("kernels")
fake = False
if is_kernels_available():
    import kernels
    fake = getattr(kernels, "IS_THE_FAKE", False)
print("PROBE" + json.dumps({
    "dita": dita.__file__,
    "available": bool(is_kernels_available()),
    "fake": fake,
    "origin": None if spec is None else spec.origin,
    "classes": [FluxPipeline.__name__, T5EncoderModel.__name__],
}))
"""


def accepted_version() -> str:
    """A version of `kernels` that the installed transformers takes for usable."""
    from transformers.utils import import_utils

    return getattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")


@pytest.mark.parametrize("installed", [False, True], ids=["as-it-is", "accepted-release-installed"])
def test_flux_and_t5_import_at_the_root(installed: bool, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    extra.mkdir()
    if installed:
        info = extra / f"kernels-{accepted_version()}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {accepted_version()}\n")
        (info / "RECORD").write_text("kernels/__init__.py,,\n")
        (extra / "kernels").mkdir()
        (extra / "kernels" / "__init__.py").write_text(_FAKE_KERNELS)
    # An empty PYTHONPATH and `-c` put the working directory, the root of the checkout, before everything else.
    output = run([sys.executable, "-c", _PROBE, str(extra)], ROOT)
    found = json.loads(output.split("PROBE", 1)[1])
    assert found["classes"] == ["FluxPipeline", "T5EncoderModel"]
    assert Path(found["dita"]).is_relative_to(ROOT)
    if installed:
        assert found["origin"] == str(extra / "kernels" / "__init__.py")
        assert found["available"]
        assert found["fake"]
    else:
        assert found["origin"] is None or not Path(found["origin"]).is_relative_to(ROOT)
        assert not found["fake"]
