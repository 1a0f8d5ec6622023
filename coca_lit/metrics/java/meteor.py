"""METEOR 1.5 as one Java process that stays alive between evaluations.

Loading its paraphrase table costs 6 s of CPU time, so ``warm_up`` starts the process while a model still generates, and
later evaluations find it ready. The process cannot block its owner: a watchdog kills it when an answer is overdue, and
that ends any pending read. Nor does it outlive its owner: it is killed by ``close``, at garbage collection and at exit,
and if Python itself is killed it reads the end of its input and stops.
"""

import contextlib
import functools
import re
import subprocess
import threading
import weakref
from collections.abc import Sequence
from typing import Self

from coca_lit.metrics.java.runtime import JVM_FLAGS, JavaError, java_executable, pycocoevalcap_jar

RESERVED = re.compile(r"\|\|\||[\r\n]")  # separators of the line protocol
SECONDS_PER_CAPTION = 0.05  # over ten times what a caption with five references takes


class Meteor:
    """Scores captions as the COCO caption evaluation does: METEOR 1.5, English, normalised, default weights.

    The process starts at ``start`` or at the first ``score``, and again when it has died. Threads may share an
    instance; ``with Meteor() as meteor`` closes it. ``timeout``: seconds for loading, and slack for each ``score``.
    """

    def __init__(self, timeout: float = 600.0) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
        self.timeout = timeout
        self._lock = threading.RLock()
        self._process: _MeteorProcess | None = None

    def start(self) -> None:
        """Start the process unless one is alive; returns at once, while it loads."""
        with self._lock:
            self._running()

    def score(self, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> float:
        """Corpus METEOR in [0, 1] of tokenised captions; ``references[i]`` are those of ``hypotheses[i]``.

        Raises JavaError when the process dies or is overdue; the next call then starts another one.
        """
        if not hypotheses or len(references) != len(hypotheses) or not all(references):
            raise ValueError(
                "METEOR needs at least one hypothesis, and at least one reference for each; "
                f"got {len(hypotheses)} hypotheses and {len(references)} lists of references"
            )
        with self._lock:
            process = self._running()
            limit = self.timeout + SECONDS_PER_CAPTION * len(hypotheses)
            overdue = threading.Event()
            watchdog = threading.Timer(limit, _expire, (overdue, process))
            watchdog.daemon = True
            watchdog.start()
            try:
                return process.score(references, hypotheses)
            except (OSError, EOFError, ValueError) as error:
                reason = f"gave no answer within {limit:g} s" if overdue.is_set() else f"failed: {error}"
                raise JavaError(f"METEOR {reason} (Java's own message, if any, is on standard error)") from error
            finally:
                watchdog.cancel()

    def close(self) -> None:
        """End the process, if any; a pending ``score`` then fails."""
        if self._process is not None:
            self._process.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _running(self) -> "_MeteorProcess":
        if self._process is None or not self._process.alive():
            self._process = _MeteorProcess()
        return self._process


class _MeteorProcess:
    """One run of the jar and its conversation, in which "|||" separates fields and a line ends each message:

    ``SCORE ||| reference ||| ... ||| hypothesis`` is answered by a line of match statistics, and
    ``EVAL ||| statistics ||| ...`` by a line with the score of each caption, then a line with that of the corpus.
    """

    def __init__(self) -> None:
        jar = pycocoevalcap_jar("meteor/meteor-1.5.jar")
        program = ["-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
        # Standard error is the caller's: a pipe that nobody reads would fill up and block Java.
        self._java = subprocess.Popen(
            [str(java_executable()), *JVM_FLAGS, *program],
            cwd=jar.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        assert self._java.stdin
        assert self._java.stdout
        self._in, self._out = self._java.stdin, self._java.stdout
        self.kill = weakref.finalize(self, _end, self._java)  # acts once: when called, collected or at exit

    def alive(self) -> bool:
        return self.kill.alive and self._java.poll() is None

    def score(self, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> float:
        try:
            statistics = []
            for refs, hypothesis in zip(references, hypotheses, strict=True):
                self._send("SCORE", *refs, hypothesis)
                statistics.append(self._receive())
            self._send("EVAL", *statistics)
            *_, corpus = (float(self._receive()) for _ in range(len(hypotheses) + 1))
        except BaseException:
            self.kill()  # the rest of the answers must not be taken for those to the next question
            raise
        return corpus

    def _send(self, *fields: str) -> None:
        self._in.write(" ||| ".join(RESERVED.sub(" ", field) for field in fields) + "\n")
        self._in.flush()

    def _receive(self) -> str:
        line = self._out.readline()
        if not line:
            raise EOFError("the Java process ended")
        return line.strip()


def _expire(overdue: threading.Event, process: _MeteorProcess) -> None:
    overdue.set()
    process.kill()


def _end(java: subprocess.Popen[str]) -> None:
    java.kill()
    java.wait()
    for pipe in (java.stdin, java.stdout):
        with contextlib.suppress(OSError):  # closing flushes what could not be sent
            if pipe:
                pipe.close()


@functools.cache
def shared_meteor() -> Meteor:
    """The instance that all evaluations of this Python process share."""
    return Meteor()


def warm_up() -> None:
    """Let the shared process load in the background; call it some seconds before captions are scored."""
    shared_meteor().start()
