"""Models by name, against a small Hub on the loopback interface that `huggingface_hub`'s own client talks to."""

import hashlib
import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import open_clip
import open_clip.pretrained
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import save

import coca_lit
from coca_lit.cli.command import compose
from coca_lit.cli.words import to_override
from coca_lit.errors import CheckpointError, DataError
from coca_lit.models import CoCa, create_model
from coca_lit.models.image import CLIP_NORMALISATION
from coca_lit.tools.caption import command as caption_cli
from coca_lit.tools.checkpoint import chosen_checkpoint
from coca_lit.tools.export import command as export_cli
from coca_lit.tools.export import push_to_hub, save_pretrained
from coca_lit.tools.export.open_clip import write_open_clip
from coca_lit.weights import hub as hub_module
from coca_lit.weights.hub import DEFAULT, PHOTOS_WEIGHTS, _say, download, list_models, locate, released_models
from coca_lit.weights.load import load_model, save_model
from coca_lit.weights.open_clip import to_open_clip
from coca_lit.weights.open_clip.config import open_clip_config
from coca_lit.weights.sharded import REST
from helpers.hub_server import TOKEN, Hub, Repository, answers_at

SMALL = {
    "image_encoder_args": {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2},
    **{"image_size": 32, "embed_dim": 32, "pooler_queries": 3, "pooler_heads": 2, "text_width": 32, "text_heads": 2},
    **{"context_length": 20, "text_layers": 1, "decoder_layers": 1, "cls_mask": "legacy"},
}
L14, B32 = "laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k", "laion/CoCa-ViT-B-32-laion2B-s13B-b90k"
SAFE, BIN = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
NOBODY = "http://127.0.0.1:9"  # the port of `discard`, which no machine serves any more


@pytest.fixture(scope="module")
def model() -> CoCa:
    torch.manual_seed(0)
    return create_model("coca_ViT-B-32", **SMALL).eval()


