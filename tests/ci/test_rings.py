import os
import shlex
import subprocess
from pathlib import Path

import pytest

rings = pytest.importorskip("rings", reason="a source distribution has no .ci")

ON_THE_NUCLEUS = "experiments tools/export projects/reasoning projects/video"
FOLDERS = ["cli", "data", "docs", "experiments", "tools/export", "projects/reasoning", "projects/video"]
REQUIRES = {"reasoning": ["classification"], "video": []}


@pytest.mark.parametrize(
    ("changed", "fast", "slow", "blocks", "clusters"),
    [
        # A project, and one that another needs.
        ("coca_lit/projects/video/clips.py", "projects/video", "projects/video", False, False),
        ("tests/projects/video/test_clips.py", "projects/video", "projects/video", False, False),
        ("coca_lit/projects/classification/probe.py", "projects/reasoning", "projects/reasoning", False, False),
        ("coca_lit/projects/clusters/engine.py", "", "", False, True),
        ("coca_lit/tools/export/onnx.py", "tools/export", "docs tools/export", True, False),
        # The nucleus: all fast tests of what is built on it, and the slow tests of what it is near to.
        ("coca_lit/data/loader.py", ON_THE_NUCLEUS, "data", False, False),
        ("coca_lit/models/coca.py", ON_THE_NUCLEUS, "tools/export", False, False),
        ("conf/train.yaml", ON_THE_NUCLEUS, "cli docs", True, False),
        ("experiments/soak/soak.py", "experiments", "experiments", False, False),
        ("README.md", "", "docs", True, False),
        ("coca_lit/projects/video/README.md", "projects/video", "docs projects/video", True, False),
    ],
)  # fmt: skip
def test_a_change_runs_what_depends_on_it(changed: str, fast: str, slow: str, blocks: bool, clusters: bool) -> None:
    decided = rings.plan([changed], FOLDERS, REQUIRES)
    always_fast = {"cli", "data", "docs"}
    assert {*FOLDERS} - {*decided.fast_ignored} == always_fast | {*fast.split()}
    assert {*FOLDERS} - {*decided.slow_ignored} == {*slow.split()}
    assert (decided.blocks, decided.clusters) == (blocks, clusters)
    assert ("SLURM" in " ".join(decided.left_out)) == (not clusters)
    assert all(folder in " ".join(decided.left_out) for folder in decided.slow_ignored)


@pytest.mark.parametrize(
    "changed", [None, ["pyproject.toml"], [".ci/run"], ["tests/helpers/running.py"], ["README.md", "a_new_folder/a.py"]]
)
def test_unknown_changes_run_everything(changed: list[str] | None) -> None:
    assert rings.plan(changed, FOLDERS, REQUIRES) == ([], [], True, True, [])


def test_what_is_at_the_root_of_the_package_runs_all_tests() -> None:
    decided = rings.plan(["coca_lit/extensions.py"], FOLDERS, REQUIRES)
    assert decided == ([], [], True, True, [])


def test_tables_name_what_exists() -> None:
    """A renamed folder would run nothing."""
    tables = [*rings.SLOW_TESTS_ALSO_NEED.values(), rings.BLOCKS_NEED, rings.CLUSTERS_NEED, rings.KNOWN]
    named = {path for table in [*tables, rings.EVERYTHING] for path in table if not path.startswith("*")}
    assert [path for path in sorted(named) if not (rings.ROOT / path).exists()] == []
    assert rings.SLOW_TESTS_ALSO_NEED.keys() <= {*rings.folders_of_tests(rings.ROOT)}


def test_a_clone_does_not_know_the_last_green_commit(tmp_path: Path) -> None:
    def git(*arguments: str, where: str = "origin") -> None:
        told = ["git", "-C", where, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        subprocess.run(told, cwd=tmp_path, check=True, capture_output=True)

    origin, clone = tmp_path / "origin", tmp_path / "clone"
    origin.mkdir()
    assert rings.changed_files({}, origin)[0] is None  # no repository
    git("init", "-b", "main")
    (origin / "kept.py").write_text("")
    (origin / "a b.py").write_text("")
    git("add", ".")
    git("commit", "-m", "first")
    git("update-ref", rings.GREEN, "HEAD")
    assert rings.changed_files({}, origin)[0] == []
    (origin / "a b.py").write_text("changed")
    (origin / "new.py").write_text("")
    assert sorted(rings.changed_files({}, origin)[0]) == ["a b.py", "new.py"]
    assert rings.changed_files({"CI_ALL": "1"}, origin)[0] is None
    git("clone", "-q", str(origin), str(clone), where=".")
    assert rings.changed_files({}, clone)[0] is None
    assert rings.changed_files({"CI_GREEN": "HEAD"}, clone)[0] == []
    assert rings.changed_files({"CI_GREEN": "0" * 40}, clone)[0] is None


def test_bash_reads_the_plan() -> None:
    environment = {**os.environ, "CI_ALL": "", "CI_GREEN": "no such commit"}
    printed = subprocess.check_output(["python3", rings.__file__], text=True, env=environment)
    script = f'set -u\n{printed}\necho "${{#fast_ignored[@]}} $blocks $clusters $why"'
    said = subprocess.check_output(["bash", "-c", script], text=True)
    assert said == "0 1 1 everything is checked: there is no commit no such commit, whose check passed\n"
    assert shlex.split(printed)  # quoted as a shell reads it
