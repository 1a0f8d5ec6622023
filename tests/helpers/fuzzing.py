"""Files that Hypothesis damages and forges, and what a reader of them may do: return, or raise one sentence; it never
crashes, hangs or takes memory without bound.

`COCA_FUZZ=20000 pytest -k forged` tries that many files for each reader, others at every call.
"""

import copy
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from coca_lit.errors import UserError

COUNT = int(os.environ.get("COCA_FUZZ", 0))


MEMORY = 600 * 2**20  # bytes by which the peak may grow, while any one file has a few kB


SECONDS = 20  # for one file


fuzz = settings(
    max_examples=COUNT or 25, derandomize=not COUNT, deadline=None, database=None, suppress_health_check=[*HealthCheck]
)


def _overwrite(content: bytes, at: int, payload: bytes) -> bytes:
    return content[:at] + payload + content[at + len(payload) :]


EDITS: list[Callable[[bytes, int, bytes], bytes]] = [
    _overwrite,
    lambda content, at, payload: content[:at] + payload + content[at:],
    lambda content, at, payload: content[:at] + content[at + len(payload) :],
    lambda content, at, payload: content[:at],
    lambda content, at, payload: content[:at] + content[at // 2 :],
    lambda content, at, payload: _overwrite(content, at // 512 * 512, content[:512]),  # another header of a tar
]


PAYLOADS = st.one_of(
    st.binary(min_size=1, max_size=16),
    st.sampled_from(
        [b"\0" * 8, b"\xff" * 8, b"\x80" + b"\0" * 7 + b"\xff" * 4, b"9" * 40, b"S", b"x", b"L", b"[" * 3000]
    ),
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    for _ in range(draw(st.integers(1, 4))):
        edit, at = draw(st.sampled_from(EDITS)), draw(st.integers(0, max(0, len(content) - 1)))
        content = edit(content, at, draw(PAYLOADS))
    return content


ODD = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 2**63, -(2**70), 10**400, 1e308 * 10, 0.5, "", "\ud800", "\udcff.jpg", "\0", "../x"]
    ),
    st.sampled_from([[], {}, [[]], [None], {"": None}, "x" * 5000, [1] * 50]).map(copy.deepcopy),
    st.text(max_size=4),
    st.integers(),
)


@st.composite
def forged(draw: st.DrawFn, document: Any) -> bytes:
    """A JSON document with odd values in some places, missing ones in others, and sometimes torn."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        document = draw(_changed(document))
    text = json.dumps(document).encode()
    if draw(st.integers(0, 9)) == 0:
        deep = draw(st.sampled_from([b"[", b'{"a":'])) * draw(st.sampled_from([10, 900, 200_000]))
        text = draw(st.sampled_from([deep, text.replace(b"1", b"1" * 5000, 1), deep + text, b"\xef\xbb\xbf" + text]))
    return draw(damaged(text)) if draw(st.integers(0, 4)) == 0 else text


@st.composite
def _changed(draw: st.DrawFn, node: Any) -> Any:
    if isinstance(node, dict | list) and node and draw(st.integers(0, 4)):
        key = draw(st.sampled_from([*node] if isinstance(node, dict) else [*range(len(node))]))
        if draw(st.integers(0, 5)) == 0:
            node.pop(key)
        else:
            node[key] = draw(_changed(node[key]))
        return node
    return draw(ODD)


@contextmanager
def bounded() -> Iterator[None]:
    """Passes the errors that a user is shown as one sentence; anything else, and a reader that hangs, fails."""

    def overdue(number: int, frame: object) -> None:
        raise AssertionError(f"it took more than {SECONDS} s")

    peak = _peak()
    before = signal.signal(signal.SIGALRM, overdue)
    signal.alarm(SECONDS)
    try:
        yield
    except UserError as error:
        if len(str(error).splitlines()) != 1:
            raise AssertionError("more than one sentence") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert _peak() - peak < MEMORY


def _peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
