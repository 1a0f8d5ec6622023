"""The notebook runs from its first to its last cell, and what is committed of it can be read without running it."""

import json
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from coca_lit.models import create_model
from coca_lit.weights.load import save_model

pytestmark = pytest.mark.slow  # a Jupyter kernel

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "experiments" / "notebooks" / "quickstart.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_model(create_model("coca_tiny"), tmp_path / "tiny.safetensors")
    monkeypatch.setenv("COCA_CHECKPOINT", str(tmp_path / "tiny.safetensors"))


@pytest.mark.usefixtures("checkpoint")
def test_cells_run_one_after_another(monkeypatch, capsys):
    """With any model of the scenes."""
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    names = {}
    for cell in code_cells(json.loads(NOTEBOOK.read_text())):
        exec("".join(line for line in cell["source"] if not line.startswith("%")), names)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-7:]][:5] == [
        *("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr")
    ]


@pytest.mark.usefixtures("checkpoint")
def test_runs_in_jupyter(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(NOTEBOOK, tmp_path)
    notebook = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "".join(output.get("text", "") for output in code_cells(notebook)[-1].outputs).startswith("Bleu_1")


def test_committed_outputs():
    text = NOTEBOOK.read_text()
    notebook = json.loads(text)
    assert len(notebook["cells"]) <= 12
    assert len(text) < 400_000
    assert [cell["execution_count"] for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    printed = json.dumps([output.get("text") for output in outputs]) + "".join(map(str, notebook["metadata"].values()))
    assert not re.search(r"(?<![.\w])/(root|home|work|tmp|Users)/", printed)
