"""Seeds derived from their purpose, so that randomness depends neither on workers nor on where a run was resumed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts, equal in every process (Python's `hash` of a string is not)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Random numbers of the CPU and of `device`, the current one of its kind, go on after the block as before it."""
    kind = torch.get_device_module(device) if device.type not in ("cpu", "meta") else None
    before = kind.get_rng_state() if kind is not None else None
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        if kind is not None:
            kind.set_rng_state(before)
