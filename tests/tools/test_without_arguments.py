"""Commands that need words, without any: one sentence with an example, as of the commands that Hydra composes. And the
first line of a command, and how else than by its name it starts.
"""

import runpy
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress

import pytest

from coca_lit.cli import command
from coca_lit.errors import ConfigError
from coca_lit.tools.prepare.command import data
from coca_lit.tools.report.command import report
from coca_lit.tools.score.command import score
from helpers.running import ROOT

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
PACKAGES = {place.partition(".command:")[0]: name for name, place in SCRIPTS.items() if ".command:" in place}


@pytest.mark.parametrize("program", [data, report, score])
def test_an_example_is_given(program: Callable[[Sequence[str]], None]) -> None:
    with pytest.raises(SystemExit, match=rf"^error: .*example: coca-{program.__name__} .*--help"):
        program([])


def test_the_first_line_comes_before_the_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compose(*_: object) -> None:
        raise ConfigError(capsys.readouterr().err)

    monkeypatch.setattr("sys.argv", ["coca-plan"])
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(command, "_composed", compose)
    with pytest.raises(SystemExit, match="coca-plan: starting"):
        command.command("plan", lambda cfg: None)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_with_a_command_starts_it(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["__main__.py", "--help"])
    with suppress(SystemExit):
        runpy.run_module(package, run_name="__main__")
    assert PACKAGES[package] in capsys.readouterr().out
