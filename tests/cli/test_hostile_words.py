"""Words of a command line are no code."""

import sys

import pytest

from coca_lit.cli import train_command as train


def test_config_that_evaluates(tmp_path, target, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["train.py", f"""threads=${{eval:'__import__("pathlib").Path("{target}").touch()'}}"""]
    )
    with pytest.raises(SystemExit, match=r"error: .*Unsupported interpolation type eval"):
        train()
