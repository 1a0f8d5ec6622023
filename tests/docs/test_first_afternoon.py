"""The modules that coca_lit/README.md lists as a first afternoon's reading are those that a training runs."""

import os
import re
import runpy
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from helpers.forking import called
from helpers.running import ROOT, TINY

HEADING = "## The first afternoon\n"


def listed(page: str) -> tuple[set[str], set[str], int, int]:
    """Of the section: the files of its table; other files that it names, which one need not read; and the numbers of
    files and lines that it states.
    """
    section = page.partition(HEADING)[2].partition("\n## ")[0]
    rows = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    stated = re.search(r"(\d+) modules, about ([\d,]+) lines", section)
    assert stated, "expected '14 modules, about 2,800 lines'"
    files = files_in(rows)
    return files, files_in(section) - files, int(stated[1]), int(stated[2].replace(",", ""))


def files_in(text: str) -> set[str]:
    """Paths in backticks, from the root of the repository or from `coca_lit/`."""
    paths = re.findall(r"`([\w/]+\.py)`", text)
    return {path if path == "train.py" or path.startswith("coca_lit/") else f"coca_lit/{path}" for path in paths}


def executed(folder: Path) -> set[str]:
    """Files of the package that a training by `train.py` runs: what waits for a step, and what makes batch and loss."""
    from coca_lit.lit_module import CoCaLit
    from coca_lit.tools.prepare.scenes import export_scenes

    export_scenes("shards", folder / "shards", count=8, size=32)
    words = ("experiment=pretrain_b32", *TINY, f"data.shards={folder}/shards/*.tar", "data.epoch_samples=null")
    words += ("data.num_workers=0", "data.batch_size=4", "trainer.max_steps=1", "evals=[]", f"output_dir={folder}/run")
    step, files, depth = CoCaLit.training_step.__code__, set(), 0

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal depth
        code = frame.f_code
        if event not in ("call", "return"):
            return
        if code is step or (code.co_name == "__next__" and code.co_filename.endswith("torch/utils/data/dataloader.py")):
            depth += 1 if event == "call" else -1
        if event == "call" and depth:
            files.add(code.co_filename)
            if code is step:
                while frame := frame.f_back:
                    files.add(frame.f_code.co_filename)

    os.chdir(folder)
    sys.argv = [str(ROOT / "train.py"), *words]
    sys.setprofile(watch)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(end.code) from end
    finally:
        sys.setprofile(None)
    own = [Path(file).relative_to(ROOT).as_posix() for file in files if file.startswith(str(ROOT))]
    return {path for path in own if path == "train.py" or path.startswith("coca_lit/")}


def lines_of(file: str) -> int:
    return len((ROOT / file).read_text().splitlines())


@pytest.mark.slow
def test_the_first_afternoon(tmp_path: Path) -> None:
    page = (ROOT / "coca_lit" / "README.md").read_text()
    if HEADING not in page:
        pytest.skip("coca_lit/README.md has no such section")
    files, passed_by, modules, lines = listed(page)
    assert (len(files), round(sum(map(lines_of, files)), -2)) == (modules, lines)
    ran = called(executed, tmp_path)
    assert sorted(ran - files - passed_by) == [], "a training runs them: list them, or name them below the table"
    assert sorted(files - ran) == [], "no training runs them"
