"""Files and settings from anywhere: each is read or refused with a sentence, and nothing in them is executed."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import METHODS, assert_same_snapshot, snapshot
from safetensors.torch import save, save_file
from small import Setting, build

import dita
from dita import registry
from dita.config import Method
from dita.errors import DitaError
from dita.schedulers.timesteps.autodiffusion import AutoDiffusion, SearchTable

ROOT = Path(__file__).resolve().parents[1]
TINY = "wan"


def paths_of(name: str) -> list[str]:
    """The settings of a method that name a file."""
    fields = dataclasses.fields(registry.get(name))
    return [field.name for field in fields if field.default == "" and field.name != "keep_as"]


FILES = [(name, path) for name in METHODS for path in paths_of(name)]
TABLES = [name for name in METHODS if "table" in {field.name for field in dataclasses.fields(registry.get(name))}]


UNREAD = ("linear", "trajectories")  # what a fit says of itself to whoever looks into it


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def header(text: bytes, says: int | None = None) -> bytes:
    return (len(text) if says is None else says).to_bytes(8, "little") + text


KINDS: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("once upon a time"),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "deep": lambda path: path.write_text("[" * 100_000),
    "list": lambda path: path.write_text("[1, 2]"),
    "number as method": lambda path: path.write_text('{"method": [1], "schema": 1, "settings": {}}'),
    "list as settings": lambda path: path.write_text('{"method": "taylorseer", "schema": 1, "settings": [[1]]}'),
    "foreign tensors": lambda path: save_file({"w": torch.ones(2)}, path),
    "tensors without end": lambda path: path.write_bytes(save({"w": torch.ones(100)})[:-40]),
    "tensors that are not finite": lambda path: save_file({"weight": torch.full((3, 2, 2), math.nan)}, path),
    "huge header": lambda path: path.write_bytes(header(b"{}", 2**62)),
    "header of the file's size": lambda path: path.write_bytes(header(b"{}", 10**9)),
    "tensor of the world's size": lambda path: path.write_bytes(
        header(b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}')
    ),
    "deep text in the header": lambda path: save_file(
        {"w": torch.ones(2)}, path, dict.fromkeys(("dita", "agd"), "[" * 100_000)
    ),
    "pickle": lambda path: torch.save({"w": Trap(path.with_name("trapped"))}, path),
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_any_kind_are_refused(kind: str, tmp_path: Path) -> None:
    pipe = build(TINY)
    before = snapshot(pipe)
    for number, (name, setting) in enumerate((*FILES, ("", ""))):
        for suffix in (".safetensors", ".json"):
            path = tmp_path / f"{number}{suffix}"
            KINDS[kind](path)
            with pytest.raises(DitaError) as caught:
                if name:
                    dita.accelerate_pipeline(pipe, name, **{setting: str(path)})  # pyright: ignore[reportArgumentType]
                else:
                    dita.load_method(path)
            assert path.name in str(caught.value) or "expected JSON" in str(caught.value)
            assert_same_snapshot(before, snapshot(pipe))
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("path", ["../../../../etc/passwd", "/etc/passwd", "a\0b.json", "\0.safetensors", "~", "", "."])
def test_paths_that_lead_elsewhere(path: str) -> None:
    """A path is the user's own; what lies there is no calibration, and of its content little is told."""
    with pytest.raises(DitaError) as caught:
        dita.load_method(path)
    assert len(str(caught.value)) < 500


def test_every_setting_that_names_a_file_is_known() -> None:
    assert {name for name, _ in FILES} == {"agd", "fitted", "sla", "vorta"}


@functools.cache
def written(name: str) -> str:
    """A calibrated method as JSON."""
    if name == "autodiffusion":  # whose forced setting holds no numbers
        values = {"timesteps": (999, 500, 1), "sigmas": (), "left_out": ((), (1,), ()), "budget": 3}
        return AutoDiffusion(steps=3, table=SearchTable(values)).to_json()
    return Setting(name).config(TINY).to_json()


