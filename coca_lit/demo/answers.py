"""The answers on the page, without the page: reading a photo, captions with both scores, classification."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from coca_lit.data.records import FORMATS, MAX_PIXELS
from coca_lit.data.transforms import build_transform
from coca_lit.errors import DataError
from coca_lit.evals.retrieval import reranked
from coca_lit.evals.samples import maps_of_captions, overlay, picture_of, thumbnail
from coca_lit.inference.inputs import open_upright
from coca_lit.inference.search import Hit, check_query
from coca_lit.models import Captions, CoCa
from coca_lit.models.patches import Images, stack_images

Strategy = Literal["beam", "sample", "greedy"]
TOP_P = 0.9  # samples without the unlikely tail, which spoils captions


@dataclass(frozen=True)
class Candidate:
    """A caption with its two scores, and for each word a picture of where the decoder looked."""

    caption: str
    log_prob: float  # of the captioner: mean over the tokens, in nats
    similarity: float  # of the contrastive towers: cosine of image and caption
    words: tuple[tuple[str, str], ...] = field(default=(), repr=False, compare=False)  # (word, data URI)

    def score(self, weight: float, logit_scale: float) -> float:
        """The score by which `CoCa.generate` orders captions in contrastive re-ranking."""
        return weight * logit_scale * self.similarity + (1 - weight) * self.log_prob


def read_photo(path: str | Path) -> Image.Image:
    """The photo in an uploaded file, upright, as RGB.

    Raises:
        DataError: the file is not an intact photo, or has too many pixels.
    """
    try:
        return open_upright(path)
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
    return _candidates(model, images, captions)


def rank(candidates: Iterable[Candidate], weight: float, logit_scale: float) -> list[Candidate]:
    """Sorts candidates, best first: by log-probability for weight 0, by similarity for weight 1."""
    return sorted(candidates, key=lambda candidate: candidate.score(weight, logit_scale), reverse=True)


def why_second(candidates: Sequence[Candidate]) -> str:
    """One sentence: what speaks for the second of ranked candidates, and what against it. Nothing if there is none."""
    if len(candidates) < 2:
        return ""
    first, second = candidates[:2]
    sides = {
        f"likely to the captioner ({second.log_prob:.2f} against {first.log_prob:.2f})": (
            second.log_prob > first.log_prob
        ),
        f"similar to the photo ({second.similarity:.3f} against {first.similarity:.3f})": (
            second.similarity > first.similarity
        ),
    }
    more = [f"more {side}" for side, better in sides.items() if better]
    less = [f"less {side}" for side, better in sides.items() if not better]
    return ", but ".join(" and ".join(part) for part in (more, less) if part)


@torch.no_grad()
def rerank_images(model: CoCa, hits: Sequence[Hit], text: str, weight: float = 0.5) -> list[Hit]:
    """Found images in the order of decoder re-ranking, see `coca_lit.evals.retrieval`; they keep their cosines.

    Raises:
        DataError: an image has gone since it was indexed.
    """
    transform = build_transform(**model.preprocessing)
    images = stack_images([transform(read_photo(hit.path)) for hit in hits]).to(model.device)
    tokens = model.tokenizer([text]).to(model.device).expand(len(hits), -1)  # (I, L)
    likelihood = model.log_likelihood(images, tokens).float().cpu()[:, None]  # (I, 1)
    similarity = model.logit_scale.exp().item() * torch.tensor([hit.score for hit in hits])[:, None]
    order = reranked(similarity, likelihood, weight)[:, 0].argsort(descending=True, stable=True)
    return [hits[i] for i in order.tolist()]


@torch.no_grad()
def classify(model: CoCa, photo: Image.Image, labels: Sequence[str], template: str = "{}") -> dict[str, float]:
    """Probability of each label at the model's own temperature, in the order of the labels.

    Raises:
        ValueError: there are fewer than two labels, the template has no {} for them, or the model lacks a word.
    """
    labels = list(dict.fromkeys(stripped for label in labels if (stripped := label.strip())))
    if len(labels) < 2:
        raise ValueError("classification needs at least two different labels, separated by commas")
    if "{}" not in template:
        raise ValueError(f"the template '{template}' has no {{}} to replace by the label, as in: a photo of a {{}}")
    texts = [template.replace("{}", label) for label in labels]  # not str.format, which would access attributes
    for text in texts:
        check_query(model.tokenizer, text)
    similarity = model.encode_image(_batch(model, photo)) @ _encode(model, texts).T  # (1, labels)
    probabilities = (model.logit_scale.exp() * similarity)[0].float().softmax(dim=0)
    return dict(zip(labels, probabilities.tolist(), strict=True))


def _candidates(model: CoCa, images: Images, captions: Captions) -> list[Candidate]:
    """A batch of one image and its captions (1, N, L); repeated samples and unused beams are left out."""
    assert captions.scores is not None
    assert captions.log_probs is not None
    assert captions.attention is not None
    ids = captions.ids[0]  # (N, L)
    pixels = images[0]
    seen = picture_of(pixels)
    looked = [
        tuple((word, thumbnail(overlay(seen, part))) for word, part in zip(words, maps, strict=True))
        for words, maps in maps_of_captions(model, pixels, ids, captions.attention[0])
    ]
    similarities = (model.encode_text(ids) @ model.encode_image(images).T)[:, 0]  # (N,)
    found: dict[str, Candidate] = {}
    columns = (captions.scores[0], captions.log_probs[0], similarities)
    numbers = (column.tolist() for column in columns)
    for row, words, score, log_prob, similarity in zip(ids, looked, *numbers, strict=True):
        text = model.tokenizer.decode(row)
        if score > float("-inf"):
            found.setdefault(text, Candidate(text, log_prob, similarity, words))
    return list(found.values())


def _batch(model: CoCa, photo: Image.Image) -> Images:
    return build_transform(**model.preprocessing)(photo)[None].to(model.device)  # (1, …)


def _encode(model: CoCa, texts: Sequence[str]) -> torch.Tensor:
    return model.encode_text(model.tokenizer(texts).to(model.device))  # (T, E)
