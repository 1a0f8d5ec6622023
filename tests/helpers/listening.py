"""Which processes listen, and from where they are reached."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path


def interfaces() -> set[str]:
    """Those of this process's network that have an address."""
    shown = subprocess.run(["ip", "-o", "address"], capture_output=True, text=True, check=True).stdout
    return {line.split()[1] for line in shown.splitlines()}


def listens_here(process: int) -> bool:
    """Whether a process listens on TCP, in the network of this one; raises `AssertionError` if in another one."""
    own = Path(f"/proc/{process}")
    sockets = set()
    for file in (own / "fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            sockets.add(os.readlink(file))
    rows = [line.split() for name in ("tcp", "tcp6") for line in (own / "net" / name).read_text().splitlines()[1:]]
    listens = any(row[3] == "0A" and f"socket:[{row[9]}]" in sockets for row in rows)  # 0A: TCP_LISTEN
    assert not listens or os.readlink(own / "ns" / "net") == os.readlink("/proc/self/ns/net")
    return listens


def descendants(process: int) -> list[int]:
    """A process, its children, and theirs."""
    children: list[str] = []
    with suppress(FileNotFoundError, ProcessLookupError):  # one that has ended
        for task in Path(f"/proc/{process}/task").iterdir():
            children += (task / "children").read_text().split()
    return [process, *(pid for child in children for pid in descendants(int(child)))]
