"""`coca-score --judgments FILES`: how well scores of captions agree with people."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from coca_lit.tools.commands import started

DESCRIPTION = """\
Scores the scores: Kendall's tau with the grades of people, and how often they prefer the same of two captions.
`coca-evaluate evals=judgments` adds the scores of a model."""


def score_judgments(words: Sequence[str]) -> None:
    """Answers the words of `coca-score`, of which `--judgments` is one."""
    from coca_lit.tools.score.output import add_output, check_output, write_scores

    parser = argparse.ArgumentParser("coca-score", description=DESCRIPTION)
    parser.add_argument(
        "--judgments",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="judged captions: Flickr8k's ExpertAnnotations.txt and CrowdFlowerAnnotations.txt, Composite's "
        "*_correctness.csv, Pascal-50S's pair_pascal.mat, or any table of image, caption and grade (judge, pair)",
    )
    parser.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="their references (default: Flickr8k.token.txt beside them): that, COCO captions or dataset_*.json",
    )
    add_output(parser)
    options, others = parser.parse_known_args(words)
    if others:
        parser.error(f"{others[0]} does not belong to --judgments, which takes no predictions: see coca-score --help")
    with started("coca-score", ValueError, RuntimeError, FileNotFoundError):
        check_output(parser, options.output)

        from coca_lit.projects.judgments.agreement import judge_files

        write_scores(options.output, judge_files(options.judgments, options.captions))
