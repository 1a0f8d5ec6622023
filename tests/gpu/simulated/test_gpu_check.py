"""`coca-gpu-check` runs to its end on the simulated GPU, and says that it is one."""

import json
from pathlib import Path

import pytest
from simulated_gpu import SimulatedGpu

from coca_lit.tools.gpu_check import checks
from coca_lit.tools.gpu_check.command import gpu_check

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def test_every_check_passes_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SimulatedGpu():
        gpu_check(["--output", str(tmp_path)])
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["simulated"]
    assert {line["outcome"] for line in found["checks"]} == {"PASS", "SKIP"}
    assert sum(line["outcome"] == "PASS" for line in found["checks"]) > 25
    assert {row["model"] for row in found["measurements"]} == {"coca_tiny"}
    details = {line["name"]: line["detail"] for line in found["checks"]}
    assert "flash_attention" in details["attention in bf16"]
    page = (tmp_path / "gpu_check.md").read_text()
    assert page.startswith("On a simulated GPU: values are those of the CPU, times mean nothing.")
    assert "| three steps in 16-mixed | PASS |" in page
    assert capsys.readouterr().out.count("PASS  ") > 25


def test_after_a_failed_check_the_others_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> str:
        raise RuntimeError("CUDA error:\nan illegal memory access")

    for name in ("equals_cpu", "same_captions", "attention_kernels", "trains", "resumes"):
        monkeypatch.setattr(checks, name, lambda *_, **__: "done")
    monkeypatch.setattr(checks, "fused_loss", fails)
    with SimulatedGpu(), pytest.raises(SystemExit) as ended:
        gpu_check(["--output", str(tmp_path)])
    assert ended.value.code == 1
    lines = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    assert [(line["name"], line["detail"]) for line in lines if line["outcome"] == "FAIL"] == [
        ("fused caption loss equals the chunks", "RuntimeError: an illegal memory access")
    ]
    assert lines[-1]["outcome"] == "PASS"
