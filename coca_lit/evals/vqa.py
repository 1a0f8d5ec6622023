"""Answers to questions about images: how the decoder writes them, and their scores; also of answers that are boxes, and
names of what is in a box.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from coca_lit.data.records import Record
from coca_lit.data.scenes.places import overlap, read_box
from coca_lit.distributed import rank
from coca_lit.errors import DataError
from coca_lit.evals.base import Evaluation, Settings, kept_with
from coca_lit.evals.inference import seeded_by, write_texts
from coca_lit.evals.samples import caption_samples, sample_sheet
from coca_lit.metrics.uncertainty import Draws, Ratios, Units, bootstrap
from coca_lit.metrics.vqa import blind_answers, enough_people, vqa_accuracy
from coca_lit.models import CoCa, DualEncoder
from coca_lit.models.inputs import Images
from coca_lit.tokenizer import Tokenizer

MAX_ANSWER = 10  # tokens, the end included
LEAST_OVERLAP = 0.5  # intersection over union of a box that counts as right
Answers = dict[int | str, str]  # by question id
T = TypeVar("T")


class VQAScores(Evaluation):
    """Accuracy of written answers, and of the answers of a classifier kept with the model, if there is one, and for
    each kind of answer. With `settings.full` also of the best guess of somebody who does not look ("blind").

    Predictions are written in the official results format, also for questions whose answers are not public.

    Args:
        records: questions, see `coca_lit.data.datasets.vqa`.
        training_records: returns the training questions, from which the blind guesses come; None for no such score.
    """

    score_names = ("accuracy",)

    def __init__(
        self,
        name: str,
        records: Sequence[Record],
        training_records: Callable[[], Sequence[Record]] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(name, records, every)
        self.training_records = training_records

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        public = all(record.captions for record in records)
        if not settings.full and (model.decoder is None or not public):
            return {}
        if model.decoder is None:
            self.not_run[f"{self.name} answers"] = "the model has no decoder, so it writes no answers"
            return {}
        size, workers = settings.batch_size, settings.workers
        # By the way in which they were found: "" by generation.
        answers = {"": generate_answers(model, records, size, workers, settings.generate or {})}
        classifier = kept_with(model, "classes", "logits")
        if classifier is not None:
            likeliest = classifier.logits(model, records, size, workers).argmax(dim=1).tolist()
            classes = classifier.classes
            answers["classifier"] = {record.id: classes[i] for record, i in zip(records, likeliest, strict=True)}
        if not settings.full:
            return _accuracies(records, answers, full=False)[0]
        if rank() == 0:
            for way, found in answers.items():
                predictions = [{"question_id": id, "answer": answer} for id, answer in found.items()]
                settings.write_json("predictions", f"{self.name}{way and f'_{way}'}.json", predictions)
            settings.write_json("samples", f"{self.name}_captions.json", caption_samples(records, answers[""]))
            settings.write_image("samples", f"{self.name}.png", sample_sheet(records, answers[""]))
        if not public:
            self.not_run[f"{self.name} accuracy"] = "the answers to these questions are not public"
            return {}
        if (guesses := blind_guesses(self, records, self.training_records)) is not None:
            answers["blind"] = guesses
        scores, self.draws = _accuracies(records, answers, full=True)
        return scores


def _accuracies(
    records: Sequence[Record], answers: Mapping[str, Answers], full: bool
) -> tuple[dict[str, float], dict[str, Draws]]:
    """Scores, and with `full` their draws: of images, each with all its questions, as those are not independent."""
    people = [enough_people(record.captions) for record in records]
    right = {
        way and f"{way}/": np.array([vqa_accuracy(found[r.id], of) for r, of in zip(records, people, strict=True)])
        for way, found in answers.items()
    }
    scores = accuracies_by_kind(records, right, lambda values, rows: sum(values[rows].tolist()) / len(rows))
    if not full:
        return scores, {}
    units = Units(record.image_key for record in records)
    parts = accuracies_by_kind(records, right, units.mean)
    return scores, bootstrap([records[i].id for i in units.first], Ratios(parts))


def accuracies_by_kind(
    records: Sequence[Record], right: Mapping[str, np.ndarray], mean: Callable[[np.ndarray, list[int]], T]
) -> dict[str, T]:
    """The accuracies of answers, and of those that were found in the way "" also for each kind: "number/accuracy".

    Args:
        right: the way in which answers were found, a prefix of the score -> how right (I,) they are.
        mean: of such values and numbers of records.
    """
    chosen = {"accuracy": list(range(len(records)))}
    for i, record in enumerate(records):
        if record.domain:
            chosen.setdefault(f"{record.domain}/accuracy", []).append(i)
    return {
        f"{way}{score}": mean(values, rows)
        for way, values in right.items()
        for score, rows in chosen.items()
        if not way or score == "accuracy"
    }


def blind_guesses(
    evaluation: Evaluation, records: Sequence[Record], training_records: Callable[[], Sequence[Record]] | None
) -> Answers | None:
    """The answers of somebody who does not look; None without training records, and with a note in
    `evaluation.not_run` where these cannot be read, as they need not lie beside the others, or have no answers.
    """
    if training_records is None:
        return None
    try:
        pairs = [(record.question, record.captions[0]) for record in training_records() if record.captions]
        return blind_answers({record.id: record.question for record in records}, pairs)
    except (DataError, ValueError) as error:
        evaluation.not_run[f"{evaluation.name} blind"] = str(error)
        return None


def generate_answers(
    model: CoCa,
    records: Sequence[Record],
    batch_size: int = 64,
    num_workers: int = 0,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> dict[int | str, str]:
    """One answer per question, by question id: what the model writes when its caption begins with the question.

    `options` are passed to `CoCa.generate`, but for a prompt and `min_length`, which are of captions; `max_length` is
    of the answer alone, `MAX_ANSWER` tokens by default.
    """
    tokenizer = model.tokenizer
    questions = {record.id: fitting(tokenizer, record.question) for record in records}
    begun = {id: len(tokenizer.encode(question)) - 1 for id, question in questions.items()}
    apart = tokenizer.decode(tokenizer.encode("10")) == "1 0"
    most = options.get("max_length") or MAX_ANSWER

    def write(part: Sequence[Record], images: Images) -> Iterator[str]:
        for start, group in groupby(range(len(part)), key=lambda row: begun[part[row].id]):  # one limit holds for all
            rows = list(group)
            room = {"max_length": min(start + most, tokenizer.context_length), "min_length": None}
            prompts = {"prompt": [questions[part[row].id] for row in rows]}
            drawn = seeded_by([part[row] for row in rows], options, model.device)
            for ids in model.generate(images[rows], **drawn | room | prompts):
                written = tokenizer.decode(ids[start:])
                yield as_people_write(written) if apart else written

    by_length = sorted(records, key=lambda record: begun[record.id])  # so that a batch has few lengths
    answers = write_texts(model, by_length, write, batch_size, num_workers)
    return {record.id: answers[record.id] for record in records}


def as_people_write(text: str) -> str:
    """A text without the blanks that CLIP's byte pairs put between digits, and around signs within a word: its 1 0 is
    10, 1 . 5 is 1.5, $ 2 0 is $20, 1 0 0 % is 100%, t - shirt is t-shirt, men 's is men's and 3 o ' clock 3 o'clock.
    Other signs stay apart, as in dr . pepper, and two numbers beside each other become one.
    """
    text = re.sub(r"(?<=\d) (?=\d)", "", text)
    of_numbers = r"(?<=\d) [.:/'] (?=\d)|(?<=\d) , (?=\d{3}\b)|[$#] (?=\d)"
    signs = rf"{of_numbers}|(?<=\w) - (?=\w)|(?<=\b\w) & (?=\w\b)|\bo ' (?=clock\b)"
    text = re.sub(signs, lambda sign: sign[0].replace(" ", ""), text)
    text = re.sub(r"\b\w \.(?: \w \.)+", lambda initials: initials[0].replace(" ", ""), text)
    return re.sub(r"(?<=\d) (?=(?:[%°]|s|st|nd|rd|th)(?!\w))|(?<=\w) (?='(?:s|t|re|ve|m|ll|d)\b)", "", text)


def fitting(tokenizer: Tokenizer, question: str) -> str:
    """The question without its end that would leave no room for an answer: whole words, and of one word characters."""
    most = max(tokenizer.context_length - MAX_ANSWER, 3)
    words = question.split()
    while len(words) > 1 and len(tokenizer.encode(" ".join(words))) - 1 > most:
        words.pop()
    text = " ".join(words)
    while len(tokenizer.encode(text)) - 1 > most:  # a word alone, such as a sentence in Chinese
        text = text[:-1]
    return text


class PlaceScores(Evaluation):
    """The share of boxes that overlap the true one by at least `LEAST_OVERLAP`, and of things in a box that are named
    in the same words, see `coca_lit.data.scenes.places`.

    Args:
        records: questions; an answer with a box is asked for one.
    """

    captioned = True
    score_names = ("box_accuracy", "name_accuracy")

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        if model.decoder is None:
            self.not_run[f"{self.name} places"] = "the model has no decoder, so it writes no answers"
            return {}
        boxes = [record.captions[0] for record in records if read_box(record.captions[0])]
        if any(read_box(model.tokenizer.decode(model.tokenizer.encode(box))) != read_box(box) for box in {*boxes}):
            self.not_run[f"{self.name} boxes"] = "the tokenizer takes boxes apart: train with a vocabulary of words"
            records = [record for record in records if read_box(record.captions[0]) is None]
        if not records:
            return {}
        answers = generate_answers(model, records, settings.batch_size, settings.workers, settings.generate or {})
        right = np.array([is_right(answers[record.id], record.captions[0]) for record in records])
        asks_box = np.array([read_box(record.captions[0]) is not None for record in records])
        units = Units(record.image_key for record in records)
        kinds = zip(self.score_names, (asks_box, ~asks_box), strict=True)
        shares = Ratios({score: units.mean(right, rows) for score, rows in kinds if rows.any()})
        return self.resample([records[i].id for i in units.first], shares, settings)


def is_right(answer: str, truth: str) -> bool:
    """Of a box whether it overlaps the true one, of a name whether it is the same."""
    true_box = read_box(truth)
    if true_box is None:
        return answer.split() == truth.split()
    box = read_box(answer)
    return box is not None and overlap(box, true_box) >= LEAST_OVERLAP
