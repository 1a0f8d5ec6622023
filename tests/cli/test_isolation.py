"""Nothing in the folder of a user's files runs, unless a config names it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from helpers.running import ROOT
from helpers.shards import jpeg, write_tar

# What a folder of downloads may hold: modules that we import, and those that Python or Hydra look for by themselves.
NAMES = (
    *("torch.py", "yaml.py", "numpy.py", "hydra.py", "sitecustomize.py", "usercustomize.py", "multiprocessing.py"),
    *("coca_lit/__init__.py", "hydra_plugins/evil.py", "hydra_plugins/__init__.py", "pickle.py", "mine.py"),
    "triton.py",  # which PyTorch imports if there is one
)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder with photos and such modules, each of which leaves a mark when it runs."""
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name + chr(10)!r})\n")
    Image.new("RGB", (40, 40), (255, 0, 0)).save(tmp_path / "A1.jpg")
    return tmp_path


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as it is installed: its script is in another folder, and nothing is on PYTHONPATH but the package."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COCA"))}
    clean |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=clean, capture_output=True, text=True, timeout=500
    )


def script(folder: Path, module: str, function: str) -> str:
    """What pip writes as `coca-…`."""
    path = folder.parent / f"{folder.name}_bin" / f"coca-{function}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"from {module} import {function}\nif __name__ == '__main__':\n    {function}()\n")
    return str(path)


def ran(folder: Path) -> str:
    return (folder / "ran").read_text() if (folder / "ran").exists() else ""


def test_a_command_in_a_folder_of_downloads(trap: Path) -> None:
    """With plugins of Hydra beside the photos, as with `cd downloads; coca-caption .`."""
    done = run(trap, script(trap, "coca_lit.tools.caption.command", "caption"), "A1.jpg", "checkpoint=/none.ckpt")
    assert "/none.ckpt" in done.stderr
    assert ran(trap) == ""


@pytest.mark.slow
def test_workers_of_coca_data_in_a_folder_of_downloads(trap: Path) -> None:
    write_tar(trap / "0.tar", {"a.jpg": jpeg(), "a.txt": b"a dog"})
    write_tar(trap / "1.tar", {"b.jpg": jpeg(), "b.txt": b"a cat"})
    done = run(trap, script(trap, "coca_lit.tools.prepare.command", "data"), "check", ".", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert ran(trap) == ""


@pytest.mark.slow
def test_a_module_in_a_folder_of_downloads(trap: Path) -> None:
    """`python -m` puts that folder first. It would find another coca_lit there, but nothing else."""
    for file in (trap / "coca_lit").iterdir():
        file.unlink()
    (trap / "coca_lit").rmdir()
    for name in ("sitecustomize.py", "usercustomize.py", "multiprocessing.py", "pickle.py"):  # before any of our code
        (trap / name).unlink()
    done = run(trap, "-m", "coca_lit.cli.evaluate", "checkpoint=/none.ckpt")
    assert "/none.ckpt" in done.stderr
    assert ran(trap) == ""


@pytest.mark.slow
def test_a_config_that_names_code_gets_what_it_names(trap: Path) -> None:
    done = run(trap, script(trap, "coca_lit.cli.evaluate", "evaluate"), "imports=[mine]", "checkpoint=builtin")
    assert ran(trap) == "mine.py\n", done.stderr


@pytest.mark.slow
def test_modules_that_a_named_one_imports_are_named_as_well(trap: Path) -> None:
    (trap / "mine.py").write_text("import helper_of_mine\n")
    (trap / "helper_of_mine.py").write_text(f"open({str(trap / 'ran')!r}, 'a').write('helper')\n")
    words = (script(trap, "coca_lit.tools.caption.command", "caption"), "A1.jpg", "checkpoint=photos")
    done = run(trap, *words, "imports=[mine]")
    assert re.search(
        r"^error: imports: mine imports 'helper_of_mine'.*imports=\[helper_of_mine,mine\]$", done.stderr, re.M
    )
    assert ran(trap) == ""
    done = run(trap, *words, "imports=[helper_of_mine,mine]")
    assert done.returncode == 0, done.stderr
    assert ran(trap) == "helper"


CHILDREN = """
import multiprocessing, os, subprocess, sys
from coca_lit.runs.launch import isolate

def job(number):
    import pickle, torch, yaml
    return [name for name in ("torch", "yaml", "pickle") if sys.modules[name].__file__.startswith(os.getcwd())]

if __name__ == "__main__":
    isolate()
    for method in ("spawn", "forkserver", "fork"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.map(job, [0]) == [[]], method
    subprocess.run([sys.executable, "-c", "import pickle, yaml"], check=True)
"""


@pytest.mark.slow
def test_processes_that_a_command_starts(trap: Path) -> None:
    """Workers of data, jobs of launchers, programs that start Python again."""
    (trap.parent / f"{trap.name}_bin").mkdir()
    file = trap.parent / f"{trap.name}_bin" / "children.py"
    file.write_text(CHILDREN)
    done = run(trap, str(file))
    assert done.returncode == 0, done.stderr
    assert ran(trap) == ""


@pytest.mark.slow
def test_a_script_beside_its_own_modules_starts_itself_again(tmp_path: Path) -> None:
    """As Lightning does for each GPU."""
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "app.py").write_text(
        "import os, subprocess, sys, beside\nfrom coca_lit.runs.launch import isolate\nisolate()\n"
        "sys.exit(0 if sys.argv[1:] else subprocess.run([sys.executable, __file__, 'again']).returncode)\n"
    )
    (tmp_path / "elsewhere").mkdir()
    done = run(tmp_path / "elsewhere", str(tmp_path / "app.py"))
    assert done.returncode == 0, done.stderr
