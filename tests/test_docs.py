"""What README, CONTRIBUTING and the pages under docs say is so."""

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
loops = import_module("loop_tables")
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "*/README.md", "eval/models/*/README.md")
    for path in ROOT.glob(pattern)
)
RESULTS = [name for name in DOCUMENTS if name == "README.md" or name.startswith("docs/results/")]


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


def places(text: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        path, _, place = target.partition("#")
        found = (ROOT / document).parent / path if path else ROOT / document
        if "://" not in target and not (found.exists() and (not place or place in places(found.read_text("utf-8")))):
            missing.append(target)
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


def test_tables_are_made_of_the_committed_rows() -> None:
    texts = tables.documents()
    assert tables.written(texts) == texts
    page = ROOT / "docs" / "results" / "sampling-loop.md"
    with pytest.raises(SystemExit, match="0 places for the table 'sizes'"):
        tables.written({**texts, page: texts[page].replace("sizes:end", "")})


def test_loop_tables_compare_with_the_next_dearer_plain_run_and_all_cheaper_ones() -> None:
    plain = [{"method": "fewer steps", "flops_ratio": f, "psnr": p} for f, p in ((0.3, 31.0), (0.2, 33.0), (0.6, 40.0))]

    def ahead(share: float, psnr: float) -> float | None:
        row = {"method": "sada", "flops_ratio": share, "psnr": psnr}
        return loops.over_fewer_steps(row, [*plain, row])

    assert ahead(0.3, 34.0) == ahead(0.3001, 34.0) == 1.0  # equal operations; twenty hundredths are closer
    assert ahead(0.31, 34.0) == -6.0 and ahead(0.1, 34.0) == 1.0
    assert ahead(0.7, 41.0) is None and ahead(0.7, 39.0) == -1.0 and ahead(1.0, 60.0) == -float("inf")


def test_a_sweep_that_is_not_measured_yet_is_passed_over() -> None:
    assert tables.loops(["fashion-wan-picard", "not measured"]) == tables.loops(["fashion-wan-picard"])


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
    for line in [line for text in (*map(read, RESULTS), fitted) for line in text.splitlines()]:
        line = re.sub(r"\bweights=\S+ ", "", line).replace(", default |", " |")
        cells = [cell.strip() for cell in line.removeprefix("|").split("|")]
        numbers = {cell.split(" ")[0] for cell in cells}
        own = [method for method in methods if f"{cells[0]} ".startswith(f"{method} ")]
        if not line.startswith("| ") or not own or not any(re.fullmatch(r"\d+\.\d", number) for number in numbers):
            continue
        named = [(method, setting) for method in own for setting in (cells[0].removeprefix(f"{method} "), *cells[1:])]
        assert any(measured.get(pair, set()) & numbers for pair in named), line
        checked += 1
    assert checked > 300


def test_tables_of_the_fitted_page_are_the_committed_ones() -> None:
    measured = read("eval/results/fitted-dit/results.md") + read("eval/results/fitted-flux/results.md")
    block = read("docs/fitted.md").split("**fashion-dit**, 50 DDIM")[1].split("<!-- fitted:end -->")[0]
    lines = [line for line in block.splitlines() if line.startswith("|")]
    assert len(lines) > 80 and set(lines) <= set(measured.splitlines())
