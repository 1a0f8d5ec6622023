"""`coca-data score`, `filter` and `dedup`: choosing samples of shards without copying them."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coca_lit.tools.prepare.subcommand import (
    SHARDS,
    add_computation,
    annotate,
    computation,
    data_parser,
    run_subcommand,
)

if TYPE_CHECKING:
    from coca_lit.projects.curation.choose import Chosen
    from coca_lit.tools.prepare.subcommand import Subcommands

SCORE = """\
Scores each pair of a set of shards with a model: similarity of the embeddings, likelihood of the caption per token, and
what needs no model: length of the caption, size of the image, perceptual hash. Writes NAME.scores.parquet beside each
NAME.tar. An interrupted command resumes at the shard where it stopped."""
FILTER = """\
Selects samples by their scores, and writes their keys for data.selection: where="similarity > 0.2 AND words > 2" keeps
those for which a condition holds, top=0.3 by=similarity the best of these. Both take any formula in SQL; columns:
shard, key, similarity, likelihood, words, characters, width, height, aspect, phash, language."""
DEDUP = """\
Selects samples no two of which are near-duplicates, and writes their keys for data.selection. Near-duplicates have the
same perceptual hash (hash-distance=0), similar ones (hash-distance=3), or similar embeddings (cosine=0.95, after
score --embeddings). The one with the most of `best` stays. against=FOLDER removes near-duplicates of other sets, too:
of earlier data, or of the images of an evaluation."""
SCORES = "folders of NAME.scores.parquet, or such files"


def score(words: Sequence[str]) -> None:
    """Runs `coca-data score …`."""
    parser, subcommands = data_parser()
    _add_score(subcommands)
    run_subcommand(parser, words)


def choose(words: Sequence[str]) -> None:
    """Runs `coca-data filter …` and `coca-data dedup …`."""
    parser, subcommands = data_parser()
    _add_filter(subcommands)
    _add_dedup(subcommands)
    run_subcommand(parser, words, resumes=False)


def _add_score(subcommands: "Subcommands") -> None:
    parser = subcommands.add_parser("score", description=SCORE)
    parser.add_argument("shards", nargs="+", help=SHARDS)
    parser.add_argument("--checkpoint", help="a file, run folder, export, hf-hub:ORG/REPO or released name, CLIPs too")
    parser.add_argument("--output", type=Path, help="folder for the scores (default: beside each shard)")
    parser.add_argument("--caption-key", default="txt", help="field of the samples' JSON that holds the caption")
    parser.add_argument("--embeddings", action="store_true", help="keep the image embeddings, for dedup cosine=…")
    parser.add_argument("--language", action="store_true", help="identify the language of the captions")
    add_computation(parser, 64)
    parser.add_engine()
    parser.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> None:
    from coca_lit.projects.curation.judge import Judgement, claim_outputs, judge_shard
    from coca_lit.tools.checkpoint import chosen_checkpoint

    checkpoint = chosen_checkpoint(options.checkpoint, offline=False)  # the small model is no judge of data
    asked = options.output, options.caption_key, options.embeddings, options.language
    judgement = Judgement(checkpoint, *asked, *computation(options))
    annotate(options, "scoring", "scores", judge_shard, claim_outputs, judgement)


def _add_filter(subcommands: "Subcommands") -> None:
    parser = subcommands.add_parser("filter", description=FILTER)
    _add_choice(parser)
    parser.add_argument("--where", default="true", help="a condition in SQL over the columns of the scores")
    parser.add_argument("--top", type=float, help="share of the samples that is kept, with --by")
    parser.add_argument("--by", help="a column, or a formula in SQL: what the best ones have most of")
    parser.set_defaults(run=_filter)


def _filter(options: argparse.Namespace) -> None:
    from coca_lit.projects.curation.choose import filter_scores

    _choose(options, filter_scores, where=options.where, top=options.top, by=options.by)


def _add_dedup(subcommands: "Subcommands") -> None:
    parser = subcommands.add_parser("dedup", description=DEDUP)
    _add_choice(parser)
    parser.add_argument("--against", nargs="+", action="extend", default=[], help=f"of other sets: {SCORES}")
    parser.add_argument("--hash-distance", type=_bits, default=0, help="bits of 64, or none (default: %(default)s)")
    parser.add_argument("--cosine", type=float, help="of image embeddings, from which on images are near-duplicates")
    parser.add_argument("--best", default="similarity", help="a column or a formula (default: %(default)s)")
    parser.set_defaults(run=_dedup)


def _dedup(options: argparse.Namespace) -> None:
    from coca_lit.projects.curation.choose import dedup_scores
    from coca_lit.projects.curation.scores import find_scores

    _choose(
        options,
        dedup_scores,
        against=find_scores(options.against),
        hash_distance=options.hash_distance,
        cosine=options.cosine,
        best=options.best,
    )


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scores", nargs="+", help=SCORES)
    parser.add_argument("--output", type=Path, required=True, help="NAME.parquet, for data.selection")
    parser.add_argument("--selection", type=Path, help="of an earlier choice: only its samples are considered")
    parser.add_argument("--memory-gb", type=float, help="that DuckDB may take (default: most of what there is)")


def _choose(options: argparse.Namespace, function: "Callable[..., Chosen]", **choice: object) -> None:
    from coca_lit.projects.curation.scores import find_scores

    chosen = function(
        find_scores(options.scores),
        options.output,
        selection=options.selection,
        memory_gb=options.memory_gb,
        **choice,
    )
    for key, value in chosen.how.items():
        if value:
            print(f"{key}: {value}")
    share = chosen.kept / max(chosen.total, 1)
    print(f"wrote {options.output}: {chosen.kept:,} of {chosen.total:,} samples ({share:.1%})")


def _bits(text: str) -> int | None:
    if text != "none" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number of bits or none, not {text!r}")
    return None if text == "none" else int(text)
