"""How deep in its tower a parameter lies, for learning rates that fall from layer to layer."""

import re

from timm.models import group_parameters
from torch import nn

from coca_lit.models.coca import CoCa

_TEXT_LAYER = re.compile(r"text\.(?:blocks\.(\d+)|\w+_embedding)")


def depths(model: nn.Module) -> dict[str, int]:
    """{parameter: layers from the top of its tower}: 1 in the last layer, one more in each before it, the embeddings
    deepest.

    It is 0 for all that stands on the towers (pooling, projections, decoder) and for models without towers. The layers
    of an image encoder are those that timm groups it into: blocks of a transformer, stages of a ResNet.
    """
    found = {name: 0 for name, _ in model.named_parameters()}
    if not isinstance(model, CoCa):
        return found
    trunk, blocks = model.image_encoder.trunk, len(model.text.blocks)
    groups = group_parameters(trunk, trunk.group_matcher(coarse=False))
    found |= {f"image_encoder.trunk.{name}": len(groups) - i for i, names in groups.items() for name in names}
    for name in found:
        if match := _TEXT_LAYER.match(name):
            found[name] = blocks - int(match[1]) if match[1] else blocks + 1
    return found
