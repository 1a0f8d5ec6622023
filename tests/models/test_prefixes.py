"""What is predicted of a text of which a part is given, and of a text without an image."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from coca_lit.losses import loss_terms
from coca_lit.models import CoCa
from coca_lit.models.coca import CAPTION, CONTRASTIVE
from helpers.naive import state_at_end

Build = Callable[..., CoCa]
LENGTHS, PREFIXES = torch.tensor([9, 4, 6]), torch.tensor([5, 1, 4])


def inputs(model: CoCa) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.randint(4, 40, (3, 12), generator=generator)


@pytest.mark.parametrize("options", [{}, {"cls_mask": "legacy"}, {"pooler": "cascade"}])
@pytest.mark.parametrize("contrastive", [False, True])
def test_what_is_given_is_not_predicted(tiny_model: Build, options: dict[str, str], contrastive: bool) -> None:
    model = tiny_model(**options)
    images, tokens = inputs(model)
    needs = (*CONTRASTIVE, *CAPTION) if contrastive else CAPTION
    whole = model(images, tokens, LENGTHS, needs=needs)
    part = model(images, tokens, LENGTHS, needs=needs, prefix_lengths=PREFIXES)
    wanted = [text[given:n].tolist() for text, given, n in zip(tokens, PREFIXES, LENGTHS, strict=True)]
    assert part.labels.tolist() == [id for row in wanted for id in row]
    places = [torch.arange(n - 1) >= given - 1 for given, n in zip(PREFIXES, LENGTHS, strict=True)]
    torch.testing.assert_close(part.hidden, whole.hidden[torch.cat(places)])


def test_a_start_that_is_given_changes_nothing(tiny_model: Build) -> None:
    model = tiny_model()
    images, tokens = inputs(model)
    terms = loss_terms(model(images, tokens, LENGTHS))
    assert terms == loss_terms(model(images, tokens, LENGTHS, prefix_lengths=torch.ones(3, dtype=torch.long)))


@pytest.mark.parametrize("cls_mask", ["correct", "legacy"])
def test_reading_sees_the_image_and_the_text_up_to_its_end(tiny_model: Build, cls_mask: str) -> None:
    model = tiny_model(cls_mask=cls_mask)
    images, tokens = inputs(model)
    states = state_at_end(model, images, tokens, PREFIXES + 1)
    assert states.shape == (3, 96)
    # The state that predicts the first token that is not given.
    out = model(images, tokens, LENGTHS + 3, needs=CAPTION)
    starts = (LENGTHS + 2).cumsum(0) - (LENGTHS + 2)
    torch.testing.assert_close(states, out.hidden[starts + PREFIXES], atol=1e-5, rtol=1e-5)
    later = tokens.clone()
    later[torch.arange(12) > PREFIXES[:, None]] = 5
    torch.testing.assert_close(state_at_end(model, images, later, PREFIXES + 1), states, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(state_at_end(model, 255 - images, tokens, PREFIXES + 1), states, atol=1e-3)


def test_texts_alone_are_read_by_the_self_blocks(tiny_model: Build) -> None:
    """Against the same blocks one after the other, text by text."""
    model = tiny_model()
    _, tokens = inputs(model)
    out = model.captions_of(None, tokens, LENGTHS)
    assert out.image_features is None
    assert out.text_features is None
    expected = []
    for text, n in zip(tokens, LENGTHS, strict=True):
        x = model.text.token_embedding(text[: n - 1]) + model.text.position_embedding[: n - 1]
        x = x[None]
        for block in (*model.text.blocks, *model.decoder.self_blocks):
            x = block(x)
        expected.append(model.decoder.norm(x)[0])
    torch.testing.assert_close(out.hidden, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert set(loss_terms(out)) == {"caption"}


def test_texts_alone_train_the_language_half(tiny_model: Build) -> None:
    model = tiny_model()
    _, tokens = inputs(model)
    loss_terms(model.captions_of(None, tokens, LENGTHS))["caption"].backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    kept = ("image_encoder.", "pooling.", "image_projection.", "decoder.cross_blocks.", "logit_scale")
    contrastive = ("text.cls_embedding", "text.norm.", "text.projection.")
    assert {n for n, _ in model.named_parameters() if not n.startswith((*kept, *contrastive))} == trained
