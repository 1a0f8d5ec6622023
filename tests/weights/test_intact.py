"""Bits that flip on a disk or on the way: found wherever weights are read, or without effect."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coca_lit.errors import why_unreadable
from coca_lit.models import CoCa, create_model
from coca_lit.tools.export.open_clip import write_open_clip
from coca_lit.weights.intact import check_archive
from coca_lit.weights.load import MODEL_KEY, load_dual_encoder, load_model, read_torch, save_model
from coca_lit.weights.start import load_image_weights
from helpers.slow import slow

FLIPS = 60


@pytest.fixture(scope="module")
def model() -> CoCa:
    torch.manual_seed(0)
    return create_model("coca_tiny", text_layers=1, decoder_layers=1, image_encoder_args={"channels": [8, 8, 8, 8]})


def flip(content: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


def write(model: CoCa, path: Path) -> None:
    if path.suffix == ".safetensors":
        save_model(model, path)
    else:
        state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": state, MODEL_KEY: model.config.stored()}, path)


@pytest.mark.parametrize("name", [*slow("model.ckpt"), "model.safetensors"])
def test_a_flipped_bit_is_found_or_changes_nothing(model: CoCa, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(model, path)
    content, rng = path.read_bytes(), random.Random(0)
    everywhere = [rng.randrange(len(content)) for _ in range(FLIPS)]
    ends = [rng.randrange(1500) for _ in range(FLIPS)] + [len(content) - 1 - rng.randrange(1500) for _ in range(FLIPS)]
    expected, harmless = model.state_dict(), 0
    for position in [*everywhere, *ends]:
        path.write_bytes(flip(content, position, rng.randrange(8)))
        try:
            loaded = load_model(path)
        except ValueError:
            continue
        harmless += 1
        assert loaded.config == model.config
        torch.testing.assert_close(loaded.state_dict(), expected, atol=0, rtol=0)
    assert harmless < FLIPS  # such as times in the archive


def test_flips_in_the_tensors_are_found(model: CoCa, tmp_path: Path) -> None:
    """Every one, and in an export for OpenCLIP too."""
    write_open_clip(
        create_model(
            "coca_vit_b32",
            image_encoder_args={"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 1},
            **{"image_size": 32, "embed_dim": 32, "pooler_queries": 3, "context_length": 10, "text_width": 32},
            **{"text_layers": 1, "text_heads": 2, "decoder_layers": 1, "cls_mask": "legacy"},
        ),
        tmp_path,
    )
    write(model, tmp_path / "model.safetensors")
    rng = random.Random(1)
    for path in (tmp_path / "open_clip_model.safetensors", tmp_path / "model.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for _ in range(10):
            path.write_bytes(flip(content, rng.randrange(start, len(content)), rng.randrange(8)))
            with pytest.raises(ValueError, match=r"safetensors' is damaged"):
                load_model(path)
        path.write_bytes(content)
        load_model(path)


def test_every_way_in_is_checked(model: CoCa, tmp_path: Path) -> None:
    write(model, tmp_path / "model.ckpt")
    trunk = {name: tensor.clone() for name, tensor in model.image_encoder.trunk.state_dict().items()}
    torch.save(trunk, tmp_path / "encoder.pt")
    for name, load in (("model.ckpt", lambda _, path: load_dual_encoder(path)), ("encoder.pt", load_image_weights)):
        content = (tmp_path / name).read_bytes()
        at = content.index(trunk["bn1.running_var"].numpy().tobytes())
        (tmp_path / name).write_bytes(flip(content, at, 0))
        with pytest.raises(ValueError, match=rf"{name}' .* part '.*'"):
            load(model, tmp_path / name)


def test_the_same_weights_are_the_same_bytes(model: CoCa, tmp_path: Path) -> None:
    for i in range(4):
        write(model, tmp_path / f"{i}.safetensors")
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(4)}) == 1


def test_files_without_a_digest_are_read(model: CoCa, tmp_path: Path) -> None:
    """Of others, and ours from before there was one."""
    write(model, tmp_path / "new.safetensors")
    save_file(
        load_file(tmp_path / "new.safetensors"),
        tmp_path / "old.safetensors",
        {MODEL_KEY: json.dumps(model.config.stored())},
    )
    assert load_model(tmp_path / "old.safetensors").config == model.config
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    content = {"state_dict": state, MODEL_KEY: model.config.stored()}
    torch.save(content, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    assert load_model(tmp_path / "legacy.ckpt").config == model.config


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_that_a_training_stores_is_taken_for_code(model: CoCa, tmp_path: Path, zipped: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    types = [torch.bfloat16, torch.bool, torch.complex64, torch.int8]
    types += [torch.uint16, torch.float8_e4m3fn] if zipped else []  # which the old format lacks
    content = {
        "state_dict": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "tensors": [torch.zeros(2).to(kind) for kind in types],
        "sizes": [torch.Size([2, 3]), torch.device("cpu"), torch.float16],
    }
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    assert check_archive(tmp_path / "x.ckpt") is zipped
    torch.testing.assert_close(read_torch(tmp_path / "x.ckpt")["state_dict"], content["state_dict"], atol=0, rtol=0)


def test_an_error_without_a_text_has_a_name() -> None:
    assert why_unreadable(RuntimeError()) == "RuntimeError"


def test_programs_are_told_from_damaged_files(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pt")
    with pytest.raises(ValueError, match=r"program\.pt': it is a program of TorchScript"):
        load_model(tmp_path / "program.pt")


def test_what_nobody_reads_is_not_written(tmp_path: Path) -> None:
    words = [f"слово{chr(1072 + i // 1024 % 32)}{chr(1072 + i // 32 % 32)}{chr(1072 + i % 32)}" for i in range(30_000)]
    model = create_model("coca_tiny", tokenizer=words)
    save_model(model, tmp_path / "model.safetensors")  # not six bytes for each letter
    assert load_model(tmp_path / "model.safetensors").tokenizer.spec == words
    model.config = replace(model.config, tokenizer=[word * 20 for word in words])
    with pytest.raises(ValueError, match=r"described in [\d,]+ bytes, and 4,194,304 are read: use fewer words"):
        save_model(model, tmp_path / "large.safetensors")
