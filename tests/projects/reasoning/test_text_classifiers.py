"""Classifiers of answers, and of texts beside one or two images."""

import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coca_lit.cli.module import build_module
from coca_lit.data.batch import Batch, collate
from coca_lit.data.datamodule import RecordsDataModule
from coca_lit.data.examples import FirstCaptionDataset
from coca_lit.data.feature_cache import mirrored
from coca_lit.data.records import Record
from coca_lit.data.transforms import build_transform
from coca_lit.errors import ConfigError, DataError
from coca_lit.lit_module import CoCaLit
from coca_lit.models import CoCa, create_model
from coca_lit.projects.reasoning.classifiers import AnswerClassifier, StateClassifier
from coca_lit.projects.reasoning.scene_data import SceneQuestionsDataModule, SceneStatementsDataModule
from coca_lit.projects.reasoning.scene_statements import LABELS, TRUTHS, comparison_records, entailment_records
from coca_lit.runs.resume import ResumePoint
from coca_lit.tools.plan.estimate import measure
from coca_lit.tools.plan.trace import trace
from coca_lit.training.optim import AdamW
from coca_lit.weights import OBJECTIVES_KEY
from coca_lit.weights.load import load_model
from helpers.kept_classifiers import check_that_files_keep, checkpoint_of
from helpers.naive import state_at_end
from helpers.running import compose

OPTIMIZER = AdamW(lr=1e-3)
ANSWERS = ["red", "2", "left"]


@pytest.fixture(scope="module")
def net() -> CoCa:
    torch.manual_seed(0)
    return create_model("coca_tiny", tokenizer="scenes_statements").eval()


@pytest.fixture(scope="module")
def questions(net: CoCa) -> Batch:
    return next(iter(SceneQuestionsDataModule(tokenizer=net.tokenizer, batch_size=8, train_count=8).train_dataloader()))


def statements(net: CoCa, task: Any) -> Batch:
    data = SceneStatementsDataModule(task, train_count=8, tokenizer=net.tokenizer, batch_size=8, image_size=32)
    return next(iter(data.train_dataloader()))


def randomised(classifier: Any, net: CoCa) -> Any:
    classifier.build(net)
    torch.nn.init.normal_(classifier.head.weight)
    torch.nn.init.normal_(classifier.head.bias)
    return classifier.eval()


# Answers


def built(net: CoCa) -> AnswerClassifier:
    classifier = AnswerClassifier(ANSWERS)
    classifier.build(net)
    return classifier


def test_a_single_answer_is_right(net: CoCa) -> None:
    """In VQA one person is left out, and three of the others must agree."""
    assert built(net).targets([[ANSWERS[0]], [ANSWERS[0], ANSWERS[1]]])[:, :2].tolist() == [[1, 0], [1, 1]]


def test_targets_are_the_accuracies_of_answers(net: CoCa) -> None:
    classifier = built(net)
    people = [("red",) * 10, ("two",) * 2 + ("The left",) * 3 + ("up",) * 5, ("?",) * 10]
    expected = torch.tensor([[1, 0, 0], [0, 0.6, 0.9], [0, 0, 0]])
    torch.testing.assert_close(classifier.targets(people), expected)


def test_the_loss_is_that_of_yes_or_no_questions(net: CoCa, questions: Batch) -> None:
    torch.manual_seed(1)
    classifier = built(net)
    torch.nn.init.normal_(classifier.head.weight)
    with torch.no_grad():
        states = state_at_end(net, questions.images, questions.tokens, questions.prefix_lengths)
        p = classifier.head(states).double().sigmoid()
        target = classifier.targets(questions.extras["captions"])
        expected = -(target * p.log() + (1 - target) * (1 - p).log()).sum(dim=1).mean()
    torch.testing.assert_close(classifier(net, questions)["answers"], expected.float(), atol=1e-3, rtol=0)
    assert classifier(net, questions._replace(prefix_lengths=None, extras={}))["answers"].item() == 0


def test_a_classifier_keeps_the_decoder_from_freezing() -> None:
    net = create_model("coca_tiny", tokenizer="scenes_statements")
    CoCaLit(net, OPTIMIZER, 0, 0.0, 0.0, objectives={"answers": AnswerClassifier(ANSWERS)})
    frozen = {name for name, p in net.decoder.named_parameters() if not p.requires_grad}
    assert frozen == {"vocabulary.weight"}
    assert not net.logit_scale.requires_grad


