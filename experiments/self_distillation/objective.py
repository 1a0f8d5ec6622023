"""Self-distillation of the image encoder, as SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786) adds it: a teacher, the
exponential moving average of the encoder, sees the whole image; the encoder sees less of it and predicts the teacher.

The targets follow DINO (Caron et al. 2021, arXiv 2104.14294, section 3.1): a softmax over prototypes, of the teacher's
outputs minus their running mean and at a low temperature. Without the mean one prototype would win everywhere, without
the low temperature all would be equal. Outputs are cosines, and their mean is ten times as fast as a teacher's
average: otherwise both grow faster than their mean follows, and one prototype wins all the same.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from coca_lit.data.batch import Batch
from coca_lit.distributed import sum_over_ranks, world_size
from coca_lit.errors import ConfigError, check_number
from coca_lit.models import CoCa
from coca_lit.training.objectives import Objective

AREA = (0.2, 0.5)  # share of the image that a local crop shows
GREY = 128  # of what is masked
MEAN_MOMENTUM = 0.9  # of the mean of the teacher's outputs, as DINO's


class Branch(nn.Module):
    """An image encoder and its head: images -> cosines with prototypes (B, 1 + S, K), of the mean token first."""

    def __init__(self, encoder: nn.Module, width: int, prototypes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.prototypes = nn.Linear(width, prototypes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.encoder(images)  # (B, S, C)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        return F.linear(F.normalize(self.head(tokens), dim=-1), F.normalize(self.prototypes.weight, dim=-1))


class SelfDistillation(Objective):
    """Predicts the teacher's view of the image from a random crop of it (SILC: Naeem et al. 2023, arXiv 2310.13355) and
    the teacher's tokens in masked cells of the grid from the others (iBOT: Zhou et al. 2021, arXiv 2111.07832). In
    evaluation the teacher rests.

    Args:
        local_weight: factor of the loss of local crops; 0 for none.
        masked_weight: factor of the loss of masked cells; 0 for none.
        masked: share of the cells that are masked.
        prototypes: that a softmax is over.
        momentum: of the teacher, for each batch, also of accumulated ones; a short training needs less.
        temperature, sharp: of the softmax of the encoder and of the teacher.
    """

    mean: Tensor
    begun: Tensor

    def __init__(
        self,
        local_weight: float = 1.0,
        masked_weight: float = 1.0,
        masked: float = 0.5,
        prototypes: int = 512,
        momentum: float = 0.996,
        temperature: float = 0.1,
        sharp: float = 0.04,
    ) -> None:
        weights = {"local": local_weight, "masked": masked_weight}
        super().__init__(**{name: weight for name, weight in weights.items() if weight})
        if not self.weights:
            raise ValueError("local_weight or masked_weight must be above 0")
        check_number("masked", masked, above=0, at_most=1)
        check_number("momentum", momentum, at_least=0, at_most=1)
        self.masked, self.prototypes, self.momentum = masked, prototypes, momentum
        self.temperature, self.sharp = temperature, sharp

    def build(self, net: CoCa) -> None:
        if net.image_encoder.token_kind is not None:
            raise ValueError("self-distillation crops square images: it does not work with images of any shape")
        self.trains = ["image_encoder"]
        width = net.image_encoder.width
        self.head = Branch(nn.Identity(), width, self.prototypes)
        self.teacher = Branch(copy.deepcopy(net.image_encoder), width, self.prototypes).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(2, self.prototypes))  # of the mean token, and of the others
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        if any(map(is_parametrized, net.image_encoder.modules())):
            raise ConfigError("self-distillation does not work with lora: its teacher is a copy of the whole encoder")
        if self.training:
            self.follow(net)
        images = batch.images
        assert isinstance(images, Tensor)
        targets = self.targets(images)  # (B, 1 + S, K)
        terms = {}
        if "local" in self.weights:
            found = self.student(net, local_crops(images))[:, 0]  # (B, K)
            terms["local"] = self.divergence(targets[:, 0], found)
        if "masked" in self.weights:
            prefix = net.image_encoder.prefix_tokens
            cells = random_cells(len(images), targets.shape[1] - 1 - prefix, self.masked, images.device)  # (B, S)
            found = self.student(net, with_masked(images, cells))[:, 1 + prefix :]
            terms["masked"] = self.divergence(targets[:, 1 + prefix :][cells], found[cells])
        return terms

    def student(self, net: CoCa, images: Tensor) -> Tensor:
        """Cosines (B, 1 + S, K) of crops and masked images, which leave no trace in the running statistics of the
        encoder's batch norms: those are of whole images.
        """
        norms = [part for part in net.image_encoder.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        before = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            return self.head(net.image_encoder(images))
        finally:
            for norm, momentum in zip(norms, before, strict=True):
                norm.momentum = momentum

    def divergence(self, targets: Tensor, logits: Tensor) -> Tensor:
        """Mean cross-entropy in nats of rows of (…, K)."""
        return -(targets * (logits / self.temperature).log_softmax(-1)).sum(-1).mean()

    @torch.no_grad()
    def follow(self, net: CoCa) -> None:
        """Moves the teacher a little towards the encoder; the first time, all the way."""
        rate = 1 - self.momentum if self.begun else 1.0
        for teacher, student in ((self.teacher.encoder, net.image_encoder), (self.teacher.head, self.head.head)):
            _move(teacher, student, rate)
        _move(self.teacher.prototypes, self.head.prototypes, rate)
        self.begun.fill_(True)

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """Softmax over prototypes (B, 1 + S, K) of the teacher, which sees the whole images."""
        self.teacher.eval()
        logits = self.teacher(images).float()
        means = self.mean[[0] + [1] * (logits.shape[1] - 1)]  # (1 + S, K)
        if self.training:
            found = torch.stack([logits[:, 0].mean(dim=0), logits[:, 1:].mean(dim=(0, 1))])  # (2, K)
            self.mean.lerp_(sum_over_ranks(found) / world_size(), 1 - MEAN_MOMENTUM)
        return ((logits - means) / self.sharp).softmax(-1)


def local_crops(images: Tensor) -> Tensor:
    """A random square part of each image (B, 3, H, W) uint8, resized to its size."""
    count, device = len(images), images.device
    sides = torch.empty(count, device=device).uniform_(*AREA).sqrt()  # of the part, as a share
    centres = (torch.rand(count, 2, device=device) * 2 - 1) * (1 - sides)[:, None]  # in [-1, 1]
    matrix = torch.zeros(count, 2, 3, device=device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = sides
    matrix[:, :, 2] = centres
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    crops = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return crops.round_().clamp_(0, 255).to(images.dtype)


def random_cells(count: int, cells: int, share: float, device: torch.device) -> Tensor:
    """(count, cells) bool: the same number of random cells in each row, at least one."""
    chosen = max(1, round(share * cells))
    return torch.rand(count, cells, device=device).argsort(dim=1) < chosen


def with_masked(images: Tensor, cells: Tensor) -> Tensor:
    """The images (B, 3, H, W) with grey in place of some cells (B, S) of a square grid."""
    side = math.isqrt(cells.shape[1])
    mask = F.interpolate(cells.view(-1, 1, side, side).float(), images.shape[-2:], mode="nearest")  # (B, 1, H, W)
    return images.masked_fill(mask > 0, GREY)


def _move(teacher: nn.Module, student: nn.Module, rate: float) -> None:
    """Parameters by the rate; buffers, such as statistics of batch norms, are copied."""
    for parameter, new in zip(teacher.parameters(), student.parameters(), strict=True):
        parameter.lerp_(new.to(parameter.dtype), rate)
    for buffer, found in zip(teacher.buffers(), student.buffers(), strict=True):
        buffer.copy_(found)
