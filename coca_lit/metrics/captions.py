"""Caption metrics against references: BLEU-1..4, METEOR, ROUGE-L, CIDEr and SPICE, equal to the official ones.

`caption_scores` computes the standard metrics, `caption_table` everything that can be computed without a model, and
`CaptionMetric` either of them from captions that several processes have written.

The scores come from pycocoevalcap's own scorers, called one by one: its ``COCOEvalCap`` downloads SPICE before it
computes anything, and its Java wrappers can hang or shift captions (see ``java``). To add a metric, add a
function to ``SCORERS``: it gets the tokenised captions and returns its corpus scores by name, and how to compute them
for resampled images.
"""

import functools
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch.distributed as dist
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from torch import Tensor

from coca_lit.metrics.cider import ResampledCider
from coca_lit.metrics.java.meteor import meteor_of_sums, shared_meteor, summable, warm_up
from coca_lit.metrics.java.runtime import JavaError, ptb_tokenize
from coca_lit.metrics.java.spice import Progress, shared_spice, spice_jars
from coca_lit.metrics.rows import RowMetric
from coca_lit.metrics.uncertainty import Draws, Ratios, Resampled, bootstrap, exact

CLIP_WEIGHT = 2.5  # stretches the cosines of CLIP, which seldom exceed 0.4, over [0, 1]
CLIP_PROMPT = "A photo depicts "  # goes before every caption and reference
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
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


class Scored(NamedTuple):
    """Corpus scores by name, and the same of images that are drawn with replacement."""

    scores: dict[str, float]
    resampled: Resampled


def _bleu(references: References, hypotheses: Hypotheses) -> Scored:
    scorer = BleuScorer(n=4)
    for image, texts in references.items():
        scorer += hypotheses[image][0], texts
    scores, _ = scorer.compute_score(option="closest", verbose=0)
    counts = []
    for caption in scorer.ctest:
        length = caption["testlen"]
        closest = min(caption["reflen"], key=lambda other: (abs(other - length), other))  # the shorter one of two
        counts.append([*caption["correct"], *caption["guess"], length, closest])

    def resampled(drawn: np.ndarray) -> dict[str, np.ndarray]:
        sums = drawn @ np.array(counts, dtype=np.float64)  # (D, 10)
        precisions = (sums[:, :4] + 1e-15) / (sums[:, 4:8] + 1e-9)  # the scorer's own guards against zeros
        brevity = np.exp(np.minimum(0, 1 - (sums[:, 9] + 1e-9) / (sums[:, 8] + 1e-15)))
        means = np.cumprod(precisions, axis=1) ** (1 / np.arange(1, 5))
        return {f"Bleu_{n}": means[:, n - 1] * brevity for n in range(1, 5)}

    return Scored({f"Bleu_{n}": score for n, score in enumerate(scores, start=1)}, resampled)


def _meteor(references: References, hypotheses: Hypotheses) -> Scored:
    found = shared_meteor().score(list(references.values()), [text for (text,) in hypotheses.values()])
    statistics = summable(found.statistics)
    return Scored({"METEOR": found.corpus}, lambda drawn: {"METEOR": meteor_of_sums(drawn @ statistics)})


def _rouge_l(references: References, hypotheses: Hypotheses) -> Scored:
    mean, of_images = Rouge().compute_score(references, hypotheses)
    return Scored({"ROUGE_L": mean}, Ratios({"ROUGE_L": (of_images, None)}))


def _cider(references: References, hypotheses: Hypotheses) -> Scored:
    @functools.cache
    def cider() -> ResampledCider:  # not before it is needed: counting takes seconds
        split = [[text.split() for text in texts] for texts in references.values()]
        return ResampledCider(split, [text.split() for (text,) in hypotheses.values()])

    return Scored({"CIDEr": Cider().compute_score(references, hypotheses)[0]}, lambda drawn: cider()(drawn))


def _spice(references: References, hypotheses: Hypotheses) -> Scored:
    return corpus_spice(shared_spice().score(list(references.values()), [text for (text,) in hypotheses.values()]))


def corpus_spice(of_images: Mapping[str, np.ndarray]) -> Scored:
    """From the scores (images,) of each kind: the whole over all images, as the official scorer has it; a category over
    those that have one, nothing if no image has.
    """
    parts: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    for name, values in of_images.items():
        known = ~np.isnan(values)
        if name == "SPICE":
            parts[name] = values, None
        elif known.any():
            parts[name] = np.nan_to_num(values), known.astype(np.float64)
    ratios = Ratios(parts)
    return Scored(exact(len(of_images["SPICE"]), ratios), ratios)


