"""Models by name, against a small Hub on the loopback interface that `huggingface_hub`'s own client talks to."""

import errno
import hashlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import open_clip.pretrained
import pytest
import torch
from hub_server import TOKEN, Hub, Repository
from PIL import Image
from safetensors.torch import save
from test_mammut import released_files

from coca_lit.cli import caption as caption_cli
from coca_lit.cli import export as export_cli
from coca_lit.cli.assembly import build_settings
from coca_lit.cli.command import compose, to_override
from coca_lit.errors import CheckpointError, ConfigError
from coca_lit.export.open_clip import write_open_clip
from coca_lit.models import CoCa, create_model
from coca_lit.models.clip import CLIP, QuickGELU
from coca_lit.models.image import CLIP_NORMALISATION
from coca_lit.weights.hub import locate, released_models
from coca_lit.weights.load import copy_weights, load_dual_encoder, load_model, save_model
from coca_lit.weights.open_clip import to_open_clip

SMALL = {
    "image_encoder_args": {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2},
    **{"image_size": 32, "embed_dim": 32, "pooler_queries": 3, "pooler_heads": 2, "text_width": 32, "text_heads": 2},
    **{"context_length": 20, "text_layers": 1, "decoder_layers": 1, "cls_mask": "legacy"},
}
L14, B32 = "laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k", "laion/CoCa-ViT-B-32-laion2B-s13B-b90k"
OPENMAMMUT = "laion/openMaMMUT-ViT-L-14-DataComp-1.4B-s12.8B-b180K"
SAFE, BIN = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"


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
    constants = huggingface_hub.constants
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the Hub's second protocol, in a library of its own
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
    assert a.config["cls_mask"] == b.config["cls_mask"]


# Names


@pytest.mark.parametrize(
    "name",
    [
        f"hf-hub:{B32}",
        "coca_ViT-B-32/laion2b_s13b_b90k",
        "COCA_vit_b_32/LAION2B-s13B-b90K",
    ],
)
def test_a_model_by_name_is_that_of_its_file(
    hub: Hub, cache: Path, files: dict[str, bytes], model: CoCa, name: str
) -> None:
    hub.repositories[B32] = Repository(files)
    assert_equal(load_model(name), model)
    assert names_in(cache) == {SAFE}  # and neither the same weights twice nor another library's
    assert not hub.asked_for("GET", "README")


def test_openmammut_by_its_name(hub: Hub) -> None:
    """In the layout of the code that trained it; random weights of a small one."""
    model, state, config = released_files()
    preprocess = {**CLIP_NORMALISATION, "interpolation": "bicubic", "resize_mode": "shortest"}
    files = {"open_clip_config.json": json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}).encode()}
    hub.repositories[OPENMAMMUT] = Repository({SAFE: save(state), **files})
    found = load_model(f"hf-hub:{OPENMAMMUT}")
    assert_equal(found, model)
    assert found.preprocessing == model.preprocessing
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert torch.equal(found.generate(image), model.generate(image))
    assert torch.equal(found.encode_text(found.tokenizer(["a dog"])), model.encode_text(model.tokenizer(["a dog"])))


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


def test_an_architecture_without_a_tag_is_the_captioner(hub: Hub, files: dict[str, bytes]) -> None:
    hub.repositories[L14] = Repository(files)
    assert L14.replace("/", "--") in str(locate("coca_ViT-L-14"))


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


def test_folders(tmp_path: Path, model: CoCa) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    assert locate(run) == run / "checkpoints" / "last.ckpt"
    (run / "checkpoints" / "best.ckpt").touch()
    assert locate(str(run)) == run / "checkpoints" / "best.ckpt"
    assert locate(run / "checkpoints") == run / "checkpoints" / "best.ckpt"
    exported.mkdir()
    save_model(model, exported / "model.safetensors")
    assert_equal(load_model(exported), model)
    target = create_model("coca_vit_b32", **SMALL)
    copy_weights(load_dual_encoder(exported), target, exported)
    assert_equal(target, model)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("coca_ViT-L-14/mscoco_finetuned", "did you mean 'coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k'?"),
        ("laion/CoCa-ViT-B-32-laion2B-s13B-b90k", f"did you mean 'hf-hub:{B32}'?"),
        ("ViT-B-32/laion2b_s34b_b79", "did you mean 'ViT-B-32/laion2b_s34b_b79k'?"),
        ("vit_h-14", "did you mean 'ViT-H-14/laion2b_s32b_b79k'?"),
    ],
)
def test_a_misspelt_name_suggests_the_right_one(name: str, hint: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(hint)):
        load_model(name)


