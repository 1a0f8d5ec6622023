"""An encoder that ends at a middle layer, against timm's own intermediate outputs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from coca_lit import load_model, save_model
from coca_lit.data.datasets.classification import scene_classes
from coca_lit.evals.base import Settings
from coca_lit.models import create_model
from coca_lit.projects.middle_layers.encoder import MiddleLayer
from coca_lit.projects.middle_layers.evaluation import LayerProbes, layer_means

VIT = {"encoder": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
RESNET = {"encoder": "resnet10t"}
EFFICIENTNET = {"encoder": "tf_efficientnet_lite0"}


def middle(whole: MiddleLayer, layer: int, images: Tensor) -> Tensor:
    """What timm says of a layer of the whole model, as tokens."""
    grids = whole.trunk.forward_intermediates(whole.normalise(images), norm=False, intermediates_only=True)
    return grids[layer].flatten(2).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("arguments", [VIT, RESNET, EFFICIENTNET], ids=lambda it: it["encoder"])
@pytest.mark.parametrize("layer", [1, -1])
def test_tokens_are_those_of_the_layer(arguments: dict, layer: int) -> None:
    whole, cut = MiddleLayer(64, layer=-1, **arguments).eval(), MiddleLayer(64, layer=layer, **arguments).eval()
    cut.trunk.load_state_dict(whole.trunk.state_dict(), strict=False)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = middle(whole, layer, images)
    found = cut(images)[:, cut.prefix_tokens :]
    torch.testing.assert_close(found, expected)
    assert cut.width == expected.shape[2]
    if layer == 1:
        assert len(cut.trunk.state_dict()) < len(whole.trunk.state_dict())
    cut.init_parameters()
    assert not torch.equal(cut(images)[:, cut.prefix_tokens :], expected)


def test_a_model_is_trained_and_kept(tmp_path: Path) -> None:
    net = create_model("coca_tiny", image_encoder="middle_layer", image_encoder_args={**RESNET, "layer": 2})
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    net.encode_image(images).sum().backward()
    assert all(p.grad is not None for p in net.image_encoder.parameters())
    save_model(net.eval(), tmp_path / "model.safetensors")
    kept = load_model(tmp_path / "model.safetensors")
    torch.testing.assert_close(kept.encode_image(images), net.encode_image(images))


@pytest.mark.parametrize(("layer", "message"), [(5, "between -5 and 4"), (-6, "between -5 and 4"), (1.5, "layer")])
def test_layers_that_do_not_exist(layer: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiddleLayer(64, layer=layer, **RESNET)


def test_probes_of_each_layer(tmp_path: Path) -> None:
    """The score of a layer is that of the probe of a model that ends there, whose mean token is the same."""
    net = create_model("coca_tiny", image_encoder="resnet10t").eval()
    classes = scene_classes(32)
    evaluation = LayerProbes("scenes", classes, scene_classes(32, trained=True), c=1e5)
    scores = evaluation.scores(net, classes.records, Settings(tmp_path, full=True))
    assert list(scores)[::3] == [f"layer{layer}/top1" for layer in range(5)]
    assert all(0 <= value <= 1 for value in scores.values())
    assert scores["layer2/top1"] > 5 / 48  # random weights know colours
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        tokens = net.image_encoder(images).mean(dim=1)
        torch.testing.assert_close(layer_means(net, images)[-1], tokens / tokens.norm(dim=1, keepdim=True))
