"""SPICE, if the user has what it needs: two jars of Stanford CoreNLP 3.6.0 that no Python package carries.

The program is pycocoevalcap's ``spice-1.0.jar``. It is started by its class path instead of its manifest, so that the
jars may lie in any folder and nothing is written beside the package.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coca_lit.metrics.java.runtime import JVM_FLAGS, JavaError, java_executable, pycocoevalcap_jar

JARS_VARIABLE = "COCA_SPICE_JARS"
JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
ARCHIVE = "http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
# SPICE serialises by reflection, which Java forbids from version 16 on unless told otherwise.
OPEN_PACKAGES = tuple(
    f"--add-opens=java.base/java.{name}=ALL-UNNAMED"
    for name in ("lang", "math", "util", "util.concurrent", "net", "text")
)
START_LIMIT_S = 300.0  # loading its parser takes half a minute
SECONDS_PER_CAPTION = 1.0  # some 50 times the usual


class SpiceError(JavaError):
    """SPICE cannot run, or did not finish; the message says why and what to do."""


def spice_jars() -> Path:
    """The folder that ``COCA_SPICE_JARS`` names, checked; SpiceError when the jars are not there."""
    folder = os.environ.get(JARS_VARIABLE)
    how = f"unpack the two jars {' and '.join(JARS)} of {ARCHIVE} into a folder and set {JARS_VARIABLE} to it"
    if not folder:
        raise SpiceError(f"SPICE needs jars that no Python package carries: {how}")
    if missing := [name for name in JARS if not Path(folder, name).is_file()]:
        raise SpiceError(f"{JARS_VARIABLE} is {folder}, where {' and '.join(missing)} is missing: {how}")
    return Path(folder).resolve()


def spice(references: Mapping[Any, Sequence[str]], hypotheses: Mapping[Any, Sequence[str]]) -> list[float]:
    """SPICE's F-score in [0, 1] of each image, in their order; ``hypotheses`` holds one caption per image, in a list.

    The corpus score is the mean. Raises SpiceError when the jars are missing, when Java fails and when it is overdue.
    """
    jars = spice_jars()
    content = [
        {"image_id": number, "test": hypotheses[image][0], "refs": list(texts)}
        for number, (image, texts) in enumerate(references.items())
    ]
    with tempfile.TemporaryDirectory(prefix="spice") as folder:
        captions, answer = Path(folder, "captions.json"), Path(folder, "scores.json")
        captions.write_text(json.dumps(content))
        _run(jars, captions, answer, limit=START_LIMIT_S + SECONDS_PER_CAPTION * len(content))
        scores = {row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(answer.read_text())}
    if len(scores) != len(content):
        raise SpiceError(f"SPICE was given {len(content)} images and answered for {len(scores)}")
    # An image whose captions yield no tuple at all has the score null, which counts as NaN in the official mean.
    return [float("nan") if scores[number] is None else float(scores[number]) for number in range(len(content))]


def _run(jars: Path, captions: Path, answer: Path, limit: float) -> None:
    program = pycocoevalcap_jar("spice/spice-1.0.jar")
    class_path = os.pathsep.join(map(str, (program, jars / "*", program.parent / "lib" / "*")))
    flags = [*JVM_FLAGS, *OPEN_PACKAGES, "-Xmx8G", "-cp", class_path]
    command = [str(java_executable()), *flags, "edu.anu.spice.SpiceScorer", str(captions), "-out", str(answer)]
    try:
        done = subprocess.run([*command, "-silent"], capture_output=True, cwd=answer.parent, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise SpiceError(f"SPICE did not finish within {limit:.0f} s") from error
    if done.returncode != 0 or not answer.is_file():
        message = " ".join(done.stderr.decode(errors="replace").split())[-500:]
        raise SpiceError(f"SPICE failed (exit status {done.returncode}): {message}")
