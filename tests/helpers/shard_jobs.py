"""For the tests of engines: work on shards that takes no time, importable by their processes, and recaptioning."""

import contextlib
import os
import signal
from pathlib import Path

from coca_lit.errors import DataError


def work_on(shard: str, folder: Path) -> tuple[str, int, str | None]:
    """What the shard's name says: `once` kills the process the first time, `always` every time, `broken` is an error of
    the user and `bug` one of ours. Else the name, the process and the device that it sees.
    """
    started = folder / f"{shard}.started"
    if shard == "always" or (shard.startswith("once") and not started.exists()):
        started.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if shard == "broken":
        raise DataError("no such caption")
    if shard == "bug":
        raise ZeroDivisionError("division by zero")
    return shard, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")


# Recaptioning on clusters


RECAPTION = (
    *("shards", "checkpoint=tiny.safetensors", "output=new", "imports=[killing]", "generate.strategy=sample"),
    *("batch_size=2", "num_workers=0", "precision=fp32", "threads=1"),
)
# A module for `imports=`: the first process that has it is sent a signal in the middle of its second shard.
KILLING = """
import os, pathlib, signal
from coca_lit.tools.caption import outputs
real, calls = outputs.write_shard, []
def write_shard(*arguments):
    calls.append(arguments)
    if len(calls) == 2 and not pathlib.Path("killed").exists():
        pathlib.Path("killed").touch()
        os.kill(os.getpid(), int(os.environ.get("KILLING", signal.SIGKILL)))
    real(*arguments)
outputs.write_shard = write_shard
"""


def shards_to_caption(folder: Path) -> dict[str, bytes]:
    """Writes what `RECAPTION` needs into a folder; returns the files that one process makes of it."""
    import torch

    from coca_lit import create_model, save_model
    from coca_lit.cli.command import compose
    from coca_lit.tools.caption.command import run
    from coca_lit.tools.prepare.scenes import write_shards

    torch.manual_seed(0)
    save_model(create_model("coca_tiny").eval(), folder / "tiny.safetensors")
    (folder / "shards").mkdir()
    write_shards(folder / "shards", 12, 40, per_shard=2)
    (folder / "killing.py").write_text(KILLING)
    with contextlib.chdir(folder):  # sampling is seeded by the path of a shard
        words = ("images=[shards]", *RECAPTION[1:], "output=expected", "imports=[]")
        run(compose("caption", words))
    return contents(folder / "expected")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
