"""Captions written with caches against captions written without any, in thousands of random cases.

python experiments/generation_equality/compare.py outputs/generation_equality --cases 10000
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from coca_lit.models import CoCa
from coca_lit.models.generation import generate
from coca_lit.models.generation.state import Decoding
from coca_lit.runs.run_folder import environment

WORDS = ["a", "red", "blue", "dog", "cat", "on", "grass"]
CONTEXT = 16
CASES_PER_MODEL = 25


class Uncached:
    """The interface of `Decoding`: every step runs the whole texts through tower and decoder again, image by image
    repeated for each of its captions.
    """

    def __init__(self, model: CoCa, image_tokens: Tensor, max_length: int) -> None:
        self.model, self.image_tokens = model, image_tokens

    def begin(self, tokens: Tensor, captions: int) -> Tensor:
        self.tokens = tokens[:, :0].repeat_interleave(captions, dim=0)
        self.image_tokens = self.image_tokens.repeat_interleave(captions, dim=0)
        self.captions = captions
        return self.step(tokens.repeat_interleave(captions, dim=0))

    def step(self, tokens: Tensor) -> Tensor:
        self.tokens = torch.cat([self.tokens, tokens], dim=1)  # (R, t)
        rows, length = self.tokens.shape
        assert self.model.decoder is not None
        states, *_ = self.model.text(self.tokens, torch.full((rows,), length), contrastive=False, packed=False)
        return self.model.decoder.vocabulary(self.model.decoder(states[:, :length], self.image_tokens)[:, -1]).float()

    def select(self, rows: Tensor, images: Tensor | None = None) -> None:
        self.tokens, self.image_tokens = self.tokens[rows], self.image_tokens[rows]


def random_model(draw: "Draw", seed: int) -> CoCa:
    """Weights so large that images matter and tokens follow one another; the end is likely or not."""
    torch.manual_seed(seed)
    model = CoCa(
        image_encoder="vit_base_patch32_clip_224",
        image_encoder_args={"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        image_size=16,
        embed_dim=24,
        pooler=draw.one("single", "parallel", "cascade"),
        pooler_queries=draw.between(2, 8),
        pooler_heads=2,
        tokenizer=WORDS,
        context_length=CONTEXT,
        cls_mask=draw.one("correct", "legacy"),
        text_width=24,
        text_layers=draw.between(1, 3),
        text_heads=3,
        decoder_layers=draw.between(1, 3),
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    assert model.decoder is not None
    assert isinstance(model.decoder.norm, nn.LayerNorm)
    bias = model.decoder.norm.bias.data.normal_()
    model.decoder.vocabulary.weight.data[model.tokenizer.eot_id] += draw.between(0, 8) * bias / bias.square().sum()
    return model.eval()


class Draw:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def between(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def one(self, *choices: Any) -> Any:
        return choices[self.between(0, len(choices) - 1)]


def random_options(draw: Draw, count: int, seed: int) -> dict[str, Any]:
    length = draw.between(4, CONTEXT)
    prompts = [" ".join(draw.one(*WORDS) for _ in range(draw.between(1, length - 3))) for _ in range(count)]
    options: dict[str, Any] = {
        "max_length": length,
        "min_length": draw.between(0, length - 1),
        "prompt": draw.one(None, prompts, prompts[0] if prompts else None),
        "repetition_penalty": draw.one(1.0, 1.3),
        "no_repeat_ngram": draw.one(0, 2, 3),
        "strategy": draw.one("greedy", "beam", "sample"),
    }
    if options["strategy"] == "beam":
        beams = draw.between(1, 5)
        more = {"num_captions": draw.between(1, beams), "length_penalty": draw.one(0.0, 0.7, 1.0)}
        options |= {"num_beams": beams, "scoring": draw.one("log_prob", "openclip_legacy")} | draw.one({}, more)
    if options["strategy"] == "sample":
        cut = draw.one({}, {"top_k": draw.between(1, 5)}, {"top_p": 0.8}, {"temperature": 0.7})
        options |= {"num_captions": draw.between(1, 4), "generator": torch.Generator().manual_seed(seed)} | cut
    if options["strategy"] == "beam" or options.get("num_captions", 1) > 1:
        options["rerank"] = draw.one(None, None, "contrastive")
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", type=int, default=10_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, tried, equal = time.process_time(), Counter[str](), Counter[str]()
    for case in range(args.cases):
        draw = Draw(case)
        if case % CASES_PER_MODEL == 0:
            model = random_model(draw, case)
        count = draw.between(1, 5)
        images = torch.randn(count, 3, 16, 16, generator=draw.generator)
        options = random_options(draw, count, case)
        found: dict[str, Any] = {}
        kinds: dict[str, Any] = {"cached": Decoding, "uncached": Uncached}
        for name, kind in kinds.items():
            if "generator" in options:
                options["generator"].manual_seed(case)
            with patch.object(generate, "Decoding", kind):
                found[name] = model.generate(images, **options)
        key = f"cached/{options['strategy']}"
        tried[key] += 1
        if torch.equal(found["cached"], found["uncached"]):
            equal[key] += 1
        else:
            print(f"case {case}: captions differ, {options}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.yaml").write_text("seed: 0\n")
    about = environment() | {
        "command": f"python experiments/generation_equality/compare.py {args.out} --cases {args.cases}",
        "seconds": round(time.process_time() - start),
    }
    (args.out / "environment.json").write_text(json.dumps(about, indent=2))
    results = {f"{key}/exact_match": equal[key] / tried[key] for key in sorted(tried)}
    results |= {f"{key}/cases": tried[key] for key in sorted(tried)}
    (args.out / "results.json").write_text(json.dumps(results, indent=2))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
