"""Filters of sampling against naive ones, reproducible draws, reranking, scores, attention, and errors that help."""

import math
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from coca_lit.cli.command import compose
from coca_lit.models import CoCa, create_model
from coca_lit.models.generation.decode import Sampling, caption_lengths, keep_top_k, keep_top_p
from coca_lit.models.generation.options import OPTIONS, describe
from coca_lit.tools.caption.command import as_run, generate_help
from helpers import naive
from helpers.generating import LENGTH, make_images, make_model, starts


@pytest.fixture(scope="module")
def model() -> CoCa:
    return make_model()


def naive_top_p(row: list[float], p: float) -> set[int]:
    """Tokens from the likeliest on, until they have p together."""
    total, kept, sum_ = sum(map(math.exp, row)), set(), 0.0
    for token in sorted(range(len(row)), key=lambda i: -row[i]):
        if sum_ >= p and kept:
            break
        kept.add(token)
        sum_ += math.exp(row[token]) / total
    return kept


@pytest.mark.parametrize("p", [0.01, 0.9])
def test_top_p_keeps_the_nucleus(p: float) -> None:
    scores = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) * 2
    for row, kept in zip(scores.tolist(), keep_top_p(scores, p), strict=True):
        assert set(kept.isfinite().nonzero()[:, 0].tolist()) == naive_top_p(row, p)


@pytest.mark.parametrize("k", [1, 99])
def test_top_k_keeps_the_likeliest(k: int) -> None:
    scores = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    for row, kept in zip(scores.tolist(), keep_top_k(scores, k), strict=True):
        assert set(kept.isfinite().nonzero()[:, 0].tolist()) == set(sorted(range(12), key=lambda i: -row[i])[:k])


@pytest.mark.parametrize("images", [Image.new("RGB", (8, 8)), [Image.new("RGB", (8, 8))]])
def test_a_picture_is_no_tensor(images: Any) -> None:
    model = make_model()
    for use in (model.generate, model.encode_image):
        with pytest.raises(TypeError, match=r"images.*build_transform"):
            use(images)


def test_draws_have_the_filtered_distribution() -> None:
    """Temperature, then top-k, then top-p: weights 4, 2, 1, 1 become 16, 4, 1, 1; the top 3 are all, as ties stay;
    16 and 4 of 22 are over 0.9.
    """
    scores = torch.tensor([4.0, 2.0, 1.0, 1.0]).log().repeat(20_000, 1)
    sampling = Sampling(temperature=0.5, top_k=3, top_p=0.9, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(sampling(scores), minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.8, 0.2, 0, 0]), atol=0.01, rtol=0)
    free = torch.bincount(Sampling(generator=torch.Generator().manual_seed(0))(scores), minlength=4) / 20_000
    torch.testing.assert_close(free, torch.tensor([0.5, 0.25, 0.125, 0.125]), atol=0.012, rtol=0)


def test_samples_have_the_probabilities_of_the_model(model: CoCa) -> None:
    """The share of each first token among many draws for one image is its probability in the uncached model."""
    captions = model.generate(
        make_images(1), strategy="sample", num_captions=8000, max_length=4, generator=torch.Generator().manual_seed(0)
    )
    shares = torch.bincount(captions[0, :, 1], minlength=model.tokenizer.vocab_size) / 8000
    expected = naive.next_scores(model, naive.image_tokens(model, make_images(1)[0]), [model.tokenizer.sot_id]).exp()
    torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)


def test_the_generator_decides_the_draws(model: CoCa) -> None:
    def draw(seed: int) -> Tensor:
        return model.generate(
            make_images(4), strategy="sample", num_captions=3, generator=torch.Generator().manual_seed(seed)
        )

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(model.generate(make_images(4), strategy="sample", top_k=1), model.generate(make_images(4)))


ALL = [{}, {"strategy": "beam", "num_captions": 2}, {"strategy": "sample", "num_captions": 3}]


@pytest.mark.parametrize("options", ALL, ids=["greedy", "beam", "sample"])
@pytest.mark.parametrize("prompt", [None, ["a", "a red dog on", "cat"]], ids=["free", "prompts"])
def test_log_probabilities_are_those_of_the_model(
    model: CoCa, options: dict[str, Any], prompt: list[str] | None
) -> None:
    """Rules change what is chosen, not what it is worth; without rules, strategies compare just that."""
    for rules in ({}, {"min_length": 5, "repetition_penalty": 1.4}):
        images = make_images(3)
        captions = model.generate(images, prompt=prompt, max_length=LENGTH, return_scores=True, **options, **rules)
        rows = captions.ids.view(3, options.get("num_captions", 1), LENGTH)
        expected = [
            [mean_log_prob(model, image, start, ids) for ids in group.tolist()]
            for image, start, group in zip(images, starts(model, prompt, 3), rows, strict=True)
        ]
        torch.testing.assert_close(
            captions.log_probs, torch.tensor(expected).view_as(captions.log_probs), atol=1e-5, rtol=1e-4
        )
        if not rules or "strategy" not in options:
            torch.testing.assert_close(captions.scores, captions.log_probs)


