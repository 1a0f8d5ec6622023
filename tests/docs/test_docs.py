"""Every link in the Markdown files leads somewhere, every command in them and in the studies' scripts is valid, and
generated parts are current.
"""

import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import key_reference
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from coca_lit.cli.command import compose
from coca_lit.cli.words import parse, to_override
from coca_lit.models import create_model
from coca_lit.tools.export.open_clip import write_open_clip
from helpers.hub_server import Hub, Repository, answers_at

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {name.removeprefix("coca-"): place.partition(":")[0] for name, place in PROJECT["scripts"].items()}
PAGES = [
    path.relative_to(ROOT)
    for folder in ("", "outputs", "coca_lit/**", "conf/**", "experiments/**", "tests/**")
    for path in sorted(ROOT.glob(f"{folder}/*.md" if folder else "*.md"))
    if "template" not in path.parts  # of a project, for which coca-new fills in the name
]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    return (ROOT / page).read_text()


# Links


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        while slug in found:
            slug += "-1"
        found.add(slug)
    return found


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text_of(page)))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page}: {target}"


def test_tests_that_pages_name_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", text_of(page))}
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert named <= set(re.findall(r"def (test_\w+)\(", code))


# Commands

COMMANDS = {"train": (), "evaluate": (), "caption": "images", "search": ("index", "query"), "plan": (), "demo": ()}
COMMANDS |= {"export": ()}
# What cannot be checked by composing its configuration, and why.
ELSEWHERE = {
    **dict.fromkeys(("apt-get", "git", "docker", "uv"), "other programs that change the machine"),
    **dict.fromkeys(("hf", "img2dataset", "sed"), "they fetch or change data from the web"),
    "coca-gpu-check": "it needs a GPU",
    **dict.fromkeys(("ray", "moto_server"), "they start a service"),
    **dict.fromkeys(("export", "eval", "source", "cd"), "they set up a shell"),
    **dict.fromkeys(("pytest", "ruff", "mypy", "lint-imports", "pre-commit", "mkdocs"), "the check itself"),
    **dict.fromkeys(("coca-score", "coca-report", "coca-data"), "they read files; tests/tools run them"),
}


def lines_of(page: Path) -> Iterator[str]:
    """The command lines in the shell blocks of a page."""
    for language, block in FENCE.findall(text_of(page)):
        if language in ("bash", "sh"):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                for part in line.split(" && "):
                    if part.strip() and not part.lstrip().startswith("#"):
                        yield part.strip()


BLOCKS = [(page, line) for line, page in {line: page for page in PAGES for line in lines_of(page)}.items()]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), BLOCKS, ids=[f"{page}: {line[:60]}" for page, line in BLOCKS])
def test_command_is_one_that_runs(page: Path, line: str) -> None:
    words = [word for word in shlex.split(line, comments=True) if word != "…"]
    while words and re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):  # variables before the command
        words = words[1:]
    if not words or words[0] in ELSEWHERE or words[:2] == ["python", "-c"]:
        return
    if words[:2] == ["pip", "install"]:
        named = re.findall(r"(?:coca_lit|\.)\[([\w,]+)\]", line)
        assert all(extra in PROJECT["optional-dependencies"] for names in named for extra in names.split(",")), line
    elif (found := command_of(words)) is not None:
        check_command(*found)
    elif words[0] in ("python", "bash", "sh") or "/" in words[0]:
        script = next(word for word in words if word.endswith((".py", ".sh")) or word == "-m")
        assert script == "-m" or (ROOT / script).is_file() or ((ROOT / page).parent / script).is_file(), line
    else:
        pytest.fail(f"{page}: nobody checks '{line}'")


def command_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Name and arguments of a command of coca_lit, whatever starts it."""
    for i, word in enumerate(words[:8]):
        if word.startswith("coca-") and (name := word.removeprefix("coca-")) in COMMANDS and i == 0:
            return name, words[1:]
        if word.endswith(("train.py", "train.sbatch")) and "/benchmarks/" not in word:
            return "train", words[i + 1 :]
        if named := [name for name, module in MODULES.items() if word in (module, module.removesuffix(".command"))]:
            return named[0], words[i + 1 :]
    return None


def check_command(name: str, arguments: list[str]) -> None:
    """Raises for an override that no config or constructor knows."""
    importlib.import_module(MODULES[name])
    for i, word in enumerate(arguments):
        if word == "--config-dir":
            arguments[i + 1] = str(ROOT / arguments[i + 1])
            if not Path(arguments[i + 1]).is_dir():  # a user's
                return
    options, overrides = parse(arguments, COMMANDS[name])
    if any("/path/to" in override for override in overrides):
        return
    compose(name, overrides if not options.multirun else [first_of(override) for override in overrides])


def first_of(override: str) -> str:
    """The first job of a sweep over an override."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    values = parsed.sweep_string_iterator() if parsed.is_choice_sweep() else ["1"]
    return f"{parsed.key_or_group}={next(iter(values))}"


# Stands in for every program that a script starts, and records the call. Only "python -c" really runs.
RECORDER = """#!/bin/sh
[ "$1" != -c ] || exec {python} "$@"
for word in "${{0##*/}}" "$@"; do printf '%s\\0' "$word" >>{record}; done
echo >>{record}
"""
OURS = ("coca-train", "coca-evaluate", "coca-caption", "coca-data", "coca-report")
PROGRAMS = ("python", "torchrun", "uv", *OURS)


