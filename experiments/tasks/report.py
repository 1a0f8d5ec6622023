"""Tables of the study of tasks."""

from pathlib import Path

from experiments.study import by_variant, read_rows, renamed

RESULTS = Path(__file__).with_name("results.csv")
KINDS = {"entailment": ("colour", "count", "relation"), "comparison": ("more", "both", "one")}
RUNS = {
    "entailment": {"entailment": "from random weights", "entailment_from_captions": "from captions, encoder frozen"},
    "comparison": {"comparison_at_32": "from entailment, 32 pixels", "comparison": "from entailment from captions"},
}


def tables() -> dict[str, str]:
    rows = read_rows(RESULTS)
    found: dict[str, str] = {}
    reasoned = []
    for task, kinds in KINDS.items():
        scores = {f"scenes_{task}/{kind}/accuracy": kind for kind in kinds}
        scores = {f"scenes_{task}/accuracy": "all", **scores, f"scenes_{task}/blind/accuracy": "text alone"}
        if of := renamed(rows, RUNS[task]):
            reasoned.append(by_variant(of, scores))
    if reasoned:
        found["tasks/reasoning"] = "\n\n".join(reasoned)
    return found
