"""Who may import whom: networks, losses and scores are plain PyTorch, Hydra ends at the entry point."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "coca_lit").rglob("*.py"))
FRAMEWORKS = {"lightning", "pytorch_lightning", "hydra", "omegaconf"}
ENTRY_POINTS = {"runs/redaction.py", "runs/run_folder.py"}  # and the whole of cli/
PLAIN = [
    *("coca_lit", "coca_lit.losses", "coca_lit.training.optim", "coca_lit.tokenizer", "coca_lit.distributed"),
    *("coca_lit.data.transforms", "coca_lit.progress", "coca_lit.training.self_critical"),
    *(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("models", "weights", "metrics", "evals", "inference", "data")
        for path in ROOT.glob(f"coca_lit/{folder}/**/[a-z]*.py")
        if path.name != "datamodule.py"  # records are read without Lightning
    ),
]


def loaded_by(*modules: str) -> set[str]:
    """Top-level packages in memory after importing the modules in a fresh interpreter."""
    code = f"import sys, json, {', '.join(modules)}; print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def test_plain_parts_load_no_framework() -> None:
    loaded = loaded_by(*PLAIN)
    assert "torch" in loaded
    assert not loaded & FRAMEWORKS


@pytest.mark.parametrize("command", ["train", "evaluate", "plan", "demo", "export", "caption", "search"])
def test_command_line_loads_no_torch(command: str) -> None:
    loaded = loaded_by(f"coca_lit.cli.{command}")
    assert "hydra" in loaded
    assert not loaded & {"torch", "lightning", "timm", "numpy", "matplotlib", "pycocoevalcap", "webdataset", "gradio"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_of_file(path: Path) -> None:
    names = list(imports(path))
    packages = {name.split(".")[0] for name in names}
    assert not packages & {"experiments", "tests", "pytorch_lightning"}
    place = path.relative_to(ROOT / "coca_lit")
    if place.parts[0] != "cli" and str(place) not in ENTRY_POINTS:
        assert not packages & {"hydra", "omegaconf"}
    for name in names:
        if name.split(".")[0] == "lightning":
            assert name.startswith("lightning.pytorch")
