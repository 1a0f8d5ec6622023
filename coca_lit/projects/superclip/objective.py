"""SuperCLIP's loss (Zhao et al. 2025, arXiv 2512.14480): the image vector predicts which tokens its caption has.

Shapes: B images of this rank, L positions of a caption, V tokens of the vocabulary, P the width of the image vector.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.data.batch import Batch
from coca_lit.distributed import sum_over_ranks, world_size
from coca_lit.losses.gradients import wide
from coca_lit.models import CoCa, CoCaOutput
from coca_lit.models.kernels import exact_fp32
from coca_lit.models.packing import to_device
from coca_lit.training.objectives import Objective


class CaptionTokens(Objective):
    """Cross-entropy of a linear classifier over the vocabulary on the image vector before its projection. The target is
    spread over the tokens of the caption in proportion to their inverse document frequency in training so far.

    Args:
        weight: factor of the loss; 1 in the paper.

    Attributes:
        steps: training batches so far, a scalar.
        frequencies: for each token the sum, over these batches, of the share of captions that have it (V,).
    """

    needs = ("pooled",)
    steps: Tensor
    frequencies: Tensor

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(caption_tokens=weight)

    def build(self, net: CoCa) -> None:
        vocab_size = net.tokenizer.vocab_size
        self.classifier = nn.Linear(net.pooling.vector_width, vocab_size)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("frequencies", torch.zeros(vocab_size))

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        assert out.pooled is not None
        tokens = caption_tokens(batch, net.tokenizer.sot_id, net.tokenizer.vocab_size)  # (B, V)
        if self.training:
            self.count(tokens)
        targets = F.normalize(tokens * self.rarity(batch), p=1, dim=1)  # (B, V), rows that add up to 1
        with exact_fp32(tokens.device), torch.autocast(tokens.device.type, enabled=False):
            logits = self.classifier(wide(out.pooled))  # (B, V)
            return {"caption_tokens": F.cross_entropy(logits, targets)}

    def count(self, tokens: Tensor) -> None:
        """Adds the captions of a batch (B, V), those of all ranks, to the frequencies."""
        self.frequencies += sum_over_ranks(tokens.mean(dim=0)) / world_size()
        self.steps += 1

    def rarity(self, batch: Batch) -> Tensor:
        """Inverse document frequency of each token (V,)."""
        one_caption = 1 / (len(batch.tokens) * world_size())
        return ((self.steps + one_caption) / (self.frequencies + one_caption)).log()


def caption_tokens(batch: Batch, start_id: int, vocab_size: int) -> Tensor:
    """1 for each token that a caption has, else 0 (B, V). Its start, its end and padding do not count."""
    tokens = batch.tokens  # (B, L)
    positions = torch.arange(tokens.shape[1], device=tokens.device)  # (L,)
    last = to_device(batch.lengths, tokens.device)[:, None] - 1  # (B, 1)
    inside = (positions > 0) & (positions < last)  # (B, L)
    found = torch.zeros(len(tokens), vocab_size, device=tokens.device)
    found.scatter_(1, tokens.where(inside, start_id), 1.0)
    found[:, start_id] = 0
    return found
