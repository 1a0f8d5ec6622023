"""OpenCLIP 4's CoCa2: the sizes of `coca_vit_b32`, with the two poolers of the paper."""

from typing import Any

from coca_lit.models.presets import PRESETS as CAPTIONERS

_COCA2: dict[str, Any] = CAPTIONERS["coca_vit_b32"] | {"pooler": "openclip_cascade"}

PRESETS: dict[str, dict[str, Any]] = {
    "coca2_vit_b32": _COCA2 | {"decoder_args": {"init_depth": 12}},  # its initial values count no cross blocks
    "coca2_moderntext_vit_b32": _COCA2 | {"text_tower": "modern"},
}
