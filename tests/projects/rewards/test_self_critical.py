"""Self-critical training: what is drawn, rewarded and differentiated, on one rank and on two, killed and resumed."""

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

from coca_lit.cli import command
from coca_lit.cli.module import build_module
from coca_lit.data.batch import Batch
from coca_lit.data.scenes.render import scene_records
from coca_lit.data.transforms import build_transform
from coca_lit.distributed import rank, world_size
from coca_lit.errors import ConfigError
from coca_lit.lit_module import CoCaLit
from coca_lit.models import CoCa, create_model
from coca_lit.models.coca import CAPTION
from coca_lit.projects.rewards.cider import CiderD
from coca_lit.projects.rewards.self_critical import END, SelfCritical
from coca_lit.training.compatibility import NEEDS_WHOLE_WEIGHTS, SHARDED, check_together, features
from coca_lit.training.objectives import terms_of
from coca_lit.training.optim import AdamW
from helpers.running import logged, run
from helpers.scored_runs import check_experiment_on_scenes

RECORDS = scene_records("train", count=8)
REFERENCES = {str(record.id): record.captions for record in RECORDS}
KEYS = list(REFERENCES)[:4]
PIXELS = [build_transform(size=32)(record.image()) for record in RECORDS]


def network() -> CoCa:
    torch.manual_seed(0)
    return create_model("coca_tiny", image_encoder_args={"channels": [8, 8, 8, 8], "output_stride": 8}).eval()


def pixels() -> Tensor:
    return torch.stack(PIXELS[:4])


class Scripted(SelfCritical):
    """Two known captions per image: a reference and a wrong one; the fourth image's do not end."""

    def _draw(self, net: CoCa, images: Tensor) -> Tensor:
        rows = []
        for i in range(rank() * 4 // world_size(), (rank() + 1) * 4 // world_size()):
            texts = (REFERENCES[KEYS[i]][0], "a small green circle")
            rows.append(net.tokenizer(list(texts))[:, : self._longest(net)])
        ids = torch.stack(rows)
        if rank() == world_size() - 1:
            ids[-1] = torch.where(ids[-1] == net.tokenizer.pad_id, 5, ids[-1]).where(ids[-1] != 2, 5)
            ids[-1, :, -1] = net.tokenizer.eot_id
        return ids


class WithUnknownWords(Scripted):
    """The model has written an unknown word, too."""

    def _draw(self, net: CoCa, images: Tensor) -> Tensor:
        ids = super()._draw(net, images)
        ids[:, 1, 2] = net.tokenizer.unk_id
        return ids


def ready(kind: type[SelfCritical] = SelfCritical, samples: int = 2) -> SelfCritical:
    made = kind(samples, max_length=16)
    made.read(REFERENCES)
    return made


def scripted_gradient(kind: type[SelfCritical] = Scripted) -> tuple[dict[str, Tensor], dict[str, float]]:
    net = network().double()
    own = slice(rank() * 4 // world_size(), (rank() + 1) * 4 // world_size())
    images = net.image_encoder(pixels()[own])
    loss, measures = ready(kind).policy(net, images, KEYS[own])
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}, measures


@pytest.mark.parametrize("kind", [Scripted, WithUnknownWords])
def test_gradient_equals_captions_one_by_one(kind: type[SelfCritical]) -> None:
    """The packed pass over all samples, against a pass for each with its own copy of the image."""
    found, measures = scripted_gradient(kind)
    net, total, rewards = network().double(), torch.zeros(()), []
    scorer = CiderD({key: [[*text.split(), END] for text in texts] for key, texts in REFERENCES.items()})
    ids = kind(2, max_length=16)._draw(net, pixels())
    for i, key in enumerate(KEYS):
        texts = [net.tokenizer.decode(row).split() for row in ids[i]]
        own = scorer(key, [words + ([] if i == 3 else [END]) for words in texts])
        rewards += own
        for k in range(2):
            row = ids[i, k]
            length = int((row == net.tokenizer.eot_id).int().argmax()) + (i != 3)  # a forced end is not differentiated
            out = net(pixels()[i : i + 1], row[None], torch.tensor([length]), needs=CAPTION)
            log_p = out.logits.log_softmax(-1).gather(1, row[1:length, None]).sum()
            total = total - (own[k] - own[1 - k]) * log_p / 8
    total.backward()
    expected = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert measures["reward"] == pytest.approx(sum(rewards) / 8, rel=1e-5)
    assert rewards[0] > rewards[1]


def test_another_reward_takes_the_place_of_cider() -> None:
    """A reward of the number of words, the end included where the caption has one."""
    seen = {}

    def lengths(references):
        seen.update(references)
        return lambda key, captions: [float(len(words)) for words in captions]

    net, made = network(), Scripted(2, max_length=16, reward=lengths)
    made.read(REFERENCES)
    _, measures = made.policy(net, net.image_encoder(pixels()), KEYS)
    captions = [caption for key in KEYS[:3] for caption in (REFERENCES[key][0], "a small green circle")]
    cut_off = 2 * 14  # start and forced end are no words
    assert measures["reward"] == (sum(len(caption.split()) + 1 for caption in captions) + cut_off) / 8
    assert seen[KEYS[0]][0] == [*REFERENCES[KEYS[0]][0].split(), END]


def test_a_mirror_image_is_rewarded_as_the_image_itself() -> None:
    """A caption that says the opposite of the references, which are of the photo that is not mirrored."""
    said = {"left": "a red circle left of a blue square", "right": "a red circle right of a blue square"}

    class Side(SelfCritical):
        def _draw(self, net: CoCa, images: Tensor) -> Tensor:
            return net.tokenizer([said[side], "a small green circle"])[None, :, : self._longest(net)]

    net, found = network(), {}
    for side, answers in (
        ("left", ()),
        ("left", (said["left"],)),
        ("right", (said["right"],)),
        ("right", ("another",)),
    ):
        made = Side(2, max_length=16)
        made.read(REFERENCES | {"0": (said["left"],)})
        tokens = net.tokenizer([said[side]])
        batch = Batch(pixels()[:1], tokens, (tokens > 0).sum(1), ["0"], extras={"captions": [answers]})
        terms_of(net, [made], batch)
        found[side, answers] = made.measures["reward"]
    plain, same, mirrored, other = found.values()
    assert plain == same == mirrored > other


def test_questions_are_refused() -> None:
    net = network()
    tokens = net.tokenizer([REFERENCES[key][0] for key in KEYS])
    batch = Batch(pixels(), tokens, (tokens > 0).sum(1), KEYS, prefix_lengths=torch.full((4,), 2))
    objective = ready()
    objective.config_key = "model.objectives.mine"
    with pytest.raises(ConfigError, match=r"model\.objectives\.mine"):
        terms_of(net, [objective], batch)


@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_one_process(on_ranks) -> None:
    expected, measures = scripted_gradient()
    results = on_ranks(2, scripted_gradient)
    mean = {name: (results[0][0][name] + results[1][0][name]) / 2 for name in expected}
    torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-5)
    assert sum(own["reward"] for _, own in results) / 2 == pytest.approx(measures["reward"], rel=1e-5)


