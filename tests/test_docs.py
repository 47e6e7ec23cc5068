"""What README and CONTRIBUTING say is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dita import registry

ROOT = Path(__file__).resolve().parents[1]
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
