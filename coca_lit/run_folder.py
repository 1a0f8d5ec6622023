"""What a run leaves behind besides checkpoints: its config, its results and its report."""

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
    """Writes `results.json`, `not_run.json` (why a score is missing) and the report, and prints the scores."""
    from coca_lit.report import write_report

    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "not_run.json").write_text(json.dumps(not_run, indent=2) + "\n")
    print_results(results)
    write_report(folder)
    print(f"everything is in {folder}, to be seen in report.html")


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