def test_a_classifier_keeps_a_pooler_of_the_decoder_alone_from_freezing(questions: Batch) -> None:
    net = create_model("coca_tiny", tokenizer="scenes_statements", pooler="parallel")
    model = CoCaLit(net, OPTIMIZER, 0, 1.0, 0.0, objectives={"answers": AnswerClassifier(ANSWERS)})
    model.training_step(questions, 0).backward()
    assert all(p.grad is not None for p in net.pooling.generative.parameters())


# Texts beside images


def naive_states(net: CoCa, records: Sequence[Record]) -> Tensor:
    """(I, n · D): every text beside every one of its images alone, without padding."""
    rows = []
    for record in records:
        ids = torch.tensor([net.tokenizer.encode(record.question)[:-1]])
        length = torch.tensor([ids.shape[1]])
        with torch.no_grad():
            rows.append(torch.cat([state_at_end(net, _pixels(image()), ids, length)[0] for image in record.images]))
    return torch.stack(rows)


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None]


@pytest.mark.parametrize(
    ("make", "labels", "images"), [(entailment_records, LABELS, 1), (comparison_records, TRUTHS, 2)], ids=["one", "two"]
)
def test_logits_are_a_linear_layer_of_the_states_side_by_side(make: Any, labels: Any, images: int, net: CoCa) -> None:
    classifier = randomised(StateClassifier(labels, images=images), net)
    records = make("val", size=32, count=4)[:7]
    states = naive_states(net, records).double().numpy()
    weight, bias = (p.detach().double().numpy() for p in (classifier.head.weight, classifier.head.bias))
    found = classifier.logits(net.train(), records, batch_size=3)
    assert net.training
    net.eval()
    np.testing.assert_allclose(found.numpy(), states @ weight.T + bias, atol=1e-4)


def test_long_texts_are_scored_as_they_are_trained_on() -> None:
    torch.manual_seed(0)
    net = create_model("coca_tiny", tokenizer="scenes_statements", context_length=24).eval()
    classifier = randomised(StateClassifier(LABELS), net)
    words = net.tokenizer.spec
    records = entailment_records("val", size=32, count=2)[:2]
    records = [record._replace(question=" ".join(words[:n])) for record, n in zip(records, (20, 30), strict=True)]
    examples = FirstCaptionDataset(records, build_transform(size=32), net.tokenizer)
    batch = collate([examples[0], examples[1]], net.tokenizer.pad_id)
    assert batch.prefix_lengths.tolist() == [21, 22]
    with torch.no_grad():
        expected = classifier.head(classifier.features(net, batch))
    torch.testing.assert_close(classifier.logits(net, records), expected)