def mean_log_prob(model: CoCa, image: Tensor, start: list[int], ids: list[int]) -> float:
    seen, ids = naive.image_tokens(model, image), ids[: ids.index(model.tokenizer.eot_id) + 1]
    chosen = [naive.next_scores(model, seen, ids[:i])[ids[i]].item() for i in range(len(start), len(ids))]
    return sum(chosen) / len(chosen)


@pytest.mark.parametrize(
    "options", [{"strategy": "beam", "num_beams": 4}, {"strategy": "sample"}], ids=["beam", "sample"]
)
def test_rerank_mixes_similarity_and_log_probability(model: CoCa, options: dict[str, Any]) -> None:
    images = make_images(5)
    if options["strategy"] == "sample":
        options = options | {"generator": torch.Generator().manual_seed(0)}
    captions = model.generate(
        images, num_captions=4, rerank="contrastive", rerank_weight=0.3, return_scores=True, **options
    )
    tokens = captions.ids.flatten(0, 1)
    texts = model.encode_text(tokens, caption_lengths(tokens, model.tokenizer.eot_id)).unflatten(0, (5, 4))
    cosines = torch.einsum("bne,be->bn", texts, model.encode_image(images))
    torch.testing.assert_close(captions.similarities, cosines)
    torch.testing.assert_close(captions.scores, 0.3 * model.logit_scale.exp() * cosines + 0.7 * captions.log_probs)
    assert (captions.scores.diff(dim=1) <= 0).all()


def test_rerank_chooses_among_all_beams(model: CoCa) -> None:
    images, beams = make_images(8), {"strategy": "beam", "num_beams": 4}
    candidates = model.generate(images, num_captions=4, **beams)
    tokens = candidates.flatten(0, 1)
    texts = model.encode_text(tokens, caption_lengths(tokens, model.tokenizer.eot_id)).unflatten(0, (8, 4))
    most_similar = torch.einsum("bne,be->bn", texts, model.encode_image(images)).argmax(dim=1)
    chosen = model.generate(images, rerank="contrastive", rerank_weight=1.0, **beams)
    assert torch.equal(chosen, candidates[torch.arange(8), most_similar])
    assert not torch.equal(chosen, candidates[:, 0])


@pytest.mark.parametrize("options", ALL, ids=["greedy", "beam", "sample"])
@pytest.mark.parametrize("count", [0, 3])
def test_attention_rows_add_up_to_one(model: CoCa, options: dict[str, Any], count: int) -> None:
    captions = model.generate(make_images(count), return_attention=True, max_length=LENGTH, **options)
    assert captions.attention.shape == (*captions.ids.shape, 5)
    position = torch.arange(LENGTH)
    written = (position > 0) & (position < caption_lengths(captions.ids, model.tokenizer.eot_id)[..., None])
    torch.testing.assert_close(captions.attention.sum(-1), written.float())


