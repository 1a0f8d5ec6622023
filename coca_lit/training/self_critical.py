"""Self-critical sequence training (Rennie et al. 2017, arXiv 1612.00563): the model draws captions, CIDEr-D judges
them, and those that beat the image's other samples become likelier.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from coca_lit.losses.policy import leave_one_out, policy_loss
from coca_lit.metrics.cider import END, CiderD, fast_words
from coca_lit.models import CoCa
from coca_lit.models.generation.options import DEFAULT_MAX_LENGTH
from coca_lit.models.generation.sampling import caption_lengths


class SelfCritical:
    """Draws captions of images, rewards them and gives the loss that trains them.

    The end of a caption counts as a word, in references too: without it, "a dog in a" is as good as it gets.

    Args:
        samples: captions that are drawn for each image; the others are the baseline of each.
        max_length: most tokens of a caption, start and end included; one that is cut off does not have its end.
    """

    def __init__(self, samples: int = 5, max_length: int = DEFAULT_MAX_LENGTH) -> None:
        if samples < 2:
            raise ValueError(f"samples must be at least 2, as a sample's baseline is the mean of the others: {samples}")
        if max_length < 3:
            raise ValueError(f"max_length must be at least 3 (start, one token, end), got {max_length}")
        self.samples, self.max_length = samples, max_length
        self._reward: CiderD | None = None
        self._step_began: float | None = None

    def check(self, net: CoCa, caption_weight: float, micro_batch_size: int | None) -> None:
        """Raises ValueError for a network and settings that do not go together with sampling."""
        if net.decoder is None or not caption_weight:
            raise ValueError("self_critical trains captions: it needs a decoder and a caption_weight above 0")
        if net.config["dropout"]:
            raise ValueError(
                "self_critical draws captions without dropout, so their gradient must be without it too: set "
                "net.dropout=0 (checkpoints trained with dropout fit)"
            )
        if micro_batch_size is not None:
            raise ValueError("self_critical does not go with micro_batch_size: take a smaller batch")

    def read(self, references: Mapping[str, Sequence[str]]) -> None:
        """Takes the references of all training images, by sample key: document frequencies are those of all of them."""
        self._reward = CiderD({key: [[*fast_words(text), END] for text in texts] for key, texts in references.items()})

    def __call__(self, net: CoCa, images: Tensor, keys: Sequence[str]) -> tuple[Tensor, dict[str, float]]:
        """Policy loss of samples, and measures: mean reward, mean distance from the baseline (whose mean is that of the
        reward), and the share of scoring in the time since the call before.

        Args:
            images: (B, S, C) tokens of the image encoder, with gradient if that is trained.
            keys: of the images, for their references.
        """
        began = time.perf_counter()
        ids = self._draw(net, images)  # (B, K, L)
        scoring = time.perf_counter()
        rewards = self._rewards(net, ids, keys)  # (B, K)
        seconds = time.perf_counter() - scoring
        advantages = leave_one_out(rewards).to(images.device)

        tokens = ids.flatten(0, 1)  # (B · K, L)
        lengths = caption_lengths(tokens, net.tokenizer.eot_id)
        lengths = lengths.where(lengths < self._most(net), lengths - 1)  # an end for lack of room was not drawn
        out = net(images, tokens, lengths, contrastive=False)
        assert out.hidden is not None
        assert out.vocabulary is not None
        assert out.labels is not None
        loss = policy_loss(out.hidden, out.vocabulary, out.labels, lengths - 1, advantages.flatten())
        measures = {"reward": float(rewards.mean()), "advantage": float(advantages.abs().mean())}
        if self._step_began is not None:
            measures["scoring_share"] = seconds / (began - self._step_began)
        self._step_began = began
        return loss, measures

    def _draw(self, net: CoCa, images: Tensor) -> Tensor:
        with torch.compiler.set_stance("force_eager"):  # a growing cache would be something new at every token
            return net.generate(
                images.detach(), strategy="sample", num_captions=self.samples, max_length=self._most(net)
            )

    def _most(self, net: CoCa) -> int:
        return min(self.max_length, net.tokenizer.context_length)

    def _rewards(self, net: CoCa, ids: Tensor, keys: Sequence[str]) -> Tensor:
        assert self._reward is not None, "read() comes first"
        tokenizer, most, rows = net.tokenizer, self._most(net), ids.tolist()
        rewards = []
        for key, samples in zip(keys, rows, strict=True):
            captions = []
            for sample in samples:
                finished = sample.index(tokenizer.eot_id) < most - 1
                captions.append([*fast_words(tokenizer.decode(sample)), *([END] if finished else [])])
            rewards.append(self._reward(key, captions))
        return torch.tensor(rewards)
