"""Further objectives of texts: CapPa's parallel prediction, from the image alone; captions behind a prompt, which
chooses the kind of caption; and the contrastive loss of captions among questions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.data.batch import Batch, padded
from coca_lit.distributed import gather, rank, world_size
from coca_lit.errors import check_number
from coca_lit.losses import caption_loss
from coca_lit.losses.gradients import wide
from coca_lit.models import CoCa, CoCaOutput
from coca_lit.models.coca import CAPTION
from coca_lit.models.kernels import exact_fp32
from coca_lit.models.packing import to_device
from coca_lit.models.text import expect_decoder
from coca_lit.tokenizer import unknown_words
from coca_lit.training.objectives import Objective, predicted


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
        if len({*map(tuple, rows)}) < len({*self.prompts}) or not all(rows):
            unknown, _ = unknown_words(self.prompts, net.tokenizer)
            raise ValueError(f"the vocabulary lacks words that tell the prompts apart: {', '.join(unknown) or 'any'}")
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
            needs=CAPTION,
            prefix_lengths=prompted.prefix_lengths,
        )
        return {"prefixed": predicted(out)}

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


class ContrastiveOfCaptions(Objective):
    """The softmax contrastive loss of the captions among texts of which others are questions with answers: these do not
    describe the image, and it says nothing about them. It takes the place of CoCa's own, `contrastive_weight=0`.

    Args:
        weight: factor of the loss.
    """

    needs = ("image_features", "text_features", "logit_scale")

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(contrastive_of_captions=weight)

    def build(self, net: CoCa) -> None:
        if net.logit_bias is not None:
            raise ValueError("this loss is a softmax: set model.net.contrastive=softmax")

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        images, texts = out.image_features, out.text_features
        assert images is not None
        assert texts is not None
        caption = torch.ones(len(texts), device=texts.device)  # (B,)
        if batch.prefix_lengths is not None:
            caption = to_device(batch.prefix_lengths == 1, texts.device).float()
        captions = gather(caption)  # (W·B,)
        own = torch.arange(len(texts), device=texts.device) + rank() * len(texts)  # of all ranks' pairs
        with exact_fp32(images.device), torch.autocast(images.device.type, enabled=False):
            sides, left_out = (images, texts), (captions - 1) * 1e4  # exp(-1e4) = 0
            losses = [
                F.cross_entropy(out.logit_scale * wide(one) @ wide(gather(other)).T + left_out, own, reduction="none")
                for one, other in (sides, sides[::-1])  # (B,) each
            ]
        found = torch.where(caption > 0, sum(losses) / 2, 0.0).sum()
        return {"contrastive_of_captions": found * world_size() / captions.sum().clamp(min=1)}


def _caption_parts(net: CoCa) -> list[str]:
    """What a caption loss alone trains; raises ValueError for a network without a decoder."""
    if net.decoder is None:
        raise ValueError("a caption loss needs a decoder: set decoder_layers above 0")
    return net.parts_for(CAPTION)
