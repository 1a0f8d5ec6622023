"""What a sweep says at its end of jobs that brought no scores."""

import json
from pathlib import Path

import pytest

from coca_lit.cli import sweep


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        ([("unfinished", ""), ("unfinished", "")], ["none of the 2 jobs", "resumes"]),
        ([("failed", "no model survives 2"), ("unfinished", "")], ["none of the 2 jobs", "no model survives 2"]),
        ([("stopped", "stopped by a signal; the same command resumes it")] * 2, ["stopped by a signal"]),
        ([("ok", ""), ("unfinished", "")], ["1 of 2 jobs", "resumes"]),
        ([("ok", ""), ("failed", "out of luck")], ["error: out of luck"]),
    ],
    ids=["none ended", "one failed", "stopped", "one did not end", "one failed of two"],
)
def test_the_end_of_a_sweep_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[tuple[str, str]], said: list[str]
) -> None:
    for number, (status, error) in enumerate(jobs):
        (tmp_path / str(number)).mkdir()
        record = {"sweep": "this", "begun": number, "overrides": {"seed": str(number)}, "status": status}
        (tmp_path / str(number) / sweep.RECORD).write_text(json.dumps(record | ({"error": error} if error else {})))
    begun = sweep.Sweep("this", tmp_path, {}, {"seed"}, set(), None, None, may_fail=False)
    monkeypatch.setattr(sweep, "_started", [begun])
    with pytest.raises(SystemExit) as end:
        sweep.end_sweep()
    message = str(end.value)
    assert message.startswith("error: ")
    assert all(words in message for words in said)
    assert not any(words in message for words in ("none;", "error: by", "\n"))
    assert not message.endswith(": none")