def test_released_names_are_those_of_open_clip() -> None:
    for name, model in released_models().items():
        theirs = open_clip.pretrained.get_pretrained_cfg(*name.split("/"))
        assert theirs["hf_hub"] == f"{model.repo}/", name
        assert theirs.get("quick_gelu", False) == model.quick_gelu, name
    coca = [name for name in open_clip.list_pretrained(as_str=True) if name.startswith("coca")]
    assert {name.replace(":", "/") for name in coca} <= released_models().keys()


def test_the_activation_of_a_released_clip_is_known(hub: Hub) -> None:
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    clip = open_clip.CLIP(48, vision_cfg=vision, text_cfg=text)
    weights = {SAFE: save({name: tensor.contiguous() for name, tensor in clip.state_dict().items()})}
    for name, quick in (("ViT-B-32/openai", True), ("ViT-B-32/laion2b_s34b_b79k", False)):
        hub.repositories[released_models()[name].repo] = Repository(weights)
        found = load_dual_encoder(name)
        assert isinstance(found, CLIP)
        assert any(isinstance(part, QuickGELU) for part in found.modules()) == quick


def test_presets_have_open_clip_names_too() -> None:
    for name in ("coca_ViT-B-32", "COCA-vit_b-32", "coca_vit_b32"):
        with torch.device("meta"):
            assert create_model(name, text_layers=1, decoder_layers=1).config["embed_dim"] == 512


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
    nobody = "http://127.0.0.1:9"  # the port of `discard`, which no machine serves any more
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody + "/{repo_id}/resolve/{revision}/{filename}"
    )
    assert_equal(load_model(f"hf-hub:{B32}"), model)
    with pytest.raises(CheckpointError, match=rf"^'me/absent' is not in \S+ and {nobody} cannot be reached: check the"):
        locate("hf-hub:me/absent")