@pytest.mark.parametrize(("task", "labels", "images"), [("entailment", LABELS, 1), ("comparison", TRUTHS, 2)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_cross_entropy_of_the_label(
    task: str, labels: Any, images: int, smoothing: float, net: CoCa
) -> None:
    classifier = randomised(StateClassifier(labels, images, label_smoothing=smoothing), net)
    batch = statements(net, task)
    assert len(batch.images) == images * len(batch.tokens) == images * 8
    with torch.no_grad():
        terms = classifier.train()(net, batch)
        evaluated = classifier.eval()(net, batch)
        logits = classifier.head(classifier.features(net, batch)).double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    numbers = [labels.index(people[0]) for people in batch.extras["captions"]]
    right = np.mean([log_p[i, number] for i, number in enumerate(numbers)])
    assert terms["labels"].item() == pytest.approx(-(1 - smoothing) * right - smoothing * log_p.mean(), rel=1e-4)
    assert evaluated["labels"].item() == pytest.approx(-right, rel=1e-4)


@pytest.mark.parametrize(
    ("task", "labels", "images", "true"), [("entailment", LABELS, 1, "entailment"), ("comparison", TRUTHS, 2, "true")]
)
def test_true_texts_have_the_caption_loss_beside_each_of_their_images(
    task: str, labels: Any, images: int, true: str, net: CoCa
) -> None:
    """Without batch and padding, as captions that end where the answer would begin."""
    classifier = randomised(StateClassifier(labels, images, true_label=true), net)
    batch = statements(net, task)
    losses: list[float] = []
    with torch.no_grad():
        terms = classifier(net, batch)
        for i, (label,) in enumerate(batch.extras["captions"]):
            read = batch.tokens[i : i + 1, : int(batch.prefix_lengths[i])]
            for pixels in batch.images[images * i : images * (i + 1)] if label == true else ():
                out = net.captions_of(net.encode_image_tokens(pixels[None]), read)
                log_p = out.logits.double().log_softmax(dim=1)
                losses += [-log_p[j, token].item() for j, token in enumerate(read[0, 1:])]
        plain = StateClassifier(labels, images)
        plain.head = classifier.head
        assert terms["labels"].item() == pytest.approx(plain.eval()(net, batch)["labels"].item(), rel=1e-5)
        other = [(next(name for name in labels if name != true),) for _ in batch.extras["captions"]]
        assert classifier(net, batch._replace(extras={"captions": other}))["true_texts"].item() == 0
    assert losses
    assert terms["true_texts"].item() == pytest.approx(np.mean(losses), rel=1e-4)
    assert set(classifier(net, batch._replace(prefix_lengths=None))) == {"labels"}


@pytest.mark.parametrize(
    ("classes", "expected"), [(["right", "wrong"], ["right", "wrong"]), (["Left", "Right"], ["Right", "Left"])]
)
def test_a_mirrored_label_is_a_side_only_where_both_sides_are_classes(
    classes: list[str], expected: list[str], net: CoCa
) -> None:
    classifier = randomised(StateClassifier(classes, true_label=classes[0]), net)
    batch = statements(net, "entailment")
    labels = [mirrored(Record(0, "", label)).captions for label in classes]
    with torch.no_grad():
        terms = classifier(net, batch._replace(extras={"captions": labels * 4}))
        same = classifier(net, batch._replace(extras={"captions": [(label,) for label in expected * 4]}))
    assert {name: term.item() for name, term in terms.items()} == {name: term.item() for name, term in same.items()}


def test_a_training_batch_has_the_images_and_texts_of_its_records(net: CoCa) -> None:
    """In the order of the keys: first and second image of each, the text as prefix, the label as answer."""
    batch = statements(net, "comparison")
    pairs = [key.rpartition("/")[0] for key in batch.keys]
    assert pairs[::2] == pairs[1::2]
    assert len(set(pairs)) == 4
    records = {record.id: record for record in comparison_records("train", size=32, count=8)}
    for i, key in enumerate(batch.keys):
        record = records[key]
        for place, image in enumerate(record.images):
            torch.testing.assert_close(batch.images[2 * i + place], _pixels(image())[0])
        read = batch.tokens[i, : int(batch.prefix_lengths[i])]
        assert read.tolist() == net.tokenizer.encode(record.question)[:-1]
        assert batch.extras["captions"][i] == record.captions


def test_a_step_trains_image_encoder_text_and_head() -> None:
    for true in (None, "true"):
        net = create_model("coca_tiny", tokenizer="scenes_statements")
        labels = StateClassifier(TRUTHS, images=2, true_label=true)
        module = CoCaLit(net, OPTIMIZER, 0, 0.0, 0.0, objectives={"labels": labels})
        module.training_step(statements(net, "comparison"), 0).backward()
        assert not [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert net.decoder.vocabulary.weight.requires_grad == (true is not None)


def test_what_does_not_fit_is_said(net: CoCa) -> None:
    batch = statements(net, "comparison")
    with pytest.raises(DataError, match=r"takes 1 images.*got 16 images and 8 texts"):
        randomised(StateClassifier(TRUTHS), net)(net, batch)
    with pytest.raises(DataError, match=r"label 'true'.*yes, no"):
        randomised(StateClassifier(["yes", "no"], images=2), net)(net, batch)
    with pytest.raises(ValueError, match="two or more"):
        StateClassifier(["yes", "yes"])
    numbers: Any = [0, 1]
    with pytest.raises(ValueError, match="as texts, got 0: write it in quotes"):
        StateClassifier(numbers)
    with pytest.raises(ValueError, match="'false', got 'entailment'"):
        StateClassifier(TRUTHS, true_label="entailment")
    with pytest.raises(ValueError, match="true_weight must be a number above 0, got 0"):
        StateClassifier(TRUTHS, true_label="true", true_weight=0)
    with pytest.raises(ValueError, match="decoder"):
        StateClassifier(TRUTHS).build(create_model("coca_tiny", decoder_layers=0))


def test_samples_of_a_batch_have_equally_many_images(net: CoCa) -> None:
    batch = [*comparison_records("val", size=32, count=2)[:1], *entailment_records("val", size=32, count=1)[:1]]
    data = RecordsDataModule({"train": batch}, val_split=None, tokenizer=net.tokenizer, batch_size=2, image_size=32)
    examples = data.training_examples()
    mixed = [examples.example(index) for index in next(iter(data.indices_from(0, 0)))]
    with pytest.raises(DataError, match="1 and 2 images"):
        collate(mixed, 0)


# Checkpoints


@pytest.mark.parametrize("classifier", [StateClassifier(TRUTHS, images=2), AnswerClassifier(ANSWERS)])
def test_a_checkpoint_keeps_its_classifier(classifier: Any, tmp_path: Path) -> None:
    net = create_model("coca_tiny", tokenizer="scenes_statements").eval()
    make = comparison_records if classifier.images == 2 else entailment_records
    check_that_files_keep(classifier, net, make("val", size=32, count=2), tmp_path)


LOAD = """
import sys
from coca_lit.weights.load import load_model
print([type(objective).__name__ for objective in load_model(sys.argv[1]).objectives.values()])
"""


def test_a_process_that_imports_no_classifier_has_those_of_a_file(net: CoCa, tmp_path: Path) -> None:
    classifier = StateClassifier(TRUTHS)
    module = CoCaLit(net, OPTIMIZER, 0, 0.0, 0.0, objectives={"mine": classifier})
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "last.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "['StateClassifier']\n"


def test_classes_in_another_order_do_not_resume() -> None:
    """As when a folder is renamed: the head has as many rows as before, and they would mean other classes."""
    cfg, classes = compose("experiment=scenes_entailment"), ["entailment", "neutral", "contradiction"]
    own = build_module(cfg).objectives["labels"].classes
    assert sorted(own) == sorted(classes)
    for before in (own, own[::-1]):
        start = ResumePoint(Path("last.ckpt"), {OBJECTIVES_KEY: {"labels": {"classes": before}, "gone": {}}})
        refused = pytest.raises(ConfigError, match=r"model\.objectives\.labels: the data have other classes")
        with nullcontext() if before == own else refused:
            build_module(cfg, start)


@pytest.mark.slow
@pytest.mark.parametrize(
    "forged",
    [
        {"kind": ["Popen"]},
        {"kind": "StateClassifier"},
        {"kind": "StateClassifier", "classes": ["a", "b"], "images": 10**9},
        {"kind": "StateClassifier", "classes": [1, 2], "images": 1},
        {"kind": "StateClassifier", "classes": [["a"], ["b"]], "images": 1},
        [],
        "x",
    ],
    ids=str,
)
def test_forged_classifiers_are_refused_in_one_sentence(forged: Any, tmp_path: Path, net: CoCa) -> None:
    weight = torch.zeros(2, net.config.text_width)
    state = {"objectives.mine.head.weight": weight, "objectives.mine.head.bias": torch.zeros(2)}
    torch.save(checkpoint_of(net, state, {"mine": forged}), path := tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"an objective in .* is damaged") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


# In the plan


WEIGHTS = {"contrastive": 1.0, "caption": 2.0}
BATCH, TOKENS = 8, 12


def planned_net() -> CoCa:
    with torch.device("meta"):
        return create_model("coca_tiny")


def classifier_of(net: CoCa) -> StateClassifier:
    classifier = StateClassifier(["no", "yes", "perhaps"], images=2)
    classifier.build(net)
    return classifier


@pytest.mark.slow
@pytest.mark.parametrize("weights", [{"contrastive": 0.0, "caption": 0.0}, WEIGHTS], ids=["alone", "and pairs"])
def test_a_classifier_beside_the_network_is_counted(weights: dict[str, float]) -> None:
    """Two images of each sample, against the counter in a real step."""
    real, planned = create_model("coca_tiny").train(), planned_net()
    beside = classifier_of(real)
    with torch.device("meta"):
        counted = classifier_of(planned)
    tokens, lengths = torch.randint(3, 30, (BATCH, TOKENS)), torch.full((BATCH,), TOKENS)
    images = torch.zeros(2 * BATCH, 3, 32, 32, dtype=torch.uint8)
    batch = Batch(images, tokens, lengths, [], prefix_lengths=lengths, extras={"captions": [("yes",)] * BATCH})
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        beside(real, batch)["labels"].backward()
    without = trace(planned_net(), weights, TOKENS, None, BATCH).total if any(weights.values()) else 0
    step = trace(planned, weights, TOKENS, None, BATCH, [counted])
    assert step.total - without == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert all(step.forward[part] > 0 for part in ("image encoder", "pooling", "text tower", "decoder"))
    assert step.forward["objectives"] == 2 * BATCH * 2 * real.config.text_width * 3
    head = sum(p.numel() for p in beside.parameters())
    assert measure(real, [beside]).weights == measure(real).weights + 4 * head
