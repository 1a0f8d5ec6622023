"""A vocabulary of the training captions, from the config to the checkpoint; unknown words and tied embeddings."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coca_lit.cli.module import build_module, with_vocabulary
from coca_lit.data.batch import Batch
from coca_lit.errors import ConfigError
from coca_lit.models import create_model
from coca_lit.runs.resume import ResumePoint
from coca_lit.tokenizer import frequent_words
from coca_lit.tools.export.open_clip import write_open_clip
from coca_lit.training.gradient_caching import label_count
from coca_lit.training.optim import AdamW
from coca_lit.weights import MODEL_KEY
from coca_lit.weights.load import load_model, save_model
from helpers.running import TINY, compose, run


def test_words_by_frequency_then_alphabet() -> None:
    captions = ["A dog and a dog.", "the dog's ball", "the cat", "A CAT"]
    assert frequent_words(captions, 2) == ["a", "cat", "dog", "the"]
    assert frequent_words(captions, 3) == ["a"]


def test_a_run_learns_its_words_and_its_checkpoint_knows_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    few = ("data.train_count=8", "evals=[]", "vocabulary=3", "model.label_smoothing=0.1", "model.net.dropout=0.1")
    run(tmp_path, *TINY, *few)
    model = load_model(tmp_path / "checkpoints" / "last.ckpt")
    words = model.tokenizer.spec
    assert f"vocabulary: {len(words)} words" in capsys.readouterr().out
    assert 3 < len(words) < 40
    assert words[0] == "a"
    ids = model.generate(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0]
    assert set(model.tokenizer.decode(ids).split()) <= set(words)
    with pytest.raises(ValueError, match="it has a tokenizer"):
        write_open_clip(model, tmp_path)


def test_a_vocabulary_does_not_replace_a_tokenizer_that_is_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocabulary=null"):
        run(tmp_path, *TINY, "vocabulary=3", "+model.net.tokenizer=scenes")


def test_a_resumed_run_keeps_the_words_of_its_checkpoint(capsys: pytest.CaptureFixture) -> None:
    """The words of captions that have changed since have the same number, and other ids. So no captions are read."""
    start = ResumePoint(
        Path("last.ckpt"), {MODEL_KEY: create_model("coca_tiny", tokenizer=["a", "dog"]).config.stored()}
    )
    cfg = compose(*TINY, "vocabulary=1", "data.train_count=8")
    assert build_module(cfg, start).net.tokenizer.spec == ["a", "dog"]
    assert "vocabulary:" not in capsys.readouterr().out
    assert cfg.model.net.get("tokenizer") is None
    assert len(build_module(cfg).net.tokenizer.spec) > 2
    given = compose(*TINY, "+model.net.tokenizer=[a,cat]")
    assert build_module(given, start).net.tokenizer.spec == ["a", "cat"]


def test_a_model_that_trains_further_keeps_its_words(tmp_path: Path) -> None:
    """The captions may have changed since, and other words would have its ids."""
    save_model(build_module(compose(*TINY, "+model.net.tokenizer=[a,dog]")).net, tmp_path / "mine.safetensors")
    cfg = compose(*TINY, "vocabulary=1", "data.train_count=8", f"init_from={tmp_path}/mine.safetensors")
    assert build_module(cfg).net.tokenizer.spec == ["a", "dog"]


def test_data_that_list_no_captions_have_no_vocabulary() -> None:
    cfg = compose("vocabulary=3")
    cfg.data = {"_target_": "lightning.pytorch.LightningDataModule"}
    with pytest.raises(ConfigError, match=r"LightningDataModule .*vocabulary=null"):
        with_vocabulary(cfg)


def test_unknown_words_are_read_but_not_predicted() -> None:
    torch.manual_seed(0)
    model = create_model("coca_tiny", tokenizer=["a", "dog", "runs"]).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = model.tokenizer(["a zebra runs", "a dog"])
    lengths = torch.tensor([5, 4])
    out = model(images, tokens, lengths)
    assert out.labels.tolist() == [4, -100, 6, 2, 4, 5, 2]
    assert label_count(model, Batch(images, tokens, lengths, [])) == 6
    other = model(images, model.tokenizer(["a dog runs", "a dog"]), lengths)
    assert torch.equal(out.hidden[1], other.hidden[1])  # what comes before it
    assert not torch.allclose(out.hidden[2], other.hidden[2])


def test_several_texts_of_an_image_side_by_side() -> None:
    torch.manual_seed(0)
    model = create_model("coca_tiny").eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = model.tokenizer(["a red circle", "a blue square", "a circle", "a small green star"])
    found = model.log_likelihood(images, tokens)
    expected = model.log_likelihood(images[[0, 0, 1, 1]], tokens)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.log_likelihood(model.image_encoder(images), tokens), expected)
    for wrong in (model, model.log_likelihood):
        with pytest.raises(ValueError, match=r"2 images.* 3 texts"):
            wrong(images, tokens[:3])


# Tied embeddings


def tied(**arguments: Any) -> Any:
    torch.manual_seed(0)
    return create_model("coca_tiny", tied_embeddings=True, **arguments)


def test_tied_embeddings_are_one_parameter_with_both_gradients() -> None:
    """The sum of the gradients that the same numbers get as two parameters."""
    one, two = tied().eval(), create_model("coca_tiny").eval()
    two.load_state_dict(one.state_dict())
    weight = one.text.token_embedding.weight
    assert one.decoder.vocabulary.weight is weight
    assert sum(p is weight for group in AdamW(lr=0.1)(one).param_groups for p in group["params"]) == 1
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for model in (one, two):
        out = model(images, model.tokenizer(["a red circle", "a blue square"]))
        (torch.nn.functional.cross_entropy(out.logits, out.labels) + out.text_features.sum()).backward()
    expected = two.text.token_embedding.weight.grad + two.decoder.vocabulary.weight.grad
    torch.testing.assert_close(weight.grad, expected)


def test_tied_embeddings_stay_tied_in_files(tmp_path: Path) -> None:
    model = tied()
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.decoder.vocabulary.weight is loaded.text.token_embedding.weight
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_tied_embeddings_survive_training_with_an_average(tmp_path: Path) -> None:
    few = ("data.train_count=8", "evals=[]", "+model.net.tied_embeddings=true", "ema=0.5", "model.caption_weight=1")
    run(tmp_path, *TINY, *few)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["net.text.token_embedding.weight"], state["net.decoder.vocabulary.weight"])
    load_model(tmp_path / "checkpoints" / "last.ckpt")
