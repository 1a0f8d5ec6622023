"""Blocks of the pages, run as a reader runs them: copied into an empty folder.

Every command of every page means the same to bash and zsh. Really run, in zsh and to their end, the blocks of the
README, and those of other pages below a line `<!-- runs -->`; of these, the lines that cannot run stand in `NOT_RUN`
with the reason. `test_docs.py` composes what does not run. `COCA_LIT_BIN=FOLDER` runs the installed commands of an
environment, for example one with an installed wheel.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SHELLS = {"bash": ["bash", "--norc"], "zsh": ["zsh", "-f"]}
RUNS = "<!-- runs -->"  # above a block
# The lines of these blocks that do not run, by what they match, and why.
NOT_RUN = {
    r"git clone|python -m venv|pip install": "installs; .ci/run does it in clean environments",
    r"python train\.py$|coca-train$": "the demo, which .ci/run trains beside other parts",
    r"pytest$": "these tests, which .ci/run runs",
    r"^uv run": "installs; tried by hand",
    r"/data/|\bdata_dir=|finetune_|pretrain_": "needs data sets",
    r"torchrun": "needs 64 GPUs",
    r"outputs/A outputs/B|outputs/my_run": "stands for runs of the reader's",
}


class Block(NamedTuple):
    """A block of code of a page: its language, text, the file that the line above it names, if any, and whether that
    line says that it runs.
    """

    language: str
    text: str
    file: str | None
    runs: bool


def blocks_of(page: Path) -> list[Block]:
    """A line that ends with a file name and a colon, "in `my_parts.py`:", names the file of the block below it."""
    found = re.finditer(r"^([^\n]*)\n+ *```(\w+)\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)
    every = page.name == "README.md" and page.parent == ROOT
    return [Block(m[2], m[3], _file(m[1]), every or m[1].strip() == RUNS) for m in found]


def _file(line: str) -> str | None:
    name = re.search(r"`([\w/]+\.(?:py|yaml))`:$", line)
    return name[1] if name else None


def commands_of(text: str) -> Iterator[str]:
    """The commands of a shell block, each on one line."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line


def reason(text: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, text.partition("  #")[0])), None)


# What the shells make of the words

PAGES = [page.relative_to(ROOT) for page in sorted(ROOT.rglob("*.md")) if "outputs" not in page.parent.parts]
# Pages with blocks that run, one after the other in one folder.
WALKS = [page for page in PAGES if any(block.runs for block in blocks_of(ROOT / page))]
# Prints the words of every command in place of running it.
RECORDER = """
say() { text=; for word in "$@"; do text="$text<$word>"; done; printf '%s\\n' "$text"; }
command_not_found_handle() { say "$@"; }
command_not_found_handler() { say "$@"; }
for name in cd source eval; do eval "$name() { say $name \\"\\$@\\"; }"; done
PATH=/none
"""


def words_of(shell: list[str], block: str, folder: Path) -> str:
    block = "\n".join(re.sub(r"^(\S*/\S+)", r"say \1", line) for line in block.splitlines())  # a program by its path
    done = subprocess.run([*shell, "-c", RECORDER + block], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.stderr == "", f"{done.stderr} of {block}"
    return "\n".join(sorted(done.stdout.splitlines()))  # a command in the background is said at any time


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_mean_the_same_in_both_shells(page: Path, tmp_path: Path) -> None:
    if any(shutil.which(name) is None for name in SHELLS):
        pytest.skip("there is no zsh")
    for block in blocks_of(ROOT / page):
        if block.language in ("bash", "sh"):
            said = [words_of(shell, "\n".join(commands_of(block.text)), tmp_path) for shell in SHELLS.values()]
            assert said[0] == said[1]


# Running them


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """In which the commands are found: those of `COCA_LIT_BIN`, or of this checkout."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    if given := os.environ.get("COCA_LIT_BIN"):
        return variables | {"PATH": f"{given}:{variables['PATH']}"}
    programs = tmp_path_factory.mktemp("bin")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, place in scripts.items():
        module, _, function = place.partition(":")
        start = f"if __name__ == '__main__':\n    {function}()\n"  # workers import the program
        (programs / name).write_text(f"#!{sys.executable}\nfrom {module} import {function}\n{start}")
        (programs / name).chmod(0o755)
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python").chmod(0o755)
    return variables | {"PATH": f"{programs}:{variables['PATH']}", "PYTHONPATH": str(ROOT)}


def script_of(block: Block) -> str:
    """What runs of a block, as a script of a shell."""
    if block.language == "python":
        return "" if reason(block.text) else f"python - <<'PYTHON'\n{block.text}PYTHON\n"
    return "\n".join(line for line in commands_of(block.text) if reason(line) is None)


@pytest.mark.slow
@pytest.mark.parametrize("page", WALKS, ids=str)
def test_blocks_run_to_their_end(page: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """Where there are photos, a folder of them with captions, a clip and a folder of clips, and nothing else."""
    shell = SHELLS["zsh" if shutil.which("zsh") else "bash"]
    (tmp_path / "photos").mkdir()
    for number, name in enumerate(["photo.jpg", "photos/beach.jpg", *(f"photos/{i}.jpg" for i in range(5))]):
        box = (-2 + number / 9, -1.5, 1 - number / 9, 1.5)
        Image.effect_mandelbrot((300, 200), box, 50).convert("RGB").save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a dog runs on the beach")
    pytest.importorskip("av")
    from helpers.clips import greys, write_clip

    (tmp_path / "videos").mkdir()
    for name in ("clip.mp4", "videos/waves.mp4", "videos/dunes.mp4"):
        write_clip(tmp_path / name, greys([50, 100, 150, 200]))
    for block in blocks_of(ROOT / page):
        if block.file is not None:
            (tmp_path / block.file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.file).write_text(block.text)
        elif block.runs and block.language in ("bash", "sh", "python") and (script := script_of(block)):
            done = subprocess.run(
                [*shell, "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"


# What the Python blocks of other pages take for granted.
GIVEN = """
import coca_lit
from coca_lit.data import Record
from PIL import Image
model = coca_lit.load_model("photos")
images = coca_lit.build_transform(**model.preprocessing)(Image.open("photos/photo.jpg"))[None]
tokenizer, records, others = model.tokenizer, [Record(1, "photos/photo.jpg", "a dog")], []
"""


@pytest.mark.slow
def test_python_blocks_of_other_pages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except blocks that need Spark or the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    Image.effect_mandelbrot((300, 200), (-2, -1.5, 1, 1.5), 50).convert("RGB").save("photos/photo.jpg")
    names: dict[str, object] = {}
    exec(GIVEN, names)
    blocks = [block for page in PAGES for block in blocks_of(ROOT / page) if not block.runs]
    python = [block.text for block in blocks if block.language == "python" and block.file is None]
    python = [text for text in python if not text.startswith("spark.") and "hf-hub:" not in text]
    assert len(python) >= 5
    for text in python:
        exec(text, dict(names))


def test_what_does_not_run_is_on_a_page() -> None:
    blocks = [block for page in WALKS for block in blocks_of(ROOT / page) if block.runs]
    texts = [text for block in blocks for text in [block.text, *commands_of(block.text)]]
    stale = [pattern for pattern in NOT_RUN if not any(re.search(pattern, text, re.MULTILINE) for text in texts)]
    assert stale == []
