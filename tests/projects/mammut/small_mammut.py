"""A small MaMMUT, and its weights for the oracle."""

from typing import Any

from coca_lit.models import CoCa, create_model
from coca_lit.weights.open_clip import from_open_clip, to_open_clip
from coca_lit.weights.open_clip.config import open_clip_config
from helpers import oracle
from helpers.open_clip_4 import SMALL
from helpers.oracle import State

ARGUMENTS = {k: v for k, v in SMALL.items() if not k.startswith("pooler")}
LAYERS = 3
NEW: dict[str, Any] = {"pooler": "mean", "text_tower": "two_pass", "text_layers": LAYERS, "decoder_layers": LAYERS}
RELEASED = NEW | {"pooler": "mean_all", "text_tower": "two_pass_with_pads"}
WITHOUT_MLP = RELEASED | {"text_tower_args": {"attention_only_every": 2}}  # blocks 0 and 2 of LAION's smaller ones


def make(**overrides: Any) -> tuple[CoCa, State, State]:
    """A model, its OpenCLIP file with every tensor random, and that in float64; with blocks without an MLP, the file is
    one of LAION-AI/open_clip_mammut.
    """
    blank = create_model("mammut2_ViT-B-32", **ARGUMENTS | overrides)
    version = "mammut" if "text_tower_args" in overrides else "4"
    state = oracle.random_state({name: tuple(tensor.shape) for name, tensor in to_open_clip(blank, version).items()})
    state["text.token_embedding.weight"] *= 3
    model = from_open_clip(state, open_clip_config(blank, version)).eval()
    return model, state, {name: t.double() for name, t in state.items()}


def released_files() -> tuple[CoCa, State, dict[str, Any]]:
    """A small openMaMMUT; its tensors and its config with the names of the code that trained the released one."""
    model, state, _ = make(**RELEASED)
    old = {("text.text_projection" if name == "text.lm_head" else name): t for name, t in state.items()}
    config = open_clip_config(model, "4")["model_cfg"]
    text = {key: value for key, value in config.pop("multimodal_cfg").items() if key != "proj_type"}
    del config["vision_cfg"]["final_ln_after_pool"], config["vision_cfg"]["pool_type"]
    return (
        model,
        old,
        {**config, "text_cfg": {**text, "does_full_decoding": True, "output_tokens": True}, "custom_text": True},
    )
