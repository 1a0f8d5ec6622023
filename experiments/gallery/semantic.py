"""How well semantic scores agree with people, beside the scores that count words.

    COCA_SPICE_JARS=/data/spice python -m experiments.gallery.semantic FOLDER

FOLDER holds Flickr8k's judgements, as for `experiments.judged_scores.judge`. Writes semantic.csv.
"""

import sys
from pathlib import Path

import torch

from coca_lit.projects.judgments.agreement import agreement
from coca_lit.projects.judgments.evaluation import measured
from coca_lit.projects.judgments.judged import read_judgments
from coca_lit.projects.semantic_score.measure import semantic_scores
from coca_lit.runs.run_folder import environment
from experiments.judged_scores.judge import ALL, FILES, compare, rows_of
from experiments.study import write_rows

COMMAND = "python -m experiments.gallery.semantic FOLDER"


def main() -> None:
    torch.set_num_threads(1)
    about = {name: str(environment()[name]) for name in ("commit", "machine", "torch")} | {"command": COMMAND}
    rows = []
    for data, file in FILES.items():
        judged = read_judgments(Path(sys.argv[1]) / file)
        scores = compare(judged) | measured(judged, semantic_scores)
        rows += [row | about for row in rows_of(data, "", ALL, agreement(judged, scores), scores)]
    write_rows(Path(__file__).with_name("semantic.csv"), rows)


if __name__ == "__main__":
    main()
