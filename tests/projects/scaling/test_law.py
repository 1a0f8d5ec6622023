"""Scaling laws: a known law is found again, predicts what was held out, and its intervals hold what they claim."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")

from PIL import Image

from coca_lit.errors import DataError
from coca_lit.metrics.uncertainty import Conditions
from coca_lit.projects.scaling.law import Law, Point, fit_scaling, frontier, points_of, published_points
from coca_lit.runs.results import write_conditions
from coca_lit.tools.report.command import report
from coca_lit.tools.report.runs import find_runs

TRUE = Law(top=0.9, a=0.45, b=0.3, c=0.5, unit=1e4)
COMPUTE = 1e3 * 2.0 ** np.arange(11)


def grid(noise: float, seed: int, seeds: int = 3) -> list[Point]:
    rng = np.random.default_rng(seed)
    scores = TRUE(COMPUTE)
    return [
        Point(f"{i}_seed{k}", float(c), float(scores[i] + noise * rng.normal()))
        for i, c in enumerate(COMPUTE)
        for k in range(seeds)
    ]


def test_a_known_law_is_found_again() -> None:
    found = fit_scaling(grid(0, 0), top=1.0)
    compute = np.geomspace(1e3, 4e6, num=20)
    assert np.abs(found.law(compute) - TRUE(compute)).max() < 2e-3
    assert found.law.top == pytest.approx(0.9, abs=5e-3)
    assert found.law.c == pytest.approx(0.5, abs=2e-2)
    assert {point.compute for point in found.fitted} == set(COMPUTE[COMPUTE[-1] / 4 * 1.001 >= COMPUTE])
    assert {prediction.point.compute for prediction in found.held_out} == set(COMPUTE[-2:])


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """95 % of single runs, of the law where they are, and of the exponent; `experiments/scaling` has more studies."""
    runs: list[bool] = []
    curve: list[bool] = []
    exponent: list[bool] = []
    for seed in range(200):
        found = fit_scaling(grid(0.01, seed), top=1.0)
        runs += [low <= point.score <= high for point, _, low, high in found.held_out]
        low, high = found.region.curve(COMPUTE[-2:])
        curve += [*(low <= TRUE(COMPUTE[-2:])) & (TRUE(COMPUTE[-2:]) <= high)]
        exponent.append(found.region.exponents.min() <= TRUE.c <= found.region.exponents.max())
    assert len(runs) > 1100
    for share in map(np.mean, (runs, curve, exponent)):
        assert 0.92 < share < 0.98


def test_intervals_end_at_the_best_score() -> None:
    """Runs that scatter widely close to it."""
    shifts = np.tile([-0.04, 0.0, 0.04], len(COMPUTE))
    scores = np.repeat(1 - 0.02 * (COMPUTE / 1e6 + 0.3) ** -1.0, 3) + shifts
    points = [Point(str(i), float(c), float(s)) for i, (c, s) in enumerate(zip(COMPUTE.repeat(3), scores, strict=True))]
    held_out = fit_scaling(points, top=1.0).held_out
    assert {prediction.high for prediction in held_out} == {1.0}


def test_a_run_off_the_law_is_outside_of_its_interval() -> None:
    points = grid(0.002, 0)
    broken = points[-1]._replace(score=0.97)
    held_out = fit_scaling([*points[:-1], broken], top=1.0).held_out
    (of_broken,) = [p for p in held_out if p.point == broken]
    assert not of_broken.low <= broken.score <= of_broken.high


def test_only_computes_that_nothing_cheaper_beats_are_fitted() -> None:
    points = [Point("a", 1, 0.1), Point("b", 2, 0.3), Point("b", 2, 0.2), Point("c", 3, 0.24), Point("d", 4, 0.5)]
    assert [point.name for point in frontier(points[::-1])] == ["a", "b", "b", "d"]


def test_too_few_points_are_refused() -> None:
    with pytest.raises(DataError, match=r"5 points.*there are 4.*--hold-out"):
        fit_scaling(grid(0, 0)[:-15])
    assert len(fit_scaling(grid(0, 0)[:-15], hold_out=1).fitted) == 18


# The command


def make_runs(folder: Path) -> Path:
    for point in grid(0.003, 1):
        run = folder / point.name
        run.mkdir(parents=True)
        (run / "results.json").write_text(json.dumps({"scenes/CIDEr": 1.0, "scenes/t2i_recall@1": point.score}))
        (run / "environment.json").write_text(json.dumps({"samples": point.compute / 3, "seconds": 1}))
        (run / "config.yaml").write_text("name: x\nmodel:\n  net:\n    embed_dim: 96\n")
    return folder


def test_points_are_of_one_set_of_images_and_have_their_own_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coca_lit.weights.load.load_dual_encoder", lambda folder: folder)
    monkeypatch.setattr("coca_lit.models.cost.forward_flops", lambda folder: {"a": 1, "b": 2}[folder.name] * 10**9)
    conditions = Conditions("val", 64, "images", 320, "texts", {})
    for name, vocabulary in (("a", 100), ("b", 200)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text('{"x/top1": 0.5}')
        (tmp_path / name / "environment.json").write_text('{"samples": 10}')
        (tmp_path / name / "config.yaml").write_text(f"vocabulary: {vocabulary}\nmodel:\n  net:\n    embed_dim: 96\n")
        write_conditions(tmp_path / name, {"x/top1": conditions})
    assert points_of(find_runs([tmp_path])[0], "x/top1") == [Point("a", 30, 0.5), Point("b", 60, 0.5)]
    write_conditions(tmp_path / "b", {"x/top1": conditions._replace(images=8, image_digest="few")})
    with pytest.raises(DataError, match=r"^x/top1 of a and b cannot be compared: 64 images of val / 8 images of val$"):
        points_of(find_runs([tmp_path])[0], "x/top1")


@pytest.mark.slow
def test_the_command_predicts_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("coca_lit.weights.load.load_dual_encoder", lambda folder: folder)
    monkeypatch.setattr("coca_lit.models.cost.forward_flops", lambda model: 10**9)  # 1 GFLOP forward, 3 with backward
    folder = make_runs(tmp_path / "runs")
    (folder / "0_seed0").rename(folder / "=1+1")
    report([str(folder), "--scaling"])
    said = capsys.readouterr().out
    assert "text to image recall@1" in said
    assert said.count("held out") == said.count("inside") + said.count("outside") == 6
    assert Image.open(folder / "scaling.png").width > 500
    rows = list(csv.DictReader((folder / "scaling.csv").open()))
    assert sorted({float(row["GFLOP"]) for row in rows}) == pytest.approx(sorted(COMPUTE))
    assert sum(bool(row["expected"]) for row in rows) == 6
    assert {row["run"] for row in rows if "=" in row["run"]} == {"'=1+1"}
    report([str(folder), "--scaling", "--hold-out", "1", "--objective", "scenes/t2i_recall@1"])
    assert "held out" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="scenes/top1"):
        report([str(folder), "--scaling", "--objective", "scenes/top1"])
    with pytest.raises(SystemExit, match=r"no run has .*t2i_recal@1.*did you mean 'scenes/t2i_recall@1'"):
        report([str(folder), "--objective", "scenes/t2i_recal@1"])
    (folder / "=1+1" / "environment.json").write_text('{"samples": "many"}')
    with pytest.raises(SystemExit, match=r"environment\.json does not hold what a run writes there"):
        report([str(folder), "--scaling", "--objective", "scenes/t2i_recall@1"])


def test_published_results_by_family(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    kept = {"model": "mammut_ViT-B-32", "downstream_dataset": "imagenet1k", "lr_scheduler": "cosine", "epoch": 4}
    kept |= {"total_epochs": 4, "gflops_total": 1e9, "acc1": 0.5}
    clip = kept | {"model": "ViT-B-32", "acc1": 60.0}
    others = [kept | change for change in ({"epoch": 3}, {"lr_scheduler": "const"}, {"downstream_dataset": "vtab"})]
    parquet.write_table(pa.Table.from_pylist([kept, clip, *others]), tmp_path / "results.parquet")
    assert published_points(tmp_path / "results.parquet") == {
        "MaMMUT": [Point("mammut_ViT-B-32", 1e9, 0.5)],
        "CLIP": [Point("ViT-B-32", 1e9, 0.6)],
    }
    parquet.write_table(pa.table({"model": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="no column downstream_dataset"):
        published_points(tmp_path / "other.parquet")
