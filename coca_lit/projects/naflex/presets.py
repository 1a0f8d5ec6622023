"""OpenCLIP 4's CoCa2 for images of any shape, with GPT-2's byte pairs and the modern text side of the project coca2."""

from typing import Any

from coca_lit.models.presets import PRESETS as CAPTIONERS

PRESETS: dict[str, dict[str, Any]] = {
    "coca2_moderntext_naflex_vit_b32": CAPTIONERS["coca_vit_b32"]
    | {
        "image_encoder": "naflex",
        "image_encoder_args": {"patch_size": 32, "pre_norm": True, "pos_embed_grid_size": [8, 8]},
        "image_size": 256,
        "pooler": "masked_parallel",
        "pooler_queries": 128,
        "tokenizer": "r50k",
        "context_length": 128,
        "text_tower": "modern",
        "text_tower_args": {"pool": "mean", "qk_norm": True},
        "decoder_args": {"qk_norm": True},
    }
}
