"""Tables of the study of tasks."""

from pathlib import Path

from experiments.study import by_variant, read_rows, renamed

RESULTS = Path(__file__).with_name("results.csv")
PROBES = {"probe_scenes": "scenes", "probe_digits": "digits"}
CLASSES = {"pairs": "pairs alone", "classes10": "10 % classes as texts", "classes50": "50 % classes as texts"}
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
    probes = [
        {key.replace("folder/", "scenes/"): value for key, value in row.items() if value}
        for row in renamed(rows, PROBES)
    ]
    ways = {f"scenes/{way}/top1": way for way in ("knn", "linear", "mean", "pooler")}
    if probes:
        scores = ways | {
            "scenes/pooler/top5": "pooler top-5",
            "scenes/pooler_gain/top1": "gain",
            "scenes/pooler_gain/p": "p",
        }
        found["tasks/pooler"] = by_variant(probes, scores)
    if mixed := renamed(rows, CLASSES):
        scores = {"scenes/top1": "zero-shot top-1", "scenes/top5": "top-5", "scenes/t2i_recall@1": "text to image R@1"}
        found["tasks/classes"] = by_variant(mixed, scores)
    return found
