"""The study of noise: draws of fewer images scatter more, by the square root, and about the official scores."""

import random

import pytest

from coca_lit.metrics.captions import Tokens, score_tokens
from experiments.caption_noise.noise import compared, measured

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]


def tokens(seed: int, count: int = 400) -> Tokens:
    chosen = random.Random(seed)

    def text() -> str:
        return " ".join(chosen.choices(WORDS, k=chosen.randint(5, 9)))

    return Tokens({i: [text(), text()] for i in range(count)}, {i: [text()] for i in range(count)})


def test_four_times_as_many_images_halve_the_interval() -> None:
    captions = tokens(0)
    system = measured(captions, [100, 400], ["Bleu", "ROUGE_L"])
    official = score_tokens(captions, ["Bleu", "ROUGE_L"])
    for score in ("Bleu_1", "ROUGE_L"):
        few, many = (low_high[1] - low_high[0] for low_high in (system[n][score].interval() for n in (100, 400)))
        assert few / many == pytest.approx(2, rel=0.15), score
        assert system[100][score].score == pytest.approx(official[score])


def test_a_system_equals_itself_and_another_one_is_compared_on_the_same_draws() -> None:
    captions = tokens(0)
    system = measured(captions, [400], ["ROUGE_L"])
    (same,) = compared("x", ("first", "second"), system, measured(captions, [400], ["ROUGE_L"]))
    assert (same["captions"], same["against"], same["value"]) == ("second", "first", "0.00000")
    assert same["low"] == same["high"] == "nan"  # draws that do not scatter say nothing
    worse = Tokens(captions.references, {i: ["z z z"] if i < 100 else text for i, text in captions.hypotheses.items()})
    (row,) = compared("x", ("first", "second"), system, measured(worse, [400], ["ROUGE_L"]))
    assert float(row["low"]) < float(row["value"]) < float(row["high"]) < 0
    assert float(row["p"]) < 0.05