def spoiled(value: Any, by: Any) -> Any:
    """The first number in a table is another."""
    if isinstance(value, dict) and value:
        first = next(iter(value))
        return {**value, first: spoiled(value[first], by)}
    if isinstance(value, list) and value:
        return [spoiled(value[0], by), *value[1:]]
    return by


@pytest.mark.parametrize("name", TABLES)
def test_damaged_tables_are_refused(name: str) -> None:
    data = json.loads(written(name))
    table = data["settings"].get("table")
    if not table:
        pytest.skip("its forced setting holds no numbers")
    changes: list[dict[str, Any]] = [
        {"values": spoiled(table["values"], by)} for by in (math.nan, math.inf, -math.inf, None, True, {"a": [None]})
    ]
    changes += [{"steps": steps} for steps in (-1, 10**12, 1.5, math.inf, "5", None)]
    changes += [{"shape": shape} for shape in (7, "abc", [None], [-1], [[1]])]
    changes += [{"model": 7}, {"scheduler": []}, {"values": [1]}, {"values": None}]
    for change in changes:
        text = json.dumps({**data, "settings": {**data["settings"], "table": {**table, **change}}})
        with pytest.raises(DitaError):
            Method.from_json(text)
    foreign = {**data, "settings": {**data["settings"], "table": {**table, "model": "Other:0123456789ab"}}}
    pipe = build(TINY)
    before = snapshot(pipe)
    odd = [spoiled(table["values"], by) for by in ("x", {"a": 1.0})]
    odd += [{**table["values"], one: "x"} for one in table["values"] if one not in UNREAD]
    for values in (*odd, dict.fromkeys(table["values"], "x")):
        text = json.dumps({**data, "settings": {**data["settings"], "table": {**table, "values": values}}})
        with pytest.raises(DitaError):
            dita.accelerate_pipeline(pipe, Method.from_json(text))
        assert_same_snapshot(before, snapshot(pipe))
    with pytest.raises(DitaError, match="Other:0123456789ab"):
        dita.accelerate_pipeline(pipe, Method.from_json(json.dumps(foreign)))
    assert_same_snapshot(before, snapshot(pipe))


ODD: tuple[Any, ...] = (
    None,
    "x",
    [],
    [[]],
    {},
    {"a": 1},
    True,
    -1,
    1.5,
    math.nan,
    math.inf,
    -math.inf,
    10**30,
    [None],
    ["x"],
)


@pytest.mark.parametrize("name", METHODS)
def test_settings_of_any_kind_are_taken_or_refused(name: str) -> None:
    data = json.loads(registry.get(name)().to_json())
    for setting in data["settings"]:
        for value in ODD:
            text = json.dumps({**data, "settings": {**data["settings"], setting: value}})
            try:
                assert hash(Method.from_json(text)) is not None
            except DitaError as error:
                assert str(error)


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}


def findings(source: str) -> list[str]:
    """What in a file could execute what it is given."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in FORBIDDEN_CALLS or "trust_remote_code" in given or given.get("shell") == "True":
            found.append(ast.unparse(node))
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(ast.unparse(node))
        if given.get("allow_pickle", "False") != "False":
            found.append(ast.unparse(node))
    return found


def test_nothing_in_the_package_executes_what_it_reads() -> None:
    bad = ["eval(x)", "import pickle", "from pickle import load", "torch.load(x)", "torch.load(x, weights_only=False)"]
    bad += ["f(trust_remote_code=True)", "np.load(x, allow_pickle=True)", "subprocess.run(x, shell=True)"]
    assert all(findings(source) for source in bad) and not findings("model.eval(); torch.load(x, weights_only=True)")
    files = [
        path for room in ("dita", "caching", "kernels", "schedulers", "eval") for path in (ROOT / room).rglob("*.py")
    ]
    assert len(files) > 200
    found = {str(path.relative_to(ROOT)): findings(path.read_text(encoding="utf-8")) for path in files}
    assert not {path: what for path, what in found.items() if what}
    assert not [str(path) for path in files if "trust_remote_code" in path.read_text(encoding="utf-8")]
