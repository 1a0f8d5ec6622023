"""The answers on the page, without the page: reading a photo, captions with both scores, classification."""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from coca_lit import extensions
from coca_lit.data.pixels import FORMATS, MAX_PIXELS
from coca_lit.data.records import ImageFile
from coca_lit.data.transforms import build_transform
from coca_lit.errors import DataError
from coca_lit.evals.retrieval import informative, mix_scores
from coca_lit.evals.samples import thumbnail
from coca_lit.models import Captions, CoCa
from coca_lit.models.inputs import Images, stack_images
from coca_lit.tokenizer import WordTokenizer
from coca_lit.tools.search.index import Hit, check_query

Strategy = Literal["beam", "sample", "greedy"]
TOP_P = 0.9  # samples without the unlikely tail, which spoils captions
NONE = "none of these"
ELSE = "something else"  # stands for the label of `NONE`, where the vocabulary has these words
EDGE = 160  # pixels of a picture of where the decoder looked
DIMMED = 0.2  # brightness of the photo there where it did not look


@dataclass(frozen=True)
class Candidate:
    """A caption with its two scores, and for each word a picture of where it comes from, if a project says that."""

    caption: str
    log_prob: float  # of the captioner: mean over the tokens, in nats
    similarity: float  # of the contrastive towers: cosine of image and caption
    words: tuple[tuple[str, str], ...] = field(default=(), repr=False, compare=False)  # (word, data URI)

    @property
    def sureness(self) -> float:
        """How sure the captioner is of each word, in the geometric mean: 0 to 1."""
        return math.exp(self.log_prob)

    def score(self, weight: float, logit_scale: float) -> float:
        """The score by which `CoCa.generate` orders captions in contrastive re-ranking."""
        return weight * logit_scale * self.similarity + (1 - weight) * self.log_prob


def read_photo(path: str | Path) -> Image.Image:
    """The photo in an uploaded file, upright, as RGB.

    Raises:
        DataError: the file is not an intact photo, or has too many pixels.
    """
    try:
        return ImageFile(Path(path))()
    except DataError as error:
        raise DataError(
            f"{Path(path).name} is refused: expected an intact {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image of at "
            f"most {MAX_PIXELS:,} pixels"
        ) from error


@torch.no_grad()
def write_captions(model: CoCa, photo: Image.Image, strategy: Strategy, count: int, seed: int = 0) -> list[Candidate]:
    """At most `count` different captions of a photo, in the order of the strategy; one if it is greedy.

    Raises:
        ValueError: the model has no decoder, or `count` is below 1.
    """
    images = _batch(model, photo)
    options: dict[str, Any] = {"return_scores": True, "return_attention": True}
    if strategy == "greedy":
        captions = model.generate(images, **options).map(lambda part: part[:, None])
    elif strategy == "beam":
        captions = model.generate(images, strategy="beam", num_beams=count, num_captions=count, **options)
    else:
        generator = torch.Generator(model.device).manual_seed(seed)
        captions = model.generate(
            images, strategy="sample", num_captions=count, top_p=TOP_P, generator=generator, **options
        )
    return _candidates(model, photo, images, captions)


def rank(candidates: Iterable[Candidate], weight: float, logit_scale: float) -> list[Candidate]:
    """Sorts candidates, best first: by log-probability for weight 0, by similarity for weight 1."""
    return sorted(candidates, key=lambda candidate: candidate.score(weight, logit_scale), reverse=True)


def shares(scores: Sequence[float]) -> list[float]:
    """How candidates with such scores share 1: their softmax."""
    return torch.tensor(scores).softmax(dim=0).tolist()


def why_second(candidates: Sequence[Candidate]) -> str:
    """What speaks for the second of ranked candidates, and what against it, in words. Nothing if there is none."""
    if len(candidates) < 2:
        return ""
    first, second = candidates[:2]
    sides = {
        "sure of its words": second.log_prob > first.log_prob,
        "like the photo": second.similarity > first.similarity,
    }
    more = [f"more {side}" for side, better in sides.items() if better]
    less = [f"less {side}" for side, better in sides.items() if not better]
    return ", but ".join(" and ".join(part) for part in (more, less) if part)


def spotlight(picture: Image.Image, attention: Tensor) -> Image.Image:
    """The picture in its own colours, the darker, the less attention (h, w) there is."""
    scaled = (attention - attention.min()) / (attention.max() - attention.min()).clamp(min=1e-12)
    # A few places have most of the attention: the root shows the others too.
    light = Image.fromarray((scaled.sqrt() * 255).byte().numpy()).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.composite(picture, ImageEnhance.Brightness(picture).enhance(DIMMED), light)