SCORERS: dict[str, Callable[[References, Hypotheses], Scored]] = {
    "Bleu": _bleu,
    "METEOR": _meteor,
    "ROUGE_L": _rouge_l,
    "CIDEr": _cider,
    "SPICE": _spice,
}
STANDARD = ("Bleu", "METEOR", "ROUGE_L", "CIDEr")  # they need only this package's dependencies


def caption_scores(
    references: Mapping[Id, Sequence[str]],
    predictions: Mapping[Id, str],
    metrics: Sequence[str] = STANDARD,
    tokenize: Tokenize = ptb_tokenize,
) -> dict[str, float]:
    """Corpus scores in the order Bleu_1, Bleu_2, Bleu_3, Bleu_4, METEOR, ROUGE_L, CIDEr, SPICE and its categories:
    CIDEr in [0, 10], all others in [0, 1].

    ``references`` holds one or more captions for each image id and ``predictions`` exactly one, for the same ids.
    ``metrics`` chooses among "Bleu" (all four), "METEOR", "ROUGE_L", "CIDEr" and "SPICE". ``tokenize`` turns texts into
    tokens joined by blanks; only the default tokenizer gives comparable scores.

    CIDEr weighs words by the number of images whose references use them, so it depends on the set that is scored
    together, and the CIDEr of a single image is 0.0 by definition: log(1) is the weight of each word.

    Raises ValueError for an unknown metric and for ids or captions that are missing or left over, and SpiceError when
    SPICE is asked for and cannot run.
    """
    metrics = [metrics] if isinstance(metrics, str) else metrics
    check_metrics(metrics)
    if "SPICE" in metrics:
        spice_jars()  # report missing jars before anything is computed
    if "METEOR" in metrics:
        warm_up()
    return score_tokens(tokenize_captions(references, predictions, tokenize), metrics)


class CaptionTable(NamedTuple):
    """Scores of captions, and how certain they are.

    Attributes:
        scores: by name.
        not_run: score -> why it could not be computed.
        draws: score -> its values for resampled images, from which intervals and tests come. The number of different
            words and distinct-n have none: a caption that is drawn twice makes a set less varied.
    """

    scores: dict[str, float]
    not_run: dict[str, str]
    draws: dict[str, Draws]


def caption_table(
    references: Mapping[Id, Sequence[str]],
    predictions: Mapping[Id, str],
    domains: Mapping[Id, str | None] | None = None,
    metrics: Sequence[str] = STANDARD,
    tokenize: Tokenize = ptb_tokenize,
    progress: Progress | None = None,
) -> CaptionTable:
    """All scores and their uncertainty. Captions are tokenised, and parsed by SPICE, once.

    Adds to ``caption_scores``, which explains the arguments and the errors: SPICE if its jars are found, exact matches,
    and statistics of the captions. Where ``domains`` tells them apart, as in nocaps, the images of each domain are also
    scored as a set of their own, as the nocaps server does (CIDEr depends on the set): "in-domain/CIDEr" and so on.
    A Java program that fails costs its own score only. ``progress`` is called with the images that SPICE has parsed
    so far and their total.
    """
    if "METEOR" in metrics:
        warm_up()
    tokens = tokenize_captions(references, predictions, tokenize)
    scores: dict[str, float] = {}
    not_run: dict[str, str] = {}
    draws: dict[str, Draws] = {}
    try:
        captions = [text for (text,) in tokens.hypotheses.values()]
        spices = shared_spice().score(list(tokens.references.values()), captions, progress)
    except (RuntimeError, FileNotFoundError) as error:
        spices = {}
        not_run = {"SPICE": str(error)}
    position = {key: i for i, key in enumerate(references)}
    groups = {"": list(references)}
    for domain in sorted({domain for domain in (domains or {}).values() if domain is not None}):
        groups[f"{domain}/"] = [key for key, own in (domains or {}).items() if own == domain]
    for prefix, ids in groups.items():
        found, failed = _try_scorers(tokens.of(ids), [name for name in metrics if name != "SPICE"])
        if spices:
            chosen = [position[key] for key in ids]
            found.append(corpus_spice({name: values[chosen] for name, values in spices.items()}))
        part = {name: score for scored in found for name, score in scored.scores.items()}
        resampled = [scored.resampled for scored in found]
        if not prefix:
            matches = [is_reference(predictions[key], texts) for key, texts in references.items()]
            lengths = [len(WORD.findall(predictions[key])) for key in references]
            means = {"exact_match": matches, "mean_length": lengths}
            resampled.append(Ratios({name: (np.array(v, dtype=np.float64), None) for name, v in means.items()}))
            part["exact_match"] = sum(matches) / len(matches)
            part |= caption_statistics(list(predictions.values()))
        scores |= {f"{prefix}{name}": score for name, score in part.items()}
        not_run |= {f"{prefix}{name}": reason for name, reason in failed.items()}
        draws |= {f"{prefix}{name}": of for name, of in bootstrap(ids, *resampled).items()}
    return CaptionTable(scores, not_run, draws)


