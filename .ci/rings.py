"""Which parts of the check run: those that depend on a file that differs from the last commit whose check passed.

That commit is in CI_GREEN, or else in refs/ci/green, where `.ci/run` records it; `git clone` does not copy that ref.
Where there is none, where a changed file is not in the tables below, or with CI_ALL=1, everything runs.

Prints variables for bash: `fast_ignored` and `slow_ignored` are arguments of pytest, `blocks` and `clusters` are 1 or
empty, `left_out` says in sentences what does not run, and `why` with what was compared.

    eval "$(python3 .ci/rings.py)"
"""

import os
import shlex
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
GREEN = "refs/ci/green"

# Paths end with "/" (a folder) or with a suffix (a file); "*.md" is every page.
KNOWN = ("coca_lit/", "conf/", "hydra_plugins/", "experiments/", "tests/", ".docs/", "outputs/", "*.md")
EVERYTHING = ("tests/conftest.py", "tests/helpers/")
OUTSIDE_THE_NUCLEUS = ("coca_lit/tools/", "coca_lit/projects/", "*.md")

# The slow tests of tests/NAME run where tests/NAME, coca_lit/NAME, a module at coca_lit's root or one of these changed.
SLOW_TESTS_ALSO_NEED: Mapping[str, tuple[str, ...]] = {
    "callbacks": ("coca_lit/runs/", "coca_lit/training/"),
    "cli": ("coca_lit/training/", "coca_lit/runs/", "conf/", "hydra_plugins/"),
    "docs": (".docs/", "conf/", "coca_lit/cli/", "coca_lit/tools/", "*.md"),
    "evals": ("coca_lit/models/", "coca_lit/metrics/"),
    "experiments": ("experiments/",),
    "runs": ("coca_lit/callbacks/", "coca_lit/training/", "coca_lit/data/"),
    "training": ("coca_lit/models/", "coca_lit/losses/", "coca_lit/callbacks/"),
    "weights": ("coca_lit/models/",),
    "tools/caption": ("coca_lit/evals/", "coca_lit/models/generation/", "coca_lit/data/shards/"),
    "tools/demo": ("coca_lit/evals/",),
    "tools/export": ("coca_lit/models/", "coca_lit/weights/"),
    "tools/plan": ("coca_lit/models/", "coca_lit/training/", "conf/"),
    "tools/report": ("coca_lit/assets/",),
}
BLOCKS_NEED = ("*.md", "tests/docs/", "conf/", "coca_lit/cli/", "coca_lit/tools/")
CLUSTERS_NEED = (
    *("coca_lit/projects/clusters/", "tests/projects/clusters/", "experiments/clusters/"),
    *("coca_lit/cli/", "coca_lit/runs/", "coca_lit/callbacks/", "coca_lit/training/", "hydra_plugins/"),
)


class Plan(NamedTuple):
    """The folders of tests that a check leaves out, which other parts it runs, and sentences about the rest."""

    fast_ignored: list[str]
    slow_ignored: list[str]
    blocks: bool
    clusters: bool
    left_out: list[str]


