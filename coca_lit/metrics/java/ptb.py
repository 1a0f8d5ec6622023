"""Penn Treebank tokens, as the COCO caption evaluation defines them: lower case, without punctuation.

Every published BLEU, METEOR, ROUGE-L and CIDEr on COCO is computed on the output of Stanford CoreNLP 3.4.1 with the
options and the stop list below, so this is part of the metrics' definition.
"""

import subprocess
from collections.abc import Sequence

from coca_lit.metrics.java.runtime import JVM_FLAGS, JavaError, java_executable, pycocoevalcap_jar

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
    tokenized = _run_tokenizer("\n".join(lines) + "\n").removesuffix("\n").split("\n")
    if len(tokenized) != len(texts):
        raise JavaError(f"the PTB tokenizer was given {len(texts)} captions and answered with {len(tokenized)} lines")
    return [" ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION) for line in tokenized]


def _run_tokenizer(text: str) -> str:
    jar = pycocoevalcap_jar("tokenizer/stanford-corenlp-3.4.1.jar")
    program = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    command = [str(java_executable()), *JVM_FLAGS, *program]
    try:
        # A lone surrogate, which no encoding can hold, becomes a question mark.
        done = subprocess.run(command, input=text.encode(errors="replace"), capture_output=True, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise JavaError(f"the PTB tokenizer did not finish within {TIME_LIMIT_S:.0f} s") from error
    if done.returncode != 0:
        message = done.stderr.decode(errors="replace")[-1000:]
        raise JavaError(f"the PTB tokenizer failed (exit status {done.returncode}): {message}")
    return done.stdout.decode()
