"""Checkpoints of strangers run no code, name no other files and fit what they describe."""

import json
import pickle
import resource
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import coca_lit
from coca_lit.cli.train import run
from coca_lit.errors import CheckpointError, ConfigError
from coca_lit.models import create_model
from coca_lit.runs.checkpoint_io import inspect
from coca_lit.weights import MODEL_KEY, sharded
from coca_lit.weights.load import save_model
from coca_lit.weights.open_clip import to_open_clip
from helpers.fuzzing import COUNT, bounded, damaged, fuzz
from helpers.hostile import Evil
from helpers.running import compose


@pytest.mark.parametrize("key", ["init_from", "init_parts.image_encoder", "ckpt_path"])
def test_pickle_as_checkpoint_of_a_training(tmp_path, target, key):
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Evil(target)))
    cfg = compose("trainer=smoke", f"{key}={tmp_path}/evil.ckpt", f"output_dir={tmp_path}/run", "name=x")
    with pytest.raises(Exception, match=r"(?i)checkpoint|weights.only"):
        run(cfg)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b'{"a": 1}', b"hello", bytes(1000), pickle.dumps([1])])
def test_what_is_no_checkpoint(tmp_path, content):
    """PyTorch advises to load it as code."""
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"it is not a file that torch\.save writes|expected a dictionary") as caught:
        coca_lit.load_model(tmp_path / "x.ckpt")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir", "hf_hub_id"])
def test_weights_that_name_other_files(tmp_path, target, key):
    """timm would load them: `torch.load` of an older timm even runs the code in them."""
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(target)))
    model = coca_lit.create_model("coca_tiny")
    model.config.image_encoder_args[key] = str(tmp_path / "evil.pth")
    coca_lit.save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"image_encoder_args.{key}"):
        coca_lit.load_model(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"init_from: .* image_encoder_args.{key}"):
        run(compose("trainer=smoke", f"init_from={tmp_path}/model.safetensors", f"output_dir={tmp_path}/run", "name=x"))


@pytest.mark.parametrize("forged", [{"embed_dim": 39_999}, {"decoder_layers": 3}, {"embed_dim": 3 * 10**30}])
def test_names_and_shapes_must_fit_the_description_before_memory_is_taken(tmp_path, forged):
    model = create_model("coca_tiny")
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, MODEL_KEY: model.config.stored() | forged}, tmp_path / "x.ckpt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"x\.ckpt' is damaged"):
        coca_lit.load_model(tmp_path / "x.ckpt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_a_description_has_a_size_limit(tmp_path):
    model = create_model("coca_tiny")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    text = json.dumps(model.config.stored())[:-1] + ', "x": [' + "[]," * (2 * 10**6) + "[]]}"
    save_file(state, tmp_path / "x.safetensors", {MODEL_KEY: text})
    with pytest.raises(ValueError, match="describes its model in more than 4,194,304 bytes"):
        coca_lit.load_model(tmp_path / "x.safetensors")
    save_file({"visual.x": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises(ValueError, match="more than 4,194,304 bytes"):
        coca_lit.load_model(tmp_path / "open_clip_model.safetensors")


FORGED_SHARDS = {
    "a place far away": ("state_dict.net.w", [[10**12, 0]], "parts of state_dict.net.w are missing"),
    "no place": ("state_dict.net.w", "nowhere", "is not a whole checkpoint"),
}


@pytest.mark.parametrize("case", FORGED_SHARDS)
def test_a_sharded_checkpoint_with_forged_headers(tmp_path, case):
    name, offsets, said = FORGED_SHARDS[case]
    places = json.dumps({name: {"saved_offsets": offsets[0]}} if isinstance(offsets, list) else offsets)
    save_file({name: torch.zeros(2, 2)}, tmp_path / "shard.safetensors", {"DCP_SHARDING_INFO": places})
    torch.save({MODEL_KEY: {}}, tmp_path / sharded.REST)
    written = {"shard.safetensors": sharded.facts(tmp_path / "shard.safetensors")}
    (tmp_path / sharded.SHARDS).write_bytes(sharded.manifest(written))
    with pytest.raises(CheckpointError, match=said):
        coca_lit.load_model(tmp_path)


def test_a_sharded_checkpoint_that_holds_code(tmp_path, target):
    torch.save({MODEL_KEY: Evil(target)}, tmp_path / sharded.REST)
    (tmp_path / sharded.SHARDS).write_bytes(sharded.manifest({}))
    with pytest.raises(ValueError, match="it holds code"):
        coca_lit.load_model(tmp_path)
    with pytest.raises(CheckpointError, match="it holds code"):
        inspect(tmp_path)
    assert not target.exists()


FILES = ("model.safetensors", "model.ckpt", "open_clip.safetensors", "open_clip.pt")


@pytest.fixture(scope="module")
def saved(forged_files) -> dict[str, bytes]:
    """The files that hold a tiny model."""
    torch.manual_seed(0)
    model = create_model("coca_tiny").eval()
    save_model(model, forged_files / "model.safetensors")
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "coca_lit_model": model.config.stored(), "epoch": 1}, forged_files / "model.ckpt")
    small = {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 1}
    sizes = {"image_size": 32, "embed_dim": 32, "pooler_queries": 3, "context_length": 10, "text_width": 32}
    layers = {"text_layers": 1, "text_heads": 1, "decoder_layers": 1, "cls_mask": "legacy"}
    theirs = to_open_clip(create_model("coca_vit_b32", image_encoder_args=small, **sizes, **layers))
    torch.save(theirs, forged_files / "open_clip.pt")
    save_file(theirs, forged_files / "open_clip.safetensors")
    return {name: (forged_files / name).read_bytes() for name in FILES}


def damaged_ends(data: st.DataObject, content: bytes) -> bytes:
    """Damage where a file of megabytes has its structure: within its first 4 kB, or its last. Hypothesis keeps what is
    drawn, so that is not the whole file.
    """
    if data.draw(st.booleans()):
        return data.draw(damaged(content[:4096])) + content[4096:]
    return content[:-4096] + data.draw(damaged(content[-4096:]))


@pytest.mark.slow
@settings(fuzz, max_examples=COUNT or 8)  # a model is built for each that is whole
@given(st.data())
def test_forged_checkpoints(forged_files, saved, data):
    for name in FILES:
        path = forged_files / f"forged{Path(name).suffix}"
        path.write_bytes(damaged_ends(data, saved[name]))
        with bounded(), suppress(ValueError, FileNotFoundError):  # which the commands show as one sentence, too
            coca_lit.load_model(path)
        if name.endswith(".ckpt"):
            with bounded():
                inspect(path)
