"""The notebook runs from its first to its last cell, and what is committed of it can be read without running it."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a Jupyter kernel

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "experiments" / "notebooks" / "quickstart.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_runs_in_jupyter_from_another_folder(tmp_path, monkeypatch):
    """As in a hosted notebook."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(NOTEBOOK, tmp_path)
    notebook = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for output in code_cells(notebook)[-1].outputs)
    scores = dict(line.split() for line in printed.splitlines())
    assert scores.keys() > {"Bleu_1", "CIDEr"}
    assert [float(value) for name, value in scores.items() if "recall" in name and 0 < float(value) <= 1]


def test_committed_outputs():
    text = NOTEBOOK.read_text()
    notebook = json.loads(text)
    assert len(notebook["cells"]) <= 12
    assert len(text) < 400_000
    assert [cell["execution_count"] for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 4
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    printed = json.dumps([output.get("text") for output in outputs]) + "".join(map(str, notebook["metadata"].values()))
    assert not re.search(r"(?<![.\w])/(root|home|work|tmp|Users)/", printed)
