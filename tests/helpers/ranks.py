"""What a process of the fixture `on_ranks` does: pickled by name, it needs a module whose name is its own."""

import multiprocessing
import os
import pickle
from datetime import timedelta
from pathlib import Path


def fork_workers() -> None:
    # Not as an initializer itself: it is a method, which would arrive with a copy of what it changes.
    multiprocessing.set_start_method("fork", force=True)


def on_rank(rank: int, world: int, store: Path, call: bytes) -> bytes:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = timedelta(seconds=180)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=world, timeout=timeout)
    os.environ["RANK"] = str(rank)  # as torchrun does: who prepares a run folder asks before there is a group
    try:
        function, arguments = pickle.loads(call)
        return pickle.dumps(function(*arguments))
    finally:
        del os.environ["RANK"]
        dist.destroy_process_group()
