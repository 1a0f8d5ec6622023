"""Records what OpenCLIP 3.3.0 writes with its own beam search and greedy sampling, for the parity tests of generation.

Its `generate` runs with some releases of transformers only, so the ids were recorded once, in their own environment:

    pip install open_clip_torch==3.3.0 transformers==4.56.2 && python tests/helpers/beam_oracle.py
"""

import json
from pathlib import Path
from typing import Any

import torch
from open_clip.coca_model import CoCa
from torch import Tensor, nn

RECORDED = Path(__file__).resolve().parents[1] / "models" / "generation" / "data" / "beam_oracle.json"
END = 49407
VISION = {
    "image_size": 32,
    "patch_size": 8,
    "width": 96,
    "layers": 2,
    "head_width": 96,
    "attentional_pool": True,
    "attn_pooler_heads": 8,
    "attn_pooler_queries": 9,
    "output_tokens": True,
}
TEXT = {"context_length": 76, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
# The end's logit moves captions from never ending to ending early; arguments as in OpenCLIP's `generate`.
CASES: dict[str, dict[str, Any]] = {
    **{f"beams, end {end}": {"end_logit": end, "arguments": {}} for end in (18, 20, 22, 24, 28)},
    "short beams": {"end_logit": 22, "arguments": {"seq_len": 12}},
    "one group": {"end_logit": 22, "arguments": {"num_beams": 5, "num_beam_groups": 1}},
    "long least": {"end_logit": 24, "arguments": {"min_seq_len": 9}},
    "repetition": {"end_logit": 22, "arguments": {"repetition_penalty": 1.3}},
    **{f"greedy, end {end}": {"end_logit": end, "arguments": {"generation_type": "top_k"}} for end in (16, 20, 24)},
    # As Apple's model cards, after `torch.manual_seed(SEED)`.
    **{
        f"Apple, end {end}": {
            "end_logit": end,
            "arguments": {"generation_type": "top_p", "top_p": 0.9, "fixed_output_length": True},
        }
        for end in (18, 20)
    },
}
SEED = 3


def tiny_open_clip(end_logit: float) -> CoCa:
    """Random weights with which images matter, tokens follow one another, and the end's logit is near `end_logit`."""
    torch.manual_seed(0)
    model = CoCa(64, vision_cfg=VISION, text_cfg=TEXT | {"embed_cls": True, "output_tokens": True}, multimodal_cfg=TEXT)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight"))), std=0.3)
    nn.init.normal_(model.text.token_embedding.weight, std=1.0)
    nn.init.normal_(model.visual.attn_pool.query, std=1.0)
    nn.init.ones_(model.text_decoder.ln_final.weight)
    with torch.no_grad():
        model.text_decoder.text_projection.normal_(std=0.5)
        for block in model.text_decoder.cross_attn:
            block.attn.out_proj.weight *= 6
        bias = model.text_decoder.ln_final.bias.normal_()
        model.text_decoder.text_projection[:, END] *= 0.4
        model.text_decoder.text_projection[:, END] += end_logit * bias / bias.square().sum()
    return model.eval()


def tiny_images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    recorded = {}
    for name, case in CASES.items():
        model = tiny_open_clip(case["end_logit"])
        torch.manual_seed(SEED)
        recorded[name] = model.generate(tiny_images(), **case["arguments"]).tolist()
    RECORDED.parent.mkdir(exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in recorded.items()]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
