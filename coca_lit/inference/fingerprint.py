"""Which model made a file: a digest of architecture and weights, so that results of two models are never mixed."""

import json

from coca_lit.models import CoCa, DualEncoder
from coca_lit.weights.digest import digest


def fingerprint(model: DualEncoder) -> str:
    """Equal for models of the same configuration with the same weights, bit for bit, whatever file they came from."""
    parts = sorted({type(part).__name__ for part in model.modules()})  # tells a CLIP with QuickGELU from one with GELU
    about = model.config if isinstance(model, CoCa) else parts
    return digest(json.dumps(about, sort_keys=True), model.state_dict().items())
