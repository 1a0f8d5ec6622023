"""`coca-new`: what it writes installs, trains and passes its own test; names that are none are refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from coca_lit.errors import ConfigError
from coca_lit.tools.new_project.command import new_project, write_project
from helpers.running import ROOT


def in_environment(python: Path, *words: str, folder: Path) -> str:
    return subprocess.run([python, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_a_new_project_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hatchling")
    monkeypatch.chdir(tmp_path)
    new_project(["nearer"])
    written = {str(path.relative_to("nearer")) for path in Path("nearer").rglob("*") if path.is_file()}
    assert written == {
        *("README.md", "pyproject.toml", "tests/test_nearer.py"),
        *(f"src/nearer/{name}" for name in ("__init__.py", "objective.py", "evaluation.py", "project.toml")),
        *(f"src/nearer/conf/{group}/scenes_nearer.yaml" for group in ("experiment", "evals")),
    }
    assert not [path for path in Path("nearer").rglob("*") if path.is_file() and "my_method" in path.read_text()]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "own"], check=True)
    packages = next(Path("own").glob("lib/python3*/site-packages"))
    packages.joinpath("others.pth").write_text("\n".join(path for path in sys.path if path))
    install = ["pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(packages), "./nearer"]
    subprocess.run([sys.executable, "-m", *install], check=True)
    python = Path("own/bin/python").absolute()
    train = str(ROOT / "train.py")
    smoke = ("experiment=scenes_nearer", "trainer=smoke", "evals=[scenes_nearer]", "name=nearer")
    in_environment(python, train, *smoke, folder=tmp_path)
    assert "train/nearness_loss" in Path("outputs/nearer/metrics.csv").read_text()
    assert "scenes_nearer/nearness" in Path("outputs/nearer/results.json").read_text()
    assert "3 passed" in in_environment(python, "-m", "pytest", "-p", "no:xdist", "nearer", folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my-loss", "cannot name a package"),
        ("My", "cannot name a package"),
        ("class", "cannot name a package"),
        ("../x", "cannot name a package"),
        ("video", "already"),
        ("torch", "already"),
    ],
)
def test_names_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        new_project([name])
    assert message in str(stopped.value)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "nearer"
    folder.mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        write_project("nearer", folder)
    assert list(folder.iterdir()) == []
