"""Zero-shot classification by hand, against scikit-learn, and on real images of digits."""

import inspect
import json
import re
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from coca_lit.data.datasets.classification import Classification, image_folder, scene_classes
from coca_lit.data.scenes.render import decode, scene_records
from coca_lit.data.transforms import build_transform
from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.evals import Settings
from coca_lit.evals.classification import ZeroShotScores
from coca_lit.metrics.classification import class_features, classification_scores
from coca_lit.models import create_model
from coca_lit.models.presets import VOCABULARIES

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The 1,797 handwritten digits of scikit-learn as a folder of images per class, and hidden files that are none."""
    root = tmp_path_factory.mktemp("digits")
    data = pytest.importorskip("sklearn.datasets").load_digits()
    for i, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        (root / f"d{label}").mkdir(exist_ok=True)
        Image.fromarray((pixels * 15).astype(np.uint8)).save(root / f"d{label}" / f"{i}.png")
    (root / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/0.png", "d0/._0.png"):
        (root / name).write_bytes(b"no image")
    (root / "classes.json").write_text(json.dumps({"classes": {f"d{i}": name for i, name in enumerate(DIGITS)}}))
    return root


class Prototypes(torch.nn.Module):
    """A model with the two encoders: pixels of an image, and for a text the mean image of the digit that it names."""

    image_size = 8
    preprocessing = MappingProxyType({"size": 8})
    device = torch.device("cpu")

    def __init__(self, means):
        super().__init__()
        self.means = means

    @property
    def tokenizer(self):
        return SimpleNamespace(tokens_of=self.tokens_of)

    def tokens_of(self, texts):
        return torch.tensor([[DIGITS.index(text.removeprefix("a photo of a ").removesuffix("."))] for text in texts])

    def encode_text(self, tokens):
        return normalize(self.means[tokens[:, 0]], dim=-1)

    def encode_image(self, images):
        return normalize(images[:, 0].flatten(1).float(), dim=-1)


def test_of_classes_with_one_name_the_first_is_chosen(digits, tmp_path):
    """As by `argmax`: ImageNet has two missiles, whose prompts are the same."""
    means = torch.stack([torch.full((64,), float(i)) for i in range(10)]) + torch.arange(64.0)
    images = image_folder(digits, digits / "classes.json")
    records = [record for record in images.records if images.labels[record.id] < 2][:60]
    labels = {record.id: i % 2 for i, record in enumerate(records)}
    images = images._replace(records=records, labels=labels, class_names=("zero", "zero"))
    scores = ZeroShotScores("digits", images).evaluate(Prototypes(means), Settings(tmp_path))
    assert scores["digits/top1"] == 0.5


def test_real_digits_against_scikit_learn(digits, tmp_path):
    data = pytest.importorskip("sklearn.datasets").load_digits()
    pixels = torch.from_numpy((data.images * 15).astype(np.uint8)).flatten(1).float()
    means = torch.stack([pixels[data.target == label].mean(dim=0) for label in range(10)])
    images = image_folder(digits, digits / "classes.json")
    scores = ZeroShotScores("digits", images).evaluate(Prototypes(means), Settings(tmp_path))
    theirs = pytest.importorskip("sklearn.metrics")
    similarity = (normalize(pixels, dim=-1) @ normalize(means, dim=-1).T).numpy()
    assert scores["digits/top1"] == pytest.approx(theirs.top_k_accuracy_score(data.target, similarity, k=1))
    assert scores["digits/top5"] == pytest.approx(theirs.top_k_accuracy_score(data.target, similarity, k=5))
    assert scores["digits/mean_per_class_recall"] == pytest.approx(
        theirs.balanced_accuracy_score(data.target, similarity.argmax(axis=1))
    )
    assert 0.85 < scores["digits/top1"] < scores["digits/top5"] < 1


def test_class_features_by_hand():
    prompts = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 5.0], [0.0, 1.0]]])
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]])  # the longer first prompt of class 0 weighs no more
    assert torch.allclose(class_features(prompts), expected)


def test_what_is_not_read_in_folders_of_classes_is_told(tmp_path, caplog):
    for name in ("cat/1.JPG", "cat/2.heic", "cat/inner/3.jpg", "dog/inner/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [record.id for record in image_folder(tmp_path).records] == ["cat/1.JPG"]
    empty, left_out = caplog.messages
    assert empty == f"1 of 2 classes in {tmp_path} have no image, e.g. dog"
    assert left_out == f"left out 3 files or folders of classes in {tmp_path}, e.g. cat/2.heic"


def test_folders(digits, tmp_path):
    plain = image_folder(digits)
    assert plain.class_names == tuple(f"d{i}" for i in range(10))
    assert plain.templates == ("a photo of a {}.",)
    assert len(plain.records) == 1797
    assert len({plain.labels[record.id] for record in plain.records[:100]}) == 10  # the first few are a fair sample
    with pytest.raises(DataNotFoundError, match="nowhere"):
        image_folder(tmp_path / "nowhere")
    (tmp_path / "more.json").write_text(json.dumps({"classes": {"d0": "zero"}, "templates": ["{}"]}))
    with pytest.raises(DataError, match=r"9 of 10 .*d1"):
        image_folder(digits, tmp_path / "more.json")
    (tmp_path / "more.json").write_text(json.dumps({"classes": {"d0": "zero"}, "templates": ["a digit"]}))
    with pytest.raises(DataError, match="'a digit'"):
        image_folder(digits, tmp_path / "more.json")
    (tmp_path / "more.json").write_text(json.dumps({"classes": {"d0": "zero"}, "templates": []}))
    with pytest.raises(DataError, match='"templates"'):
        image_folder(digits, tmp_path / "more.json")
    (tmp_path / "more.json").write_text("[]")
    with pytest.raises(DataError, match="classes"):
        image_folder(digits, tmp_path / "more.json")


def test_imagenet_names_and_templates(tmp_path):
    metadata = pytest.importorskip("open_clip.zero_shot_metadata")
    (tmp_path / "n01440764").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "n01440764" / "a.JPEG")
    imagenet = image_folder(tmp_path, "imagenet")
    assert imagenet.class_names == tuple(metadata.IMAGENET_CLASSNAMES)
    assert [t.replace("{}", "x") for t in imagenet.templates] == [t("x") for t in metadata.OPENAI_IMAGENET_TEMPLATES]
    assert imagenet.class_names[imagenet.labels["n01440764/a.JPEG"]] == "tench"


def test_sets_of_some_of_the_classes(tmp_path):
    """ImageNet-A and -R: only the classes with a folder are candidates, the names CLIP_benchmark's, in its order."""
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    metadata = pytest.importorskip("open_clip.zero_shot_metadata")
    source = inspect.getsource(builder)
    names = dict(zip(builder.all_imagenet_wordnet_ids, metadata.IMAGENET_CLASSNAMES, strict=True))
    for letter in "ar":
        found = re.search(rf"imagenet_{letter}_wnids = [{{\[](.*?)[}}\]]", source)
        listed = sorted(re.findall(r"n\d{8}", found[1]))
        assert len(listed) == 200
        for folder in listed:
            (tmp_path / letter / folder).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / letter / listed[7] / "a.jpg")
        found = image_folder(tmp_path / letter, "imagenet", subset=True)
        assert found.class_names == tuple(names[folder] for folder in listed)
        assert list(found.labels.values()) == [7]
        assert len(image_folder(tmp_path / letter, "imagenet").class_names) == 1000


