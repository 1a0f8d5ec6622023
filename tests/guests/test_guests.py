"""A package outside coca_lit extends every part of a run, by its own configs and without a change to coca_lit.

`COCA_LIT_BIN=FOLDER` runs the installed commands of an environment, for example one with an installed wheel. Without it
the same functions run in processes that need not import them.
"""

import json
import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow  # commands in processes of their own

GUESTS = Path(__file__).resolve().parent
BIN = os.environ.get("COCA_LIT_BIN")


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the folder of the guest package, which is on nobody's path."""
    if BIN:
        return subprocess.run([f"{BIN}/{name}", *arguments], cwd=GUESTS, capture_output=True, text=True, timeout=600)
    from helpers.forking import Program

    root = GUESTS.parents[1]
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    program = (
        (str(root / "train.py"),)
        if name == "coca-train"
        else ("-m", scripts[name].partition(":")[0].removesuffix(".command"))
    )
    return Program(*program, *arguments, cwd=GUESTS, environment=os.environ).wait()


def command(name: str, *arguments: str) -> str:
    """Standard output of a command that must succeed."""
    done = run(name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guest")
    command("coca-train", "--config-dir", "conf", "experiment=guest", "trainer=smoke", f"hydra.run.dir={folder}")
    return folder / "checkpoints" / "last.ckpt"


def test_everything_takes_part_in_training(checkpoint: Path) -> None:
    run = checkpoint.parents[1]
    assert (run / "steps.txt").read_text() == "2"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "train/brightness_loss" in line]) == 2
    assert any("val/brightness_loss" in line for line in lines)
    results = json.loads((run / "results.json").read_text())
    assert 0 <= results["patches/t2i_recall@1"] <= 1
    assert results["patches/words"] > 0
    assert "patches/brightness" in results


def test_a_whole_data_module(tmp_path: Path) -> None:
    options = ("experiment=guest", "data=patches_module", "trainer=smoke", f"hydra.run.dir={tmp_path}", "evals=[]")
    command("coca-train", "--config-dir", "conf", *options)
    assert (tmp_path / "steps.txt").read_text() == "2"


def test_the_checkpoint_is_evaluated_and_captions(checkpoint: Path, tmp_path: Path) -> None:
    options = ("imports=[my_coca_parts]", f"checkpoint={checkpoint}")
    few = ("evals=patches", "scoring.images=4", f"hydra.run.dir={tmp_path}")
    command("coca-evaluate", "--config-dir", "conf", *options, *few)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["patches/words"] > 0
    trained = json.loads((checkpoint.parents[1] / "results.json").read_text())
    assert found["patches/brightness"] == pytest.approx(trained["patches/brightness"], rel=1e-4)  # of the same colours
    Image.new("RGB", (40, 40), (255, 0, 0)).save(tmp_path / "red.png")
    written = command("coca-caption", str(tmp_path / "red.png"), *options, "generate.strategy=greedy")
    assert written.startswith(f"{tmp_path / 'red.png'}\t")


def test_without_its_package_the_checkpoint_is_refused_in_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    done = run("coca-caption", str(tmp_path / "x.png"), f"checkpoint={checkpoint}")
    assert done.returncode == 1
    assert "imports=['my_coca_parts.encoder']" in done.stderr
    assert "Traceback" not in done.stderr