@pytest.fixture(scope="module")
def files(model: CoCa, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository of OpenCLIP's with a file that no one asks for."""
    folder = tmp_path_factory.mktemp("export")
    write_open_clip(model, folder)
    torch.save(to_open_clip(model), folder / BIN)
    wanted = {name: (folder / name).read_bytes() for name in (SAFE, BIN, "open_clip_config.json")}
    return wanted | {"README.md": b"# A card", "pytorch_model.bin": b"of another library"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """The Hub that the client talks to instead of the real one, with an empty cache and no token."""
    with Hub() as hub:
        answers_at(monkeypatch, hub.url, cache)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's tries
        yield hub


def names_in(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("snapshots/*/*") if path.suffix in (".bin", ".safetensors")}


def assert_nothing_left(cache: Path) -> None:
    assert names_in(cache) == set()
    assert [path for path in cache.rglob("blobs/*") if path.stat().st_size > 10_000] == []


@torch.no_grad()
def assert_equal(a: CoCa, b: CoCa) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
    assert a.config.cls_mask == b.config.cls_mask


# Names


@pytest.mark.parametrize(
    "name", [f"hf-hub:{B32}", "coca_ViT-B-32/laion2b_s13b_b90k", "COCA_vit_b_32/LAION2B-s13B-b90K"]
)
def test_a_model_by_name_is_that_of_its_file(
    hub: Hub, cache: Path, files: dict[str, bytes], model: CoCa, name: str
) -> None:
    hub.repositories[B32] = Repository(files)
    assert_equal(load_model(name), model)
    assert names_in(cache) == {SAFE}  # and neither the same weights twice nor another library's
    assert not hub.asked_for("GET", "README")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["apple/mobileclip2_coca_dfn2b_s13b_docci_s12m_context128", "coca_ViT-L-14/dfn2b_s13b_docci_s12m_context128"],
)
def test_apples_layout(hub: Hub, name: str, model: CoCa, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One `.pt`, and a `config.json` that is OpenCLIP's model config itself. Its heads are not those of the rule."""
    config = open_clip_config(model)["model_cfg"]
    config["vision_cfg"]["head_width"], config["text_cfg"]["heads"] = 16, 2
    torch.save(to_open_clip(model), tmp_path / "mobileclip2_coca.pt")
    content = (tmp_path / "mobileclip2_coca.pt").read_bytes()
    files = {"mobileclip2_coca.pt": content, "config.json": json.dumps(config).encode(), "LICENSE": b"apple-amlr"}
    hub.repositories["apple/mobileclip2_coca_dfn2b_s13b_docci_s12m_context128"] = Repository(files)
    _say.cache_clear()
    for _ in range(2):
        found = load_model(name)
    assert_equal(found, model)
    assert found.config.text_heads == 2
    assert [record.getMessage() for record in caplog.records if "apple-amlr" in record.getMessage()] != []
    assert len([record for record in caplog.records if "licence" in record.getMessage()]) == 1
    assert len(hub.asked_for("GET", "/storage/")) == 1


RUN = "mammut_ViT-S-32_s12.8B_dfn_2b_globalbs180224_lr0.0025_b1_0.9_b2_0.95_sched_cosine_warmup6000_gpus512"
STUDY = "laion/scaling-laws-for-comparison"


def trained(state: dict[str, torch.Tensor], epoch: int) -> bytes:
    """A checkpoint as OpenCLIP's training writes it under DDP."""
    weights = {f"module.{name}": tensor for name, tensor in state.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    torch.save({"epoch": epoch, "name": RUN, "state_dict": weights, "optimizer": optimizer}, file := io.BytesIO())
    return file.getvalue()


@pytest.mark.slow
def test_layout_of_the_scaling_study(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder a run, a checkpoint an epoch, no config: what the tensors show and OpenCLIP's rules are enough."""
    image = {"patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 1}
    arguments = {"image_encoder_args": image, "image_size": 32, "embed_dim": 64, "text_width": 64, "text_heads": 1}
    torch.manual_seed(0)
    layers = {"text_layers": 3, "decoder_layers": 3}
    model = create_model("coca_ViT-S-32", **arguments, **layers, cls_mask="legacy").eval()
    state = to_open_clip(model)
    later = {name: tensor + 1 for name, tensor in state.items()}
    contents = {1: trained(state, 1), 2: trained(state, 2), 10: trained(later, 10)}
    files = {f"{RUN}/epoch_{n}.pt": content for n, content in contents.items()}
    hub.repositories[STUDY] = Repository(files | {"results.parquet": b"1", f"{RUN}2/epoch_11.pt": b"1"})
    last = load_model(f"hf-hub:{STUDY}/{RUN}")
    torch.testing.assert_close(last.logit_scale, model.logit_scale + 1)
    assert last.config == model.config
    for name in ("epoch_2", "epoch_2.pt"):
        assert_equal(load_model(f"hf-hub:{STUDY}/{RUN}/{name}"), model)
    folder = tmp_path / RUN
    folder.mkdir()
    for n, content in contents.items():
        (folder / f"epoch_{n}.pt").write_bytes(content)
    assert locate(folder).name == "epoch_10.pt"
    assert locate(folder / "epoch_1").name == "epoch_1.pt"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_equal(load_model(f"hf-hub:{STUDY}/{RUN}/epoch_2"), model)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        load_model(f"hf-hub:{STUDY}/{RUN}/epoch_1")


def test_a_repository_is_listed(hub: Hub) -> None:
    runs = [RUN, "ViT-S-32-alt_s1.28B_datacomp", "ViT-B-16-text-plus_s300M_relaion2b-en"]
    files = {f"{run}/epoch_{n}.pt": b"1" for run in runs for n in (1, 2)}
    hub.repositories[STUDY] = Repository(files | {"results.parquet": b"1", "clip.safetensors": b"1"})
    start = f"hf-hub:{STUDY}"
    assert list_models(f"{start}/*") == sorted(f"{start}/{name}" for name in (*runs, "clip.safetensors"))
    assert list_models(f"{start}/vit_s_32*") == [f"{start}/{runs[1]}"]
    assert list_models(f"{start}/vit_[A-S]-[0-9]2-*") == [f"{start}/{runs[1]}"]
    assert list_models(f"{start}/{RUN}/*") == [f"{start}/{RUN}/epoch_{n}.pt" for n in (1, 2)]
    for wrong, message in ((f"{start}/absent/*", "has no folder 'absent'"), ("hf-hub:a*", "expected ORG/REPO")):
        with pytest.raises(CheckpointError, match=message):
            list_models(wrong)


def test_a_config_of_another_library_is_left_alone(tmp_path: Path, files: dict[str, bytes]) -> None:
    (tmp_path / SAFE).write_bytes(files[SAFE])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {}}))
    assert load_model(tmp_path).config.text_heads == 1  # by OpenCLIP's rule of 64 a head


def test_a_slash_at_the_end_of_a_folder_changes_nothing(hub: Hub, files: dict[str, bytes]) -> None:
    hub.repositories[STUDY] = Repository({f"{RUN}/{SAFE}": files[SAFE]})
    assert locate(f"hf-hub:{STUDY}/{RUN}/").read_bytes() == files[SAFE]


def test_a_run_folder_comes_before_a_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    for name in ("run.pt", "run/last.ckpt"):
        (tmp_path / name).touch()
    assert locate(tmp_path / "run") == tmp_path / "run" / "last.ckpt"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/run") == tmp_path / "run" / "last.ckpt"


@pytest.mark.parametrize(
    "link",
    [
        *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints", "model.safetensors", "mine.pt"),
        *("checkpoints/last.ckpt/checkpoint.ckpt", "last.ckpt/shard-00001.safetensors", "checkpoint.ckpt"),
        "config.json",
    ],
)
def test_a_folder_that_links_to_weights_elsewhere_is_refused(tmp_path: Path, link: str) -> None:
    """A stranger's could show whoever exports its model a file of his own."""
    beside = {"config.json": "model.safetensors", "last.ckpt/shard-00001.safetensors": f"last.ckpt/{REST}"}
    for name in (f"private/{REST}", "private/last.ckpt", f"run/{beside.get(link, 'README.md')}"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "run" / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / link).symlink_to(tmp_path / "private" / ("" if link == "checkpoints" else REST))
    with pytest.raises(DataError, match="is a link out of its folder, which is not followed"):
        locate(tmp_path / "run")


def test_links_within_a_run_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_2.ckpt").touch()
    (tmp_path / "run" / "checkpoints" / "last.ckpt").symlink_to("step_2.ckpt")
    (tmp_path / "link").symlink_to("run")
    assert locate(tmp_path / "link") == tmp_path / "link" / "checkpoints" / "last.ckpt"


def test_a_folder_of_the_hubs_cache_links_to_its_blobs(hub: Hub, cache: Path, files: dict[str, bytes]) -> None:
    hub.repositories[B32] = Repository(files)
    file = locate(f"hf-hub:{B32}")
    assert file.is_symlink()
    assert locate(file.parent) == file


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coca_ViT-B-32", "coca_ViT-L-14"])
@torch.no_grad()
def test_weights_of_the_real_shapes(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """A gigabyte or two and a half under the released name, random: features equal OpenCLIP's."""
    torch.manual_seed(0)
    theirs = open_clip.create_model(name).eval()
    theirs.text_decoder.text_projection.normal_(std=0.02)  # OpenCLIP leaves whatever memory holds
    torch.save(theirs.state_dict(), tmp_path / BIN)
    content = (tmp_path / BIN).read_bytes()
    repo = f"laion/{name.replace('coca', 'CoCa').replace('_', '-', 1)}-laion2B-s13B-b90k"
    hub.repositories[repo] = Repository({BIN: content})
    known = released_models()[f"{name}/laion2b_s13b_b90k"]
    random_weights = known._replace(sha256={BIN: hashlib.sha256(content).hexdigest()})
    monkeypatch.setattr("coca_lit.weights.hub.released_models", lambda: {known.name: random_weights})
    ours = load_model(f"{name}/laion2b_s13b_b90k")
    pixels, captions = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8), ["a photo of two dogs"]
    mean, deviation = (torch.tensor(CLIP_NORMALISATION[key])[:, None, None] for key in ("mean", "std"))
    expected = theirs.encode_image((pixels / 255 - mean) / deviation, normalize=True)
    torch.testing.assert_close(ours.encode_image(pixels), expected, rtol=1e-4, atol=1e-5)
    expected = theirs.encode_text(open_clip.get_tokenizer(name)(captions), normalize=True)
    torch.testing.assert_close(ours.encode_text(ours.tokenizer(captions)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_revisions_are_kept_apart(hub: Hub, files: dict[str, bytes], model: CoCa) -> None:
    hub.repositories["me/coca"] = repository = Repository(files)
    first = next(iter(repository.commits))
    changed = {name: tensor + 1 for name, tensor in to_open_clip(model).items()}
    repository.commit(files | {SAFE: save(changed)})
    assert_equal(load_model(f"hf-hub:me/coca@{first}"), model)
    newer = load_model("hf-hub:me/coca")
    torch.testing.assert_close(newer.logit_scale, model.logit_scale + 1)
    # A push between the config and the weights of one download changes nothing.
    config = huggingface_hub.hf_hub_download("me/coca", "open_clip_config.json")
    assert locate("hf-hub:me/coca").parent == Path(config).parent


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("coca_ViT-L-14/mscoco_finetuned", "did you mean 'coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k'?"),
        ("laion/CoCa-ViT-B-32-laion2B-s13B-b90", f"did you mean 'hf-hub:{B32}'?"),
        ("ViT-B-32/laion2b_s34b_b79", "did you mean 'ViT-B-32/laion2b_s34b_b79k'?"),
        ("vit_h-14", "did you mean 'ViT-H-14/laion2b_s32b_b79k'?"),
    ],
)
def test_a_misspelt_name_suggests_the_right_one(name: str, hint: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(hint)):
        load_model(name)


@pytest.mark.parametrize(
    "name", ["ViT-B-32/openai", "vit_l_14/LAION2B-s32B-b82K", "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"]
)
def test_a_clip_is_refused_before_it_is_downloaded(hub: Hub, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^'{name}' is a CLIP.*coca-search.*load_dual_encoder take it$"):
        load_model(name)
    assert not hub.requests


def test_released_names_are_those_of_open_clip() -> None:
    others = ("apple/mobileclip2_coca", "laion/openMaMMUT")  # not of OpenCLIP's list
    for name, model in released_models().items():
        if model.repo.startswith(others):
            continue
        theirs = open_clip.pretrained.get_pretrained_cfg(*name.split("/"))
        assert theirs["hf_hub"] == f"{model.repo}/", name
        assert theirs.get("quick_gelu", False) == model.quick_gelu, name
    coca = [name for name in open_clip.list_pretrained(as_str=True) if name.startswith("coca")]
    assert {name.replace(":", "/") for name in coca} <= released_models().keys()


@pytest.mark.parametrize("name", [f"hf-hub:{B32}", "hf-hub:me/coca@v1.0", "ViT-B-32/openai", "coca_ViT-L-14"])
def test_names_need_no_quotes_on_the_command_line(name: str) -> None:
    assert compose("evaluate", [to_override(f"checkpoint={name}")]).checkpoint == name


# The cache, and what goes wrong


def test_a_model_in_the_cache_needs_no_connection(
    hub: Hub, files: dict[str, bytes], model: CoCa, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[B32] = Repository(files)
    hub.repositories["me/own"] = Repository({"model.safetensors": files[SAFE]})  # a repository without config
    for name in (f"hf-hub:{B32}", "hf-hub:me/own"):
        first = locate(name)
        downloads = len(hub.asked_for("GET", "/storage/"))
        assert locate(name) == first
        assert len(hub.asked_for("GET", "/storage/")) == downloads
        with monkeypatch.context() as offline:
            offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
            assert locate(name) == first
    answers_at(monkeypatch, NOBODY)
    assert_equal(load_model(f"hf-hub:{B32}"), model)
    with pytest.raises(CheckpointError, match=rf"^'me/absent'.*{NOBODY} cannot be reached"):
        locate("hf-hub:me/absent")
    with pytest.raises(CheckpointError, match=f"^{NOBODY} cannot be reached for 'me/own'.*'photos'"):
        list_models("hf-hub:me/own/*")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:me/absent", "there is no 'me/absent' at {hub}, or you may not read it: check the name"),
        ("hf-hub:me/coca@v9", "'me/coca' has no revision 'v9'"),
        ("hf-hub:me/data", "'me/data' holds no weights that can be read; expected one of open_clip_model.safetensors"),
        ("hf-hub:me/gated", "'me/gated' is gated: accept its terms at {hub}/me/gated and set HF_TOKEN"),
        ("hf-hub:a/b/c", "there is no 'a/b' at {hub}"),
        ("hf-hub:a", "'a' is not the name of a repository: expected ORG/REPO"),
        ("hf-hub:me/coca/run", "'me/coca' has no folder 'run'"),
        ("hf-hub:me/coca/../x", "'../x' is not a path within 'me/coca'"),
        ("hf-hub:me/coca/weights.pt", f"'me/coca' has no 'weights.pt': it has {SAFE}, {BIN}"),
        ("hf-hub:me/study/epoch_9", "'me/study' has no 'epoch_9': it has the epochs 1, 2"),
        ("hf-hub:me/several", "'me/several' has several files of weights: add one to its name, of a.pt, b.bin"),
        ("hf-hub:../../etc", "'../..' is not the name of a repository: expected ORG/REPO"),
    ],
)
@pytest.mark.parametrize("token", [None, "hf_of_a_stranger"])
def test_refusals_are_one_sentence(
    hub: Hub,
    cache: Path,
    files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    message: str,
    token: str | None,
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.repositories |= {
        "me/coca": Repository(files),
        "me/data": Repository({"data.csv": b"1"}),
        "me/gated": Repository(files, gated=True),
        "me/study": Repository({"epoch_1.pt": b"1", "epoch_2.pt": b"1"}),
        "me/several": Repository({"a.pt": b"1", "b.bin": b"1"}),
    }
    with pytest.raises(CheckpointError, match=f"^{re.escape(message.format(hub=hub.url))}") as refused:
        load_model(name)
    assert "\n" not in str(refused.value)
    assert_nothing_left(cache)


def test_a_broken_connection_is_resumed(
    hub: Hub, files: dict[str, bytes], model: CoCa, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = len(files[SAFE]) // 10  # what came is kept in whole chunks
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", chunk)
    hub.repositories[B32] = Repository(files)
    hub.breaks = 2
    assert_equal(load_model(f"hf-hub:{B32}"), model)
    starts = [request.range for request in hub.asked_for("GET", "/storage/")]
    assert starts == [None, f"bytes={5 * chunk}-", f"bytes={7 * chunk}-"]


@pytest.mark.parametrize(
    ("fault", "value", "message"),
    [
        ("breaks", 1000, r"^the connection to \S+ broke"),
        ("lies", -1000, "^the connection"),  # about the size
        ("lies", 1000, "^the connection"),
        ("tampered", True, rf"^'{SAFE}' of {B32} .*sha256"),
    ],
)
def test_a_download_that_fails_leaves_nothing_that_is_loaded(
    hub: Hub, cache: Path, files: dict[str, bytes], fault: str, value: int, message: str
) -> None:
    hub.repositories[B32] = Repository(files)
    setattr(hub, fault, value)
    with pytest.raises(CheckpointError, match=message):
        locate(f"hf-hub:{B32}")
    assert names_in(cache) == set()
    if fault != "lies":
        assert_nothing_left(cache)
    setattr(hub, fault, 0)
    load_model(f"hf-hub:{B32}")


def test_a_released_file_has_its_hash(hub: Hub, files: dict[str, bytes], model: CoCa) -> None:
    """The Hub serves another file than the released one under its name, and says so in good faith."""
    hub.repositories[L14] = Repository({name: files[name] for name in (BIN, "open_clip_config.json")})
    for _ in range(2):  # from the cache, too
        with pytest.raises(CheckpointError, match=rf"^'{BIN}' of {L14} .*sha256"):
            load_model("coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k")
    assert_equal(load_model(f"hf-hub:{L14}@main"), model)


# Out


@pytest.mark.slow
def test_pushed_and_pulled(
    hub: Hub, model: CoCa, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    graphs = dict.fromkeys(["decoder.onnx", "decoder.onnx.data", "text_encoder.onnx"], b"of an earlier push")
    hub.repositories["me/my-coca"] = repository = Repository(files | graphs | {"LICENSE": b"MIT"})
    assert push_to_hub(model, "me/my-coca") == "hf-hub:me/my-coca"
    assert repository.files.keys() == {"model.safetensors", "README.md", "LICENSE", "pytorch_model.bin"}
    assert 'coca_lit.load_model("hf-hub:me/my-coca")' in repository.files["README.md"].decode()
    assert_equal(load_model("hf-hub:me/my-coca"), model)
    push_to_hub(model, "me/new", private=True)
    assert hub.repositories["me/new"].private
    save_pretrained(model, tmp_path / "saved")
    save_pretrained(model, tmp_path / "saved")  # again
    assert_equal(load_model(tmp_path / "saved"), model)
    (tmp_path / "saved" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        save_pretrained(model, tmp_path / "saved")


@pytest.mark.slow
def test_an_export_is_pushed_with_its_card_and_pictures(
    hub: Hub, model: CoCa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(run / "samples" / "scenes.png")
    save_model(model, run / "model.safetensors")
    (run / "results.json").write_text(json.dumps({"scenes/CIDEr": 1.5}))
    words = [f"checkpoint={run}", "format=open_clip", f"output={tmp_path}/out", "push_to=me/my-coca"]
    with pytest.raises(CheckpointError, match="HF_TOKEN"):
        export_cli.run(compose("export", words))
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_stranger")
    with pytest.raises(CheckpointError, match=r"\(401\).*overwrite=true"):
        export_cli.run(compose("export", words))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export_cli.run(compose("export", [*words, "overwrite=true"]))
    pushed = hub.repositories["me/my-coca"].files
    assert pushed == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    card = pushed["README.md"].decode()
    for part in ("![samples_scenes.png](samples_scenes.png)", "| CIDEr |", "hf-hub:me/my-coca", "push_to=me/my-coca"):
        assert part in card
    assert_equal(load_model("hf-hub:me/my-coca"), model)
    export_cli.run(compose("export", [*words, "overwrite=true"]))  # the pictures are part of an export


def test_a_push_without_rights_is_one_sentence(hub: Hub, model: CoCa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_stranger")
    with pytest.raises(CheckpointError, match=rf"^{hub.url} .*'me/my-coca' \(401\)"):
        push_to_hub(model, "me/my-coca")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"'my-coca'.*ORG/REPO"):
        push_to_hub(model, "my-coca")
    with pytest.raises(CheckpointError, match=r"^HF_HUB_OFFLINE"):
        push_to_hub(model, "me/my-coca")


# Without a network


@pytest.fixture(params=["refused", "forbidden"])
def offline(request: pytest.FixtureRequest, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it takes the network away: nobody answers, or HF_HUB_OFFLINE is set. Waiting for it then is an error."""

    def take_away() -> None:
        if request.param == "forbidden":
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        else:
            answers_at(monkeypatch, NOBODY)

        def wait(seconds: float) -> None:
            raise AssertionError(f"waits {seconds} s and tries again")

        monkeypatch.setattr(time, "sleep", wait)

    return take_away


def test_without_a_network_commands_take_the_model_of_the_package(
    hub: Hub, files: dict[str, bytes], offline: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[L14] = Repository(files)
    assert chosen_checkpoint(None) == DEFAULT
    offline()
    capsys.readouterr()
    assert chosen_checkpoint(None) == "photos"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "photos" in said
    assert chosen_checkpoint(None, offline=False) == DEFAULT
    assert chosen_checkpoint("mine.ckpt") == "mine.ckpt"


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_not_waited_for_where_a_model_is_cached(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    hub.repositories[L14] = Repository({SAFE: files[SAFE], "open_clip_config.json": files["open_clip_config.json"]})
    cached = download(L14)

    def busy(*_: object, **__: object) -> None:
        answer: Any = SimpleNamespace(status_code=status, headers={}, request=None)
        raise HfHubHTTPError(f"{status}", response=answer)

    monkeypatch.setattr(hub_module, "_listed", busy)
    assert download(L14) == cached
    with pytest.raises(CheckpointError, match=f"answered {status} for '{B32}': try again later"):
        download(B32)


def test_without_a_network_a_cached_model_is_taken(
    hub: Hub, files: dict[str, bytes], offline: Callable[[], None]
) -> None:
    hub.repositories[L14] = Repository({SAFE: files[SAFE], "open_clip_config.json": files["open_clip_config.json"]})
    download(L14)
    offline()
    assert chosen_checkpoint(None) == DEFAULT
    assert locate(DEFAULT).name == SAFE


@pytest.mark.parametrize("kind", ["socks5", "gopher"])  # without the package `socksio`; of no client
def test_behind_a_proxy_of_another_kind(
    hub: Hub,
    model: CoCa,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    monkeypatch.setenv("ALL_PROXY", f"{kind}://me:hunter2@127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setitem(sys.modules, "socksio", None)
    request.addfinalizer(huggingface_hub.close_session)
    huggingface_hub.close_session()  # another one is made with this proxy
    _say.cache_clear()
    assert [chosen_checkpoint(None) for _ in range(2)] == ["photos"] * 2
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == [f"{hub.url}"]
    for ask in (lambda: push_to_hub(model, "me/my-coca"), lambda: list_models("hf-hub:me/x/*"), lambda: download(L14)):
        with pytest.raises(CheckpointError, match=rf"{hub.url} cannot be"):
            ask()
    assert "hunter2" not in caplog.text


def test_the_package_has_the_name_and_a_folder_needs_a_separator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert locate("photos") == PHOTOS_WEIGHTS
    for name in ("photos/", "./photos"):
        with pytest.raises(FileNotFoundError, match="in the folder"):
            locate(name)


# Commands


@pytest.mark.slow
def test_a_photo_is_captioned_without_naming_a_model(
    hub: Hub, cache: Path, files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[L14] = Repository(files)
    Image.effect_noise((40, 50), 99).convert("RGB").save(tmp_path / "photo.png")
    caption_cli.run(compose("caption", [f"images=[{tmp_path}/photo.png]", "num_workers=0", "precision=fp32"]))
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path}/photo.png\t")
    said = "coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k, OpenCLIP's CoCa finetuned on MSCOCO, 2.55 GB"
    assert f"{said}, kept in {cache}; a smaller one: checkpoint=coca_ViT-B-32 (1.01 GB)" in err


def test_the_table_of_public_models_has_all_captioners() -> None:
    page = Path(coca_lit.__file__).parent / "weights" / "README.md"
    rows = []
    for name, contexts in re.findall(r"^\| `([^`/:]+/[^`/]+)` \| ([\d, ]*)", page.read_text(), re.MULTILINE):
        rows += [name.replace("contextN", f"context{n}") for n in contexts.strip().split(", ")]
    assert sorted(rows) == sorted(list_models("coca*") + list_models("mammut*"))
    assert sorted(rows) == sorted(name for name, model in released_models().items() if model.captions)
