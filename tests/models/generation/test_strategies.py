"""Every strategy of generation against the slow way: one caption at a time, no cache, plain lists."""

import pytest
import torch
from torch import Tensor, nn

from coca_lit.models import CoCa
from helpers import naive
from helpers.generating import LENGTH, PROMPTS, make_images, make_model, starts
from helpers.slow import slow


def padded(rows: list[list[int]], pad: int, length: int = LENGTH) -> Tensor:
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows]).view(len(rows), length)


@pytest.fixture(scope="module")
def model() -> CoCa:
    return make_model()


@pytest.mark.parametrize("count", [*slow(0), 5])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("rules", [{}, {"least": 6, "penalty": 1.5, "ngram": 2}], ids=["free", "constrained"])
def test_greedy_equals_the_uncached_loop(model: CoCa, count: int, prompt: str, rules: dict[str, float]) -> None:
    images, beginning = make_images(count), PROMPTS[prompt](count)
    expected = [
        naive.greedy(model, image, start, LENGTH, **rules)
        for image, start in zip(images, starts(model, beginning, count), strict=True)
    ]
    captions = model.generate(images, prompt=beginning, max_length=LENGTH, **options_of(rules))
    assert torch.equal(captions, padded(expected, model.tokenizer.pad_id))


@pytest.mark.parametrize("width", [1, *slow(2), 3])
@pytest.mark.parametrize("count", [*slow(0), 5])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("rules", [{}, {"least": 6, "penalty": 1.5, "ngram": 2}], ids=["free", "constrained"])
def test_beams_equal_the_uncached_search(
    model: CoCa, width: int, count: int, prompt: str, rules: dict[str, float]
) -> None:
    images, beginning = make_images(count), PROMPTS[prompt](count)
    captions = model.generate(
        images,
        prompt=beginning,
        strategy="beam",
        num_beams=width,
        num_captions=width,
        max_length=LENGTH,
        length_penalty=0.7,
        return_scores=True,
        **options_of(rules),
    )
    assert captions.ids.shape == (count, width, LENGTH)
    for image, start, ids, scores in zip(
        images, starts(model, beginning, count), captions.ids, captions.scores, strict=True
    ):
        expected = naive.beams(model, image, start, LENGTH, width, 0.7, **rules)
        assert torch.equal(ids, padded([row for _, row in expected], model.tokenizer.pad_id))
        torch.testing.assert_close(scores, torch.tensor([score for score, _ in expected]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [*slow(0), 5])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("number", [None, 3])
def test_samples_follow_prompts_and_end(model: CoCa, count: int, prompt: str, number: int | None) -> None:
    images, beginning = make_images(count), PROMPTS[prompt](count)
    captions = model.generate(images, prompt=beginning, strategy="sample", num_captions=number, max_length=LENGTH)
    assert captions.shape == ((count, LENGTH) if number is None else (count, number, LENGTH))
    for start, rows in zip(
        starts(model, beginning, count), captions.view(count, number or 1, LENGTH).tolist(), strict=True
    ):
        for row in rows:
            end = row.index(model.tokenizer.eot_id)
            assert row[: len(start)] == start
            assert set(row[end + 1 :]) <= {model.tokenizer.pad_id}


@pytest.mark.parametrize("free", [2, 3])
def test_the_widest_beam_is_exhaustive_search(free: int) -> None:
    """A beam as wide as there are captions of `free` tokens cannot lose any of them."""
    model = make_model(words=["dog"])
    image, length = make_images(1), free + 1
    width = model.tokenizer.vocab_size**free
    expected = naive.all_captions(model, image[0], [model.tokenizer.sot_id], length)
    options = {"strategy": "beam", "num_beams": width, "num_captions": width, "max_length": length}
    found = model.generate(image, **options, return_scores=True)
    assert torch.equal(
        found.ids[0, : len(expected)], padded([ids for _, ids in expected], model.tokenizer.pad_id, length)
    )
    torch.testing.assert_close(
        found.scores[0, : len(expected)], torch.tensor([score for score, _ in expected]), atol=1e-5, rtol=1e-5
    )
    assert found.scores[0, len(expected) :].isneginf().all()


def test_log_probability_beams_ignore_a_shift_of_the_logits(model: CoCa, monkeypatch: pytest.MonkeyPatch) -> None:
    """The captions of the legacy rule, which adds logits, change."""
    images = make_images(6)
    options = {"strategy": "beam", "num_beams": 3, "max_length": LENGTH, "min_length": 0}
    before = {
        scoring: model.generate(images, **options, scoring=scoring) for scoring in ("log_prob", "openclip_legacy")
    }
    monkeypatch.setattr(
        model.decoder.vocabulary, "forward", lambda x: nn.functional.linear(x, model.decoder.vocabulary.weight) - 50
    )
    after = {scoring: model.generate(images, **options, scoring=scoring) for scoring in before}
    assert torch.equal(before["log_prob"], after["log_prob"])
    assert not torch.equal(before["openclip_legacy"], after["openclip_legacy"])


def options_of(rules: dict[str, float]) -> dict[str, float]:
    names = {"least": "min_length", "penalty": "repetition_penalty", "ngram": "no_repeat_ngram"}
    return {names[name]: value for name, value in rules.items()}


def test_a_finished_draw_may_repeat_what_is_forbidden() -> None:
    """A model can write the padding id too; then pad and end are a run that may not come twice, but padding follows."""
    model = make_model()
    weight = model.decoder.vocabulary.weight.data
    weight[model.tokenizer.pad_id] = weight[model.tokenizer.eot_id]
    drawn = {"strategy": "sample", "num_captions": 50, "generator": torch.Generator().manual_seed(0)}
    captions = model.generate(make_images(8), max_length=12, no_repeat_ngram=2, **drawn)
    rows = captions.flatten(0, 1).tolist()
    pad, end = model.tokenizer.pad_id, model.tokenizer.eot_id
    assert any(row[row.index(end) - 1] == pad and row[-1] == pad for row in rows)


@pytest.mark.parametrize("options", [{}, {"strategy": "beam", "num_beams": 4}], ids=["greedy", "beam"])
def test_images_are_encoded_once_and_finished_rows_leave(
    model: CoCa, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    encoded, rows = [], []
    encode, step = model.image_encoder.forward, model.decoder.step
    monkeypatch.setattr(model.image_encoder, "forward", lambda images: (encoded.append(len(images)), encode(images))[1])
    monkeypatch.setattr(model.decoder, "step", lambda states, *rest: (rows.append(len(states)), step(states, *rest))[1])
    captions = model.generate(make_images(20), max_length=12, **options)
    assert encoded == [20]
    assert len(captions) == 20
    assert rows[0] == 20  # the beginnings, before there are several captions for an image
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert rows[-1] < rows[1] <= 20 * options.get("num_beams", 1)
