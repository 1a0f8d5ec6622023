"""METEOR 1.5 as one Java process that stays alive between evaluations.

Loading its paraphrase table costs 6 s of CPU time, so ``warm_up`` starts the process while a model still generates, and
later evaluations find it ready.
"""

import functools
import re
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from coca_lit.metrics.java.runtime import JVM_FLAGS, Conversation, JavaError, java_executable, pycocoevalcap_file

RESERVED = re.compile(r"\|\|\||[\r\n]")  # separators of the line protocol
LOADING_S = 600.0  # and slack for each call of `score`
SECONDS_PER_CAPTION = 0.05  # over ten times what a caption with five references takes
# Parameters for English. The four stages of matching: exact words, stems, synonyms, paraphrases.
ALPHA = 0.85
BETA = 0.2
GAMMA = 0.6
DELTA = 0.75
STAGE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
STATISTICS = 23


class MeteorScores(NamedTuple):
    """METEOR of all captions, and what it is made of.

    Attributes:
        corpus: METEOR in [0, 1] of all captions.
        captions: (captions,) that of each.
        statistics: (captions, 23), whose sums make the score of any selection of captions, see `meteor_of_sums`.
    """

    corpus: float
    captions: np.ndarray
    statistics: np.ndarray


class Meteor:
    """Scores captions as the COCO caption evaluation does: METEOR 1.5, English, normalised, default weights.

    The process starts at ``start`` or at the first ``score``, and again when it has died. Threads may share an
    instance.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: Conversation | None = None

    def start(self) -> Conversation:
        """The process; a new one, unless one is alive, is returned at once, while it loads."""
        with self._lock:
            if self._process is None or not self._process.alive():
                jar = pycocoevalcap_file("meteor/meteor-1.5.jar")
                program = ["-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
                # Standard error is the caller's: a pipe that nobody reads would fill up and block Java.
                self._process = Conversation([str(java_executable()), *JVM_FLAGS, *program], cwd=jar.parent)
            return self._process

    def score(self, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> MeteorScores:
        """Scores of tokenised captions; ``references[i]`` belong to ``hypotheses[i]``.

        Raises JavaError when the process dies or is overdue; the next call then starts another one.
        """
        if not hypotheses or len(references) != len(hypotheses) or not all(references):
            raise ValueError(
                "METEOR needs at least one hypothesis, and at least one reference for each; "
                f"got {len(hypotheses)} hypotheses and {len(references)} lists of references"
            )
        with self._lock:
            process = self.start()
            try:
                with process.deadline(LOADING_S + SECONDS_PER_CAPTION * len(hypotheses)):
                    return _scores(process, references, hypotheses)
            except TimeoutError as error:
                raise JavaError(f"METEOR {error} (Java's own message, if any, is on standard error)") from error
            except (OSError, EOFError, ValueError) as error:
                message = f"METEOR failed: {error} (Java's own message, if any, is on standard error)"
                raise JavaError(message) from error

    def close(self) -> None:
        """End the process, if any; a pending ``score`` then fails."""
        if self._process is not None:
            self._process.kill()


def _scores(process: Conversation, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> MeteorScores:
    """Asks the jar. "|||" separates fields and a line ends each message: ``SCORE ||| reference ||| ... ||| hypothesis``
    is answered by a line of match statistics, and ``EVAL ||| statistics ||| ...`` by a line with the score of each
    caption, then a line with that of the corpus.
    """

    def ask(*fields: str) -> None:
        process.send(" ||| ".join(RESERVED.sub(" ", field) for field in fields))

    try:
        statistics = []
        for refs, hypothesis in zip(references, hypotheses, strict=True):
            ask("SCORE", *refs, hypothesis)
            statistics.append(process.receive())
        ask("EVAL", *statistics)
        *single, corpus = (float(process.receive()) for _ in range(len(hypotheses) + 1))
        found = np.array([[float(number) for number in row.split()] for row in statistics])
        return MeteorScores(corpus, np.array(single), found)
    except BaseException:
        process.kill()  # the rest of the answers must not be taken for those to the next question
        raise


def summable(statistics: np.ndarray) -> np.ndarray:
    """Statistics (captions, 23) of single captions, as METEOR adds them up: a caption that matches from end to end has
    no break and adds no chunk.
    """
    stages = statistics[:, 4:20].reshape(-1, 4, 4)  # stage; content words of caption, reference, function words of both
    matches = stages.sum(axis=1)
    whole = (matches[:, 0] + matches[:, 2] == statistics[:, 0]) & (matches[:, 1] + matches[:, 3] == statistics[:, 1])
    result = statistics.copy()
    result[whole & (statistics[:, 20] == 1), 20] = 0
    return result


def meteor_of_sums(sums: np.ndarray) -> np.ndarray:
    """METEOR 1.5 of sets of captions (…,), from the sums (…, 23) of their `summable` statistics.

    Denkowski and Lavie 2014, section 2: a weighted harmonic mean of precision and recall, less a penalty for chunks.
    """
    length, functions = sums[..., 0:2], sums[..., 2:4]  # of caption and reference
    stages = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 2, 2)  # stage; content or function words; caption, reference
    weights = DELTA * stages[..., 0, :] + (1 - DELTA) * stages[..., 1, :]  # (…, stage, side)
    matched = np.einsum("s,...sk->...k", STAGE_WEIGHTS, weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = np.moveaxis(matched / (DELTA * (length - functions) + (1 - DELTA) * functions), -1, 0)
        mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        chunks_per_match = 2 * sums[..., 20] / (sums[..., 21] + sums[..., 22])
        return np.nan_to_num(mean * (1 - GAMMA * chunks_per_match**BETA))


@functools.cache
def shared_meteor() -> Meteor:
    """The instance that all evaluations of this Python process share."""
    return Meteor()


def warm_up() -> None:
    """Let the shared process load in the background; call it some seconds before captions are scored."""
    shared_meteor().start()
