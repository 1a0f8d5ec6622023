"""OpenCLIP 4's two poolers for images of any shape: padding is never looked at."""

from torch import Tensor, nn

from coca_lit.models.poolers import OpenClipPooling
from coca_lit.projects.naflex.inputs import EncodedPatches


class MaskedPooling(OpenClipPooling):
    """In OpenCLIP these poolers are siblings of timm's encoder, not parts of it, and their queries start smaller."""

    token_kind = EncodedPatches

    def init_parameters(self) -> None:
        super().init_parameters()
        for pooler in (self.generative, self.contrastive):
            nn.init.normal_(pooler.query, std=pooler.query.shape[1] ** -0.5)

    def context(self, tokens: EncodedPatches) -> tuple[Tensor, Tensor | None]:
        return self.norm(tokens.rows), tokens.key_mask()


class MaskedParallelPooling(MaskedPooling):
    parallel = True


class MaskedCascadePooling(MaskedPooling):
    parallel = False
