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
# Besides cli/, the commands of the tools, and projects, which may be about Hydra.
READS_CONFIGS = {"runs/redaction.py", "runs/resume.py", "runs/run_folder.py", "tools/engines.py"}
PLAIN = [
    *("coca_lit", "coca_lit.losses", "coca_lit.training.optim", "coca_lit.tokenizer", "coca_lit.distributed"),
    *("coca_lit.data.transforms", "coca_lit.progress", "coca_lit.training.objectives"),
    *(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("models", "weights", "metrics", "evals", "inference", "data")
        for path in ROOT.glob(f"coca_lit/{folder}/**/[a-z]*.py")
        if path.name not in ("datamodule.py", "laion.py")  # records are read without Lightning
    ),
]


COMMANDS = [  # of Hydra
    *("coca_lit.cli.train", "coca_lit.cli.evaluate"),
    *(f"coca_lit.tools.{name}.command" for name in ("plan", "demo", "export", "caption", "search")),
]
LOADED = """
import importlib, json, sys
def packages(names):
    for name in names:
        importlib.import_module(name)
    return sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps([packages(names) for names in json.load(sys.stdin)]))
"""


def loaded_by(*steps: list[str]) -> list[set[str]]:
    """Top-level packages in memory of a fresh interpreter after each step, which imports some modules more."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED], cwd=ROOT, input=json.dumps(steps), capture_output=True, text=True, check=True
    )
    return [set(names) for names in json.loads(done.stdout)]


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.slow
def test_plain_parts_load_no_framework() -> None:
    (loaded,) = loaded_by(PLAIN)
    assert "torch" in loaded
    assert not loaded & FRAMEWORKS


@pytest.mark.slow
def test_training_from_random_weights_loads_no_reader_of_weights() -> None:
    build = "module.build_module(command.compose('train', ['model.net.name=coca_tiny', 'output_dir=x', 'name=x']))"
    program = f"import sys\nfrom coca_lit.cli import command, module\n{build}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "coca_lit.models.coca" in done.stdout.split()
    assert "coca_lit.weights.load" not in done.stdout.split()


def test_command_line_loads_no_torch() -> None:
    heavy = {"torch", "lightning", "timm", "numpy", "matplotlib", "pycocoevalcap", "webdataset", "gradio"}
    for command, loaded in zip(COMMANDS, loaded_by(*([name] for name in COMMANDS)), strict=True):
        assert "hydra" in loaded, command
        assert not loaded & heavy, command


@pytest.mark.slow
def test_help_and_mistakes_in_the_grammar_are_answered_without_torch() -> None:
    program = """
import sys
from coca_lit.cli import train_command
for word in ("--help", "--version", "--hlp", "seed", "trainer=smok"):
    sys.argv = ["train.py", word]
    try:
        train_command()
    except SystemExit as error:
        assert str(error).startswith("error: ") and word not in ("--help", "--version"), error
    else:
        assert word in ("--help", "--version")
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Examples" in done.stdout
    assert not {"torch", "lightning", "timm", "numpy"} & {*done.stdout.splitlines()[-1].split()}


def test_imports_of_the_package() -> None:
    """Hydra ends at the commands; nothing comes from this repository's other folders or from Lightning's older name."""
    for path in SOURCES:
        names = list(imports(path))
        packages = {name.split(".")[0] for name in names}
        assert not packages & {"experiments", "tests", "helpers", "pytorch_lightning"}, path
        place = path.relative_to(ROOT / "coca_lit")
        if place != Path("training/lightning_fixes.py"):  # which works around its private parts
            own = [name for name in names if name.split(".")[0] == "lightning"]
            assert all(name.startswith("lightning.pytorch") for name in own), path
        at_the_commands = place.parts[0] in ("cli", "projects") or place.name == "command.py"
        if not at_the_commands and str(place) not in READS_CONFIGS:
            assert not packages & {"hydra", "omegaconf"}, path
