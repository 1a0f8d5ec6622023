"""Writing captions: encode images once, let a strategy write, order what it wrote, add scores and attention."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.models.generation.beam import BeamSearch
from coca_lit.models.generation.constraints import Constraints
from coca_lit.models.generation.options import Options
from coca_lit.models.generation.sampling import caption_lengths, decode, greedy
from coca_lit.models.generation.state import Decoding, Hypotheses, Prompts, encode_prompts
from coca_lit.models.generation.static import StaticDecoding, static_step
from coca_lit.models.kernels.linear import packed_weights

if TYPE_CHECKING:
    from coca_lit.models.coca import CoCa

DEFAULT_RERANK_WEIGHT = 0.2  # near the best of scenes and of photos, experiments/contrastive_reranking


class Captions(NamedTuple):
    """Captions with what was asked for beside them. N is there if `num_captions` was given."""

    ids: Tensor  # (B, [N,] L), padded
    scores: Tensor | None = None  # (B, [N]), what the captions are ordered by
    log_probs: Tensor | None = None  # (B, [N]), mean over the chosen tokens, in nats
    similarities: Tensor | None = None  # (B, [N]), cosine of image and caption features; with rerank only
    attention: Tensor | None = None  # (B, [N,] L, S), where the decoder looked when it chose each token

    def each(self, change: Callable[[Tensor], Tensor]) -> "Captions":
        return Captions(change(self.ids), *(None if part is None else change(part) for part in self[1:]))


@torch.no_grad()
def generate(
    model: "CoCa",
    images: Tensor,
    prompt: str | Sequence[str] | None,
    options: Options,
    attention: bool = False,
) -> Captions:
    """Captions of images (B, 3, H, W) with their scores, see `CoCa.generate`."""
    if model.decoder is None:
        raise ValueError(
            "this model cannot caption: it was built for retrieval only (decoder_layers=0) and has no decoder"
        )
    least, most = options.lengths(model.tokenizer.context_length)
    beginnings = encode_prompts(model, prompt, len(images), most)
    was_training = model.training
    model.eval()
    try:
        vector, image_tokens = model.pooling(
            model.image_encoder(images.to(model.device)), contrastive=options.rerank is not None
        )
        hypotheses = _write(model, image_tokens, beginnings, options, least)
        captions = _order(model, hypotheses, beginnings, vector, options)
        maps = _attention(model, captions.ids, image_tokens) if attention else None
    finally:
        model.train(was_training)
    captions = captions._replace(attention=maps)
    if options.num_captions is None:
        captions = captions.each(lambda part: part[:, 0])
    return captions


def _write(model: "CoCa", image_tokens: Tensor, beginnings: Prompts, options: Options, min_length: int) -> Hypotheses:
    tokenizer = model.tokenizer
    assert model.decoder is not None
    decoding = decoding_for(model, image_tokens, beginnings.ids.shape[1])
    constraints = Constraints(tokenizer.eot_id, min_length, options.repetition_penalty, options.no_repeat_ngram)
    with packed_weights(model.text, model.decoder):
        if options.strategy == "beam":
            penalty = 1.0 if options.length_penalty is None else options.length_penalty
            search = BeamSearch(options.beams, penalty, options.scoring, constraints, tokenizer.pad_id)
            return search.search(decoding, beginnings)
        choose = greedy if options.strategy == "greedy" else options.sampling
        return decode(decoding, beginnings, constraints, choose, options.captions, tokenizer.pad_id)


def decoding_for(model: "CoCa", image_tokens: Tensor, max_length: int) -> Decoding:
    if model.static_step is None and not image_tokens.is_cuda:
        return Decoding(model, image_tokens, max_length)
    return StaticDecoding(model, image_tokens, max_length, model.static_step or static_step)


def _order(
    model: "CoCa", hypotheses: Hypotheses, beginnings: Prompts, vector: Tensor | None, options: Options
) -> Captions:
    """The captions to return, in their order: the strategy's, or the best by similarity and log-probability first."""
    ids, scores, sums = hypotheses
    lengths = caption_lengths(ids, model.tokenizer.eot_id)
    log_probs = sums / (lengths - beginnings.lengths[:, None])  # (B, N)
    captions = Captions(ids, scores, log_probs)
    if vector is not None:
        cosines = _similarities(model, ids, lengths, vector)
        weight = DEFAULT_RERANK_WEIGHT if options.rerank_weight is None else options.rerank_weight
        mixed = weight * model.logit_scale.exp().float() * cosines + (1 - weight) * log_probs
        mixed = mixed.masked_fill(scores.isneginf(), float("-inf"))  # there are fewer captions than beams
        order = mixed.argsort(dim=1, descending=True, stable=True)
        ids = ids.gather(1, order[:, :, None].expand_as(ids))
        captions = Captions(ids, *(part.gather(1, order) for part in (mixed, log_probs, cosines)))
    return captions.each(lambda part: part[:, : options.captions])


def _similarities(model: "CoCa", ids: Tensor, lengths: Tensor, vector: Tensor) -> Tensor:
    """Cosines (B, N) of images, given as contrastive vectors (B, E), and their captions (B, N, L)."""
    texts = model.encode_text(ids.flatten(0, 1), lengths.flatten()).unflatten(0, ids.shape[:2])  # (B, N, E)
    images = F.normalize(model.image_projection(vector), dim=-1)  # (B, E)
    return (texts * images[:, None]).sum(dim=-1).float()


def _attention(model: "CoCa", ids: Tensor, image_tokens: Tensor) -> Tensor:
    """Where the decoder looked when it chose each token of captions (B, N, L): (B, N, L, S), see `CoCa.generate`."""
    assert model.decoder is not None
    tokens = ids.flatten(0, 1)  # (B · N, L)
    lengths = caption_lengths(tokens, model.tokenizer.eot_id)
    states, _, _ = model.text(tokens, lengths, contrastive=False, packed=False)
    weights = model.decoder.attention(states, image_tokens).float()  # (B · N, T, S), row t has read the tokens up to t
    maps = weights.new_zeros(*tokens.shape, weights.shape[2])
    chosen = min(weights.shape[1], tokens.shape[1] - 1)
    maps[:, 1 : chosen + 1] = weights[:, :chosen]
    written = torch.arange(tokens.shape[1], device=ids.device) < lengths[:, None]  # (B · N, L)
    return (maps * written[:, :, None]).unflatten(0, ids.shape[:2])
