"""Named sizes of MaMMUT: OpenCLIP's two, and the 15 of LAION's scaling study (arXiv 2506.04598; configs of
LAION-AI/open_clip_mammut).
"""

from typing import Any

from coca_lit.models.presets import PRESETS as CAPTIONERS
from coca_lit.models.presets import STUDY_PATCHES, STUDY_SIZES, size_of_study

# No poolers with queries, and the text tower, read with a context of 77, is the decoder.
_MAMMUT2: dict[str, Any] = {"pooler": "mean", "text_tower": "two_pass", "context_length": 77}
_MAMMUT: dict[str, Any] = {
    "pooler": "mean_all",
    "text_tower": "two_pass_with_pads",
    "context_length": 77,
    "decoder_args": {"cross_attention_every": 2},
}
# Those in which the blocks of the text that a cross block follows have no MLP.
_WITHOUT_MLP = ("s32", "s16", "s14", "m32", "m16", "m14", "b32", "b14")


def _of_study(size: str, patch: int) -> dict[str, Any]:
    arguments = size_of_study(size, patch) | _MAMMUT
    if f"{size}{patch}" in _WITHOUT_MLP:
        arguments["text_tower_args"] = {"attention_only_every": 2}
    return arguments


PRESETS: dict[str, dict[str, Any]] = {
    "mammut2_vit_b32": CAPTIONERS["coca_vit_b32"] | _MAMMUT2,
    "mammut2_vit_l14": CAPTIONERS["coca_vit_l14"] | _MAMMUT2,
    **{f"mammut_vit_{size}{patch}": _of_study(size, patch) for size in STUDY_SIZES for patch in STUDY_PATCHES},
}
