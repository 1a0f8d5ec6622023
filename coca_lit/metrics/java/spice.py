"""SPICE (Anderson et al. 2016, arXiv 1607.08822) as one Java process that stays alive between evaluations.

Its program is pycocoevalcap's ``spice-1.0.jar``; two jars of Stanford CoreNLP, under another licence, come from the
user. The program itself ends in an error on every Java from 15 on, because it writes its answer through a script engine
that Java has dropped. So its classes are called from Python by JPype, in a process of their own
(`spice_process`): no gigabyte of heap and no signal handlers enter the process that trains.

Parsing costs about 30 ms a caption, so the scene graphs of captions are kept in ``CACHE``: the references of a data set
are parsed once.
"""

import functools
import json
import math
import os
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from coca_lit.metrics.java.runtime import (
    JVM_FLAGS,
    Conversation,
    JavaError,
    java_executable,
    pycocoevalcap_file,
)

JARS_VARIABLE = "COCA_SPICE_JARS"
JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
FOLDER = Path("~/.cache/coca_lit/spice")  # `coca-data spice` puts the jars there
CACHE = FOLDER / "graphs"
MAVEN = Path("~/.m2/repository/edu/stanford/nlp/stanford-corenlp/3.6.0")
HOW = (
    "run `coca-data spice`, or put edu.stanford.nlp:stanford-corenlp:3.6.0 and its classifier `models` from Maven into "
    f"a folder and set {JARS_VARIABLE} to it"
)
# SPICE serialises by reflection, which Java forbids from version 16 on unless told otherwise.
OPEN_PACKAGES = tuple(
    f"--add-opens=java.base/java.{name}=ALL-UNNAMED"
    for name in ("lang", "math", "util", "util.concurrent", "net", "text")
)
# Calls into native code and legacy memory access are what JPype and the cache need; older Java versions lack the flags.
QUIET = ("--enable-native-access=ALL-UNNAMED", "--sun-misc-unsafe-memory-access=allow")
SILENCE_LIMIT_S = 300.0  # between two answers; loading takes seconds, and so do the captions of one answer

# Of tuples in the scene graphs -> name of the score.
CATEGORIES = {
    "All": "SPICE",
    "Object": "SPICE_object",
    "Attribute": "SPICE_attribute",
    "Relation": "SPICE_relation",
    "Color": "SPICE_color",
    "Cardinality": "SPICE_count",
    "Size": "SPICE_size",
}

Progress = Callable[[int, int], None]  # called with the images scored so far and their total


class SpiceError(JavaError):
    """SPICE cannot run, or did not finish; the message says why and what to do."""


def spice_jars() -> Path:
    """The folder with the two jars: ``COCA_SPICE_JARS``, else the first of ``FOLDER``, a Maven cache and
    pycocoevalcap's own that has both.

    Raises:
        SpiceError: there is none, or a jar is damaged.
    """
    chosen = os.environ.get(JARS_VARIABLE)
    if chosen:
        folder = Path(chosen).expanduser()
        missing = [name for name in JARS if not (folder / name).is_file()]
        if missing:
            raise SpiceError(f"{JARS_VARIABLE} is {folder}, where {' and '.join(missing)} is missing: {HOW}")
    else:
        places = [FOLDER.expanduser(), MAVEN.expanduser(), pycocoevalcap_file("spice/lib")]
        found = [place for place in places if all((place / name).is_file() for name in JARS)]
        if not found:
            raise SpiceError(f"SPICE needs two jars that no Python package carries: {HOW}")
        folder = found[0]
    for name in JARS:
        if not zipfile.is_zipfile(folder / name):
            raise SpiceError(f"{folder / name} is damaged or not a jar: remove it, then {HOW}")
    return folder.resolve()


class Spice:
    """SPICE's F-scores of captions. The process starts at the first ``score``, and again when it has died or the jars
    lie elsewhere; threads may share an instance.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Conversation | None = None
        self._jars: Path | None = None

    def score(
        self,
        references: Sequence[Sequence[str]],
        hypotheses: Sequence[str],
        progress: Progress | None = None,
    ) -> dict[str, np.ndarray]:
        """Scores (images,) in [0, 1] by name, of tokenised captions. As in the official program, a category is NaN
        where neither the caption nor the references of an image have such a tuple; the whole is 0 there.

        Raises:
            SpiceError: JPype, Java or the jars are missing or damaged, or Java dies, fails or stops responding.
        """
        jars = spice_jars()
        question = json.dumps([[list(r), caption] for r, caption in zip(references, hypotheses, strict=True)])
        rows: list[dict[str, float | None]] = []
        with self._lock:
            try:
                if self._process is None or not self._process.alive() or jars != self._jars:
                    self.close()
                    self._process = _start(jars)
                    self._jars = jars
                process = self._process
                with process.deadline(SILENCE_LIMIT_S):
                    process.send(question)
                while len(rows) < len(hypotheses):
                    with process.deadline(SILENCE_LIMIT_S):
                        answer = json.loads(process.receive())
                    if "warning" in answer:
                        warnings.warn(answer["warning"], stacklevel=2)
                    if "error" in answer:
                        raise SpiceError(f"SPICE failed: {answer['error']}")
                    rows += answer.get("scores", [])
                    if progress is not None and rows:
                        progress(len(rows), len(hypotheses))
            except TimeoutError as error:
                raise SpiceError(f"SPICE {error}") from error
            except (OSError, EOFError, ValueError) as error:
                raise SpiceError(f"SPICE failed: {error}") from error
            finally:
                if len(rows) < len(hypotheses):
                    self.close()  # the rest of the answers must not be taken for those to the next question
        return {
            name: np.array([math.nan if row[kind] is None else row[kind] for row in rows])
            for kind, name in CATEGORIES.items()
        }

    def close(self) -> None:
        """End the process, if any."""
        if self._process is not None:
            self._process.kill()


def _start(jars: Path) -> Conversation:
    if find_spec("jpype") is None:
        raise SpiceError("SPICE needs JPype, by which Python calls Java: run `pip install 'coca_lit[spice]'`")
    program = pycocoevalcap_file("spice/spice-1.0.jar")
    cache: str | None = str(CACHE.expanduser())
    try:
        CACHE.expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"SPICE keeps no scene graphs: cannot make {cache}: {error.strerror}", stacklevel=3)
        cache = None
    folder = tempfile.TemporaryDirectory(prefix="coca_spice_")  # of native libraries that Java unpacks, and its log
    libraries = {"win32": "bin/server/jvm.dll", "darwin": "lib/server/libjvm.dylib"}
    settings: dict[str, Any] = {
        "jvm": str(java_executable().resolve().parents[1] / libraries.get(sys.platform, "lib/server/libjvm.so")),
        "flags": [
            *(*JVM_FLAGS, *OPEN_PACKAGES, "-XX:+IgnoreUnrecognizedVMOptions", *QUIET),
            *("-Xmx4G", f"-Djava.io.tmpdir={folder.name}"),
        ],
        "class_path": [str(program), *map(str, program.parent.glob("lib/*.jar")), *(str(jars / name) for name in JARS)],
        "cache": cache,
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    }
    worker = Path(__file__).with_name("spice_process.py")
    with Path(folder.name, "log").open("wb") as log:  # CoreNLP reports every file that it loads
        command = [sys.executable, "-P", str(worker), json.dumps(settings)]
        return Conversation(command, Path(folder.name), stderr=log, clean_up=folder.cleanup)


@functools.cache
def shared_spice() -> Spice:
    """The instance that all evaluations of this Python process share."""
    return Spice()
