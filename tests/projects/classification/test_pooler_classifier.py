"""A classifier of images beside the network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coca_lit.data.batch import Batch
from coca_lit.data.scenes.render import scene_records
from coca_lit.errors import ConfigError
from coca_lit.lit_module import CoCaLit
from coca_lit.models import CoCa, create_model
from coca_lit.models.inputs import Input
from coca_lit.projects.classification.classifier import PoolerClassifier
from coca_lit.projects.classification.pooler_probe import ClassPooler
from coca_lit.training.optim import AdamW
from coca_lit.weights.load import load_model
from helpers.kept_classifiers import check_that_files_keep, checkpoint_of


@pytest.fixture(scope="module")
def net() -> CoCa:
    torch.manual_seed(0)
    return create_model("coca_tiny").eval()


CLASSES = ["cat", "dog", "fish"]


@pytest.fixture(scope="module")
def classified() -> Batch:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    tokens, lengths = torch.zeros(4, 3, dtype=torch.long), torch.full((4,), 3)
    return Batch(images, tokens, lengths, list("abcd"), extras={"captions": [("dog",), ("cat",), ("dog",), ("fish",)]})


def pooler_classifier(net: CoCa, **options: Any) -> PoolerClassifier:
    classifier = PoolerClassifier(CLASSES, heads=4, **options)
    classifier.build(net)
    torch.nn.init.normal_(classifier.head.weight)
    torch.nn.init.normal_(classifier.head.bias)
    return classifier.eval()


def test_images_are_classified_by_a_query_and_a_linear_layer(net: CoCa, classified: Batch) -> None:
    """As the head of the probe, which is compared with NumPy."""
    classifier = pooler_classifier(net)
    probe = ClassPooler(net.image_encoder.width, 3, heads=4)
    probe.pooler.load_state_dict(classifier.pooler.state_dict())
    probe.head.load_state_dict(classifier.head.state_dict())
    with torch.no_grad():
        logits = probe(net.image_encoder(classified.images))
        loss = classifier(net, classified)["labels"]
    expected = -logits.double().log_softmax(dim=1)[range(4), [1, 0, 1, 2]].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_mixup_mixes_images_and_targets_with_one_share(net: CoCa, classified: Batch) -> None:
    classifier = pooler_classifier(net, mixup=0.4, label_smoothing=0.1).train()
    torch.manual_seed(3)
    share = float(torch.distributions.Beta(0.4, 0.4).sample())
    torch.manual_seed(3)
    with torch.no_grad():
        found = classifier(net, classified)["labels"]
        pixels = net.image_encoder.normalise(classified.images)
        mixed = torch.stack([share * pixels[i] + (1 - share) * pixels[3 - i] for i in range(4)])
        logits = classifier.head(classifier.pooler(net.image_encoder(mixed))[:, 0]).double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = np.full((4, 3), 0.1 / 3)
    for i, (one, other) in enumerate(zip([1, 0, 1, 2], [2, 1, 0, 1], strict=True)):
        targets[i, one] += 0.9 * share
        targets[i, other] += 0.9 * (1 - share)
    assert 0.01 < share < 0.99
    assert found.item() == pytest.approx(-(targets * log_p).sum(axis=1).mean(), rel=1e-4)


def test_layers_learn_at_rates_of_their_own() -> None:
    """The pooler and the head with the full rate, the encoder with less the further down."""
    net = create_model("coca_tiny")
    classifier = PoolerClassifier(CLASSES, heads=4)
    parts = ["pooling", "text", "decoder"]
    module = CoCaLit(net, AdamW(lr=1.0, layer_decay=0.5), 0, 0.0, 0.0, freeze=parts, objectives={"c": classifier})
    assert not [n for n, p in net.named_parameters() if p.requires_grad and not n.startswith("image_encoder.")]
    rates = {group["lr"] for group in module.make_optimizer(net).param_groups}
    assert max(rates) == 0.5
    assert len(rates) > 2
    assert {group["lr"] for group in module.make_optimizer(module.objectives).param_groups} == {1.0}


def test_images_of_any_shape_are_refused() -> None:
    net = create_model("coca_tiny")
    net.image_encoder.token_kind = Input
    with pytest.raises(ValueError, match="than ImageEncoder"):
        PoolerClassifier(CLASSES).build(net)


def test_a_pooler_of_the_encoder_mixes_pixels_alone(net: CoCa, classified: Batch) -> None:
    with torch.no_grad():
        features = net.image_encoder(classified.images)
    with pytest.raises(ConfigError, match="mixup"):
        pooler_classifier(net, mixup=0.4).train()(net, classified._replace(images=features))


def test_a_checkpoint_keeps_its_classifier(tmp_path: Path) -> None:
    net = create_model("coca_tiny").eval()
    check_that_files_keep(PoolerClassifier(CLASSES, heads=4), net, scene_records("val", count=4), tmp_path)


@pytest.mark.slow
def test_a_forged_number_of_heads_is_refused_in_one_sentence(tmp_path: Path, net: CoCa) -> None:
    weight = torch.zeros(2, net.config.text_width)
    state = {"objectives.mine.head.weight": weight, "objectives.mine.head.bias": torch.zeros(2)}
    forged = {"kind": "PoolerClassifier", "classes": ["a", "b"], "heads": 7}
    torch.save(checkpoint_of(net, state, {"mine": forged}), path := tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"an objective in .* is damaged") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
