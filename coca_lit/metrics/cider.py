"""CIDEr-D of images that are drawn with replacement, for intervals; `captions` scores results officially."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the length penalty
AT_ONCE = 50  # resamples whose weights are in memory: about 1 MB each for 5,000 images

NGram = tuple[str, ...]


class ResampledCider:
    """The CIDEr-D of images that were drawn with replacement, as the official scorer has it: whatever is drawn twice
    counts as two images, in the document frequencies too.

    All is linear in the squares of the weights of n-grams, so each draw is a few products of sparse matrices with
    them. N-grams that the references of one image alone use have the same weight and share a column, which saves most
    of the work.

    Shapes: I images, R references, N = 4 lengths of n-grams, W columns of n-grams, D draws.

    Args:
        references: of each image, the words of its references.
        captions: of each image, the words of its caption.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]], captions: Sequence[Sequence[str]]) -> None:
        self.images = len(captions)
        counted = [[Counter(ngrams(words)) for words in group] for group in references]
        documents: dict[NGram, list[int]] = {}
        for image, group in enumerate(counted):
            for ngram in set().union(*group):
                documents.setdefault(ngram, []).append(image)
        # Column 0 is that of n-grams in no reference, 1 + i of those in the references of image i alone.
        column: dict[NGram, int] = {}
        frequency: list[tuple[int, int, float]] = [(1 + image, image, 1.0) for image in range(self.images)]
        width = 1 + self.images
        for ngram, own in documents.items():
            if len(own) == 1:
                column[ngram] = 1 + own[0]
            else:
                column[ngram] = width
                frequency += [(width, image, 1.0) for image in own]
                width += 1

        captions_counted = [Counter(ngrams(words)) for words in captions]
        caption_squares: list[tuple[int, int, float]] = []
        reference_squares: list[tuple[int, int, float]] = []
        products: list[tuple[int, int, float]] = []
        penalties: list[float] = []
        image_of_reference: list[int] = []
        for image, (caption, group) in enumerate(zip(captions_counted, counted, strict=True)):
            caption_squares += _entries(image, ((g, n * n) for g, n in caption.items()), column)
            length = max(len(captions[image]) - 1, 0)  # the number of pairs of words, as in pycocoevalcap
            for words, counts in zip(references[image], group, strict=True):
                row = len(image_of_reference)
                reference_squares += _entries(row, ((g, n * n) for g, n in counts.items()), column)
                shared = caption.keys() & counts.keys()
                products += _entries(row, ((g, min(caption[g], counts[g]) * counts[g]) for g in shared), column)
                penalties.append(math.exp(-((length - max(len(words) - 1, 0)) ** 2) / (2 * SIGMA**2)))
                image_of_reference.append(image)
        total = len(image_of_reference)
        self._frequency = _sparse(frequency, (width, self.images))  # (W, I)
        self._caption_squares = _sparse(caption_squares, (self.images * LONGEST, width))  # (I N, W)
        self._reference_squares = _sparse(reference_squares, (total * LONGEST, width))  # (R N, W)
        self._products = _sparse(products, (total * LONGEST, width))  # (R N, W)
        self._penalty = torch.tensor(penalties, dtype=torch.float64)[:, None]  # (R, 1)
        self._image = torch.tensor(image_of_reference)  # (R,)
        self._share = 10 / LONGEST / torch.bincount(self._image, minlength=self.images).double()[:, None]  # (I, 1)

    def __call__(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """CIDEr (D,) in [0, 10], by how often (D, I) each image was drawn."""
        parts = np.array_split(counts, range(AT_ONCE, len(counts), AT_ONCE))
        return {"CIDEr": np.concatenate([self._scores(torch.from_numpy(part.T.copy())).numpy() for part in parts])}

    def _scores(self, drawn: torch.Tensor) -> torch.Tensor:
        """(I, D) -> (D,)"""
        drawn = drawn.double()
        weights = drawn.sum(dim=0).log() - (self._frequency @ drawn).clamp(min=1).log()  # (W, D)
        squares = weights.square_()
        caption = (self._caption_squares @ squares).unflatten(0, (-1, LONGEST)).sqrt_()[self._image]  # (R, N, D)
        reference = (self._reference_squares @ squares).unflatten(0, (-1, LONGEST)).sqrt_()  # (R, N, D)
        norm = caption.mul_(reference)
        cosine = (self._products @ squares).unflatten(0, (-1, LONGEST)).div_(norm.masked_fill_(norm == 0, 1))
        similarity = cosine.sum(dim=1) * self._penalty  # (R, D)
        of_image = torch.zeros_like(drawn).index_add_(0, self._image, similarity) * self._share  # (I, D)
        return (of_image * drawn).sum(dim=0) / drawn.sum(dim=0)


def ngrams(words: Sequence[str]) -> list[NGram]:
    words = tuple(words)
    return [words[i : i + n] for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1)]


def _entries(
    row: int, values: Iterable[tuple[NGram, int]], column: Mapping[NGram, int]
) -> list[tuple[int, int, float]]:
    """Entries of a matrix with a row for each row and length of n-grams: (row N + n - 1, column, value)."""
    return [(row * LONGEST + len(ngram) - 1, column.get(ngram, 0), float(value)) for ngram, value in values]


def _sparse(entries: Sequence[tuple[int, int, float]], shape: tuple[int, int]) -> torch.Tensor:
    """A sparse matrix; entries of the same place are added up."""
    rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
    indices = torch.tensor([rows, columns], dtype=torch.long)
    numbers = torch.tensor(values, dtype=torch.float64)
    return torch.sparse_coo_tensor(indices, numbers, shape, check_invariants=True).coalesce()
