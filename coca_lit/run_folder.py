"""What a run leaves behind besides checkpoints: its config, its results and its curves."""

import csv
import json
import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf


def start_run_folder(cfg: DictConfig) -> None:
    """Writes `config.yaml`. Values that come from the environment stay references, so that no secret lands in a file."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("RANK", "0") == "0":
        folder = Path(cfg.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=False))


def write_results(folder: Path, results: dict[str, float], not_run: dict[str, str]) -> None:
    """Writes `results.json`, `not_run.json` (why a score is missing) and `curves.png`, and prints the scores."""
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "not_run.json").write_text(json.dumps(not_run, indent=2) + "\n")
    if (folder / "metrics.csv").exists():
        plot_curves(folder / "metrics.csv", folder / "curves.png")
    print_results(results)
    print(f"everything is in {folder}")


def print_results(results: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    groups = sorted({name.rpartition("/")[0] for name in results})
    table = Table("score", *groups, title="results", title_justify="left")
    for score in dict.fromkeys(name.rpartition("/")[2] for name in results):
        values = (results.get(f"{group}/{score}") for group in groups)
        table.add_row(score, *("" if value is None else f"{value:.4f}" for value in values))
    if results:
        Console().print(table)


def plot_curves(metrics: Path, picture: Path) -> None:
    """Losses and scores over the steps, from the CSV logger's file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = _read_curves(metrics)
    losses = {name: curve for name, curve in curves.items() if name.endswith("_loss")}
    scores = {name: c for name, c in curves.items() if name.endswith(("/CIDEr", "_recall@1", "/exact_match")) and len(c) > 1}
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, group) in zip(figure.subplots(1, 2), {"losses": losses, "scores": scores}.items(), strict=True):
        for name, points in group.items():
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else "")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if group:
            axes.legend(fontsize=8)
    figure.savefig(picture, dpi=120)


def _read_curves(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    curves.setdefault(name, []).append((int(row["step"]), float(value)))
    return curves
