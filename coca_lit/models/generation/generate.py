"""Writing captions: encode images once, let a strategy write, order its captions, add scores and attention."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.models import kernels
from coca_lit.models.generation.decode import Constraints, Sampling, caption_lengths, decode, greedy
from coca_lit.models.generation.options import OPTIONS, GenerateOptions, Options, complete, describe
from coca_lit.models.generation.state import Decoding, Hypotheses, Prompts, encode_prompts
from coca_lit.models.inputs import Images, Input, expect_pixels
from coca_lit.models.text import expect_decoder

if TYPE_CHECKING:
    from coca_lit.models.coca import CoCa


class Captions(NamedTuple):
    """Captions with their scores. N is there if `num_captions` was given."""

    ids: Tensor  # (B, [N,] L), padded
    scores: Tensor | None = None  # (B, [N]), what the captions are ordered by
    log_probs: Tensor | None = None  # (B, [N]), mean over the chosen tokens, in nats
    similarities: Tensor | None = None  # (B, [N]), cosine of image and caption features; with rerank only
    attention: Tensor | None = None  # (B, [N,] L, S), where the decoder looked when it chose each token

    def map(self, function: Callable[[Tensor], Tensor]) -> "Captions":
        return Captions(function(self.ids), *(None if part is None else function(part) for part in self[1:]))


@overload
def write_captions(
    model: "CoCa",
    images: Images,
    *,
    return_scores: Literal[False] = False,
    return_attention: Literal[False] = False,
    **options: Unpack[GenerateOptions],
) -> Tensor: ...


@overload
def write_captions(
    model: "CoCa",
    images: Images,
    *,
    return_scores: Literal[True],
    return_attention: bool = False,
    **options: Unpack[GenerateOptions],
) -> Captions: ...


@overload
def write_captions(
    model: "CoCa",
    images: Images,
    *,
    return_scores: bool = False,
    return_attention: Literal[True],
    **options: Unpack[GenerateOptions],
) -> Captions: ...


@torch.no_grad()
def write_captions(
    model: "CoCa",
    images: Images,
    *,
    return_scores: bool = False,
    return_attention: bool = False,
    **options: Unpack[GenerateOptions],
) -> Tensor | Captions:
    if not isinstance(images, Input):
        expect_pixels(images)
    chosen = complete(options)
    expect_decoder(model.decoder)
    least, most = chosen.lengths(model.tokenizer.context_length)
    prompts = encode_prompts(model, chosen.prompt, len(images), most)
    was_training = model.training
    model.eval()
    try:
        encoded = model.image_encoder(images.to(model.device))
        vector, image_tokens = model.pooling(encoded, contrastive=chosen.rerank is not None)
        decoding = Decoding(model, image_tokens, most)
        hypotheses = _search(model, decoding, prompts, chosen, least)
        captions = _order(model, hypotheses, prompts, vector, chosen)
        if return_attention:
            captions = captions._replace(attention=_attention(model, captions.ids, image_tokens))
    finally:
        model.train(was_training)
    if chosen.num_captions is None:
        captions = captions.map(lambda part: part[:, 0])
    return captions if return_scores or return_attention else captions.ids


_OPTION_LINES = "\n    ".join(f"{name}: {describe(name)}" for name in OPTIONS)
write_captions.__doc__ = f"""Captions of images (B, 3, H, W), or an `Input`, as ids (B, L), padded, ended by the end id.

`model.tokenizer.decode(row)` gives the text.

Args:
    {_OPTION_LINES}
    return_scores, return_attention: return `Captions` instead of the ids alone. Attention (B, [N,] L, S) is where the
        decoder looked among the image tokens when it chose each token, the mean over layers and heads: rows add up to
        1, and are 0 for start and padding.

Raises:
    TypeError: images that are neither, or an unknown option; the message suggests the right one.
    ValueError: options that do not go together or are out of range, prompts that are empty or too long, or a model
        without decoder.
