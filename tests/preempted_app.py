"""train.py whose job is sent submitit's signal for preemption in its second batch."""

import signal

from omegaconf import DictConfig
from running import watched
from test_resume import Signal

from coca_lit.cli.command import command
from coca_lit.cli.train import train_job


def job(cfg: DictConfig) -> float | None:
    with watched(Signal(signal.SIGUSR2)):
        return train_job(cfg)


if __name__ == "__main__":
    command("train", job, multirun=True)
