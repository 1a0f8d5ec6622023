"""From words on a command line to the objects of a run, or one sentence that says what is wrong with them."""

import time

from coca_lit.runs.signals import requeue_while_starting


def train_command() -> None:
    """Entry point of `python train.py` and `coca-train`. Signals are answered before anything slow is imported."""
    began = time.time()
    requeue_while_starting()
    from coca_lit.cli.command import job_command
    from coca_lit.cli.train import run

    job_command("train", run, began=began)
