"""The accuracy of VQA (Antol et al. 2015, arXiv 1505.00468), equal to the official evaluation to the last digit.

An answer is right as far as three of the people asked gave it. Whom to compare with is arbitrary, so the score is the
mean over the ways to leave one of the (usually ten) people out. Before that both sides are brought into one form,
unless all people agree to the letter.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

Id = TypeVar("Id", bound=Hashable)

ENOUGH = 3  # people of the same opinion
ARTICLES = ("a", "an", "the")
_NUMBERS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBERS.split())} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# People forget one apostrophe: every spelling below without one of its own.
_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _APOSTROPHES.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the one entry that the official table has the wrong way round


@functools.lru_cache(maxsize=100_000)
def normalize_answer(answer: str) -> str:
    """Lower case, without articles and punctuation, number words as digits, apostrophes where they belong.

    "Two, the  dogs." -> "2 dogs". A punctuation mark beside a blank goes, elsewhere it becomes a blank; in an answer
    with a number like 1,000 all go; a full stop stays before a digit.
    """
    text = " ".join(answer.split())
    closed_up = _NUMBER_WITH_COMMA.search(text) is not None
    words = text
    for mark in PUNCTUATION:
        words = words.replace(mark, "" if closed_up or f"{mark} " in text or f" {mark}" in text else " ")
    words = _FULL_STOP.sub("", words).lower()
    numbered = [NUMBERS.get(word, word) for word in words.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in ARTICLES)


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Of one answer in [0, 1], against those that people gave, ten in VQA.

    Raises ValueError when there are none.
    """
    if not answers:
        raise ValueError("there are no answers to compare with: the test sets have no public ones")
    given = " ".join(answer.split())
    people = [" ".join(text.split()) for text in answers]
    if len(set(people)) > 1:
        given = normalize_answer(given)
        people = [normalize_answer(text) for text in people]
    same = people.count(given)
    # Whoever said the same is left out in `same` of the cases.
    scores = [min((same - (person == given)) / ENOUGH, 1) for person in people]
    return sum(scores) / len(scores)


def enough_people(answers: Sequence[str]) -> Sequence[str]:
    """The answers to a question, ten times where they are so few that none could be wholly right: one person is left
    out, and three of the others have to agree.
    """
    return answers if len(answers) > ENOUGH else [answer for answer in answers for _ in range(10)]


def blind_answers(questions: Mapping[Id, str], training: Iterable[tuple[str, str]]) -> dict[Id, str]:
    """What one would answer without looking: the most frequent answer to training questions of the same words,
    and to a question that is new the most frequent answer to all of them.

    Args:
        training: (question, answer) pairs.

    Raises:
        ValueError: there are none.
    """
    usual: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in training:
        usual[question][answer] += 1
        usual[""][answer] += 1
    if not usual:
        raise ValueError("the training has no answers to guess from")
    return {id: usual[question if question in usual else ""].most_common(1)[0][0] for id, question in questions.items()}
