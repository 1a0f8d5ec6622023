"""Disks that are full."""

import resource
import signal


def at_most(size: int | None) -> None:
    """This process can write no file longer than that, and a write beyond it is cut off, as on a full disk. Only for
    processes of their own: whatever else a process writes is cut off too.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then it is an error, EFBIG
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))
