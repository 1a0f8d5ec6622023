"""Retrieval by the image as each text pools it, for the candidates that the plain vectors find."""

from torch import Tensor

from coca_lit.evals.base import required_objective
from coca_lit.evals.retrieval import Comparison
from coca_lit.models import CoCa, DualEncoder
from coca_lit.models.inputs import Images
from coca_lit.projects.flair.objective import TextConditioned


class PooledSimilarity(Comparison):
    """The cosine of a text and of the image as the text pools it, by the objective that is kept with the model."""

    def check(self, model: DualEncoder) -> None:
        required_objective(model, TextConditioned)

    def encode_images(self, model: DualEncoder, images: Images) -> Tensor:
        assert isinstance(model, CoCa)
        return model.encode_image_tokens(images)  # (B, Q, T)

    def compare(self, model: DualEncoder, images: Tensor, texts: Tensor) -> Tensor:
        pooling = required_objective(model, TextConditioned).pooling
        return model.logit_scale.exp() * pooling(images, texts)
