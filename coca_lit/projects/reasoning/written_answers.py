"""Answers to questions about images, as the decoder writes them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import Any

from coca_lit.data.records import Record
from coca_lit.evals.inference import seeded_by, write_texts
from coca_lit.models import CoCa
from coca_lit.models.inputs import Images
from coca_lit.tokenizer import Tokenizer

MAX_ANSWER = 10  # tokens, the end included


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