def test_numbered_folders(tmp_path):
    """ImageNet-V2's folders are the numbers of the classes, sorted as texts: 10 comes before 2."""
    metadata = pytest.importorskip("open_clip.zero_shot_metadata")
    for number in range(1000):
        (tmp_path / str(number)).mkdir()
    for number in (2, 10, 999):
        Image.new("RGB", (4, 4)).save(tmp_path / str(number) / "a.jpeg")
    found = image_folder(tmp_path, "imagenet")
    assert found.labels == {"2/a.jpeg": 2, "10/a.jpeg": 10, "999/a.jpeg": 999}
    assert found.class_names == tuple(metadata.IMAGENET_CLASSNAMES)
    (tmp_path / "1000").mkdir()
    with pytest.raises(DataError, match=r"1 of 1001 .*1000"):
        image_folder(tmp_path, "imagenet")


def test_classes_by_the_decoder_equal_a_loop(tmp_path):
    torch.manual_seed(0)
    model = create_model("coca_tiny").eval()
    names = ("red star", "blue ring", "pink cross", "green square", "red ring", "large orange circle")
    records = scene_records("val", count=4)
    labels = {record.id: i for i, record in enumerate(records)}
    scenes = Classification(records, labels, names, ("a small {} above a small {}", "there is a {}"))
    evaluation = ZeroShotScores("scenes", scenes, likelihood=True)
    scores = evaluation.evaluate(model, Settings(tmp_path, batch_size=5))
    transform = build_transform(size=32)
    pictures = [record.image() for record in scenes.records] + [Image.new("RGB", (9, 9), (123, 117, 104))]
    found = torch.zeros(5, 6)
    with torch.no_grad():
        for i, picture in enumerate(pictures):
            image = transform(picture)[None]
            for c, name in enumerate(scenes.class_names):
                texts = [template.replace("{}", name) for template in scenes.templates]
                found[i, c] = sum(model.log_likelihood(image, model.tokenizer([text]))[0] for text in texts) / 2
    for way, values in (("likelihood", found[:4]), ("pmi", found[:4] - found[4])):
        expected = classification_scores(values, torch.arange(4))
        expected = {f"scenes/{way}/{name}": value for name, value in expected.items()}
        assert {name: scores[name] for name in expected} == pytest.approx(expected)
    assert evaluation.draws.keys() == scores.keys()
    without = ZeroShotScores("scenes", scenes, likelihood=True)
    assert "scenes/pmi/top1" not in without.evaluate(create_model("coca_tiny", decoder_layers=0), Settings(tmp_path))
    assert "no decoder" in without.not_run["scenes likelihood"]


def test_scene_classes(tmp_path):
    scenes = scene_classes()
    assert len(scenes.class_names) == 48
    assert not {record.id for record in scenes.records} & {record.id for record in scene_records("train")}
    for record in scenes.records:
        assert {f"{t.colour} {t.shape}" for t in decode(record.id).things} == {
            scenes.class_names[scenes.labels[record.id]]
        }
    words = {word for template in scenes.templates for word in template.replace("{}", "red star").split()}
    assert words <= set(VOCABULARIES["scenes"])
    torch.manual_seed(0)
    scores = ZeroShotScores("scenes", scenes).evaluate(create_model("coca_tiny"), Settings(tmp_path, images=30))
    assert scores.keys() == {"scenes/top1", "scenes/top5", "scenes/mean_per_class_recall"}
