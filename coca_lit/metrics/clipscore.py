"""CLIPScore and RefCLIPScore (Hessel et al. 2021, arXiv 2104.08718): how well captions fit images in a feature space.

The published scores use OpenAI's CLIP ViT-B/32. With the features of another model they compare captions, not models.
Shapes: I images, T references, D features; all features of unit length.
"""

from torch import Tensor

WEIGHT = 2.5  # stretches the cosines of CLIP, which seldom exceed 0.4, over [0, 1]
PROMPT = "A photo depicts "  # goes before every caption and reference


def clip_scores(images: Tensor, captions: Tensor, references: Tensor, image_of_reference: Tensor) -> dict[str, float]:
    """Means over images: CLIPScore = 2.5 max(cos(image, caption), 0), and its harmonic mean with the fit to references.

    ``images`` and ``captions`` are (I, D), one caption per image. ``references`` is (T, D), and reference t belongs to
    image ``image_of_reference[t]``; an image's fit is max(cos(caption, reference), 0) of its nearest reference.
    """
    of_images = clip_scores_of_images(images, captions, references, image_of_reference)
    return {name: values.mean().item() for name, values in of_images.items()}


def clip_scores_of_images(
    images: Tensor, captions: Tensor, references: Tensor, image_of_reference: Tensor
) -> dict[str, Tensor]:
    """Scores (I,) of single images; arguments as for `clip_scores`."""
    if images.shape != captions.shape or len(references) != len(image_of_reference):
        raise ValueError(
            f"expected one caption per image and one image per reference, got {tuple(images.shape)} image features, "
            f"{tuple(captions.shape)} caption features, {len(references)} references and "
            f"{len(image_of_reference)} owners"
        )
    fit = WEIGHT * (images * captions).sum(dim=1).clamp(min=0)  # (I,)
    cosines = (captions[image_of_reference] * references).sum(dim=1)  # (T,)
    nearest = cosines.new_zeros(len(images)).scatter_reduce(0, image_of_reference, cosines, "amax")  # (I,), at least 0
    harmonic = 2 * fit * nearest / (fit + nearest).clamp(min=1e-12)
    return {"CLIPScore": fit, "RefCLIPScore": harmonic}
