"""The pooler probe against plain NumPy, and its bound on the disk."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score

from coca_lit.data.datasets.classification import Classification
from coca_lit.data.records import Record
from coca_lit.evals import Settings
from coca_lit.metrics.uncertainty import difference
from coca_lit.models import CoCa, create_model
from coca_lit.projects.classification.pooler_probe import ClassPooler, PoolerProbe
from coca_lit.projects.classification.probes import ProbeScores

DIGITS = load_digits()


class Digit:
    """A digit of scikit-learn, 32 px."""

    def __init__(self, i: int) -> None:
        self.i = i

    def __call__(self) -> Image.Image:
        pixels = (DIGITS.images[self.i] * 15).astype(np.uint8)
        return Image.fromarray(pixels).convert("RGB").resize((32, 32))


def digits(numbers: range) -> Classification:
    records = [Record(i, Digit(i)) for i in numbers]
    return Classification(records, {i: int(DIGITS.target[i]) for i in numbers}, tuple("0123456789"), ("{}",))


@pytest.fixture(scope="module")
def model() -> CoCa:
    torch.manual_seed(0)
    return create_model("coca_tiny").eval()


TRAINING, IMAGES = digits(range(60)), digits(range(60, 100))
LABELS = torch.tensor([TRAINING.labels[record.id] for record in TRAINING.records])


def by_hand(head: ClassPooler, tokens: np.ndarray) -> np.ndarray:
    """Logits (B, K) of tokens (B, S, C): one head after the other, one image after the other."""
    p = {name: value.detach().double().numpy() for name, value in head.named_parameters()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
        return (x - x.mean(axis=-1, keepdims=True)) / deviation * p[f"{name}.weight"] + p[f"{name}.bias"]

    width = tokens.shape[2]
    query = (
        norm(p["pooler.query"], "pooler.norm_query") @ p["pooler.attention.q.weight"].T + p["pooler.attention.q.bias"]
    )
    rows = []
    for image in tokens:
        both = norm(image, "pooler.norm_context") @ p["pooler.attention.kv.weight"].T + p["pooler.attention.kv.bias"]
        gathered = []
        for part in np.split(np.arange(width), head.pooler.attention.heads):
            scores = both[:, part] @ query[0, part] / np.sqrt(len(part))
            weights = np.exp(scores - scores.max())
            gathered.append(weights / weights.sum() @ both[:, width + part])
        out = np.concatenate(gathered) @ p["pooler.attention.out.weight"].T + p["pooler.attention.out.bias"]
        rows.append(norm(out, "pooler.norm_out") @ p["head.weight"].T + p["head.bias"])
    return np.stack(rows)


def test_the_head_is_attention_of_a_query_and_a_linear_layer() -> None:
    torch.manual_seed(0)
    head = ClassPooler(24, 5, heads=3)
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens = torch.randn(4, 7, 24)
    with torch.no_grad():
        np.testing.assert_allclose(head(tokens).numpy(), by_hand(head, tokens.double().numpy()), atol=1e-4)


def test_what_is_stored_changes_nothing_but_the_disk(model: CoCa, tmp_path: Path) -> None:
    """All, some of the others, some of the training, none. Tokens are rounded to fp16 either way, so the trained probe
    is the same, and the files are within the bound.
    """
    of_one = 2 * model.image_encoder(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).numel()
    tokens = model.image_encoder(torch.stack([_pixels(record) for record in IMAGES.records]))
    whole = PoolerProbe(str(tmp_path / "whole"), epochs=2, batch_size=32, heads=4)
    expected = whole.probe(model, TRAINING.records, LABELS, IMAGES.records, 10)
    for stored in (100, 70, 20, 0):
        folder = tmp_path / str(stored)
        probe = PoolerProbe(str(folder), epochs=2, batch_size=32, heads=4, max_gb=stored * of_one / 1e9)
        found = probe.probe(model, TRAINING.records, LABELS, IMAGES.records, 10)
        size = sum(path.stat().st_size for path in folder.rglob("*.npy"))
        assert stored * of_one <= size <= stored * of_one + 2 * 128  # headers of two files
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.means, tokens.mean(dim=1), atol=2e-3, rtol=2e-3)


def _pixels(record: Record) -> torch.Tensor:
    return torch.from_numpy(np.asarray(record.image()).transpose(2, 0, 1).copy())


def test_scores_and_the_paired_test(model: CoCa, tmp_path: Path) -> None:
    model.train().requires_grad_(True)
    pooler = PoolerProbe(str(tmp_path / "tokens"), epochs=3, lr=3e-3, batch_size=32, heads=4)
    evaluation = ProbeScores("digits", IMAGES, TRAINING, k=5, c=1.0, pooler=pooler)
    scores = evaluation.evaluate(model, Settings(tmp_path))
    assert model.image_encoder.training
    assert all(p.requires_grad for p in model.image_encoder.parameters())
    model.eval()
    found = pooler.probe(model, TRAINING.records, LABELS, IMAGES.records, 10)
    truth = [IMAGES.labels[record.id] for record in IMAGES.records]
    for k in (1, 5):
        assert scores[f"digits/pooler/top{k}"] == pytest.approx(top_k_accuracy_score(truth, found.logits.numpy(), k=k))
    linear = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(found.train_means.double().numpy(), LABELS.numpy())
    assert scores["digits/mean/top1"] == pytest.approx(linear.score(found.means.double().numpy(), truth))
    gain = scores["digits/pooler/top1"] - scores["digits/mean/top1"]
    assert scores["digits/pooler_gain/top1"] == pytest.approx(gain)
    tested = difference(evaluation.draws["digits/mean/top1"], evaluation.draws["digits/pooler/top1"])
    interval = evaluation.draws["digits/pooler_gain/top1"].interval()
    assert interval == pytest.approx((tested.low, tested.high))
    assert scores["digits/pooler_gain/p"] == tested.p


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="epochs"):
        PoolerProbe(str(tmp_path), epochs=-1)
    with pytest.raises(ValueError, match="max_gb"):
        PoolerProbe(str(tmp_path), max_gb=-1)
