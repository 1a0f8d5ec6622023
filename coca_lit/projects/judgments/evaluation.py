"""The evaluation `judgments`: which scores do people agree with, including scores that a model gives?"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from coca_lit.data.datasets.annotations import find_file
from coca_lit.data.records import Record
from coca_lit.distributed import rank
from coca_lit.errors import DataError, check_names
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.captions import Measure
from coca_lit.evals.inference import blind_log_likelihoods, embed_images, embed_texts, log_likelihoods
from coca_lit.metrics.captions import CLIP_PROMPT, clip_scores
from coca_lit.metrics.java.runtime import JavaError
from coca_lit.metrics.uncertainty import Draws
from coca_lit.models import DualEncoder
from coca_lit.models.packing import text_lengths
from coca_lit.projects.judgments.agreement import TAUS, Agreement, Scores, agreement, mixtures, reference_scores
from coca_lit.projects.judgments.judged import Judged, read_judgments

OF_MODEL = ("CLIPScore", "RefCLIPScore", "likelihood", "likelihood_per_token", "pmi", "pmi_per_token")
OF_REFERENCES = ("Bleu_1", "Bleu_4", "ROUGE_L", "METEOR", "CIDEr", "CIDEr_plain", "SPICE")
MIXTURES = (("CIDEr", "CLIPScore"), ("CIDEr", "pmi"), ("CLIPScore", "pmi"), ("METEOR", "RefCLIPScore"))
PART = 4096  # candidates whose references are in memory
HALF = "half/"  # of the images, on which mixtures are compared; the other half chose their weights


class JudgedScores(Evaluation):
    """Agreement with people, of scores that compare a caption with references and of what the model says about it:
    CLIPScore and RefCLIPScore in its feature space, the decoder's log p(caption | image) as a sum and per token, and
    "pmi", which subtracts log p(caption).

    "tau_b_CIDEr" is Kendall's tau-b of CIDEr with the grades, each judge's a point of its own; "tau_b_people" that of
    people with each other; "CIDEr_accuracy" the share of pairs in which CIDEr prefers what people prefer. Below "half/"
    are mixtures, "CIDEr + pmi", and all scores on the same half of the images.

    Args:
        records: of `judged_captions` or `read_judgments`.
        images: folder of the judged images, or the one that holds it as images/.
        mixed: pairs of scores that are mixed; those that cannot be computed are left out.
        measures: further scores of each judged caption beside the references of its image, with `settings.full`.
    """

    final_score_names = None
    generates = False

    def __init__(
        self,
        name: str,
        records: Judged,
        images: str | Path,
        mixed: Sequence[Sequence[str]] = MIXTURES,
        measures: Mapping[str, Measure] | None = None,
        every: int = 1,
    ) -> None:
        for pair in mixed:
            check_names("mixed", pair, (*OF_REFERENCES, *OF_MODEL))
        folder = Path(images)
        super().__init__(name, records.records(folder / "images", folder), every)
        self.judged, self.mixed = records, [(first, second) for first, second in mixed]
        self.measures = dict(measures or {})

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        judged = self.judged.of({record.id for record in records})
        scores = model_scores(model, judged, records, settings)
        if model.decoder is None:
            self.not_run[f"{self.name} likelihood"] = "the model has no decoder to read the captions with"
        if settings.full:
            try:
                found, missing = reference_scores(judged)
            except (JavaError, FileNotFoundError) as error:  # of the tokenizer, which all of them need
                found, missing = {}, dict.fromkeys(OF_REFERENCES, str(error))
            scores = found | self._measured(judged) | scores
            self.not_run |= {f"{self.name} {score}": reason for score, reason in missing.items()}
        self.draws = named(agreement(judged, scores))
        if settings.full and len({candidate.image for candidate in judged.candidates}) > 1:
            known = [pair for pair in self.mixed if scores.keys() >= set(pair)]
            half, mixed, shares = mixtures(judged, scores, known)
            of_half = agreement(half, mixed)
            self.draws |= {f"{HALF}{score}": draws for score, draws in named(of_half).items()}
            if rank() == 0:
                settings.write_json("predictions", f"{self.name}_mixtures.json", {"shares": shares})
        return {score: draws.score for score, draws in self.draws.items()}

    def _measured(self, judged: Judged) -> Scores:
        scores: Scores = {}
        for name, measure in self.measures.items():
            try:
                scores |= measured(judged, measure)
            except DataError as error:
                self.not_run[f"{self.name} {name}"] = str(error)
        return scores

    def compared_texts(self, records: Sequence[Record]) -> Sequence[str]:
        """The judged captions and the references."""
        judged = self.judged.of({record.id for record in records})
        return [*(candidate.caption for candidate in judged.candidates), *super().compared_texts(records)]


def judged_captions(root: str | Path, judgments: str, captions: str | None = None) -> Judged:
    """`read_judgments` of a file in a folder, with the file of the captions there."""
    folder = Path(root)
    path = find_file(f"the judgements {judgments}", [folder / judgments], "put them there, as they are published")
    return read_judgments(path, folder / captions if captions is not None else None)


def measured(judged: Judged, measure: Measure) -> Scores:
    """What a measure says of each candidate (C,), as if it were the only caption of an image of its own."""
    alone = [Record(i, own.image, judged.references[own.image]) for i, own in enumerate(judged.candidates)]
    captions: dict[int | str, str] = {i: own.caption for i, own in enumerate(judged.candidates)}
    return {score: values for score, (values, _) in measure(alone, captions).items()}


def named(found: Agreement) -> dict[str, Draws]:
    """Scores of an evaluation: "tau_b_CIDEr", "tau_b_people", "CIDEr_accuracy", "CIDEr_HC_accuracy"."""
    scores: dict[str, Draws] = {}
    for measure, of in found.by.items():
        if measure in TAUS:
            everyone = {**of, "people": found.people[measure]} if measure in found.people else of
            scores |= {f"{measure}_{name}": draws for name, draws in everyone.items()}
        else:
            scores |= {f"{name}_{measure.replace(' ', '_')}": draws for name, draws in of.items()}
    return scores


def model_scores(model: DualEncoder, judged: Judged, records: Sequence[Record], settings: Settings) -> Scores:
    """What the model says about each candidate (C,), see `JudgedScores`. Its decoder does not count words that its
    vocabulary lacks.
    """
    place = {record.id: number for number, record in enumerate(records)}
    image = torch.tensor([place[candidate.image] for candidate in judged.candidates])  # (C,)
    captions = [candidate.caption for candidate in judged.candidates]
    texts = list(dict.fromkeys(captions))
    number = {text: i for i, text in enumerate(texts)}
    text = torch.tensor([number[caption] for caption in captions])  # (C,)
    scores = _of_features(model, records, texts, image, text, settings)
    if model.decoder is None:
        return scores
    beside: list[list[int]] = [[] for _ in records]  # the texts of each image, as they come
    for own, which in zip(image.tolist(), text.tolist(), strict=True):
        beside[own].append(which)
    rows = log_likelihoods(model, records, texts, lambda i: beside[i], settings.batch_size, settings.workers)
    read = torch.empty(len(captions))
    read[image.argsort(stable=True)] = torch.cat(rows)
    gained = read - blind_log_likelihoods(model, texts, settings.batch_size)[text]
    tokens = model.tokenizer.tokens_of(texts)  # (T, L)
    lengths = text_lengths(tokens, model.tokenizer.pad_id)
    counted = torch.arange(1, tokens.shape[1]) < lengths[:, None]  # tokens that a likelihood is the sum over
    if (unknown := model.tokenizer.unk_id) is not None:
        counted &= tokens[:, 1:] != unknown
    words = counted.sum(dim=1).clamp(min=1)[text]
    found = {"likelihood": read, "likelihood_per_token": read / words, "pmi": gained, "pmi_per_token": gained / words}
    return scores | {name: values.double().numpy() for name, values in found.items()}


def _of_features(
    model: DualEncoder, records: Sequence[Record], texts: Sequence[str], image: Tensor, text: Tensor, settings: Settings
) -> Scores:
    """CLIPScore and RefCLIPScore (C,) of candidates, given the numbers of their images and texts (C,)."""
    prompt = CLIP_PROMPT if model.tokenizer.unk_id is None else ""  # a closed vocabulary lacks its words
    images = embed_images(model, records, settings.batch_size, settings.workers)
    references = [caption for record in records for caption in record.captions]
    features = embed_texts(model, [prompt + caption for caption in (*texts, *references)], settings.batch_size)
    written, of_references = features.split([len(texts), len(references)])
    groups = of_references.split([len(record.captions) for record in records])
    found: list[dict[str, Tensor]] = []
    for part_image, part_text in zip(image.split(PART), text.split(PART), strict=True):
        own = [groups[i] for i in part_image.tolist()]
        owner = torch.arange(len(own)).repeat_interleave(torch.tensor([len(group) for group in own]))
        found.append(clip_scores(images[part_image], written[part_text], torch.cat(own), owner))
    return {name: torch.cat([part[name] for part in found]).double().numpy() for name in found[0]}
