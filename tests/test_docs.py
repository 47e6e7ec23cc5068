"""What README and CONTRIBUTING say is so."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from dita import registry
from dita.eval.labels import setting_of
from dita.eval.rows import read_rows

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
tables = import_module("readme_tables")
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/fitted.md",
    "docs/edge_cases.md",
    "docs/robustness.md",
    "docs/composition.md",
    "kernels/README.md",
    "schedulers/README.md",
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", read("README.md"), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    shortened = "\n".join(blocks).replace("num_inference_steps=50", "num_inference_steps=12")
    names: dict[str, object] = {}
    exec(compile(shortened, "README.md", "exec"), names)
    assert (tmp_path / "magcache.json").is_file()


def test_readme_lists_every_method_with_its_file() -> None:
    listed = dict(re.findall(r"^\| \[`([a-z0-9-]+)`\]\((\S+)\) \|", read("README.md"), flags=re.MULTILINE))
    defined = {name: registry.get(name).__module__.removeprefix("dita.").replace(".", "/") for name in registry.names()}
    assert listed == {name: f"{file}.py" for name, file in defined.items()}
    for name in listed:
        arxiv = registry.get(name).arxiv
        assert not arxiv[0].isdigit() or f"arxiv.org/abs/{arxiv}" in read("README.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", read(document))
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not ((ROOT / document).parent / target).exists()]
    assert not missing


def test_what_works_together_is_tested() -> None:
    rows = [line for line in read("docs/composition.md").splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 25
    for row in rows:
        named = re.search(r"`(test_\w+\.py)::(test_\w+)` \|$", row)
        assert named and f"\ndef {named[2]}(" in read(f"tests/{named[1]}"), row


def test_readme_commands_are_make_targets() -> None:
    commands = set(re.findall(r"\bmake ([a-z]+)", read("README.md") + read("CONTRIBUTING.md")))
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), flags=re.MULTILINE))
    assert {"demo", "test"} <= commands <= targets


def test_tables_of_the_readme_are_made_of_the_committed_rows() -> None:
    assert tables.written(read("README.md")) == read("README.md")


def test_settings_in_tables_are_those_of_committed_rows() -> None:
    measured: dict[tuple[str, str], set[str]] = {}
    for file in (ROOT / "eval" / "results").glob("*/results.jsonl"):
        for row in read_rows(file):
            if row.get("psnr") is not None:
                setting = re.sub(r"\bweights=\S+ ", "", setting_of(row).removesuffix(", default"))
                measured.setdefault((row["method"], setting), set()).add(f"{row['psnr']:.1f}")
    methods = {method for method, _ in measured}
    checked = 0
    fitted = read("docs/fitted.md").split("**fashion-dit**, 50 DDIM")[0]  # what follows is of other rows, see below
    for line in [*read("README.md").splitlines(), *fitted.splitlines()]:
        cells = [cell.strip() for cell in line.removeprefix("|").split("|")]
        numbers = {cell.split(" ")[0] for cell in cells}
        own = [method for method in methods if f"{cells[0]} ".startswith(f"{method} ")]
        if not line.startswith("| ") or not own or not any(re.fullmatch(r"\d+\.\d", number) for number in numbers):
            continue
        if "as alone" in line or "; " in line or "(fashion-flux" in line:  # told in words
            continue
        named = [(method, setting) for method in own for setting in (cells[0].removeprefix(f"{method} "), *cells[1:])]
        assert any(measured.get(pair, set()) & numbers for pair in named), line
        checked += 1
    assert checked > 150


def test_tables_of_the_fitted_page_are_the_committed_ones() -> None:
    measured = read("eval/results/fitted-dit/results.md") + read("eval/results/fitted-flux/results.md")
    block = read("docs/fitted.md").split("**fashion-dit**, 50 DDIM")[1].split("<!-- fitted:end -->")[0]
    lines = [line for line in block.splitlines() if line.startswith("|")]
    assert len(lines) > 80 and set(lines) <= set(measured.splitlines())