def plan(changed: Iterable[str] | None, folders: Iterable[str], requires: Mapping[str, list[str]]) -> Plan:
    """Decides by changed files.

    Args:
        changed: paths in the repository; None where they are unknown.
        folders: of tests, below `tests`: "data", "tools/plan", "projects/video".
        requires: the projects that a project needs.
    """
    files = None if changed is None else [*changed]
    if files is None or any(_under(file, EVERYTHING) or not _under(file, KNOWN) for file in files):
        return Plan([], [], True, True, [])
    modules = [file for file in files if file.startswith("coca_lit/") and file.count("/") == 1 and file.endswith(".py")]
    nucleus = [
        file
        for file in files
        if _under(file, ("coca_lit/", "conf/", "hydra_plugins/")) and not _under(file, OUTSIDE_THE_NUCLEUS)
    ]
    fast_ignored, slow_ignored = list[str](), list[str]()
    for folder in folders:
        needed = [f"coca_lit/projects/{name}/" for name in requires.get(folder.removeprefix("projects/"), ())]
        depends = [f"tests/{folder}/", f"coca_lit/{folder}/", *needed, *SLOW_TESTS_ALSO_NEED.get(folder, ())]
        changed_here = [file for file in files if _under(file, depends)]
        if not changed_here and not modules:
            slow_ignored.append(folder)
        if folder.startswith(("tools/", "projects/", "experiments")) and not changed_here and not nucleus:
            fast_ignored.append(folder)
    blocks = any(_under(file, BLOCKS_NEED) for file in files) or bool(modules)
    clusters = any(_under(file, CLUSTERS_NEED) for file in files) or bool(modules)
    left_out = []
    if fast_ignored:
        left_out.append(f"all tests of {', '.join(fast_ignored)}: neither they nor the nucleus changed")
    if only_slow := [folder for folder in slow_ignored if folder not in fast_ignored]:
        left_out.append(f"the slow tests of {', '.join(only_slow)}: what they depend on did not change")
    if not blocks:
        left_out.append(f"the commands that pages show: no change in {', '.join(BLOCKS_NEED)}")
    if not clusters:
        left_out.append(f"the tests on SLURM and Ray: no change in {', '.join(CLUSTERS_NEED)}")
    return Plan(fast_ignored, slow_ignored, blocks, clusters, left_out)


def _under(file: str, paths: Iterable[str]) -> bool:
    for path in paths:
        if path.startswith("*") and file.endswith(path.removeprefix("*")):
            return True
        if file == path or (path.endswith("/") and file.startswith(path)):
            return True
    return False


def changed_files(environment: Mapping[str, str], root: Path) -> tuple[list[str] | None, str]:
    """The files that differ from the last commit whose check passed, and a sentence; None where all must be checked."""
    if environment.get("CI_ALL"):
        return None, "everything is checked: CI_ALL is set"
    green = environment.get("CI_GREEN") or GREEN
    commit = _git(root, "rev-parse", "--verify", "--quiet", f"{green}^{{commit}}")
    if not commit:
        return None, f"everything is checked: there is no commit {green}, whose check passed"
    differing = _git(root, "diff", "--name-only", "--no-renames", "-z", commit[0])
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z")
    if differing is None or untracked is None:
        return None, "everything is checked: git cannot tell what changed"
    files = [*differing, *untracked]
    return files, f"{len(files)} files differ from {commit[0][:10]} ({green}), whose check passed"


def _git(root: Path, *arguments: str) -> list[str] | None:
    """The lines, or names that end with a zero byte, that git prints; None where it fails."""
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return [name for name in done.stdout.replace("\0", "\n").splitlines() if name]


def folders_of_tests(root: Path) -> list[str]:
    """But for the outside package, which every check tests."""
    tests = root / "tests"
    mirrored = [*tests.glob("[!_]*/"), *tests.glob("tools/[!_]*/"), *tests.glob("projects/[!_]*/")]
    folders = [path.relative_to(tests).as_posix() for path in sorted(mirrored) if path.is_dir()]
    return [folder for folder in folders if folder not in ("guests", "helpers", "tools", "projects")]


def required_projects(root: Path) -> dict[str, list[str]]:
    manifests = root.glob("coca_lit/projects/*/project.toml")
    return {path.parent.name: tomllib.loads(path.read_text()).get("requires", []) for path in manifests}


def main() -> None:
    changed, why = changed_files(os.environ, ROOT)
    decided = plan(changed, folders_of_tests(ROOT), required_projects(ROOT))
    for name in ("fast_ignored", "slow_ignored"):
        print(f"{name}=({shlex.join(f'--ignore=tests/{folder}' for folder in getattr(decided, name))})")
    print(f"blocks={'1' * decided.blocks}")
    print(f"clusters={'1' * decided.clusters}")
    print(f"left_out=({shlex.join(decided.left_out)})")
    print(f"why={shlex.quote(why)}")


if __name__ == "__main__":
    main()
