"""A model that captions images of noise in many ways."""

import torch
from torch import Tensor, nn

from coca_lit.models import CoCa

WORDS = ["a", "red", "blue", "dog", "cat", "on", "grass"]
LENGTH = 10
PROMPTS = {
    "none": lambda count: None,
    "one": lambda count: "a red",
    "ragged": lambda count: ["a", "a red dog on", "cat"][:count] + ["blue dog"] * (count - 3),
}


def make_model(words: list[str] = WORDS, seed: int = 0, end: float = 5.0) -> CoCa:
    """Weights large enough that images matter, tokens follow one another and captions end at different places."""
    torch.manual_seed(seed)
    model = CoCa(
        image_encoder="vit_base_patch32_clip_224",
        image_encoder_args={"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        image_size=16,
        embed_dim=24,
        pooler_queries=6,
        pooler_heads=2,
        tokenizer=words,
        context_length=12,
        text_width=24,
        text_layers=2,
        text_heads=3,
        decoder_layers=2,
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    bias = model.decoder.norm.bias.data.normal_()
    model.decoder.vocabulary.weight.data[model.tokenizer.eot_id] += end * bias / bias.square().sum()
    return model


def make_images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def starts(model: CoCa, prompt: str | list[str] | None, count: int) -> list[list[int]]:
    prompts = [prompt or ""] * count if prompt is None or isinstance(prompt, str) else prompt
    return [model.tokenizer.encode(text)[:-1] for text in prompts]
