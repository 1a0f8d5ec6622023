"""train.py whose job is sent a signal in its second batch: seed 0 submitit's for preemption, others SIGTERM."""

import signal

from omegaconf import DictConfig
from running import watched
from test_resume import Signal

from coca_lit.cli.command import command
from coca_lit.cli.train import train_job


def job(cfg: DictConfig) -> float | None:
    with watched(Signal(signal.SIGTERM if cfg.seed else signal.SIGUSR2)):
        return train_job(cfg)


if __name__ == "__main__":
    command("train", job, multirun=True)