"""


def _search(model: "CoCa", decoding: Decoding, prompts: Prompts, options: Options, min_length: int) -> Hypotheses:
    end_id = model.tokenizer.eot_id
    pad_id = model.tokenizer.pad_id
    constraints = Constraints(end_id, min_length, options.repetition_penalty, options.no_repeat_ngram)
    with kernels.packed_weights(model.text, expect_decoder(model.decoder)):
        if options.strategy == "beam":
            from coca_lit.models.generation.beam import BeamSearch

            penalty = float(options.length_penalty)
            return BeamSearch(options.num_beams, penalty, options.scoring, constraints, pad_id).search(
                decoding, prompts
            )
        sampling = Sampling(options.temperature, options.top_k, options.top_p, options.generator)
        choose = greedy if options.strategy == "greedy" else sampling
        return decode(decoding, prompts, constraints, choose, options.captions, pad_id)


def _order(
    model: "CoCa", hypotheses: Hypotheses, prompts: Prompts, vector: Tensor | None, options: Options
) -> Captions:
    """The captions to return: in the order of the strategy, or by similarity and log-probability, the best first.
    Log-probabilities are those of whole captions, before `cut_at`.
    """
    ids, scores, sums = hypotheses
    lengths = caption_lengths(ids, model.tokenizer.eot_id)
    log_probs = sums / (lengths - prompts.lengths[:, None])  # (B, N)
    if options.cut_at:
        ids = _cut(model, ids, prompts, lengths, options.cut_at)
        lengths = caption_lengths(ids, model.tokenizer.eot_id)
    captions = Captions(ids, scores, log_probs)
    if vector is not None:
        texts = model.encode_text(ids.flatten(0, 1), lengths.flatten()).unflatten(0, ids.shape[:2])  # (B, N, E)
        images = F.normalize(model.image_projection(vector), dim=-1)  # (B, E)
        cosines = (texts * images[:, None]).sum(dim=-1).float()  # (B, N)
        weight = options.rerank_weight
        mixed = weight * model.logit_scale.exp().float() * cosines + (1 - weight) * log_probs
        mixed = mixed.masked_fill(scores.isneginf(), float("-inf"))  # there are fewer captions than beams
        order = mixed.argsort(dim=1, descending=True, stable=True)
        ids = ids.gather(1, order[:, :, None].expand_as(ids))
        captions = Captions(ids, *(part.gather(1, order) for part in (mixed, log_probs, cosines)))
    return captions.map(lambda part: part[:, : options.captions])


def _cut(model: "CoCa", ids: Tensor, prompts: Prompts, lengths: Tensor, text: str) -> Tensor:
    """Captions (B, N, L) of these lengths (B, N) that end before the first token which contains the text."""
    tokenizer = model.tokenizer
    containing = [number for number, token in enumerate(tokenizer.token_bytes) if text.encode() in token]
    places = torch.arange(ids.shape[-1], device=ids.device)  # padding may be a token of the text
    written = (places >= prompts.lengths[:, None, None]) & (places < lengths[:, :, None])  # (B, N, L)
    stop = torch.isin(ids, torch.tensor(containing, device=ids.device)) & written  # (B, N, L)
    stops = stop.cumsum(dim=-1)  # so far
    kept = ids.where(stops == 0, tokenizer.pad_id)
    return kept.where(~stop | (stops > 1), tokenizer.eot_id)


def _attention(model: "CoCa", ids: Tensor, image_tokens: Tensor) -> Tensor:
    """Where the decoder looked when it chose each token of captions (B, N, L): (B, N, L, S)."""
    tokens = ids.flatten(0, 1)  # (B · N, L)
    lengths = caption_lengths(tokens, model.tokenizer.eot_id)
    states, _, _ = model.text(tokens, lengths, contrastive=False, packed=False)
    # (B · N, T, S), row t has read the tokens up to t
    weights = expect_decoder(model.decoder).attention(states, image_tokens).float()
    maps = weights.new_zeros(*tokens.shape, weights.shape[2])
    chosen = min(weights.shape[1], tokens.shape[1] - 1)
    maps[:, 1 : chosen + 1] = weights[:, :chosen]
    written = torch.arange(tokens.shape[1], device=ids.device) < lengths[:, None]  # (B · N, L)
    return (maps * written[:, :, None]).unflatten(0, ids.shape[:2])
