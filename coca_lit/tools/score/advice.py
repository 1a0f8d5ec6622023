"""What a user should know about caption scores before quoting them: examples, and what makes scores mislead."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from pycocoevalcap.cider.cider import Cider

from coca_lit.metrics.captions import tokenize_captions

FEW_IMAGES = 1000  # below, document frequencies are too coarse
DIFFERENT = 0.5  # share of captions that differ, at least; 65 to 80 % in published models' captions of COCO

References = Mapping[int | str, Sequence[str]]
Captions = Mapping[int | str, str]


def warnings(references: References, captions: Captions) -> Iterator[str]:
    """A sentence for each reason why the scores may mislead."""
    if lone := sum(len(texts) < 2 for texts in references.values()):
        yield (
            f"warning: {lone:,} of {len(references):,} images have one reference: scores with one reference are not "
            "comparable with those of several"
        )
    if len(captions) < FEW_IMAGES:
        yield (
            f"warning: CIDEr weighs words by these {len(captions):,} images: compare it on the same images only (the "
            "same captions of COCO have CIDEr 94.8 on 1,000 images and 91.9 on 5,000, see experiments/caption_noise)"
        )
    counts = Counter(captions.values())
    if len(counts) < DIFFERENT * len(captions):
        caption, count = counts.most_common(1)[0]
        yield (
            f"warning: {len(counts):,} of {len(captions):,} captions are different, and {count:,} are {caption!r}: "
            "scores reward a safe caption for many images"
        )


def examples(references: References, captions: Captions, count: int) -> Iterator[str]:
    """The `count` captions with the highest and the lowest CIDEr, as they are compared: tokenised, with references."""
    if not count:
        return
    tokens = tokenize_captions(references, captions)
    _, of_images = Cider().compute_score(tokens.references, tokens.hypotheses)
    order = np.argsort(of_images, kind="stable")
    images = list(tokens.references)
    for heading, chosen in (("best", order[::-1][:count]), ("worst", order[:count])):
        yield f"\n{heading} captions by CIDEr, tokenised"
        for place in chosen.tolist():
            image = images[place]
            yield f"  {100 * of_images[place]:6.1f}  {tokens.hypotheses[image][0] or '(empty)'}  (image {image})"
            yield from (f"          {text}" for text in dict.fromkeys(tokens.references[image]))
