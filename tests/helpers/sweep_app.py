"""A stand-in for train.py whose jobs take no time: the learning rate is the score, above 1 it is an error, 0 is a
bug, and 109 is signal 9 to its own process, 209 only the first time; a training answers SIGTERM with `SystemExit`.
"""

import json
import os
import signal
import sys
from pathlib import Path

from omegaconf import DictConfig

from coca_lit.cli.command import job_command
from coca_lit.errors import ConfigError
from coca_lit.metrics.uncertainty import Conditions
from coca_lit.runs.results import write_conditions


def job(cfg: DictConfig) -> float:
    rate = float(cfg.model.optimizer.lr)
    folder = Path(cfg.output_dir)
    if rate > 200 and (folder / "killed").exists():
        rate = 0.2
    if rate > 100:
        (folder / "killed").touch()
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        os.kill(os.getpid(), int(rate) % 100)
    if rate == 0:
        raise RuntimeError(f"no model learns at {rate}")
    if rate > 1:
        raise ConfigError(f"no model survives {rate}")
    with (folder / f"rank{os.environ.get('SLURM_PROCID', '')}.txt").open("a") as file:
        file.write(f"{os.getpid()}\n")
    (folder / "config.yaml").write_text(f"model: {{optimizer: {{lr: {rate}}}}}\n")
    results = {"scenes/CIDEr": rate, "scenes/i2t_median_rank": 1 - rate}
    (folder / "results.json").write_text(json.dumps(results))
    write_conditions(folder, dict.fromkeys(results, Conditions("val", 5000, "images", 5000, "texts", {})))
    return rate


if __name__ == "__main__":
    job_command("train", job)
