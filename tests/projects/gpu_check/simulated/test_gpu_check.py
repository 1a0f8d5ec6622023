"""`coca-gpu-check` runs to its end on the simulated GPU."""

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from simulated_gpu import SimulatedGpu
from torch.profiler import ProfilerActivity, profile

from coca_lit.models import CoCa
from coca_lit.projects.gpu_check import checks
from coca_lit.projects.gpu_check.command import gpu_check

pytestmark = pytest.mark.filterwarnings("ignore")
LACKS = "not on a simulated GPU"


@pytest.fixture(autouse=True)
def what_the_simulation_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler, NCCL, and PyTorch's own count of synchronisations and times of kernels."""

    def lacks() -> str:
        return LACKS

    def trains(*overrides: str) -> str:
        return lacks() if "+model.compile=true" in overrides else real_trains(*overrides)

    real_trains = checks.trains
    monkeypatch.setattr(checks, "trains", trains)
    monkeypatch.setattr(checks, "no_synchronisation", lacks)
    monkeypatch.setattr(checks, "collectives", lacks)
    monkeypatch.setattr(checks, "profile", lambda activities: profile(activities=[ProfilerActivity.CPU]))


def test_every_check_passes_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "PRECISIONS", ("16-mixed",))  # test_training.py has the others
    with SimulatedGpu():
        gpu_check(["--output", str(tmp_path), "--quick"])
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {line["outcome"] for line in found["checks"]} == {"PASS"}
    assert sum(line["detail"] != LACKS for line in found["checks"]) > 22
    assert {row["model"] for row in found["measurements"]} == {"coca_tiny"}
    details = {line["name"]: line["detail"] for line in found["checks"]}
    assert "flash_attention" in details["attention in bf16"]
    page = (tmp_path / "gpu_check.md").read_text()
    assert page.startswith("Measured. gpu simulated GPU, ")
    assert "| three steps in 16-mixed | PASS |" in page
    assert capsys.readouterr().out.count("PASS  ") > 22


def test_after_a_failed_check_the_others_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> str:
        raise RuntimeError("CUDA error:\nan illegal memory access")

    def fails_without_a_word() -> str:
        raise AssertionError

    for name in ("equals_cpu", "trains", "resumes"):
        monkeypatch.setattr(checks, name, lambda *_, **__: "done")
    for name in ("_step_speed", "_caption_speed"):
        monkeypatch.setattr(checks, name, lambda *_: {})
    monkeypatch.setattr(checks, "attention_kernels", fails_without_a_word)
    monkeypatch.setattr(checks, "same_captions", fails)
    with SimulatedGpu(), pytest.raises(SystemExit) as ended:
        gpu_check(["--output", str(tmp_path), "--quick"])
    assert ended.value.code == 1
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["measurements"] == [{"model": "coca_tiny", "batch": 16}] * 2
    lines = found["checks"]
    assert [(line["name"], line["detail"]) for line in lines if line["outcome"] == "FAIL"] == [
        ("captions equal those of the CPU", "RuntimeError: an illegal memory access"),
        ("attention in bf16", "AssertionError: no message"),
    ]
    assert lines[-1]["outcome"] == "PASS"


def test_a_folder_that_cannot_be_made_is_told_before_the_checks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with SimulatedGpu(), pytest.raises(SystemExit, match="--output: cannot write"):
        gpu_check(["--output", str(tmp_path / "file" / "found")])


@pytest.mark.parametrize("check", [partial(checks.equals_cpu, "fp32"), checks.resumes])
def test_a_difference_that_is_no_number_fails(check: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first one is."""
    differences = chain([0.0, math.nan], repeat(0.0))
    monkeypatch.setattr(checks, "_difference", lambda *_: next(differences))
    weights = {"state_dict": dict.fromkeys("abc", torch.ones(1))}
    monkeypatch.setattr(checks, "_run", lambda *_: weights)
    with SimulatedGpu(), pytest.raises(ValueError, match="within nan"):
        check()


def test_a_missing_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def frozen(net: CoCa) -> CoCa:
        other = copy.deepcopy(net)
        other.logit_scale.requires_grad_(False)
        return other

    monkeypatch.setattr(checks, "copy", SimpleNamespace(deepcopy=frozen))
    with SimulatedGpu(), pytest.raises(ValueError, match=r"1 gradients are missing, e\.g\. of logit_scale"):
        checks.equals_cpu("fp32")