def calls_of(script: Path, folder: Path) -> list[list[str]]:
    """The calls of programs by a study's script when nothing has run yet, each a list of words; none of them runs."""
    study = folder / script.parent.relative_to(ROOT)
    study.mkdir(parents=True)
    for file in (script, *script.parent.glob("*.csv")):
        shutil.copy(file, study)
    (folder / "bin").mkdir()
    for name in PROGRAMS:
        (folder / "bin" / name).write_text(RECORDER.format(python=sys.executable, record=folder / "calls"))
        (folder / "bin" / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "SEEDS": "0"}
    environment |= {"NOISE": "10", "FLICKR8K": str(folder)}
    subprocess.run(["bash", study / script.name, folder], env=environment, check=True, timeout=600)
    return [line.split("\0")[:-1] for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(ROOT.glob("experiments/*/run.sh")), ids=lambda path: path.parent.name)
def test_script_of_a_study_starts_what_runs(script: Path, tmp_path: Path) -> None:
    for words in calls_of(script, tmp_path):
        if (found := command_of(words)) is not None:
            check_command(*found)
        elif words[0] == "python":
            module = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
            source = (ROOT / module).read_text()
            assert all(f'"{word}"' in source for word in words if word.startswith("--")), words
        else:
            assert words[0] in ELSEWHERE, words


KEYS = [
    code
    for row in re.findall(
        r"^\| .*", text_of(Path("conf/README.md")).partition("## Keys by task")[2].partition("\n## ")[0], re.M
    )
    for code in re.findall(r"`([^`]+=[^`]+)`", row)
    if "." in code.partition("=")[0]  # tests/cli/test_config.py composes all options of all groups
]


@pytest.mark.slow
@pytest.mark.parametrize("code", KEYS)
def test_key_of_a_task_composes(code: str) -> None:
    overrides = [to_override(word) for word in shlex.split(code)]
    try:
        compose("train", overrides)
    except Exception:  # a key of what a default run does not have
        compose("train", ["data=laion", "evals=mscoco", "logger=[mlflow,wandb]", *overrides])


# Python


def blocks(page: str) -> list[str]:
    return [block for language, block in FENCE.findall(text_of(Path(page))) if language == "python"]


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The current folder holds photos, and a Hub on the loopback interface a small model under the released name."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    folder = tmp_path / "released"
    folder.mkdir()
    encoder = {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    sizes = {"image_size": 32, "embed_dim": 32, "pooler_queries": 3, "text_width": 32, "text_heads": 2}
    sizes |= {"text_layers": 1, "decoder_layers": 1}
    write_open_clip(create_model("coca_vit_b32", image_encoder_args=encoder, cls_mask="legacy", **sizes), folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "photos").mkdir()
    Image.effect_noise((90, 60), 80).convert("RGB").save("photo.jpg")
    Image.open("photo.jpg").save("photos/1.jpg")
    with Hub() as hub:
        hub.repositories["laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k"] = Repository(files)
        answers_at(monkeypatch, hub.url, tmp_path / "cache")
        yield


def execute(page: str, names: dict[str, object]) -> None:
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)


@pytest.mark.slow
@pytest.mark.usefixtures("released")
def test_python_of_the_pages_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    execute("README.md", names)
    assert "\ntensor([[" in capsys.readouterr().out  # two similarities, after a caption
    execute("coca_lit/tools/caption/README.md", names)
    assert names["likelihood"].shape == (2,)  # type: ignore[attr-defined]
    assert [path for _, path in names["hits"]] == [Path("photos/1.jpg")]  # type: ignore[attr-defined]


def test_other_python_compiles() -> None:
    """What is left needs a Spark session."""
    for page in PAGES:
        for block in blocks(str(page)):
            compile(block, str(page), "exec")


# Generated


def test_every_extra_is_explained() -> None:
    extras = PROJECT["optional-dependencies"].keys() - {"test", "dev"}  # those are in CONTRIBUTING.md
    assert [name for name in extras if f"`{name}`" not in text_of(Path("README.md"))] == []


def test_every_dependency_is_explained() -> None:
    wanted = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
    names = {name for line in wanted if (name := re.split(r"[\[<>=,;]", line)[0]) != "coca_lit"}
    assert set(re.findall(r"^\| `([\w-]+)`", text_of(Path("coca_lit/DEPENDENCIES.md")), re.MULTILINE)) == names


def test_every_key_is_listed_and_explained() -> None:
    page = key_reference.reference()
    for row in (
        "| `trainer.micro_batch_size` | `null` | ",
        "| `model.net.context_length` | `76` | ",
        "| `model.optimizer.lr` | ",
        "| `callbacks.non_finite_guard.max_in_a_row` | ",
    ):
        assert row in page
    missing = [row.key for _, rows in key_reference._sections() for row in rows if not row.meaning]
    assert not missing


def test_messages_of_the_troubleshooting_page_are_ours() -> None:
    """Each message in the first column occurs in the code, piece by piece."""
    sources = [path.read_text() for path in (ROOT / "coca_lit").rglob("*.py")]
    written = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # sentences go over several lines
    rows = re.findall(r"^\| (`.*?) \|", text_of(Path("coca_lit/TROUBLESHOOTING.md")), re.MULTILINE)
    pieces = [piece for row in rows for code in re.findall(r"`([^`]+)`", row) for piece in code.split("…")]
    assert len(rows) > 10
    assert [piece for piece in pieces if piece.strip("' ,") and piece.strip() not in written] == []
