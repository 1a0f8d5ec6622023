"""Which statements about scenes are right: those that name colours, or those that name shapes?

python experiments/tasks/named.py outputs/tasks/comparison_seed0 --task comparison
"""

import argparse
from collections import defaultdict

import torch

from coca_lit.data.scenes.render import COLOURS
from coca_lit.evals.base import kept_objective
from coca_lit.projects.classification.classifier import Classifier
from coca_lit.projects.reasoning.scene_statements import comparison_records, entailment_records
from coca_lit.tools.report.tables import Table, markdown
from coca_lit.weights.load import load_model

TASKS = {"entailment": entailment_records, "comparison": comparison_records}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="its folder or a checkpoint")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--split", default="test")
    options = parser.parse_args()
    model = load_model(options.run).eval()
    classifier = kept_objective(model, Classifier)
    assert classifier is not None, f"{options.run} has no classifier"
    records = TASKS[options.task](options.split, model.image_size)
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for record, logits in zip(records, classifier.logits(model, records), strict=True):
        names = "colours" if any(word in COLOURS for word in record.question.split()) else "shapes"
        right[record.domain or "", names].append(classifier.classes[int(logits.argmax())] == record.captions[0])
    lines = [[*key, str(len(found)), f"{100 * sum(found) / len(found):.1f}"] for key, found in sorted(right.items())]
    print(markdown(Table("", ["kind", "names", "statements", "right, %"], lines)))


if __name__ == "__main__":
    main()
