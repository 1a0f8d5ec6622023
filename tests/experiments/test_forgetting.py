"""The study of forgetting: what is kept is relative to the same model of the same seed before."""

import pytest

from experiments import study
from experiments.forgetting import report


def test_kept_is_relative_to_the_same_model_and_seed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    recalls = {
        "before_seed0": (0.9, 0.7),
        "c0_seed0": (0.3, 0.1),
        "before_seed1": (0.6, 0.4),
        "c0_seed1": (0.3, 0.2),
        "modern_before_seed0": (1.0, 1.0),
        "modern_c0_seed0": (0.5, 0.2),
        "modern_c0_seed1": (0.5, 0.2),  # its model before was not scored
    }
    rows = [
        {"run": run, "seed": run[-1], "scenes/t2i_recall@5": str(t2i), "scenes/i2t_recall@5": str(i2t)}
        for run, (t2i, i2t) in recalls.items()
    ]
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.csv")
    study.write_rows(report.RESULTS, [*rows, {"run": "modern_failed_seed0", "seed": "0"}])
    kept = {prefix: {row["run"]: row["scenes/kept"] for row in report.runs_of(prefix)} for prefix in ("", "modern_")}
    assert kept == {
        "": {"before_seed0": "100.00", "c0_seed0": "25.00", "before_seed1": "100.00", "c0_seed1": "50.00"},
        "modern_": {"before_seed0": "100.00", "c0_seed0": "35.00"},
    }