def test_weights_of_others_without_their_config_are_not_guessed_at(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenCLIP itself leaves the weights alone in the cache when it is asked for a tag."""
    hub.repositories[B32] = Repository(files)
    huggingface_hub.hf_hub_download(B32, BIN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids downloading it"):
        locate(f"hf-hub:{B32}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    locate(f"hf-hub:{B32}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:me/absent", "there is no 'me/absent' at {hub}, or you may not read it: check the name"),
        ("hf-hub:me/coca@v9", "'me/coca' has no revision 'v9'"),
        ("hf-hub:me/data", "'me/data' holds no weights that can be read; expected one of open_clip_model.safetensors"),
        ("hf-hub:me/gated", "'me/gated' is gated: accept its terms at {hub}/me/gated and set HF_TOKEN"),
        ("hf-hub:a/b/c", "'a/b/c' is not the name of a repository: expected ORG/REPO"),
        ("hf-hub:../../etc", "'../../etc' is not the name of a repository: expected ORG/REPO"),
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
    }
    with pytest.raises(CheckpointError, match=f"^{re.escape(message.format(hub=hub.url))}") as refused:
        load_model(name)
    assert "\n" not in str(refused.value)
    assert_nothing_left(cache)


def test_a_token_opens_a_gated_repository(
    hub: Hub, files: dict[str, bytes], model: CoCa, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repositories["me/gated"] = Repository(files, gated=True)
    assert_equal(load_model("hf-hub:me/gated"), model)


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


def test_a_connection_that_never_holds_leaves_nothing(hub: Hub, cache: Path, files: dict[str, bytes]) -> None:
    hub.repositories[B32] = Repository(files)
    hub.breaks = 1000
    with pytest.raises(CheckpointError, match=r"^the connection to \S+ broke while files of .* run the same command"):
        locate(f"hf-hub:{B32}")
    assert_nothing_left(cache)
    hub.breaks = 0
    load_model(f"hf-hub:{B32}")


def test_other_bytes_than_announced_are_removed(hub: Hub, cache: Path, files: dict[str, bytes]) -> None:
    hub.repositories[B32] = Repository(files)
    hub.tampered = True
    with pytest.raises(CheckpointError, match=rf"^'{SAFE}' of {B32} did not arrive as it was sent"):
        locate(f"hf-hub:{B32}")
    assert_nothing_left(cache)
    hub.tampered = False
    load_model(f"hf-hub:{B32}")


def test_a_released_file_has_its_hash(hub: Hub, files: dict[str, bytes], model: CoCa) -> None:
    """The Hub serves another file than the released one under its name, and says so in good faith."""
    hub.repositories[L14] = Repository({name: files[name] for name in (BIN, "open_clip_config.json")})
    for _ in range(2):  # from the cache, too
        with pytest.raises(
            CheckpointError, match=rf"^'{BIN}' of {L14} is not the released file \(sha256 \w+, expected"
        ):
            load_model("coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k")
    assert_equal(load_model(f"hf-hub:{L14}@main"), model)


def test_no_space_is_one_sentence(
    hub: Hub, cache: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(url: str, file: Any, **_: Any) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.repositories[B32] = Repository(files)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(
        CheckpointError, match=rf"^there is no space left in {cache} for '{B32}': free some, or set HF_"
    ):
        locate(f"hf-hub:{B32}")
    assert_nothing_left(cache)


# Out


def test_pushed_and_pulled(
    hub: Hub, model: CoCa, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repositories["me/my-coca"] = repository = Repository(files | {"LICENSE": b"MIT"})
    assert model.push_to_hub("me/my-coca") == "hf-hub:me/my-coca"
    assert repository.files.keys() == {"model.safetensors", "README.md", "LICENSE", "pytorch_model.bin"}
    assert 'coca_lit.load_model("hf-hub:me/my-coca")' in repository.files["README.md"].decode()
    assert_equal(CoCa.from_pretrained("me/my-coca"), model)
    assert_equal(load_model("hf-hub:me/my-coca"), model)
    model.push_to_hub("me/new", private=True)
    assert hub.repositories["me/new"].private
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")  # again
    assert_equal(CoCa.from_pretrained(tmp_path / "saved"), model)
    (tmp_path / "saved" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not part of an export"):
        model.save_pretrained(tmp_path / "saved")


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
    with pytest.raises(CheckpointError, match="needs a token that may write: set HF_TOKEN"):
        export_cli.run(compose("export", words))
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export_cli.run(compose("export", words))
    pushed = hub.repositories["me/my-coca"].files
    assert pushed == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    card = pushed["README.md"].decode()
    for part in ("![samples_scenes.png](samples_scenes.png)", "| CIDEr |", "hf-hub:me/my-coca", "push_to=me/my-coca"):
        assert part in card
    assert_equal(load_model("hf-hub:me/my-coca"), model)
    export_cli.run(compose("export", [*words, "overwrite=true"]))  # the pictures are part of an export


def test_a_push_without_rights_is_one_sentence(hub: Hub, model: CoCa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_stranger")
    with pytest.raises(CheckpointError, match=rf"^{hub.url} refuses access to 'me/my-coca' \(401\): HF_TOKEN is not"):
        model.push_to_hub("me/my-coca")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="'my-coca' is not the name of a repository: expected ORG/REPO"):
        model.push_to_hub("my-coca")
    with pytest.raises(CheckpointError, match=r"^HF_HUB_OFFLINE forbids reaching"):
        model.push_to_hub("me/my-coca")


# Commands


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


def test_a_wrong_name_on_a_command_line_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^checkpoint: there is no checkpoint 'coca_ViT-X'"):
        export_cli.run(compose("export", ["checkpoint=coca_ViT-X", "format=safetensors", "output=out"]))


def test_the_judge_of_captions_is_found_before_the_training() -> None:
    cfg = compose("evaluate", ["checkpoint=any", "scoring.clip_score_model=ViT-B-32/opnai"])
    with pytest.raises(ConfigError, match=r"^scoring.clip_score_model: .* did you mean 'ViT-B-32/openai'\?$"):
        build_settings(cfg)
