"""Seeds derived from their purpose, so that randomness depends neither on workers nor on where a run was resumed."""

import hashlib


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts, equal in every process (Python's `hash` of a string is not)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
