"""Scores a file of captions, without a model: `coca-score PREDICTIONS REFERENCES`."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coca_lit.runs.launch import isolate
from coca_lit.tools.commands import command_for, further_commands, started
from coca_lit.tools.score.output import add_output, check_output, write_scores

if TYPE_CHECKING:
    from coca_lit.data.records import Listing
    from coca_lit.metrics.captions import CaptionTable
    from coca_lit.metrics.uncertainty import Parts

    Measure = Callable[[Sequence[Listing], dict[int | str, str]], Parts]  # as in coca_lit.evals.captions

DESCRIPTION = """\
Scores captions against references: BLEU-1..4, METEOR, ROUGE-L, CIDEr, SPICE (where its jars are), and statistics of the
captions; nocaps also by domain. The numbers equal the official COCO caption evaluation's, times 100 as in papers;
the 95 % intervals come from a bootstrap over the images. --output keeps the numbers as they are."""
EXAMPLE = "for example: coca-score predictions.json captions_val2014.json"
FEW_IMAGES = 1000  # below, document frequencies are too coarse
DIFFERENT = 0.5  # share of captions that differ, at least; 65 to 80 % in published models' captions of COCO


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "coca-score",
        description=DESCRIPTION,
        epilog=EXAMPLE + further_commands("score"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("predictions", type=Path, nargs="?", help='[{"image_id": 42, "caption": "a dog"}, ...]')
    parser.add_argument(
        "references", type=Path, nargs="?", help="COCO or nocaps captions, or Karpathy's dataset_*.json; may be .gz"
    )
    parser.add_argument("--split", default="test", help="split of a Karpathy file (default: test)")
    parser.add_argument("--examples", type=int, default=0, metavar="N", help="print the N best and worst captions")
    add_output(parser)
    return parser


def score(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `coca-score`. Mistakes of the user are one sentence on standard error and exit code 1."""
    isolate()
    words = sys.argv[1:] if arguments is None else arguments
    handed_over = command_for("score", words)
    if handed_over is not None:
        handed_over(words)
    else:
        score_files(words)


def score_files(words: Sequence[str], make_measure: "Callable[[], Measure] | None" = None) -> None:
    """What `coca-score` does with a file of captions and one of references.

    Args:
        make_measure: makes a function of the listings of images and their captions, which returns further scores.
    """
    parser = _parser()
    options = parser.parse_args(words)
    if options.references is None:
        sys.exit(f"error: name the files of the captions and of their references; {EXAMPLE} (more: coca-score --help)")

    with started("coca-score", ValueError, RuntimeError, FileNotFoundError):
        from coca_lit.reading import printable
        from coca_lit.runs.scores import print_scores

        check_output(parser, options.output)
        captions, listings = read_files(options.predictions, options.references, options.split)
        texts = {key: item.captions for key, item in listings.items()}
        table = score_captions(captions, listings, make_measure() if make_measure is not None else None)
        scores = table.scores
        domains = Counter(item.domain for item in listings.values())
        images = {score: domains.get(score.rpartition("/")[0], len(captions)) for score in scores}
        print_scores(scores, table.draws, images)
        for name, reason in table.not_run.items():
            print(printable(f"{name} not run: {reason}"))
        for line in (*warnings(texts, captions), *examples(texts, captions, options.examples)):
            print(printable(line))
        write_scores(options.output, scores)


Captions = Mapping[int | str, str]
References = Mapping[int | str, Sequence[str]]
Listings = Mapping[int | str, "Listing"]


def read_files(predictions: Path, references: Path, split: str = "test") -> tuple[Captions, Listings]:
    """Captions and the listings of their images.

    Raises:
        DataError: a file cannot be read, an image occurs twice in one, or the images of the two files differ.
    """
    from coca_lit.data.datasets.annotations import read_references
    from coca_lit.errors import DataError
    from coca_lit.tools.score.results import read_results

    captions = read_results(predictions)
    listings = {item.id: item for item in read_references(references, split) if item.captions}
    missing = [key for key in listings if key not in captions]
    unknown = [key for key in captions if key not in listings]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(listings)} images have no caption, e.g. {missing[:3]}")
    if unknown:
        problems.append(f"{len(unknown)} captions are of images that it does not hold, e.g. {unknown[:3]}")
    if set(map(str, missing)) & set(map(str, unknown)):
        problems.append("the ids are numbers in one file and texts in the other")
    if problems:
        raise DataError(f"{predictions} does not fit {references}: {'; '.join(problems)}")
    return captions, listings


def score_captions(captions: Captions, listings: Listings, measure: "Measure | None" = None) -> "CaptionTable":
    """Scores, the reasons for missing ones, and their draws; with those of a further measure."""
    from coca_lit.metrics.captions import caption_table
    from coca_lit.metrics.uncertainty import Ratios, bootstrap
    from coca_lit.progress import ProgressBar

    domains = {key: item.domain for key, item in listings.items()}
    texts = {key: item.captions for key, item in listings.items()}
    with ProgressBar("SPICE") as bar:
        table = caption_table(texts, captions, domains, progress=bar.reach)
    if measure is not None:
        draws = bootstrap(list(texts), Ratios(measure(list(listings.values()), dict(captions))))
        table.draws.update(draws)
        table.scores.update({name: of_score.score for name, of_score in draws.items()})
    return table


def warnings(references: References, captions: Captions) -> Iterator[str]:
    """A sentence for each reason why the scores may mislead, to know before quoting them."""
    lone = sum(len(texts) < 2 for texts in references.values())
    if lone:
        yield (
            f"warning: {lone:,} of {len(references):,} images have one reference: scores with one reference are not "
            "comparable with those of several"
        )
    if len(captions) < FEW_IMAGES:
        yield (
            f"warning: CIDEr weighs words by these {len(captions):,} images: compare it on the same images only (the "
            "same captions of COCO have CIDEr 94.8 on 1,000 images and 91.9 on 5,000, see experiments/scores.md)"
        )
    counts = Counter(captions.values())
    if len(counts) < DIFFERENT * len(captions):
        caption, count = counts.most_common(1)[0]
        yield (
            f"warning: {len(counts):,} of {len(captions):,} captions are different, and {count:,} are {caption!r}: "
            "scores reward a safe caption for many images"
        )


def examples(references: References, captions: Captions, count: int) -> Iterator[str]:
    """The `count` captions with the highest and the lowest CIDEr, as they are compared: tokenised, with references."""
    if not count:
        return

    import numpy as np
    from pycocoevalcap.cider.cider import Cider

    from coca_lit.metrics.captions import tokenize_captions

    tokens = tokenize_captions(references, captions)
    _, of_images = Cider().compute_score(tokens.references, tokens.hypotheses)
    order = np.argsort(of_images, kind="stable")
    images = list(tokens.references)
    for heading, chosen in (("best", order[::-1][:count]), ("worst", order[:count])):
        yield ""
        yield f"{heading} captions by CIDEr, tokenised"
        for place in chosen.tolist():
            image = images[place]
            yield f"  {100 * of_images[place]:6.1f}  {tokens.hypotheses[image][0] or '(empty)'}  (image {image})"
            yield from (f"          {text}" for text in dict.fromkeys(tokens.references[image]))