def test_captions_are_drawn_from_the_model_and_images_encoded_once() -> None:
    images = pixels()
    net = network()
    calls = []
    net.image_encoder.trunk.register_forward_hook(lambda *_: calls.append(1))
    objective = ready(samples=3)
    module = CoCaLit(net, AdamW(lr=0.1), objectives={"rewards": objective})
    module.log_dict = lambda *_, **__: None
    module.log = lambda *_, **__: None
    tokens = net.tokenizer([REFERENCES[key][0] for key in KEYS])
    batch = Batch(images, tokens, (tokens > 0).sum(1), KEYS)
    torch.manual_seed(5)
    loss = module.training_step(batch, 0)
    torch.manual_seed(5)
    again = net.generate(images, strategy="sample", num_captions=3, max_length=16)
    calls.clear()
    torch.manual_seed(5)
    assert torch.equal(objective._draw(net, net.image_encoder(images)), again)
    assert calls == [1]
    loss.backward()
    assert net.image_encoder.trunk.conv1[0].weight.grad is not None  # trained, if it is not frozen


# The smallest run: four steps, all parts trained and the contrastive loss beside
POLICY = "model.objectives.self_critical"
RUN = (
    *("experiment=scst_mscoco", "data=scenes", "init_from=null", "evals=[]", "image_size=32"),
    *("trainer=cpu", "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=1"),
    *("data.train_count=8", "data.batch_size=4", f"{POLICY}.samples=2", f"{POLICY}.max_length=8"),
    *("model.net.name=coca_tiny", "+model.net.text_layers=1", "+model.net.decoder_layers=1"),
    "model.contrastive_weight=0.5",
)


@pytest.mark.slow
def test_a_run_logs_its_rewards_and_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    run(tmp_path / "whole", *RUN, "callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep_last=9")
    run(tmp_path / "again", *RUN, f"ckpt_path={tmp_path}/whole/checkpoints/step_1.ckpt")
    whole, again = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "again")
    )
    torch.testing.assert_close(again["state_dict"], whole["state_dict"], rtol=0, atol=0)
    values = logged(tmp_path / "whole")
    for name in ("reward", "advantage", "policy_loss", "contrastive_loss"):
        assert len(values[f"train/{name}"]) == 4, name
    assert len(values["train/scoring_share"]) == 3
    assert all(0 < share < 1 for share in values["train/scoring_share"])
    assert "train/caption_loss" not in values
    assert len(values["val/caption_loss"]) == 2


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({"dropout": 0.1}, {}, "net.dropout=0"),
        ({}, {"weight": 0}, "policy_weight"),
        ({"decoder_layers": 0}, {}, "decoder"),
    ],
)
def test_what_does_not_go_together_is_refused(model: dict, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoCaLit(create_model("coca_tiny", **model), AdamW(lr=0.1), objectives={"rewards": SelfCritical(**options)})


def test_all_captions_and_whole_weights_are_needed() -> None:
    objective = SelfCritical()
    objective.config_key = "model.objectives.mine"
    with pytest.raises(ConfigError, match=r"mine .*LightningDataModule .*training_captions"):
        objective.take_data(L.LightningDataModule())
    trainer = SimpleNamespace(strategy=None, precision="32-true", callbacks=[], accumulate_grad_batches=1)
    found = features(trainer, network(), [objective], None)
    assert found[NEEDS_WHOLE_WEIGHTS] == "model.objectives.mine"
    with pytest.raises(ConfigError, match=r"trainer=fsdp .*model\.objectives\.mine"):
        check_together(found | {SHARDED: "trainer=fsdp"})


def test_a_plan_does_not_count_it() -> None:
    cfg = command.compose("plan", ["experiment=scst_mscoco", "init_from=null", "model.net.name=coca_tiny"])
    (objective,) = build_module(cfg).configured_objectives
    assert not objective.is_counted


# An untrained encoder of the experiment, in place of the tiny one, and little text.
FEW_PHOTOS = (
    *("init_parts.image_encoder=null", "+model.net.image_encoder_args={}", "data.train_count=8", "data.batch_size=8"),
    *("model.net.text_width=96", "model.net.text_heads=4"),
)


@pytest.mark.slow
def test_the_experiment_runs_on_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_experiment_on_scenes(monkeypatch, tmp_path, "scst_flickr8k", *FEW_PHOTOS)
