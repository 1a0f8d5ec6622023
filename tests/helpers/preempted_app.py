"""train.py whose job is sent a signal in its second batch: seed 0 submitit's for preemption, others SIGTERM."""

import signal

from omegaconf import DictConfig

from coca_lit.cli.command import job_command
from coca_lit.cli.train import run
from helpers.resuming import Signal
from helpers.running import watched


def job(cfg: DictConfig) -> dict[str, float]:
    with watched(Signal(signal.SIGTERM if cfg.seed else signal.SIGUSR2)):
        return run(cfg)


if __name__ == "__main__":
    job_command("train", job)
