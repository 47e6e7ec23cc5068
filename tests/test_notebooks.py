"""Every notebook runs from top to bottom, with fewer solver steps and samples than a reader would take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
SHRUNK = {
    "DITA_NOTEBOOK_STEPS": "6",
    "DITA_NOTEBOOK_SAMPLES": "2",
    "DITA_NOTEBOOK_FRAMES": "2",
    "DITA_NOTEBOOK_PAIRS": "1",
}
FRESH = "%reset -f\nimport os, torch\nos.chdir({folder!r})\ntorch.set_grad_enabled(True)\ndel os, torch"
"""What a notebook finds: no name of the one before it, whose imports alone stay loaded and save ten seconds."""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NotebookClient]:
    """A running kernel."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in SHRUNK.items():
            environment.setenv(name, value)
        environment.setenv("PYTHONPATH", str(NOTEBOOKS[0].parents[1]))
        environment.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        client = NotebookClient(nbformat.v4.new_notebook(), timeout=600, kernel_name="python3")
        with client.setup_kernel():
            yield client


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, kernel: NotebookClient) -> None:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FRESH.format(folder=str(tmp_path))))
    kernel.nb = notebook
    kernel.execute(cleanup_kc=False)
    results = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "execute_result"
    ]
    assert results[-1] == "True", "each notebook ends in the claim that it makes"
