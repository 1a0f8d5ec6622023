"""Losses beside the network: the answer classifier and the image decoder; and that nothing depends on the latter."""

import ast
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from running import ROOT, run

from coca_lit.auxiliary.answers import AnswerClassifier
from coca_lit.auxiliary.image_decoder import ImageDecoder, sheet
from coca_lit.data.batch import Batch
from coca_lit.data.scenes.datamodule import ScenesDataModule
from coca_lit.data.scenes.export import export_scenes
from coca_lit.data.scenes.questions import SceneQuestionsDataModule, scene_question_records
from coca_lit.errors import ConfigError
from coca_lit.lit_module import CoCaLit
from coca_lit.models import CoCa, create_model
from coca_lit.training.optim import adamw
from coca_lit.weights.load import load_model

OPTIMIZER = partial(adamw, lr=1e-3)
ANSWERS = ["red", "2", "left"]


@pytest.fixture(scope="module")
def net() -> CoCa:
    torch.manual_seed(0)
    return create_model("coca_tiny", tokenizer="scenes_vqa").eval()


@pytest.fixture(scope="module")
def questions(net: CoCa) -> Batch:
    return next(iter(SceneQuestionsDataModule(net.tokenizer, 8, train_count=8).train_dataloader()))


# The answer classifier


def test_targets_are_the_accuracies_of_answers(net: CoCa) -> None:
    classifier = AnswerClassifier(net, ANSWERS)
    people = [("red",) * 10, ("two",) * 2 + ("The left",) * 3 + ("up",) * 5, ("?",) * 10]
    expected = torch.tensor([[1, 0, 0], [0, 0.6, 0.9], [0, 0, 0]])
    torch.testing.assert_close(classifier.targets(people), expected)


def test_the_loss_is_that_of_yes_or_no_questions(net: CoCa, questions: Batch) -> None:
    torch.manual_seed(1)
    classifier = AnswerClassifier(net, ANSWERS)
    torch.nn.init.normal_(classifier.head.weight)
    with torch.no_grad():
        p = (
            classifier.head(net.multimodal_state(questions.images, questions.tokens, questions.prefix_lengths))
            .double()
            .sigmoid()
        )
        target = classifier.targets(questions.answers)
        expected = -(target * p.log() + (1 - target) * (1 - p).log()).sum(dim=1).mean()
    torch.testing.assert_close(classifier(net, questions), expected.float(), atol=1e-3, rtol=0)
    assert classifier(net, questions._replace(prefix_lengths=None, answers=())).item() == 0


def test_the_answer_chosen_is_the_likeliest(net: CoCa) -> None:
    classifier = AnswerClassifier(net, ANSWERS)
    torch.nn.init.normal_(classifier.head.weight)
    records = scene_question_records("val", count=2)
    chosen = classifier.answer(net.train(), records, batch_size=3)
    assert net.training
    net.eval()
    for record in records:
        image = torch.from_numpy(_pixels(record.image()))[None]
        ids = torch.tensor([net.tokenizer.encode(record.question)[:-1]])
        with torch.no_grad():
            assert chosen[record.id] == ANSWERS[int(classifier.head(net.multimodal_state(image, ids)).argmax())]


def _pixels(image: Image.Image) -> Any:
    import numpy as np

    return np.asarray(image).transpose(2, 0, 1).copy()