def _try_scorers(tokens: Tokens, metrics: Sequence[str]) -> tuple[list[Scored], dict[str, str]]:
    """What the metrics find, and why some find nothing: a Java program may be missing or die."""
    found: list[Scored] = []
    failed: dict[str, str] = {}
    for name, scorer in SCORERS.items():
        if name in metrics:
            try:
                found.append(scorer(*tokens))
            except (JavaError, FileNotFoundError) as error:
                failed[name] = str(error)
    return found, failed


def is_reference(caption: str, references: Sequence[str]) -> bool:
    """Whether a caption equals one of the references, apart from case, blanks and a closing full stop."""
    plain, *others = ("".join(text.lower().split()).rstrip(".") for text in (caption, *references))
    return plain in others


def caption_statistics(captions: Collection[str]) -> dict[str, float]:
    """Mean number of words, number of different words, and distinct-1 and -2 (Li et al. 2016, arXiv 1510.03055).

    Distinct-n is the number of different n-grams over the number of all of them; long texts and large sets lower it, so
    it compares models on the same images only.
    """
    texts = [WORD.findall(caption.lower()) for caption in captions]
    words = [word for text in texts for word in text]
    pairs = [pair for text in texts for pair in pairwise(text)]
    return {
        "mean_length": len(words) / max(len(texts), 1),
        "vocabulary": float(len(set(words))),
        "distinct_1": _distinct(words),
        "distinct_2": _distinct(pairs),
    }


def are_novel(captions: Iterable[str], training_captions: Iterable[str]) -> list[bool]:
    """Whether each caption differs from all training captions in a letter or digit: models write "t - shirt"."""
    known = _different(tuple(training_captions))
    return [_letters(caption) not in known for caption in captions]


def words_of(caption: str) -> str:
    """Its words in small letters, without Java's tokenizer."""
    return " ".join(WORD.findall(caption.lower()))


@functools.lru_cache(maxsize=1)  # the same at each scoring of a training
def _different(captions: tuple[str, ...]) -> frozenset[str]:
    return frozenset(map(_letters, captions))


def _letters(caption: str) -> str:
    return "".join(filter(str.isalnum, caption.lower()))


