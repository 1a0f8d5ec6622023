"""CoCa's own losses, and the average of trained models as a teacher of both, which reads the same views:

model.contrastive_weight=0 model.caption_weight=0 'model.objectives.teachers={checkpoints: [RUN, RUN],
  _target_: experiments.flickr8k_two_hours.average_of_teachers.AverageOfTeachers}'
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit import load_model
from coca_lit.data.batch import Batch
from coca_lit.distributed import sum_over_ranks, world_size
from coca_lit.losses import loss_terms
from coca_lit.models import CoCa
from coca_lit.models.coca import IGNORED_LABEL
from coca_lit.projects.distillation.loss import Teacher, distillation_loss
from coca_lit.training.objectives import Objective


class AverageOfTeachers(Objective):
    """(1 - λ) of each loss of CoCa plus λ of its distillation: KL divergence from the teachers' softmaxes over the
    batch (`distillation_loss`), and from their distributions of the next word (Hinton et al. 2015, arXiv 1503.02531, at
    temperature 1). Each step reads one teacher, in turn: the gradients are linear in the targets, so on average they
    equal the gradient with the mean of all teachers. Validation has CoCa's losses alone.

    Args:
        checkpoints: models with the vocabulary, the context and the frozen stages of the one in training.
        share: λ.
        contrastive, caption: weights of both pairs of losses.
        label_smoothing: of the caption loss.
    """

    averages_tokens = True

    def __init__(
        self,
        checkpoints: Sequence[str],
        share: float = 0.7,
        contrastive: float = 1.0,
        caption: float = 2.0,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__(
            own_contrastive=(1 - share) * contrastive,
            own_caption=(1 - share) * caption,
            teachers_contrastive=share * contrastive,
            teachers_caption=share * caption,
        )
        self.label_smoothing = label_smoothing
        self.teachers = [load_model(path) for path in checkpoints]  # a list: not saved with the training
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def build(self, net: CoCa) -> None:
        self.trains = [name for name, _ in net.named_parameters()]
        for teacher in self.teachers:
            if teacher.tokenizer.spec != net.tokenizer.spec:
                raise ValueError("the teachers need the vocabulary of the model in training")

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        pairs = batch.images, batch.tokens, batch.lengths
        out = net(*pairs)
        terms = loss_terms(out, self.label_smoothing if self.training else 0.0)
        terms = {f"own_{name}": term for name, term in terms.items()}
        if not self.training:
            return terms
        assert out.image_features is not None
        assert out.text_features is not None
        assert out.labels is not None
        teacher = self.teachers[int(self.steps) % len(self.teachers)]
        self.steps += 1
        for parameter, own in zip(teacher.parameters(), net.parameters(), strict=True):
            parameter.requires_grad_(own.requires_grad)  # what is frozen tells which stages made the stored features
        with torch.no_grad():
            theirs = teacher(*pairs)
            next_words = F.softmax(theirs.logits, dim=-1)  # (N, V)
        predicted = out.labels != IGNORED_LABEL  # (N,)
        divergence = F.kl_div(F.log_softmax(out.logits, dim=-1), next_words, reduction="none").sum(-1)  # (N,)
        count = sum_over_ranks(predicted.sum()).clamp(min=1)  # of the global batch, as ranks differ
        terms["teachers_caption"] = divergence[predicted].sum() * world_size() / count
        sides = [Teacher(theirs.image_features, theirs.text_features, float(theirs.logit_scale))]
        terms["teachers_contrastive"] = distillation_loss(out.image_features, out.text_features, out.logit_scale, sides)
        return terms