@torch.no_grad()
def rerank_images(model: CoCa, hits: Sequence[Hit], text: str, weight: float = 0.5) -> list[Hit]:
    """Found images in the order of decoder re-ranking, see `coca_lit.evals.retrieval`; they keep their cosines. Those
    that have gone since they were indexed are left out.
    """
    transform = build_transform(**model.preprocessing)
    read = dict[Hit, Any]()
    for hit in hits:
        with suppress(DataError):
            read[hit] = transform(read_photo(hit.path))
    if not read:
        return []
    hits = [*read]
    images = stack_images([*read.values()]).to(model.device)
    tokens = model.tokenizer([text]).to(model.device).expand(len(hits), -1)  # (I, L)
    likelihood = model.log_likelihood(images, tokens).float().cpu()[:, None]  # (I, 1)
    similarity = model.logit_scale.exp().item() * torch.tensor([hit.score for hit in hits])[:, None]
    ranked = mix_scores(similarity, informative(likelihood), weight)[:, 0]
    order = ranked.argsort(descending=True, stable=True)
    return [hits[i] for i in order.tolist()]


@torch.no_grad()
def classify(model: CoCa, photo: Image.Image, labels: Sequence[str], template: str = "{}") -> dict[str, float]:
    """Probability of each label at the model's own temperature, in the order of the labels, and of `NONE`: a text that
    names something else, or nothing, where the vocabulary lacks these words.

    Raises:
        ValueError: there is no label, the template has no {} for them, or the model lacks a word.
    """
    labels = list(dict.fromkeys(stripped for label in labels if (stripped := label.strip())))
    if not labels:
        raise ValueError("classification needs a label, or several separated by commas")
    if "{}" not in template:
        raise ValueError(f"the template '{template}' has no {{}} to replace by the label, as in: a photo of a {{}}")
    texts = [template.replace("{}", label) for label in labels]  # not str.format, which would access attributes
    for text in texts:
        check_query(model.tokenizer, text)
    known = not isinstance(model.tokenizer, WordTokenizer) or {*ELSE.split()} <= {*model.tokenizer.spec}
    texts.append(template.replace("{}", ELSE if known else "").strip())
    tokens = model.tokenizer(texts).to(model.device)
    similarity = model.encode_image(_batch(model, photo)) @ model.encode_text(tokens).T  # (1, labels + 1)
    probabilities = (model.logit_scale.exp() * similarity)[0].float().softmax(dim=0)
    return dict(zip([*labels, NONE], probabilities.tolist(), strict=True))


def _candidates(model: CoCa, photo: Image.Image, images: Images, captions: Captions) -> list[Candidate]:
    """A batch of one image and its captions (1, N, L); repeated samples and unused beams are left out."""
    assert captions.scores is not None
    assert captions.log_probs is not None
    assert captions.attention is not None
    ids = captions.ids[0]  # (N, L)
    pictures = _pictures_of_words(model, photo, images, ids, captions.attention[0])
    similarities = (model.encode_text(ids) @ model.encode_image(images).T)[:, 0]  # (N,)
    found: dict[str, Candidate] = {}
    columns = (captions.scores[0], captions.log_probs[0], similarities)
    numbers = (column.tolist() for column in columns)
    for row, words, score, log_prob, similarity in zip(ids, pictures, *numbers, strict=True):
        text = model.tokenizer.decode(row)
        if score > float("-inf"):
            found.setdefault(text, Candidate(text, log_prob, similarity, words))
    return list(found.values())


def _pictures_of_words(
    model: CoCa, photo: Image.Image, images: Images, ids: Tensor, attention: Tensor
) -> list[tuple[tuple[str, str], ...]]:
    """The words of each caption (N, L) with pictures of where they come from; none without a project that says that."""
    targets = list(extensions.declared("word_maps").values())
    if not targets:
        return [()] * len(ids)
    word_maps = extensions.load(targets[0])
    seen = seen_part(model, photo)
    return [
        tuple((word, thumbnail(spotlight(seen, part))) for word, part in zip(words, maps, strict=True))
        for words, maps in word_maps(model, images[0], ids, attention)
    ]


def seen_part(model: CoCa, photo: Image.Image) -> Image.Image:
    """What the model sees of a photo, at a resolution for people."""
    preprocessing = model.preprocessing
    if "input_kind" in preprocessing:  # in place of a square
        seen = photo.convert("RGB")
        seen.thumbnail((EDGE, EDGE))
        return seen
    pixels = build_transform(EDGE, preprocessing["interpolation"], preprocessing["resize_mode"])(photo)
    assert isinstance(pixels, Tensor)  # (3, EDGE, EDGE)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _batch(model: CoCa, photo: Image.Image) -> Images:
    return build_transform(**model.preprocessing)(photo)[None].to(model.device)  # (1, …)
