"""Texts between pairs on a simulated GPU: nothing waits for it."""

from pathlib import Path

import pytest
from recorded_runs import on_gpu, recorded_steps

pytestmark = pytest.mark.filterwarnings("ignore")


def test_texts_between_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(["a red circle and a blue square"] * 20))
    steps = recorded_steps(monkeypatch)
    on_gpu(tmp_path / "run", f"data.text={tmp_path}/texts.txt")
    for step in steps[1:-1]:
        assert not step.waits, dict(step.waits)
