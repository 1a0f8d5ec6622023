"""The study's mixed reward: its parts against the official scorers and a hand-worked case. Its average of teachers,
against plain loops.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu

from coca_lit.data.batch import Batch
from coca_lit.data.scenes.render import scene_records
from coca_lit.data.transforms import build_transform
from coca_lit.evals import Settings
from coca_lit.evals.inference import embed_pairs
from coca_lit.evals.retrieval import RetrievalScores
from coca_lit.models import CoCa
from coca_lit.models.coca import IGNORED_LABEL
from coca_lit.projects.rewards.cider import CiderD
from coca_lit.projects.rewards.self_critical import END
from coca_lit.tokenizer import get_tokenizer, split_words
from coca_lit.weights.load import save_model
from experiments.flickr8k_two_hours.average_of_teachers import AverageOfTeachers
from experiments.flickr8k_two_hours.consensus import ConsensusCaptions
from experiments.flickr8k_two_hours.hubs import BankedRetrieval
from experiments.flickr8k_two_hours.mixed_reward import MixedReward
from experiments.flickr8k_two_hours.paraphrases import paraphrased_records
from experiments.flickr8k_two_hours.subwords import subwords

REFERENCES = {
    "dogs": [["a", "brown", "dog", "runs", "through", "the", "snow", END], ["a", "dog", "in", "the", "snow", END]],
    "boys": [["two", "boys", "play", "soccer", END], ["two", "boys", "kick", "a", "ball", END]],
}
CAPTIONS = [["a", "dog", "runs", "through", "the", "snow", END], ["a", "dog", END], ["two", "cats"], []]


def test_the_reward_is_the_weighted_sum_of_its_parts() -> None:
    found = MixedReward(REFERENCES, bleu=0.5, recall=3.0)("dogs", CAPTIONS)
    references = {i: [" ".join(words) for words in REFERENCES["dogs"]] for i in range(len(CAPTIONS))}
    bleu = Bleu(4).compute_score(references, {i: [" ".join(c)] for i, c in enumerate(CAPTIONS)}, verbose=0)[1][3]
    cider = CiderD(REFERENCES)("dogs", CAPTIONS)
    # Of the first reference 7 of 8 words are found by 7 words; 3 of 6 of the second by 3; nothing by the others.
    best = [1 / (0.85 / 0.875 + 0.15), 1 / (0.85 / 0.5 + 0.15), 0.0, 0.0]
    assert found == pytest.approx([c + 0.5 * b + 3 * f for c, b, f in zip(cider, bleu, best, strict=True)])
    assert found[0] > found[1] > found[2]


def test_the_beam_that_is_most_like_the_nearest_captions_is_scored(
    tiny_model: Callable[..., CoCa], tmp_path: Path
) -> None:
    """Against plain loops, a photo at a time."""
    model, records = tiny_model(), scene_records("val", count=24)
    asked, captions = records[:8], [caption for record in records[8:] for caption in record.captions]
    evaluation = ConsensusCaptions("few", asked, lambda: captions, neighbours=5)
    settings = Settings(tmp_path, generate={"strategy": "beam", "num_beams": 4, "max_length": 12}, batch_size=3)
    found = evaluation.write(model, asked, settings)
    cider, transform = CiderD({i: [caption.split()] for i, caption in enumerate(captions)}), build_transform(32)
    later = 0
    with torch.no_grad():
        texts = [model.encode_text(model.tokenizer([caption]))[0] for caption in captions]
        for record in asked:
            pixels = transform(record.image())[None]
            similarity = [float(model.encode_image(pixels)[0] @ text) for text in texts]
            nearest = sorted(range(len(captions)), key=lambda i: -similarity[i])[:5]
            beams = model.generate(pixels, strategy="beam", num_beams=4, num_captions=4, max_length=12)[0]
            written = [model.tokenizer.decode(ids) for ids in beams]
            sums = [sum(cider(i, [text.split()])[0] for i in nearest) for text in written]
            assert found[record.id] == written[sums.index(max(sums))]
            later += sums.index(max(sums)) > 0
    assert 0 < later < len(asked)


def test_similarities_are_lessened_by_those_of_the_bank(tiny_model: Callable[..., CoCa], tmp_path: Path) -> None:
    """Against plain loops."""
    model, records = tiny_model(), scene_records("val", count=14)
    asked, bank = records[:8], records[8:]
    found = BankedRetrieval("few", asked, bank, sharpness=20).evaluate(model, Settings(tmp_path, batch_size=3))
    images, texts, owner = embed_pairs(model, asked)
    photos, captions, _ = embed_pairs(model, bank)
    of_image = [math.log(sum(math.exp(20 * float(image @ text)) for text in captions)) / 20 for image in images]
    of_text = [math.log(sum(math.exp(20 * float(photo @ text)) for photo in photos)) / 20 for text in texts]
    first = [max(range(8), key=lambda i: float(images[i] @ text) - of_image[i]) for text in texts]
    assert found["few/t2i_recall@1"] == sum(i == int(o) for i, o in zip(first, owner, strict=True)) / len(texts)
    first = [max(range(len(texts)), key=lambda t: float(image @ texts[t]) - of_text[t]) for image in images]
    assert found["few/i2t_recall@1"] == sum(int(owner[t]) == i for i, t in enumerate(first)) / 8
    assert found != RetrievalScores("few", asked).evaluate(model, Settings(tmp_path))


@pytest.mark.parametrize(("weight", "candidates"), [(0.0, 2), (1.0, 8)])
def test_the_decoder_reranks_what_is_nearest_then(
    tiny_model: Callable[..., CoCa], tmp_path: Path, weight: float, candidates: int
) -> None:
    """Without weight it changes nothing; alone, and with all pairs read, it is as without the bank."""
    model, records = tiny_model(), scene_records("val", count=14)
    settings = Settings(tmp_path, rerank=candidates)
    found = BankedRetrieval("few", records[:8], records[8:], 20, weight).evaluate(model, settings)
    plain = RetrievalScores("few", records[:8], weight).evaluate(model, settings)
    for way in ("t2i", "i2t"):
        expected = plain[f"few/reranked_{way}_recall@1"] if weight else found[f"few/{way}_recall@1"]
        assert found[f"few/reranked_{way}_recall@1"] == expected
    assert found.keys() <= plain.keys()


def test_each_teacher_in_turn_teaches_both_losses(tmp_path: Path, tiny_model: Callable[..., CoCa]) -> None:
    student, *teachers = nets = [tiny_model() for _ in range(3)]
    for net in nets:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    for number, teacher in enumerate(teachers):
        save_model(teacher, tmp_path / f"{number}.safetensors")
    objective = AverageOfTeachers([str(tmp_path / f"{n}.safetensors") for n in (0, 1)], share=0.75, label_smoothing=0.0)
    objective.build(student)
    images = torch.randint(0, 256, (3, 3, student.image_size, student.image_size), dtype=torch.uint8)
    texts = ["a red circle", "a blue cube left of a square", "a circle"]
    tokens, lengths = student.tokenizer(texts), torch.tensor(student.tokenizer.lengths(texts))
    batch = Batch(images, tokens, lengths, ["0", "1", "2"])
    for teacher in (*teachers, teachers[0]):
        terms = objective(student, batch)
        with torch.no_grad():
            own, theirs = student(images, tokens, lengths), teacher(images, tokens, lengths)
        similarities = [
            out.logit_scale.double() * out.image_features.double() @ out.text_features.double().T
            for out in (theirs, own)
        ]
        both = torch.cat([torch.stack(similarities), torch.stack(similarities).mT], dim=1)  # (2, 6, 3)
        contrastive = sum(map(apart, *both)) / 6
        predicted = own.labels != IGNORED_LABEL  # all but the words that the vocabulary lacks
        caption = sum(map(apart, theirs.logits[predicted].double(), own.logits[predicted].double())) / predicted.sum()
        assert terms["teachers_contrastive"].item() == pytest.approx(contrastive, rel=1e-4)
        assert terms["teachers_caption"].item() == pytest.approx(float(caption), rel=1e-4)
        plain = torch.nn.functional.cross_entropy(own.logits, own.labels)
        assert terms["own_caption"].item() == pytest.approx(plain.item(), rel=1e-4)
    assert objective.weights["teachers_caption"] == 0.75 * 2
    assert objective.eval()(student, batch).keys() == {"own_contrastive", "own_caption"}


def apart(logits: torch.Tensor, others: torch.Tensor) -> float:
    """KL divergence of the second softmax from the first."""
    p, q = torch.softmax(logits, 0).tolist(), torch.softmax(others, 0).tolist()
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    """Two training photos of which Karpathy's file tells, the captions of each, and a photo for validation."""
    captions = {"train": ["A boy jumps over the woodland .", "A child jumps over the forest ."], "val": ["A boy ."]}
    images = [
        {"imgid": i, "filename": f"{split}{i}.jpg", "split": split, "sentences": [{"raw": caption}] * 4}
        for split, texts in captions.items()
        for i, caption in enumerate(texts, start=10 * len(split))
    ]
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    for image in images:
        Image.new("RGB", (8, 8)).save(tmp_path / image["filename"])
    return tmp_path


@pytest.mark.slow
def test_paraphrases_replace_one_phrase_by_known_words_in_training_captions_alone(flickr: Path) -> None:
    for record in paraphrased_records(flickr, "train", likelihood=0.01):
        given, others = record.captions[:4], record.captions[4:]
        assert len(given) == len(others)
        for one, other in zip(map(split_words, given), map(split_words, others), strict=True):
            assert one != other
            assert {*other} <= {*split_words("a boy child jumps over the woodland forest")}
    assert [record.captions for record in paraphrased_records(flickr, "val")] == [("A boy .",) * 4]


def test_sub_words_know_every_text(flickr: Path) -> None:
    tokenizer = get_tokenizer(subwords(flickr, 320))
    assert tokenizer.decode(tokenizer.encode("A boy jumps: Δ!")) == "a boy jumps: δ!"
    assert len(tokenizer.encode("woodland")) == 3  # start, a learned word, end
    assert get_tokenizer(subwords(flickr, 270)).vocab_size == 270
