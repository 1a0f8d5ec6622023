"""Further objectives of texts: CapPa's parallel prediction, from the image alone; captions behind a prompt, which
chooses the kind of caption; and answers as classes, of a linear layer over the most frequent ones.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.data.batch import Batch, padded
from coca_lit.data.records import Record
from coca_lit.errors import check_number
from coca_lit.evals.inference import write_texts
from coca_lit.evals.vqa import fitting
from coca_lit.losses import caption_loss, loss_terms
from coca_lit.metrics.vqa import normalize_answer, vqa_accuracy
from coca_lit.models import CoCa
from coca_lit.models.packing import to_device
from coca_lit.models.patches import Images
from coca_lit.models.text import expect_decoder
from coca_lit.training.objectives import Objective


class ParallelPrediction(Objective):
    """Caption loss with masked inputs (CapPa: Tschannen et al. 2023, arXiv 2306.07915). For a share of the pairs of a
    batch the text side reads start tokens in the place of the caption, so every token is predicted from the image and
    its position alone, and the image features must carry all of it. The other pairs have the usual caption loss, and so
    have all pairs in evaluation.

    With `contrastive_weight=0 caption_weight=0` it is CapPa itself. As in CoCa, tokens attend to those before them; the
    paper lets masked ones attend to all, which are as empty.

    Args:
        share: of the pairs whose captions are masked; 0.75 in the paper.
        weight: factor of the loss.
    """

    averages_tokens = True

    def __init__(self, share: float = 0.75, weight: float = 1.0) -> None:
        super().__init__(parallel=weight)
        check_number("share", share, above=0, at_most=1)
        self.share = share

    def build(self, net: CoCa) -> None:
        self.trains = _caption_parts(net)

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        read = self.masked(batch, net.tokenizer.sot_id) if self.training else batch.tokens
        states, _, layout = net.text(read, batch.lengths, contrastive=False)
        image_tokens = net.encode_image_tokens(batch.images)
        hidden, labels = net.predict(states, layout, batch.tokens, batch.lengths, image_tokens, batch.prefix_lengths)
        return {"parallel": caption_loss(hidden, expect_decoder(net.decoder).vocabulary.weight, labels)}

    def masked(self, batch: Batch, start_id: int) -> Tensor:
        """What the text side reads (B, L): for a random share of the pairs, start tokens after the prefix."""
        masked = torch.rand(len(batch.tokens), device=batch.tokens.device) < self.share  # (B,)
        positions = torch.arange(batch.tokens.shape[1], device=masked.device)
        given = 1 if batch.prefix_lengths is None else batch.prefix_lengths[:, None].to(masked.device)
        return batch.tokens.masked_fill(masked[:, None] & (positions >= given), start_id)


class PrefixPrompts(Objective):
    """Caption loss of captions behind a prompt, which is read and not predicted. `generate.prompt` then asks for the
    kind of caption that a prompt stands for.

    Args:
        prompts: each caption gets one of them at random, in evaluation the first.
        weight: factor of the loss.
    """

    ids: Tensor
    averages_tokens = True

    def __init__(self, prompts: Sequence[str], weight: float = 1.0) -> None:
        super().__init__(prefixed=weight)
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not self.prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in self.prompts):
            raise ValueError(f"prompts must be one or more texts with words, got {prompts!r}")

    def build(self, net: CoCa) -> None:
        self.trains = _caption_parts(net)
        rows = [ids[1:-1] for ids in net.tokenizer.encode_batch(self.prompts)]
        if max(map(len, rows)) > net.tokenizer.context_length // 2:
            raise ValueError(f"a prompt takes more than half of the context of {net.tokenizer.context_length} tokens")
        ids, self.lengths = padded(rows, net.tokenizer.pad_id)  # (P, p), and (P,), which stays on the host
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        count = len(batch.tokens)
        which = torch.randint(len(self.prompts), (count,)) if self.training else torch.zeros(count, dtype=torch.long)
        prompted = self.with_prompts(net, batch, which)
        out = net(
            prompted.images,
            prompted.tokens,
            prompted.lengths,
            contrastive=False,
            prefix_lengths=prompted.prefix_lengths,
        )
        return {"prefixed": loss_terms(out)["caption"]}

    def with_prompts(self, net: CoCa, batch: Batch, which: Tensor) -> Batch:
        """The batch with a prompt between the start and the rest of each text; texts that become too long are cut.

        Args:
            which: (B,) number of the prompt of each text, on the host.
        """
        tokens, context = batch.tokens, net.tokenizer.context_length
        lengths = (batch.lengths + self.lengths[which]).clamp(max=context)
        prefix_lengths = self.lengths[which] + (1 if batch.prefix_lengths is None else batch.prefix_lengths)
        prompts = self.ids[to_device(which, tokens.device)]  # (B, p)
        added, ends = (to_device(x, tokens.device)[:, None] for x in (self.lengths[which], lengths))  # (B, 1)
        positions = torch.arange(min(tokens.shape[1] + prompts.shape[1], context), device=tokens.device)  # (T,)
        from_prompt = prompts.gather(1, (positions - 1).clamp(0, prompts.shape[1] - 1).expand(len(tokens), -1))
        from_text = tokens.gather(1, (positions - added).clamp(0, tokens.shape[1] - 1))
        new = torch.where((positions >= 1) & (positions <= added), from_prompt, from_text)
        new = new.scatter(1, ends - 1, net.tokenizer.eot_id).masked_fill(positions >= ends, net.tokenizer.pad_id)
        return batch._replace(tokens=new, lengths=lengths, prefix_lengths=prefix_lengths)


def _caption_parts(net: CoCa) -> list[str]:
    """What a caption loss alone trains; raises ValueError for a network without a decoder."""
    if net.decoder is None:
        raise ValueError("a caption loss needs a decoder: set decoder_layers above 0")
    return net.parameters_of_loss("caption")


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
