"""Objectives of captions: CapPa's parallel prediction, and captions behind a prompt that names their kind."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coca_lit.data.batch import Batch, padded
from coca_lit.errors import check_number
from coca_lit.losses import caption_loss
from coca_lit.models import CoCa
from coca_lit.models.coca import CAPTION
from coca_lit.models.packing import to_device
from coca_lit.models.text import expect_decoder
from coca_lit.tokenizer import unknown_words
from coca_lit.training.objectives import Objective, caption_term


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
        self.trains = caption_parts(net)

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        read = self.masked(batch, net.tokenizer.sot_id) if self.training else batch.tokens
        states, _, layout = net.text(read, batch.lengths, contrastive=False)
        image_tokens = net.encode_image_tokens(batch.images)
        hidden, labels = net.predict(states, layout, batch.tokens, batch.lengths, image_tokens, batch.prefix_lengths)
        vocabulary = expect_decoder(net.decoder).vocabulary.weight
        return {"parallel": caption_loss(hidden, vocabulary, labels)}

    def masked(self, batch: Batch, start_id: int) -> Tensor:
        """What the text side reads (B, L): for a random share of the pairs, start tokens after the prefix."""
        device = batch.tokens.device
        chosen = torch.rand(len(batch.tokens), device=device) < self.share  # (B,)
        positions = torch.arange(batch.tokens.shape[1], device=device)  # (L,)
        after_prefix = positions >= to_device(prefix_lengths(batch), device)[:, None]  # (B, L)
        return batch.tokens.masked_fill(chosen[:, None] & after_prefix, start_id)


class PrefixPrompts(Objective):
    """Caption loss of captions behind a prompt, which is read and not predicted. `generate.prompt` then asks for the
    kind of caption that a prompt stands for.

    Args:
        prompts: each caption gets one of them at random, in evaluation the first.
        weight: factor of the loss.
    """

    ids: Tensor  # (P, p), of each prompt, padded
    averages_tokens = True

    def __init__(self, prompts: Sequence[str], weight: float = 1.0) -> None:
        super().__init__(prefixed=weight)
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not self.prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in self.prompts):
            raise ValueError(f"prompts must be one or more texts with words, got {prompts!r}")

    def build(self, net: CoCa) -> None:
        self.trains = caption_parts(net)
        rows = [ids[1:-1] for ids in net.tokenizer.encode_batch(self.prompts)]  # without start and end
        different_rows = {tuple(row) for row in rows}
        if len(different_rows) < len(set(self.prompts)) or not all(rows):
            unknown, _ = unknown_words(self.prompts, net.tokenizer)
            raise ValueError(f"the vocabulary lacks words that tell the prompts apart: {', '.join(unknown) or 'any'}")
        if max(len(row) for row in rows) > net.tokenizer.context_length // 2:
            raise ValueError(f"a prompt takes more than half of the context of {net.tokenizer.context_length} tokens")
        ids, self.lengths = padded(rows, net.tokenizer.pad_id)  # the lengths (P,) stay on the host
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        prompted = self.with_prompts(net, batch, self.drawn(len(batch.tokens)))
        out = net(
            prompted.images,
            prompted.tokens,
            prompted.lengths,
            needs=CAPTION,
            prefix_lengths=prompted.prefix_lengths,
        )
        return {"prefixed": caption_term(out)}

    def drawn(self, count: int) -> Tensor:
        """Number of the prompt of each text (B,), on the host."""
        if not self.training:
            return torch.zeros(count, dtype=torch.long)
        return torch.randint(len(self.prompts), (count,))

    def with_prompts(self, net: CoCa, batch: Batch, which: Tensor) -> Batch:
        """The batch with a prompt between the start and the rest of each text; texts that become too long are cut.

        Args:
            which: (B,) number of the prompt of each text, on the host.
        """
        tokens, device = batch.tokens, batch.tokens.device
        context = net.tokenizer.context_length
        prompt_lengths = self.lengths[which]  # (B,), on the host
        lengths = (batch.lengths + prompt_lengths).clamp(max=context)

        prompts = self.ids[to_device(which, device)]  # (B, p)
        last_of_prompt = to_device(prompt_lengths, device)[:, None]  # (B, 1), position of its last token
        ends = to_device(lengths, device)[:, None]  # (B, 1)
        positions = torch.arange(min(tokens.shape[1] + prompts.shape[1], context), device=device)  # (T,)

        place_in_prompt = (positions - 1).clamp(0, prompts.shape[1] - 1)
        place_in_text = (positions - last_of_prompt).clamp(0, tokens.shape[1] - 1)
        from_prompt = prompts[:, place_in_prompt]
        from_text = tokens.gather(1, place_in_text)
        in_prompt = (positions >= 1) & (positions <= last_of_prompt)
        prompted = torch.where(in_prompt, from_prompt, from_text)  # (B, T)
        prompted = prompted.scatter(1, ends - 1, net.tokenizer.eot_id)
        prompted = prompted.masked_fill(positions >= ends, net.tokenizer.pad_id)
        return batch._replace(
            tokens=prompted,
            lengths=lengths,
            prefix_lengths=prefix_lengths(batch) + prompt_lengths,
        )


def prefix_lengths(batch: Batch) -> Tensor:
    """Number of leading tokens of each text that are not predicted (B,): the start, and a question if there is one."""
    if batch.prefix_lengths is None:
        return torch.ones_like(batch.lengths)
    return batch.prefix_lengths


def caption_parts(net: CoCa) -> list[str]:
    """What a caption loss alone trains; raises ValueError for a network without a decoder."""
    if net.decoder is None:
        raise ValueError("a caption loss needs a decoder: set decoder_layers above 0")
    return net.parts_for(CAPTION)
