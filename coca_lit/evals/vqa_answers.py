"""Answers of a model to questions about images, written by its decoder."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.evals.inference import write_texts
from coca_lit.models import CoCa
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

    `options` are those of `CoCa.generate`; answers have `MAX_ANSWER` tokens at most, if they do not say otherwise.
    """
    tokenizer = model.tokenizer

    def write(part: Sequence[Record], images: Tensor) -> Iterable[str]:
        questions = [fitting(tokenizer, record.question) for record in part]
        begun = [len(ids) - 1 for ids in tokenizer.encode_batch(questions)]
        room = {"max_length": min(max(begun) + MAX_ANSWER, tokenizer.context_length)}
        texts = model.generate(images, prompt=questions, **room | dict(options))
        return [tokenizer.decode(ids[start:]) for ids, start in zip(texts, begun, strict=True)]

    return write_texts(model, records, write, batch_size, num_workers)


def fitting(tokenizer: Tokenizer, question: str) -> str:
    """The question without the last words that would leave no room for an answer."""
    most = max(tokenizer.context_length - MAX_ANSWER, 3)
    words = question.split()
    while len(words) > 1 and len(tokenizer.encode_batch([" ".join(words)])[0]) - 1 > most:
        words.pop()
    return " ".join(words)
