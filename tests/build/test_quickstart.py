"""examples/quickstart.ipynb runs from top to bottom, and shows what its text says."""

import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def read():
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_stored_without_results():
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert len(cells) >= 6
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_the_notebook_runs_and_shows_what_it_says(monkeypatch):
    pytest.importorskip("transformers")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = read()
    client.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "cpp        yes" in printed
    assert "attention: cpp" in printed
    assert float(re.search(r"largest difference from PyTorch: (\S+)", printed)[1]) < 1e-5
    before, after = map(float, re.search(r"loss (\S+) before, (\S+) after", printed).groups())
    assert before == pytest.approx(after, abs=1e-3)
    assert all(
        re.search(rf"^{name} +[\d.]+ ms$", printed, re.MULTILINE) for name in ("unmodified", "accelerated")
    )
    first, last = map(float, re.search(r"loss (\S+) at first, (\S+) at last", printed).groups())
    assert first > 5 and last < 0.5
    assert "The quick brown fox jumps over the lazy dog." in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)