def test_attention_is_that_of_the_cross_blocks(model: CoCa, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of zero make it uniform; the keys of the model do not."""
    captions = model.generate(make_images(2), return_attention=True, max_length=LENGTH)
    assert (captions.attention[:, 1] - 0.2).abs().max() > 0.01
    for block in model.decoder.cross_blocks:
        monkeypatch.setattr(
            block.attention, "keys_values", lambda x, norm: (torch.zeros(len(x), 3, 5, 8), torch.zeros(len(x), 3, 5, 8))
        )
    uniform = model.generate(make_images(2), return_attention=True, max_length=LENGTH).attention[:, 1]
    torch.testing.assert_close(uniform, torch.full_like(uniform, 0.2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "beams"}, "strategy"),
        ({"strategy": "sample", "num_beams": 3}, "num_beams.*'beam'.*'sample'"),
        ({"length_penalty": 2.0}, "length_penalty.*'beam'"),
        ({"scoring": "openclip_legacy"}, "openclip_legacy.*'beam'"),
        ({"num_captions": 2}, "greedy"),
        ({"strategy": "beam", "num_beams": 3, "num_captions": 4}, "3 beams.*4 captions"),
        ({"strategy": "sample", "rerank": "contrastive"}, "rerank.*num_captions"),
        ({"strategy": "beam", "rerank_weight": 0.5}, "rerank_weight"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_length": 13}, "max_length.*12.*13"),
        ({"min_length": 12}, "min_length.*12.*max_length"),
        ({"prompt": 5}, "prompt.*5"),
        ({"prompt": ""}, "prompt 0"),
        ({"prompt": ["a dog"]}, "1 prompts.* 2 images"),
    ],
)
def test_wrong_options_are_explained(model: CoCa, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(make_images(2), **options)


def test_a_misspelt_option_suggests_the_right_one(model: CoCa) -> None:
    with pytest.raises(TypeError, match=r"'num_beems'.*'num_beams'"):
        model.generate(make_images(1), strategy="beam", num_beems=4)


@pytest.mark.parametrize("options", [{"top_k": "5"}, {"top_k": 2.5}, {"num_captions": True}, {"temperature": "hot"}])
def test_wrong_types_are_explained(model: CoCa, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name):
        model.generate(make_images(1), strategy="sample", **options)


def test_every_option_is_documented_and_a_key_of_the_command() -> None:
    keys = {name: option for name, option in OPTIONS.items() if option.key}
    assert OPTIONS.keys() - keys.keys() == {"generator"}
    assert set(compose("caption").generate) == set(keys)
    for name, option in OPTIONS.items():
        assert f"{name}: {describe(name)}" in CoCa.generate.__doc__
        assert option.help
    assert all(describe(name) in generate_help() for name in keys if name != "strategy")
    assert "(default beam)" in generate_help()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "strategy=greedy"),
        ({"strategy": "beam", "min_length": 5}, "strategy=beam num_beams=2 min_length=5 length_penalty=1.0"),
        (
            {"preset": "mobileclip2"},
            "strategy=sample preset=mobileclip2 temperature=1.0 top_p=0.9 min_length=5 cut_at=.",
        ),
    ],
)
def test_options_are_told_as_they_will_be_used(options: dict[str, Any], said: str) -> None:
    assert as_run(options) == said


def test_generation_leaves_the_model_as_it_was(model: CoCa) -> None:
    training = make_model().train()
    training.generate(make_images(2), strategy="beam")
    assert training.training
    assert training.decoder.training
    with pytest.raises(ValueError, match="shape"):
        training.generate(make_images(2)[:, :1])
    assert training.training
    assert all(parameter.grad is None for parameter in training.parameters())


def test_a_model_without_decoder_says_so() -> None:
    model = CoCa(make_model().config, decoder_layers=0)
    with pytest.raises(ValueError, match="decoder_layers=0"):
        model.generate(make_images(1))


def test_a_preset_of_options_and_where_captions_are_cut(model: CoCa) -> None:
    """Apple's: a nucleus, cut before the first token with a full stop. What is given beside it counts."""
    images = make_images(4)
    drawn = {"strategy": "sample", "top_p": 0.9, "min_length": 5}

    def captions(**options: Any) -> list[str]:
        ids = model.generate(images, generator=torch.Generator().manual_seed(0), max_length=LENGTH, **options)
        assert ((ids == model.tokenizer.eot_id).sum(-1) == 1).all()
        return [model.tokenizer.decode(row) for row in ids]

    whole = captions(**drawn)
    assert captions(preset="mobileclip2") == whole  # no word has a full stop
    word = whole[0].split()[2]
    assert captions(preset="mobileclip2", cut_at=word) == [text.split(word)[0].strip() for text in whole]
    start = "a dog on"  # which is kept, although it has the text
    rest = [text.removeprefix(start) for text in captions(preset="mobileclip2", prompt=start)]
    cut = captions(preset="mobileclip2", prompt=start, cut_at="dog")
    assert any("dog" in text for text in rest)
    assert cut == [(start + text.split("dog")[0]).strip() for text in rest]
    with pytest.raises(ValueError, match="cut_at must be a text, got 1"):
        model.generate(images, cut_at=1)
    with pytest.raises(ValueError, match=r"preset.*'mobileclip2'"):
        model.generate(images, preset="apple")


def test_a_cut_at_a_token_that_is_also_padding_leaves_one_end() -> None:
    """Id 0 of CLIP's byte pairs is "!", and what captions are padded with."""
    torch.manual_seed(0)
    model = create_model("coca_tiny", tokenizer="clip").eval()
    end = torch.zeros(model.tokenizer.vocab_size).index_fill(0, torch.tensor(model.tokenizer.eot_id), 100.0)
    model.decoder.vocabulary.register_forward_hook(lambda _module, _inputs, logits: logits + end)  # as soon as it may
    ids = model.generate(torch.zeros(2, 3, 32, 32), strategy="greedy", min_length=4, cut_at="!")
    assert ((ids == model.tokenizer.eot_id).sum(dim=-1) == 1).all()
