"""Caption metrics against references: BLEU-1..4, METEOR, ROUGE-L, CIDEr and SPICE, equal to the official ones.

`caption_scores` computes the standard metrics, `caption_table` everything that can be computed without a model, and
`CaptionMetric` either of them from captions that several processes have written.

The scores come from pycocoevalcap's own scorers, called one by one: its ``COCOEvalCap`` downloads SPICE before it
computes anything, and its Java wrappers can hang or shift captions (see ``ptb`` and ``meteor``). To add a metric, add a
function to ``SCORERS``: it gets the tokenised captions and returns its corpus scores by name.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain, islice
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from coca_lit.metrics.diversity import caption_statistics
from coca_lit.metrics.java.meteor import shared_meteor, warm_up
from coca_lit.metrics.java.ptb import ptb_tokenize
from coca_lit.metrics.java.runtime import JavaError
from coca_lit.metrics.java.spice import SpiceError, spice, spice_jars
from coca_lit.metrics.rows import RowMetric, in_order, plain_ids

Id = TypeVar("Id", bound=Hashable)
References = Mapping[Any, list[str]]  # image -> its tokenised references
Hypotheses = Mapping[Any, list[str]]  # image -> a list of its one tokenised prediction, as pycocoevalcap expects it
Tokenize = Callable[[Sequence[str]], list[str]]  # texts -> tokens of each, joined by blanks


class Tokens(NamedTuple):
    """Tokenised captions of the same images, in the same order."""

    references: References
    hypotheses: Hypotheses

    def of(self, images: Iterable[Hashable]) -> "Tokens":
        """The tokens of these images."""
        chosen = list(images)
        return Tokens({i: self.references[i] for i in chosen}, {i: self.hypotheses[i] for i in chosen})


def _bleu(references: References, hypotheses: Hypotheses) -> dict[str, float]:
    scores, _ = Bleu(4).compute_score(references, hypotheses, verbose=0)
    return {f"Bleu_{n}": score for n, score in enumerate(scores, start=1)}


def _meteor(references: References, hypotheses: Hypotheses) -> dict[str, float]:
    return {"METEOR": shared_meteor().score(list(references.values()), [text for (text,) in hypotheses.values()])}


def _rouge_l(references: References, hypotheses: Hypotheses) -> dict[str, float]:
    return {"ROUGE_L": Rouge().compute_score(references, hypotheses)[0]}


def _cider(references: References, hypotheses: Hypotheses) -> dict[str, float]:
    return {"CIDEr": Cider().compute_score(references, hypotheses)[0]}


def _spice(references: References, hypotheses: Hypotheses) -> dict[str, float]:
    return {"SPICE": fmean(spice(references, hypotheses))}


SCORERS: dict[str, Callable[[References, Hypotheses], dict[str, float]]] = {
    "Bleu": _bleu,
    "METEOR": _meteor,
    "ROUGE_L": _rouge_l,
    "CIDEr": _cider,
    "SPICE": _spice,
}
STANDARD = ("Bleu", "METEOR", "ROUGE_L", "CIDEr")  # they need nothing but this package's dependencies


def caption_scores(
    references: Mapping[Id, Sequence[str]],
    predictions: Mapping[Id, str],
    metrics: Sequence[str] = STANDARD,
    tokenize: Tokenize = ptb_tokenize,
) -> dict[str, float]:
    """Corpus scores in the order Bleu_1, Bleu_2, Bleu_3, Bleu_4, METEOR, ROUGE_L, CIDEr: CIDEr in [0, 10], all others
    in [0, 1].

    ``references`` holds one or more captions for each image id and ``predictions`` exactly one, for the same ids.
    ``metrics`` chooses among "Bleu" (all four), "METEOR", "ROUGE_L", "CIDEr" and "SPICE". ``tokenize`` turns texts into
    tokens joined by blanks; only the default tokenizer gives comparable scores.

    CIDEr weighs words by the number of images whose references use them, so it depends on the set that is scored
    together, and the CIDEr of a single image is 0.0 by definition: log(1) is the weight of each word.

    Raises ValueError for an unknown metric and for ids or captions that are missing or left over, and SpiceError when
    SPICE is asked for and cannot run.
    """
    check_metrics(metrics)
    if "SPICE" in metrics:
        spice_jars()  # report missing jars before anything is computed
    if "METEOR" in metrics:
        warm_up()
    return score_tokens(tokenize_captions(references, predictions, tokenize), metrics)


def caption_table(
    references: Mapping[Id, Sequence[str]],
    predictions: Mapping[Id, str],
    domains: Mapping[Id, str | None] | None = None,
    metrics: Sequence[str] = STANDARD,
    tokenize: Tokenize = ptb_tokenize,
) -> tuple[dict[str, float], dict[str, str]]:
    """All scores by name, and the reason for each that could not be computed. Every Java program runs once.

    Adds to ``caption_scores``, which explains the arguments and the errors: SPICE if its jars are found, exact matches,
    and statistics of the captions. Where ``domains`` tells them apart, as in nocaps, the images of each domain are also
    scored as a set of their own, as the nocaps server does (CIDEr depends on the set): "in-domain/CIDEr" and so on.
    """
    if "METEOR" in metrics:
        warm_up()
    tokens = tokenize_captions(references, predictions, tokenize)
    not_run: dict[str, str] = {}
    try:
        spices = dict(zip(tokens.references, spice(*tokens), strict=True))
    except SpiceError as error:
        spices, not_run = {}, {"SPICE": str(error)}
    groups = {"": list(references)}
    for domain in sorted({domain for domain in (domains or {}).values() if domain is not None}):
        groups[f"{domain}/"] = [key for key, own in (domains or {}).items() if own == domain]
    scores: dict[str, float] = {}
    for prefix, ids in groups.items():
        computable = [metric for metric in metrics if metric not in not_run]  # a program that failed is not asked again
        part = score_tokens(tokens.of(ids), computable, not_run) | (
            {"SPICE": fmean(spices[i] for i in ids)} if spices else {}
        )
        if not prefix:
            part["exact_match"] = exact_match(references, predictions)
            part |= caption_statistics(list(predictions.values()))
        scores |= {f"{prefix}{name}": score for name, score in part.items()}
    return scores, not_run


def exact_match(references: Mapping[Id, Sequence[str]], predictions: Mapping[Id, str]) -> float:
    """Share of captions that equal one of their references, see `is_reference`."""
    return sum(is_reference(predictions[key], texts) for key, texts in references.items()) / len(references)


def is_reference(caption: str, references: Sequence[str]) -> bool:
    """Whether a caption equals one of the references, apart from case, blanks and a closing full stop."""
    plain, *others = (" ".join(text.lower().split()).rstrip(" .") for text in (caption, *references))
    return plain in others


class CaptionMetric(RowMetric):
    """Scores of captions that are written batch by batch, on any number of processes.

        class Captioner(L.LightningModule):
            def __init__(self):
                ...
                self.scores = CaptionMetric()

            def validation_step(self, batch, batch_idx):
                captions = self.write(batch.images)  # list[str]
                self.scores.update(batch.ids, captions, batch.references)

            def on_validation_epoch_end(self):
                self.log_dict(self.scores.compute())  # {"Bleu_1": ..., "METEOR": ..., "CIDEr": ..., "exact_match": ...}
                self.scores.reset()

    The first process runs the metrics, Java included, and tells the others the result.

    Args:
        metrics, tokenize: as in `caption_scores`, but a Java program that fails costs its own score alone.
        table: compute everything that `caption_table` does.

    Attributes:
        not_run: score -> why the last `compute` has no value for it.
    """

    def __init__(
        self,
        metrics: Sequence[str] = STANDARD,
        tokenize: Tokenize = ptb_tokenize,
        table: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_metrics(metrics)
        self.metrics, self.tokenize, self.table = tuple(metrics), tokenize, table
        self.not_run: dict[str, str] = {}
        self.add_rows("captions")

    def update(
        self,
        ids: Sequence[int | str],
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        domains: Sequence[str | None] | None = None,
    ) -> None:
        """A batch of images: for each its id, one caption, its references, and its domain if there are several."""
        plain = plain_ids(ids, len(predictions))
        texts = [list(group) for group in references]
        self.append("captions", zip(plain, predictions, texts, domains or [None] * len(plain), strict=True))

    def compute(self) -> dict[str, float]:
        """Scores by name, the same on every process.

        Raises ValueError as `caption_scores` does, JavaError if the tokenizer fails, and FileNotFoundError if there is
        no Java; on every process.
        """
        if not self._is_synced:
            scores, self.not_run = self._scores()
            return scores
        group: Any = self.process_group or dist.group.WORLD
        box: list[Any] = [None]
        if dist.get_rank(group) == 0:
            try:
                box = [self._scores()]
            except Exception as error:  # else the other processes would wait for a result that never comes
                box = [error]
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
        if isinstance(box[0], Exception):
            raise box[0]
        scores, self.not_run = box[0]
        return scores

    def _scores(self) -> tuple[dict[str, float], dict[str, str]]:
        by_id = {id: row for id, *row in self.rows("captions")}
        rows = {id: by_id[id] for id in sorted(by_id, key=in_order)}
        predictions = {id: caption for id, (caption, _, _) in rows.items()}
        references = {id: texts for id, (_, texts, _) in rows.items()}
        if self.table:
            domains = {id: domain for id, (_, _, domain) in rows.items()}
            return caption_table(references, predictions, domains, self.metrics, self.tokenize)
        if "METEOR" in self.metrics:
            warm_up()
        not_run: dict[str, str] = {}
        scores = score_tokens(tokenize_captions(references, predictions, self.tokenize), self.metrics, not_run)
        return scores | {"exact_match": exact_match(references, predictions)}, not_run


def tokenize_captions(
    references: Mapping[Id, Sequence[str]],
    predictions: Mapping[Id, str],
    tokenize: Tokenize = ptb_tokenize,
) -> Tokens:
    """Tokens of all captions, in one run of the tokenizer. Raises ValueError as `caption_scores` does."""
    _check_captions(references, predictions)
    texts = [*chain.from_iterable(references.values()), *(predictions[key] for key in references)]
    tokens = tokenize(texts)
    if len(tokens) != len(texts):
        raise ValueError(f"tokenize must return a string for each of the {len(texts)} captions, got {len(tokens)}")
    rest = iter(tokens)
    split_references = {key: list(islice(rest, len(group))) for key, group in references.items()}
    if not any(chain.from_iterable(split_references.values())):
        raise ValueError("no reference holds a word")
    return Tokens(split_references, {key: [text] for key, text in zip(references, rest, strict=True)})


def score_tokens(
    tokens: Tokens, metrics: Sequence[str] = STANDARD, not_run: dict[str, str] | None = None
) -> dict[str, float]:
    """The scores of `caption_scores` for captions that are tokenised already.

    Args:
        not_run: gets the reason for each score whose Java program fails; without it that is a JavaError.
    """
    scores: dict[str, float] = {}
    for metric in (name for name in SCORERS if name in metrics):
        try:
            scores |= {name: float(score) for name, score in SCORERS[metric](*tokens).items()}
        except JavaError as error:
            if not_run is None:
                raise
            not_run[metric] = str(error)
    return scores


def check_metrics(metrics: Sequence[str]) -> None:
    """Raises ValueError for a metric that is unknown, with the nearest known one."""
    folded = {name.lower(): name for name in SCORERS}
    for unknown in [name for name in metrics if name not in SCORERS]:
        close = get_close_matches(unknown.lower(), folded, n=1)
        hint = f"; did you mean {folded[close[0]]!r}?" if close else ""
        raise ValueError(f"unknown caption metric {unknown!r}, known are {', '.join(SCORERS)}{hint}")


def _check_captions(references: Mapping[Id, Sequence[str]], predictions: Mapping[Id, str]) -> None:
    missing = [key for key in references if key not in predictions]
    unexpected = [key for key in predictions if key not in references]
    if missing or unexpected or not references:
        raise ValueError(
            "predictions and references must be of the same one or more images: "
            f"{len(missing)} images have no prediction {missing[:5]}, "
            f"{len(unexpected)} predictions have no references {unexpected[:5]}"
        )
    for key, captions in references.items():
        if isinstance(captions, str) or not captions:
            raise ValueError(f"image {key!r} needs a list of one or more references, got {captions!r}")
        if not isinstance(predictions[key], str):
            raise ValueError(f"image {key!r} needs exactly one string as its prediction, got {predictions[key]!r}")
