"""What the page asks of a model: each answer against the model's own methods, each refusal with its sentence."""

import struct
import zlib

import pytest
import torch

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import render
from coca_lit.data.transforms import build_transform
from coca_lit.errors import DataError
from coca_lit.tools.checkpoint import write_scenes
from coca_lit.tools.demo.answers import Candidate, classify, rank, read_photo, rerank_images, why_second, write_captions
from coca_lit.tools.search.index import ImageIndex

PHOTO = render(7, 64)


@pytest.fixture
def model(tiny_model):
    return tiny_model()


def pixels(model):
    return build_transform(size=model.image_size)(PHOTO)[None]


def scale(model):
    return model.logit_scale.detach().exp().item()


def test_ranked_beams_are_those_of_contrastive_reranking(model):
    weight = 0.3
    found = rank(write_captions(model, PHOTO, "beam", 5), weight, scale(model))
    options = {"rerank": "contrastive", "rerank_weight": weight, "return_scores": True}
    expected = model.generate(pixels(model), strategy="beam", num_beams=5, num_captions=5, **options)
    assert [c.caption for c in found] == list(dict.fromkeys(model.tokenizer.decode(row) for row in expected.ids[0]))
    best = found[0]
    assert best.log_prob == pytest.approx(expected.log_probs[0, 0].item(), abs=1e-5)
    assert best.similarity == pytest.approx(expected.similarities[0, 0].item(), abs=1e-5)
    assert best.score(weight, scale(model)) == pytest.approx(expected.scores[0, 0].item(), abs=1e-4)


def test_the_second_has_its_reasons():
    first, likelier, worse = Candidate("a", -0.5, 0.3), Candidate("b", -0.25, 0.2), Candidate("c", -0.75, 0.1)
    assert why_second([first, likelier]) == ("more sure of its words, but less like the photo")
    assert why_second([first, worse]) == ("less sure of its words and less like the photo")
    assert why_second([first]) == ""


def test_found_images_are_reranked_as_in_evaluations(model, tmp_path):
    index = ImageIndex(model, write_scenes(tmp_path, count=6))
    index.update()
    text = "a large red star"
    hits = index.query(text, 6)
    found = rerank_images(model, hits, text, weight=1.0)
    assert {*found} == {*hits}
    records = [Record(i, hit.path, (text,)) for i, hit in enumerate(hits)]
    tokens = model.tokenizer([text])
    images = torch.cat([build_transform(**model.preprocessing)(record.image())[None] for record in records])
    expected = [model.log_likelihood(image[None], tokens).item() for image in images]
    assert found == [hits[i] for i in sorted(range(6), key=lambda i: -expected[i])]
    assert rerank_images(model, hits, text, weight=0.0) == hits
    hits[2].path.unlink()
    assert rerank_images(model, hits, text, weight=1.0) == [hit for hit in found if hit != hits[2]]
    assert rerank_images(model, hits[2:3], text) == []


@pytest.mark.slow
def test_greedy_writes_one_and_sampling_follows_its_seed(model):
    greedy = write_captions(model, PHOTO, "greedy", 5)
    assert [c.caption for c in greedy] == [model.tokenizer.decode(model.generate(pixels(model))[0])]
    draws = [write_captions(model, PHOTO, "sample", 6, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len({c.caption for c in draws[0]}) == len(draws[0]) <= 6


def test_classification_is_the_softmax_of_scaled_cosines(model):
    found = classify(model, PHOTO, ["circle", " star", "circle", "ring", ""], "a {}")
    texts = model.tokenizer(["a circle", "a star", "a ring", "a"])
    cosines = model.encode_image(pixels(model)) @ model.encode_text(texts).T
    expected = (model.logit_scale.exp() * cosines).softmax(dim=1)[0]
    assert list(found) == ["circle", "star", "ring", "none of these"]
    torch.testing.assert_close(torch.tensor([*found.values()]), expected.detach())


@pytest.mark.parametrize(
    ("labels", "template", "message"),
    [
        (["", " "], "{}", "needs a label"),
        (["circle", "star"], "a photo", r"the template 'a photo' has no \{\}"),
        (["circle", "dog"], "a {}", "no 'dog'"),
    ],
)
def test_labels_that_say_nothing_to_the_model(model, labels, template, message):
    with pytest.raises(ValueError, match=message):
        classify(model, PHOTO, labels, template)


def test_template_reaches_no_attribute(model):
    with pytest.raises(ValueError, match="no '0'"):  # read as text, as anything that is not {}
        classify(model, PHOTO, ["circle", "star"], "{} {0.__class__}")


def png(width: int, height: int) -> bytes:
    """A PNG file that claims a size and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        ("bomb.png", png(9_000, 9_000)),
    ],
)
def test_file_that_is_no_photo(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"^{name}.*JPEG.*GIF"):
        read_photo(tmp_path / name)
