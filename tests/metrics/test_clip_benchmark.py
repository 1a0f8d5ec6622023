"""Retrieval and zero-shot scores equal clip_benchmark's, on random features and unequal numbers of captions."""

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

from coca_lit.metrics.classification import class_features, classification_scores
from coca_lit.metrics.retrieval import feature_ranks

retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")


class Lookup:
    """A model whose images are rows of a table, and whose texts are the numbers of rows of another."""

    def __init__(self, texts):
        self.texts = texts

    def encode_image(self, images):
        return images

    def encode_text(self, tokens):
        return self.texts[tokens]


def numbers(texts):
    return torch.tensor([int(text) for text in texts])


def test_retrieval():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 16, generator=generator)
    counts = torch.randint(1, 8, (60,), generator=generator)
    image_of_text = torch.arange(60).repeat_interleave(counts)
    texts = images[image_of_text] + 2.0 * torch.randn(len(image_of_text), 16, generator=generator)
    names = [[str(t) for t in (image_of_text == i).nonzero()[:, 0].tolist()] for i in range(60)]
    batches = [(images[i : i + 7], names[i : i + 7]) for i in range(0, 60, 7)]
    theirs = retrieval.evaluate(Lookup(texts), batches, numbers, "cpu", amp=False, recall_k_list=[1, 5, 10])
    ours = feature_ranks(normalize(images, dim=-1), normalize(texts, dim=-1), image_of_text).recalls()
    for k in (1, 5, 10):
        assert ours[f"t2i_recall@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert ours[f"i2t_recall@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)
        assert 0.1 < ours[f"t2i_recall@{k}"] < 1


def accuracy(output, target, topk):
    """As clip_benchmark's, which turns an array of one element into a float: NumPy no longer does."""
    correct = output.topk(max(topk)).indices == target[:, None]
    return [correct[:, :k].sum().item() / len(target) for k in topk]


def test_classification(monkeypatch):
    monkeypatch.setattr(classification, "accuracy", accuracy)
    generator = torch.Generator().manual_seed(0)
    classes, prompts = 12, 3
    texts = torch.randn(classes * prompts, 16, generator=generator)
    labels = torch.randint(0, classes, (200,), generator=generator)
    images = texts[labels * prompts] + 2.0 * torch.randn(200, 16, generator=generator)
    names = [str(c) for c in range(classes)]

    def rows(formatted):  # "c-p": prompt p of class c
        return torch.tensor([int(c) * prompts + int(p) for c, p in (text.split("-") for text in formatted)])

    templates = [f"{{c}}-{p}" for p in range(prompts)]
    dataset = TensorDataset(images, labels)
    dataset.classes = names
    batches = DataLoader(dataset, batch_size=32)
    theirs = classification.evaluate(Lookup(texts), batches, rows, names, templates, "cpu", amp=False)
    similarity = normalize(images, dim=-1) @ class_features(texts.unflatten(0, (classes, prompts))).T
    ours = classification_scores(similarity, labels)
    assert ours["top1"] == pytest.approx(theirs["acc1"], abs=1e-6)
    assert ours["top5"] == pytest.approx(theirs["acc5"], abs=1e-6)
    assert ours["mean_per_class_recall"] == pytest.approx(theirs["mean_per_class_recall"], abs=1e-6)
    assert 0.1 < ours["top1"] < ours["top5"] < 1