def _distinct(ngrams: Sequence[object]) -> float:
    return len(set(ngrams)) / max(len(ngrams), 1)


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
        progress: as in `caption_table`; on the first process.

    Attributes:
        not_run: score -> why the last `compute` has no value for it.
        draws: score -> its values for resampled images, with `table`.
    """

    def __init__(
        self,
        metrics: Sequence[str] = STANDARD,
        tokenize: Tokenize = ptb_tokenize,
        table: bool = False,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_metrics(metrics)
        self.metrics = tuple(metrics)
        self.tokenize = tokenize
        self.table = table
        self.progress = progress
        self.not_run: dict[str, str] = {}
        self.draws: dict[str, Draws] = {}

    def update(
        self,
        ids: Sequence[int | str],
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        domains: Sequence[str | None] | None = None,
    ) -> None:
        """A batch of images: for each its id, one caption, its references, and its domain if there are several."""
        texts = [list(group) for group in references]
        self.append(ids, predictions, texts, domains or [None] * len(predictions))

    def compute(self) -> dict[str, float]:
        """Scores by name, the same on every process.

        Raises ValueError as `caption_scores` does, JavaError if the tokenizer fails, and FileNotFoundError if there is
        no Java; on every process.
        """
        if not self._is_synced:
            found = self._scores()
        else:
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
            found = box[0]
        scores, self.not_run, self.draws = found
        return scores

    def _scores(self) -> CaptionTable:
        rows = self.rows()
        predictions = {id: caption for id, (caption, _, _) in rows.items()}
        references = {id: texts for id, (_, texts, _) in rows.items()}
        if self.table:
            domains = {id: domain for id, (_, _, domain) in rows.items()}
            return caption_table(references, predictions, domains, self.metrics, self.tokenize, self.progress)
        if "METEOR" in self.metrics:
            warm_up()
        found, failed = _try_scorers(tokenize_captions(references, predictions, self.tokenize), self.metrics)
        scores = {name: score for scored in found for name, score in scored.scores.items()}
        matches = [is_reference(predictions[key], texts) for key, texts in references.items()]
        return CaptionTable(scores | {"exact_match": sum(matches) / len(matches)}, failed, {})


def tokenize_captions(
    references: Mapping[Id, Sequence[str]],
    predictions: Mapping[Id, str],
    tokenize: Tokenize = ptb_tokenize,
) -> Tokens:
    """Tokens of all captions, in one run of the tokenizer. Raises ValueError as `caption_scores` does."""
    missing = [key for key in references if key not in predictions]
    unexpected = [key for key in predictions if key not in references]
    if missing or unexpected or not references:
        raise ValueError(
            "predictions and references must be of the same one or more images: "
            f"{len(missing)} images have no prediction {missing[:5]}, "
            f"{len(unexpected)} predictions have no references {unexpected[:5]}"
        )
    for key, captions in references.items():
        if isinstance(captions, str) or not captions or not isinstance(predictions[key], str):
            got = f"{captions!r} and {predictions[key]!r}"
            raise ValueError(f"image {key!r} needs a list of one or more references and one text of it, got {got}")
    texts = [*chain.from_iterable(references.values()), *(predictions[key] for key in references)]
    rest = iter(tokenize(texts))
    split_references = {key: list(islice(rest, len(group))) for key, group in references.items()}
    if not any(chain.from_iterable(split_references.values())):
        raise ValueError("no reference holds a word")
    return Tokens(split_references, {key: [text] for key, text in zip(references, rest, strict=True)})


def score_tokens(tokens: Tokens, metrics: Sequence[str] = STANDARD) -> dict[str, float]:
    """The scores of `caption_scores` for captions that are tokenised already."""
    chosen = [scorer for name, scorer in SCORERS.items() if name in metrics]
    return {name: float(score) for scorer in chosen for name, score in scorer(*tokens).scores.items()}


def check_metrics(metrics: Sequence[str]) -> None:
    """Raises ValueError for a metric that is unknown."""
    for name in metrics:
        if name not in SCORERS:
            raise ValueError(f"a caption metric must be {' or '.join(map(repr, SCORERS))}, got {name!r}")


def clip_scores(images: Tensor, captions: Tensor, references: Tensor, image_of_reference: Tensor) -> dict[str, Tensor]:
    """CLIPScore and RefCLIPScore (I,) of the captions of images (Hessel et al. 2021, arXiv 2104.08718): how well they
    fit in a feature space. CLIPScore = 2.5 max(cos(image, caption), 0); RefCLIPScore is its harmonic mean with
    max(cos(caption, reference), 0) of the nearest reference.

    The published scores use OpenAI's CLIP ViT-B/32. With the features of another model they compare captions, not
    models.

    Args:
        images, captions: (I, D), one caption for each image; all features are of unit length.
        references: (T, D); reference t belongs to image ``image_of_reference[t]``.
    """
    if images.shape != captions.shape or len(references) != len(image_of_reference):
        raise ValueError(
            f"expected one caption per image and one image per reference, got images {tuple(images.shape)}, captions "
            f"{tuple(captions.shape)}, {len(references)} references and {len(image_of_reference)} owners"
        )
    fit = CLIP_WEIGHT * (images * captions).sum(dim=1).clamp(min=0)  # (I,)
    cosines = (captions[image_of_reference] * references).sum(dim=1)  # (T,)
    nearest = cosines.new_zeros(len(images)).scatter_reduce(0, image_of_reference, cosines, "amax")  # (I,), at least 0
    harmonic = 2 * fit * nearest / (fit + nearest).clamp(min=1e-12)
    return {"CLIPScore": fit, "RefCLIPScore": harmonic}
