"""Self-critical sequence training (Rennie et al. 2017, arXiv 1612.00563): the model samples captions, a reward scores
them (CIDEr-D by default), and those that beat the other samples of their image become more likely.

For a caption y drawn from the model, ∇ E[r(y)] = E[(r(y) - b) ∇ log p(y)] for any b that does not depend on y
(REINFORCE, Williams 1992). b is the mean reward of the image's other samples: it needs no greedy caption, and its
variance is smaller (Luo 2020, arXiv 2003.09971).
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from coca_lit.data.batch import Batch
from coca_lit.data.feature_cache import swap_sides
from coca_lit.distributed import sum_over_ranks
from coca_lit.errors import ConfigError
from coca_lit.losses.caption import caption_loss
from coca_lit.models import CoCa, CoCaOutput
from coca_lit.models.coca import CAPTION, IGNORED_LABEL
from coca_lit.models.generation.decode import caption_lengths
from coca_lit.models.generation.options import DEFAULT_MAX_LENGTH
from coca_lit.projects.rewards.cider import CiderD, fast_words
from coca_lit.training.objectives import Objective

END = "<end>"  # a word of captions that are finished, and of references
# Scores of several captions of an image, from its sample key and their words
Reward = Callable[[Hashable, Sequence[Sequence[str]]], Sequence[float]]


class SelfCritical(Objective):
    """Samples captions, rewards them and computes the policy loss that trains them, in the place of the caption loss.

    The end of a caption counts as a word, in references too: without it, "a dog in a" would score best.

    Args:
        samples: captions that are sampled for each image; the baseline of each is the mean reward of the others.
        max_length: most tokens of a caption, start and end included; one that is cut off has no end.
        reward: makes the reward from the words of all references, by sample key, when training starts.
        weight: factor of the loss.
    """

    needs = ("encoded",)
    replaces = ("caption",)
    works_with_micro_batches = False
    works_sharded = False
    is_counted = False

    def __init__(
        self,
        samples: int = 5,
        max_length: int = DEFAULT_MAX_LENGTH,
        reward: Callable[[Mapping[Hashable, Sequence[Sequence[str]]]], Reward] = CiderD,
        weight: float = 1.0,
    ) -> None:
        super().__init__(policy=weight)
        if samples < 2:
            raise ValueError(f"samples must be at least 2, as a sample's baseline is the mean of the others: {samples}")
        if max_length < 3:
            raise ValueError(f"max_length must be at least 3 (start, one token, end), got {max_length}")
        self.samples = samples
        self.max_length = max_length
        self._build_reward = reward
        self._reward: Reward | None = None
        self._references: Mapping[str, Sequence[str]] = {}
        self._previous_start: float | None = None  # when the previous call began
        self._previous_scoring = 0.0  # seconds that its scoring took

    def build(self, net: CoCa) -> None:
        if net.decoder is None:
            raise ValueError(f"{self.config_key} trains captions: it needs a decoder")
        if net.config.dropout:
            raise ValueError(f"{self.config_key} samples and trains without dropout: set net.dropout=0")
        self.trains = net.parts_for(CAPTION)

    def take_data(self, data: Any) -> None:
        if not hasattr(data, "training_captions"):
            raise ConfigError(
                f"{self.config_key} needs all captions: give {type(data).__name__} a method training_captions()"
            )
        self.read(data.training_captions())

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        if batch.prefix_lengths is not None:
            raise ConfigError(f"{self.config_key} samples captions without a question, and these data have questions")
        assert out.encoded is not None
        captions = batch.extras.get("captions", ())
        loss, self.measures = self.policy(net, out.encoded, batch.keys, captions)
        return {"policy": loss}

    def read(self, references: Mapping[str, Sequence[str]]) -> None:
        """Takes the references of all training images, by sample key; CIDEr-D counts its document frequencies there."""
        words: dict[Hashable, list[list[str]]] = {
            key: [[*fast_words(text), END] for text in texts] for key, texts in references.items()
        }
        self._reward = self._build_reward(words)
        self._references = references

    def policy(
        self, net: CoCa, images: Any, keys: Sequence[str], answers: Sequence[Sequence[str]] = ()
    ) -> tuple[Tensor, dict[str, float]]:
        """Policy loss of sampled captions, and measures: the mean reward, the mean distance of rewards from their
        baselines, and the share of the previous call's scoring in the time from that call to this one.

        Args:
            images: what the image encoder returns, with gradient if that is trained.
            keys: of the images, for their references.
            answers: the texts of each image; they tell a mirror image of `feature_cache` from the image itself.
        """
        start = time.perf_counter()
        ids = self._draw(net, images)  # (B, K, L)
        scoring_start = time.perf_counter()
        rewards = self._rewards(net, ids, keys, answers)  # (B, K)
        scoring = time.perf_counter() - scoring_start
        advantages = leave_one_out(rewards).to(images.device)

        tokens = ids.flatten(0, 1)  # (B · K, L)
        image_tokens = net.encode_image_tokens(images).repeat_interleave(self.samples, dim=0)  # (B · K, Q, E)
        lengths = caption_lengths(tokens, net.tokenizer.eot_id).cpu()
        lengths = lengths.where(lengths < self._longest(net), lengths - 1)  # a forced end was not sampled
        out = net.captions_of(image_tokens, tokens, lengths)
        assert out.hidden is not None
        assert out.vocabulary is not None
        assert out.labels is not None
        labels = out.labels
        if net.tokenizer.unk_id is not None:  # of captions that the model has written they are words like any other
            labels = labels.masked_fill(labels == IGNORED_LABEL, net.tokenizer.unk_id)
        predicted = (lengths - 1).to(images.device)  # all but the start token
        loss = policy_loss(out.hidden, out.vocabulary, labels, predicted, advantages.flatten())

        measures = {"reward": float(rewards.mean()), "advantage": float(advantages.abs().mean())}
        if self._previous_start is not None:
            measures["scoring_share"] = self._previous_scoring / (start - self._previous_start)
        self._previous_start = start
        self._previous_scoring = scoring
        return loss, measures

    def _draw(self, net: CoCa, images: Any) -> Tensor:
        with torch.compiler.set_stance("force_eager"):  # a growing cache has a new shape at every token
            ids = net.generate(
                images.detach(), strategy="sample", num_captions=self.samples, max_length=self._longest(net)
            )
        torch.clear_autocast_cache()  # up to PyTorch 2.10 it has casts without a graph, which training would take
        return ids

    def _longest(self, net: CoCa) -> int:
        """Most tokens of a caption."""
        return min(self.max_length, net.tokenizer.context_length)

    def _rewards(self, net: CoCa, ids: Tensor, keys: Sequence[str], answers: Sequence[Sequence[str]]) -> Tensor:
        assert self._reward is not None, "read() comes first"
        last = self._longest(net) - 1
        texts_of_images = answers or [()] * len(ids)
        rewards = []
        for key, samples, texts in zip(keys, ids.tolist(), texts_of_images, strict=True):
            references = self._references.get(key, ())
            mirrored_references = [swap_sides(text) for text in references]
            is_mirrored = list(texts) != list(references) and list(texts) == mirrored_references
            captions = []
            for sample in samples:
                text = net.tokenizer.decode(sample)
                if is_mirrored:  # the references are of the image itself
                    text = swap_sides(text)
                words = fast_words(text)
                if sample.index(net.tokenizer.eot_id) < last:
                    words.append(END)
                captions.append(words)
            rewards.append(self._reward(key, captions))
        return torch.tensor(rewards)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards (B, K) minus the mean of the other K - 1 samples of the same image: (B, K), rows add up to 0."""
    samples = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (samples / (samples - 1))


def policy_loss(hidden: Tensor, vocabulary: Tensor, labels: Tensor, lengths: Tensor, advantages: Tensor) -> Tensor:
    """-Σ advantage · log p(caption), averaged over all sampled captions of the global batch.

    Args:
        hidden, vocabulary, labels: of the sampled captions, one after the other, as `caption_loss` takes them.
        lengths: (R,) rows of `hidden` that belong to each caption.
        advantages: (R,) reward minus baseline.

    Returns:
        A scalar whose mean over ranks is the mean over the global batch. Its gradient is -∇ E[reward]; its value means
        nothing.
    """
    count = sum_over_ranks(torch.full((), len(advantages), device=advantages.device))
    weights = advantages.repeat_interleave(lengths)  # (N,)
    return caption_loss(hidden, vocabulary, labels, count, weights=weights)
