"""Visual question answering as classification: a linear layer over the most frequent answers."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.data.batch import Batch, padded
from coca_lit.data.records import Record
from coca_lit.evals.inference import write_texts
from coca_lit.evals.vqa import fitting
from coca_lit.metrics.vqa import normalize_answer, vqa_accuracy
from coca_lit.models import CoCa
from coca_lit.models.packing import to_device
from coca_lit.models.patches import Images
from coca_lit.training.objectives import Objective


class AnswerClassifier(Objective):
    """Classifies the decoder's state at the end of the question, which depends on the question and the image.

    Every answer is a binary classification whose target is the accuracy that the answer would score (Teney et al. 2017,
    arXiv 1708.02711): people disagree, and several answers can be right.

    Args:
        answers: the classes, normalised.
        weight: factor of the loss, a sum over answers.
    """

    def __init__(self, answers: Sequence[str], weight: float = 1.0) -> None:
        super().__init__(answers=weight)
        if len(set(answers)) != len(answers) or len(answers) < 2:
            raise ValueError(f"expected two or more different answers to choose from, got {len(answers)}")
        self.answers = list(answers)
        self._numbers = {answer: i for i, answer in enumerate(answers)}

    def build(self, net: CoCa) -> None:
        if net.decoder is None:
            raise ValueError("answers need a decoder, which a model with decoder_layers=0 lacks")
        of_decoder = [f"decoder.{name}" for name, _ in net.decoder.named_children() if name != "vocabulary"]
        self.trains = of_decoder + [part for part in net.parameters_of_loss("caption") if part != "decoder"]
        self.head = nn.Linear(net.config["text_width"], len(self.answers))
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.constant_(self.head.bias, -5.0)  # at first every answer counts as wrong, as most are

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy in nats per question, summed over answers; 0 for a batch without questions."""
        if batch.prefix_lengths is None:
            return {"answers": 0 * (self.head.weight.sum() + self.head.bias.sum())}
        logits = self.head(net.multimodal_state(batch.images, batch.tokens, batch.prefix_lengths))  # (B, N)
        targets = to_device(self.targets(batch.answers), logits.device)
        loss = F.binary_cross_entropy_with_logits(logits.float(), targets)
        return {"answers": loss * len(self.answers)}

    def targets(self, answers: Sequence[Sequence[str]]) -> Tensor:
        """(B, N): the score of each of the N answers against the people's answers to each of B questions."""
        targets = torch.zeros(len(answers), len(self.answers))
        for row, people in zip(targets, answers, strict=True):
            for answer in set(people):
                if (i := self._numbers.get(normalize_answer(answer))) is not None:
                    row[i] = max(row[i].item(), vqa_accuracy(answer, people))
        return targets

    @torch.no_grad()
    def answer(
        self, net: CoCa, records: Sequence[Record], batch_size: int = 64, num_workers: int = 0
    ) -> dict[int | str, str]:
        """The most likely answer to each question, by question id, on every rank."""

        def write(part: Sequence[Record], images: Images) -> Iterable[str]:
            questions = [fitting(net.tokenizer, record.question) for record in part]
            rows = [ids[:-1] for ids in net.tokenizer.encode_batch(questions)]
            tokens, lengths = padded(rows, net.tokenizer.pad_id)
            states = net.multimodal_state(images, tokens.to(net.device), lengths)
            return [self.answers[i] for i in self.head(states).argmax(dim=1).tolist()]

        was_training = net.training
        net.eval()
        try:
            return write_texts(net, records, write, batch_size, num_workers)
        finally:
            net.train(was_training)
