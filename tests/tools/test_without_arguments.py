"""Commands that need words, without any: one sentence with an example, as of the commands that Hydra composes. And the
first line of a command.
"""

from collections.abc import Callable, Sequence

import pytest

from coca_lit.cli import command
from coca_lit.errors import ConfigError
from coca_lit.tools.prepare.command import data
from coca_lit.tools.report.command import report
from coca_lit.tools.score.command import score


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
    monkeypatch.setattr(command, "compose", compose)
    with pytest.raises(SystemExit, match="coca-plan: starting"):
        command.command("plan", lambda cfg: None)
