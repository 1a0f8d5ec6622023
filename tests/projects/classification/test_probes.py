"""Nearest neighbours and linear probes equal scikit-learn's."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

pytest.importorskip("sklearn")
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from coca_lit.data.datasets.classification import image_folder
from coca_lit.errors import DataError
from coca_lit.evals import Settings
from coca_lit.evals.inference import embed_images
from coca_lit.models import create_model
from coca_lit.projects.classification.linear import linear_classifier, neighbour_votes
from coca_lit.projects.classification.probes import ProbeScores


@pytest.fixture(scope="module")
def digits():
    """Features of real digits as unit vectors: 900 to learn from, 300 to classify."""
    data = load_digits()
    rng = np.random.default_rng(0)
    features = normalize(torch.from_numpy(data.data + rng.normal(0, 8, data.data.shape)).float(), dim=1)
    labels = torch.from_numpy(data.target).long()
    return features[:900], labels[:900], features[900:1200], labels[900:1200]


@pytest.mark.parametrize("c", [0.316, 100])
def test_logistic_regression(digits, c):
    train, labels, images, _ = digits
    theirs = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(train.double().numpy(), labels.numpy())
    weights, biases = linear_classifier(train, labels, 10, c)
    logits = images.double() @ weights.T + biases
    np.testing.assert_allclose(logits.softmax(1).numpy(), theirs.predict_proba(images.double().numpy()), atol=1e-4)
    assert logits.argmax(1).tolist() == theirs.predict(images.double().numpy()).tolist()
    np.testing.assert_allclose(weights.numpy(), theirs.coef_, atol=1e-2 * np.abs(theirs.coef_).max())


@pytest.mark.parametrize("k", [1, 4, 20])
def test_nearest_neighbours(digits, k):
    train, labels, images, _ = digits
    theirs = KNeighborsClassifier(k, metric="cosine").fit(train.numpy(), labels.numpy())
    votes = neighbour_votes(train, labels, images, 10, k)
    np.testing.assert_allclose(votes.numpy() / k, theirs.predict_proba(images.numpy()), atol=1e-6)
    assert votes.argmax(1).tolist() == theirs.predict(images.numpy()).tolist()


def test_scores_of_folders(tmp_path):
    """Of a model's features, with intervals, against scikit-learn from the pixels on."""
    data, rng = load_digits(), np.random.default_rng(0)
    for split, numbers in (("train", range(60)), ("val", range(60, 100))):
        for i in numbers:
            folder = tmp_path / split / str(data.target[i] % 3)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(data.images[i] * 15 + rng.normal(0, 20, (8, 8)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    torch.manual_seed(0)
    model = create_model("coca_tiny").eval()
    train, images = image_folder(tmp_path / "train"), image_folder(tmp_path / "val")
    evaluation = ProbeScores("digits", images, train, k=5, c=10.0)
    scores = evaluation.evaluate(model, Settings(tmp_path))
    x, y = embed_images(model, train.records).double().numpy(), [train.labels[r.id] for r in train.records]
    new, true = embed_images(model, images.records).double().numpy(), [images.labels[r.id] for r in images.records]
    linear = LogisticRegression(C=10.0, tol=1e-8, max_iter=5000).fit(x, y)
    assert scores["digits/linear/top1"] == pytest.approx(linear.score(new, true))
    assert scores["digits/knn/top1"] == pytest.approx(
        KNeighborsClassifier(5, metric="cosine").fit(x, y).score(new, true)
    )
    assert {"digits/linear/top1", "digits/knn/mean_per_class_recall"} <= evaluation.draws.keys()
    with pytest.raises(DataError, match=r"\b3\b.*2"):
        ProbeScores("digits", images._replace(class_names=images.class_names[:2]), train)
    for wrong in ({"k": 0}, {"k": 2.5}, {"c": 0}):
        with pytest.raises(ValueError, match=rf"^{next(iter(wrong))} must be a "):
            ProbeScores("digits", images, train, **wrong)