def test_a_classifier_keeps_the_decoder_from_freezing() -> None:
    net = create_model("coca_tiny", tokenizer="scenes_vqa")
    CoCaLit(net, OPTIMIZER, 0, 0.0, 0.0, auxiliary={"answers": partial(AnswerClassifier, answers=ANSWERS)})
    frozen = {name for name, p in net.decoder.named_parameters() if not p.requires_grad}
    assert frozen == {"vocabulary.weight"}
    assert not net.logit_scale.requires_grad


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(AnswerClassifier, answers=["a"]), "two or more different answers"),
        (partial(AnswerClassifier, answers=["a", "a"]), "two or more different answers"),
        (partial(AnswerClassifier, answers=ANSWERS, weight=0), "must be a number above 0, got 0"),
        (partial(ImageDecoder, size=30), r"size \(30\) must be a multiple of patch \(4\)"),
        (partial(ImageDecoder, heads=5), r"the text width \(96\) must be a multiple of heads \(5\)"),
    ],
)
def test_wrong_arguments_are_one_sentence(net: CoCa, make: Callable[[CoCa], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(net)


def test_names_of_losses_and_micro_batches(net: CoCa) -> None:
    further: dict[str, Any] = {"caption": ImageDecoder}
    with pytest.raises(ValueError, match="auxiliary: 'caption' is the name of a loss of the network"):
        CoCaLit(net, OPTIMIZER, auxiliary=further)
    with pytest.raises(ValueError, match="micro_batch_size does not go with auxiliary losses"):
        CoCaLit(net, OPTIMIZER, auxiliary={"x": ImageDecoder}, micro_batch_size=2, freeze=["image_encoder"])
    with pytest.raises(ValueError, match=r"answers need a decoder, which .* lacks"):
        AnswerClassifier(create_model("coca_tiny", decoder_layers=0), ANSWERS)


# The image decoder


def test_a_drawing_depends_on_the_caption_alone(net: CoCa) -> None:
    torch.manual_seed(0)
    decoder = ImageDecoder(net).eval()
    tokens, lengths = net.tokenizer(["a large red ring", "a small blue star"]), torch.tensor([6, 6])
    drawn = decoder.draw(net, tokens, lengths)
    assert drawn.shape == (2, 3, 32, 32)
    torch.testing.assert_close(decoder.draw(net, tokens[:1, :6], lengths[:1]), drawn[:1], atol=1e-5, rtol=1e-5)
    padded = tokens.clone()
    padded[:, 6:] = 9  # behind the end
    torch.testing.assert_close(decoder.draw(net, padded, lengths), drawn, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)


def test_patches_lie_where_they_belong(net: CoCa) -> None:
    """With a head that draws its own patch number, the picture counts from left to right and from top to bottom."""
    decoder = ImageDecoder(net, size=8, patch=4)
    numbers = torch.arange(4.0).view(1, 4, 1).expand(1, 4, 48)
    decoder.blocks = torch.nn.Module()
    decoder.blocks.forward = lambda *_, **__: numbers  # type: ignore[method-assign]  # in place of the transformer
    decoder.pixels = torch.nn.Identity()
    drawn = decoder.draw(net, net.tokenizer("a ring"), torch.tensor([4]))[0, 0]
    assert drawn[::4, ::4].tolist() == [[0, 1], [2, 3]]
    assert drawn[3, 3] == 0


def test_it_learns_to_draw_what_a_caption_says() -> None:
    """Four scenes are drawn nearer to the truth than by the mean of them, which knows no caption."""
    torch.manual_seed(0)
    net = create_model("coca_tiny")
    batch = next(iter(ScenesDataModule(net.tokenizer, 4, train_count=4).train_dataloader()))
    module = CoCaLit(net, OPTIMIZER, auxiliary={"image_decoder": partial(ImageDecoder, layers=1)})
    decoder = module.auxiliary["image_decoder"]
    optimizer = torch.optim.Adam([*net.text.parameters(), *decoder.parameters()], lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        decoder(net, batch).backward()
        optimizer.step()
    pixels = batch.images.float() / 255
    assert decoder(net, batch).item() < 0.2 * (pixels - pixels.mean(dim=0)).square().mean().item()


def test_the_sheet_shows_images_beside_drawings() -> None:
    images, drawings = torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8)
    page = sheet(["a", "b", "c"], images, drawings)
    assert page.getpixel((20, 60)) == (0, 0, 0)
    assert page.getpixel((160, 60)) == (255, 255, 255)


def test_nothing_else_knows_the_image_decoder() -> None:
    """Its module and its experiment can be removed, and everything else stays as it is."""
    own = {"coca_lit/auxiliary/image_decoder.py", "conf/experiment/scenes_image_decoder.yaml"}
    paths = [p for folder in ("coca_lit", "conf") for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml")]
    for path in paths:
        if path.relative_to(ROOT).as_posix() not in own:
            code = path.read_text()
            if path.suffix == ".py":
                code = " ".join(_names(ast.parse(code)))
            assert "coca_lit.auxiliary.image_decoder" not in code, path
            assert "ImageDecoder" not in code, path


def _names(tree: ast.AST) -> list[str]:
    return [
        str(getattr(node, "module", None) or getattr(node, "name", None) or getattr(node, "id", ""))
        for node in ast.walk(tree)
    ]


# Whole runs

SMALL = ("trainer=smoke", "scoring.images=8", "data.train_count=16")


def test_a_run_that_draws(tmp_path: Path) -> None:
    run(tmp_path, "experiment=scenes_image_decoder", *SMALL, "evals=[scenes_retrieval]")
    assert Image.open(tmp_path / "samples" / "drawings.png").size[0] > 300
    assert "train/image_decoder_loss" in (tmp_path / "metrics.csv").read_text()
    assert "val/image_decoder_loss" in (tmp_path / "metrics.csv").read_text()
    assert "<h2>drawings</h2>" in (tmp_path / "report.html").read_text()
    assert not [n for n in load_model(tmp_path / "checkpoints" / "last.ckpt").state_dict() if "image_decoder" in n]
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    trained = state["optimizer_states"][0]["state"]
    assert len(trained) == sum(1 for name in state["state_dict"] if _is_parameter(name))


def _is_parameter(name: str) -> bool:
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_a_run_that_answers(tmp_path: Path) -> None:
    results = run(tmp_path, "experiment=scenes_vqa", *SMALL)
    kinds = {"colour", "shape", "count", "place", "classifier", "blind"}
    assert set(results) <= {"scenes_vqa/accuracy", *(f"scenes_vqa/{kind}/accuracy" for kind in kinds)}
    assert {"scenes_vqa/accuracy", "scenes_vqa/classifier/accuracy", "scenes_vqa/blind/accuracy"} <= set(results)
    assert (tmp_path / "predictions" / "scenes_vqa_classifier.json").is_file()
    assert "scenes_vqa: answers" in (tmp_path / "report.html").read_text()
    assert load_model(tmp_path / "checkpoints" / "last.ckpt").tokenizer.decode([4]) != ""


def test_a_run_on_the_files_of_vqa(tmp_path: Path) -> None:
    export_scenes("vqa", tmp_path / "vqa", count=8, size=32)
    tiny = ("model.net.name=coca_tiny", "+model.net.tokenizer=scenes_vqa", "image_size=32", "data.num_workers=0")
    overrides = ("experiment=finetune_vqa", "model=coca_answers", f"data.root={tmp_path}/vqa", *tiny)
    results = run(tmp_path / "run", "trainer=smoke", *overrides)
    kinds = {"number", "other", "classifier", "blind"}
    assert {"vqa/accuracy", "vqa/classifier/accuracy"} <= set(results)
    assert set(results) <= {"vqa/accuracy", *(f"vqa/{kind}/accuracy" for kind in kinds)}
    rows = json.loads((tmp_path / "run" / "predictions" / "vqa.json").read_text())
    assert {*rows[0]} == {"question_id", "answer"}


def test_sharded_weights_and_further_losses_are_refused() -> None:
    from coca_lit.runs.setup_checks import check_strategy
    from coca_lit.training.sharding import FullySharded

    with pytest.raises(ValueError, match="auxiliary losses do not work with sharded weights"):
        check_strategy(FullySharded(), "32-true", None, None, auxiliary=True)


def test_texts_without_a_decoder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a ring\n" * 16)
    clip = ("+model.net.decoder_layers=0", f"data.text={tmp_path}/texts.txt", "evals=[]")
    with pytest.raises(ConfigError, match=r"data\.text: texts without images train the decoder, which a CLIP"):
        run(tmp_path, *SMALL, *clip)
