"""What a stranger can hand us and what a user can leak: each is refused with a clear message, at the public entries."""

import gzip
import io
import json
import pickle
import re
import struct
import sys
import tarfile
import zlib
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from running import compose, train_py

import coca_lit
from coca_lit.cli.train import run, train
from coca_lit.data.bad_samples import BadSample
from coca_lit.data.batch import Batch
from coca_lit.data.datasets.coco import coco_folder_records
from coca_lit.data.records import decode_image
from coca_lit.data.shards.datamodule import LAIONDataModule
from coca_lit.data.shards.tar import MAX_MEMBER
from coca_lit.errors import CheckpointError, DataError
from coca_lit.runs.checkpoint_io import inspect
from coca_lit.runs.redaction import mask, redact
from coca_lit.runs.run_folder import start_run_folder
from coca_lit.tokenizer import get_tokenizer

TOKENIZER = get_tokenizer("clip")


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.fixture
def target(tmp_path: Path):
    """A file that hostile input tries to make."""
    path = tmp_path / "outside" / "ran"
    path.parent.mkdir()
    yield path
    assert not path.exists()


def jpeg(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 18), (shade, 100, 50)).save(buffer, "JPEG")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def good(texts: str = "txt", text: bytes = b"a dog") -> dict[str, bytes]:
    """The members of eight samples."""
    pairs = [(f"good{i}", jpeg(i)) for i in range(8)]
    return {name: data for key, image in pairs for name, data in ((f"{key}.jpg", image), (f"{key}.{texts}", text))}


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def train_on(path: Path, batches: int = 4) -> tuple[set[str], list[BadSample], list[Batch]]:
    """Keys and bad samples of some batches that the training loader makes of one shard."""
    data = LAIONDataModule(
        shards=str(path),
        epoch_samples=4 * batches,
        tokenizer=TOKENIZER,
        batch_size=4,
        image_size=16,
        indexed=False,
        shuffle_buffer=1,
        max_bad_fraction=0.95,
    )
    seen = list(islice(data.train_dataloader(), batches))
    return (
        {key.rpartition("/")[2] for batch in seen for key in batch.keys},
        [b for batch in seen for b in batch.bad],
        seen,
    )


# Files that are code


@pytest.mark.parametrize("key", ["init_from", "image_weights", "ckpt_path"])
def test_pickle_as_checkpoint_of_a_training(tmp_path, target, key):
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Evil(target)))
    cfg = compose("trainer=smoke", f"{key}={tmp_path}/evil.ckpt", f"output_dir={tmp_path}/run", "name=x")
    with pytest.raises(Exception, match=r"(?i)checkpoint|weights.only"):
        run(cfg)


def test_pickle_as_model(tmp_path, target):
    torch.save({"state_dict": Evil(target)}, tmp_path / "evil.ckpt")
    with pytest.raises(
        ValueError, match=r"not a checkpoint of tensors and plain values alone, .*: it holds code"
    ) as caught:
        coca_lit.load_model(tmp_path / "evil.ckpt")
    assert "weights_only" not in str(caught.value)
    with pytest.raises(CheckpointError, match="more than tensors and plain values: it holds code") as caught:
        inspect(tmp_path / "evil.ckpt")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b'{"a": 1}', b"hello", bytes(1000), pickle.dumps([1])])
def test_what_is_no_checkpoint(tmp_path, content):
    """PyTorch advises to load it as code."""
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"it is not a file that torch\.save writes|expected a dictionary") as caught:
        coca_lit.load_model(tmp_path / "x.ckpt")
    assert "weights_only" not in str(caught.value)


def test_a_list_of_captions(tmp_path):
    (tmp_path / "captions.json").write_text("[]")
    with pytest.raises(DataError, match=r"captions\.json does not follow the COCO captions schema: .* list") as caught:
        coco_folder_records(tmp_path)
    assert "indices" not in str(caught.value)


def test_config_that_evaluates(tmp_path, target, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["train.py", f"""threads=${{eval:'__import__("pathlib").Path("{target}").touch()'}}"""]
    )
    with pytest.raises(SystemExit, match=r"error: .*Unsupported interpolation type eval"):
        train()


# Shards


@pytest.mark.parametrize("scheme", ["pipe:touch {0}", "PIPE:touch {0}", "ssh://host/{0}", "file:/x/../{0}"])
def test_url_that_is_a_command(target, scheme):
    with pytest.raises(DataError, match=r"not from '[A-Za-z]+:'"):
        LAIONDataModule(shards=scheme.format(target), epoch_samples=8, tokenizer=TOKENIZER, batch_size=4).prepare_data()


def test_members_that_hold_code(tmp_path, target):
    code = pickle.dumps(Evil(target))
    names = ("evil.pyd", "evil.pickle", "evil.pkl", "evil.pth", "evil.PTH")
    keys, bad, _ = train_on(write_tar(tmp_path / "x.tar", dict.fromkeys(names, code) | good()))
    assert keys == {f"good{i}" for i in range(8)}
    assert {(found.key, found.reason) for found in bad} == {(name, "code in a shard") for name in names}


def test_images_that_hold_code(tmp_path, target):
    files = {"evil.jpg": pickle.dumps(Evil(target)), "evil.txt": b"a dog"} | good()
    keys, bad, _ = train_on(write_tar(tmp_path / "x.tar", files))
    assert "evil" not in keys
    assert bad[0].reason == "unreadable image"


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.txt", "/evil.jpg"])
def test_members_that_lead_out_of_the_shard(tmp_path, name):
    before = sorted(tmp_path.iterdir())
    path = write_tar(tmp_path / "x.tar", good() | {name: jpeg()})
    keys, bad, _ = train_on(path, batches=5)
    assert all(key.startswith("good") for key in keys)
    assert "leads out of the shard" in bad[0].detail
    assert sorted(tmp_path.iterdir()) == [*before, path]


def tar_bomb(path: Path, kind: bytes) -> Path:
    """A good start, and then a member (or header) of 4 GB of zeros in a file of a few kB."""
    info = tarfile.TarInfo("bomb.jpg")
    info.size, info.type = 4 * 2**30, kind
    start = io.BytesIO()
    with tarfile.open(fileobj=start, mode="w") as tar:
        for name, data in good().items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    whole = start.getvalue().rstrip(b"\0")
    whole += bytes(-len(whole) % 512) + info.tobuf(tarfile.GNU_FORMAT) + bytes(10 * 2**20)
    path.write_bytes(gzip.compress(whole, 1) if path.suffix == ".gz" else whole)
    return path


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("name", ["bomb.tar", "bomb.tar.gz"])
def test_members_and_headers_that_claim_gigabytes(tmp_path, name, kind):
    keys, bad, _ = train_on(tar_bomb(tmp_path / name, kind))
    assert keys <= {f"good{i}" for i in range(8)}
    assert f"more than {MAX_MEMBER:,}" in bad[0].detail


def test_text_bomb(tmp_path):
    files = {"bomb.jpg": jpeg(), "bomb.txt": b"a dog " * 1_000_000} | good()
    keys, bad, _ = train_on(write_tar(tmp_path / "x.tar", files))
    assert "bomb" not in keys
    assert bad[0][1:3] == ("bomb", "missing caption")


def test_json_bomb(tmp_path):
    bomb = {"bomb.jpg": jpeg(), "bomb.json": b'{"caption": ' + b"[" * 100_000}
    path = write_tar(tmp_path / "x.tar", bomb | good("json", b'{"caption": "a dog"}'))
    data = LAIONDataModule(
        shards=str(path),
        epoch_samples=8,
        tokenizer=TOKENIZER,
        batch_size=4,
        image_size=16,
        caption_keys="caption",
        max_bad_fraction=0.5,
    )
    assert "bomb" not in {key for batch in data.train_dataloader() for key in batch.keys}


def test_captions_that_hold_special_tokens(tmp_path):
    caption = b"<start_of_text>a dog<end_of_text> <|endoftext|> a cat</s>"
    *_, (batch, *_) = train_on(write_tar(tmp_path / "x.tar", good(text=caption)))
    for tokens, length in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True):
        real = tokens[:length]
        assert (real[0], real[-1]) == (TOKENIZER.sot_id, TOKENIZER.eot_id)
        assert not {TOKENIZER.sot_id, TOKENIZER.eot_id} & set(real[1:-1])
        assert "end_of_text" in TOKENIZER.decode(real).replace(" ", "")


# Images, as the web page and every data set decode them


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (SVG, "x is not a readable image: it is none of JPEG, PNG, WEBP, BMP, GIF"),
        (b"", "x is not a readable image: it is none of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "x is not a readable image: it is none of"),
        (png_header(0, 9), "x is not a readable image"),
        (b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b";", "x (is not a readable image|has 0 x 0 pixels)"),
        (png_header(60_000, 60_000), "x is not a readable image: Image size .* could be decompression bomb"),
        (png_header(8_000, 5_001), "x has 8000 x 5001 pixels, more than the 40,000,000 that are decoded"),
        (png_header(1, 30_000), "x has 1 x 30000 pixels, an aspect ratio above 100"),
        (jpeg()[:300], "x is not a readable image"),
    ],
    ids=["svg", "empty", "postscript", "no width", "no pixels", "bomb", "large", "line", "cut"],
)
def test_no_picture(content, said):
    with pytest.raises(DataError, match=f"^{said}"):
        decode_image(io.BytesIO(content), "x")


# Secrets


def test_no_secret_in_what_a_run_prints_and_writes(tmp_path, monkeypatch):
    secrets = {"WANDB_API_KEY": "from-environment-1", "HF_TOKEN": "from-environment-2"}
    arguments = (
        *("trainer=smoke", "name=x", "++logger.csv.token=typed-3", "++model.net.note=${oc.env:HF_TOKEN}"),
        "++logger.csv.deep={api_key:typed-4,password:${oc.env:WANDB_API_KEY}}",
        "+data.text=https://me:typed-5@host/x",
    )
    printed = train_py(*arguments, "--cfg", "job", "--resolve", cwd=tmp_path, **secrets)
    shown = yaml.safe_load(printed.stdout)
    assert (shown["model"]["net"]["name"], shown["model"]["net"]["note"]) == ("coca_tiny", "<hidden>")
    hidden = [shown["logger"]["csv"]["token"], *shown["logger"]["csv"]["deep"].values()]
    assert hidden == ["<hidden>"] * 3
    stopped = train_py(*arguments, cwd=tmp_path, **secrets)
    (said,) = stopped.stderr.splitlines()
    assert said.startswith("error: model: CoCa has no argument 'note'")
    for name, value in secrets.items():  # what a run that starts writes
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    start_run_folder(compose(*arguments, f"output_dir={tmp_path}/outputs/x"))
    written = {path.name: path.read_text() for path in (tmp_path / "outputs").rglob("*") if path.is_file()}
    assert {"config.yaml", "environment.json"} <= set(written)
    assert "token=<hidden>" in json.loads(written["environment.json"])["command"]
    assert yaml.safe_load(written["config.yaml"])["model"]["net"]["note"] == "${oc.env:HF_TOKEN}"
    everything = "".join([printed.stdout, printed.stderr, stopped.stdout, stopped.stderr, *written.values()])
    assert not re.search(r"from-environment|typed-", everything)
    wrong = train_py("++logger.csv.token=typed-6,typed-7", "name=x", cwd=tmp_path)  # which the message repeats
    assert wrong.stderr.startswith("error: ")
    assert "typed-" not in wrong.stderr


def test_no_secret_of_a_sweep(tmp_path):
    """In Hydra's record, the log lines of its launcher, our records, and names of folders."""
    words = ("-m", "seed=1,2", "++logger.csv.token=typed-1", "model.net.name=nothing", "hydra.sweep.subdir=${seed}")
    done = train_py(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert "the first error: model: unknown model 'nothing'" in done.stderr
    assert "#1 : seed=2 ++logger.csv.token=<hidden>" in done.stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert {"multirun.yaml", "job.json", "error.txt", "results.csv"} <= {path.name for path in files}
    everything = "".join([done.stdout, done.stderr, *map(str, files), *(path.read_text() for path in files)])
    assert "typed-1" not in everything


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *(
            (f"{name}=x1", f"{name}=<hidden>")
            for name in ("api_key", "aws_secret_key", "api-key", "accessToken", "auth")
        ),
        *((f"{name}=x1", f"{name}=<hidden>") for name in ("passphrase", "GITHUB_PAT", "a.b.password", "clientSecret")),
        *(
            (f"{name}=x1", f"{name}=<hidden>")
            for name in ("password", "passwd", "db_pwd", "DB_PASSWORD", "credentials")
        ),
        *(
            (text, text)
            for text in ("tokenizer=x", "caption_tokens: 20", "author=me", "compat=1", "no_repeat_ngram: 3")
        ),
        ("token=${oc.env:HF_TOKEN}", "token=${oc.env:HF_TOKEN}"),
        ("s3://user:pass@host/x", "s3://user:<hidden>@host/x"),
        ('{"api_key": "a, b"}', '{"api_key": "<hidden>"}'),
        ("token: 'a b', c", "token: '<hidden>', c"),
        ("Authorization: Bearer abc", "Authorization: <hidden>"),
        ("https://host/x?token=abc&y=1", "https://host/x?token=<hidden>&y=1"),
        ("['x.api_key=a', 'seed=1']", "['x.api_key=<hidden>', 'seed=1']"),
    ],
)
def test_names_of_secrets(text, shown):
    assert redact(text) == shown


def test_everything_under_a_secret_name_is_one():
    config = {"auth": {"user": "me", "pin": 12, "key": "${oc.env:KEY}"}, "urls": ["s3://me:pw@host"], "token": None}
    masked = {"user": "<hidden>", "pin": "<hidden>", "key": "${oc.env:KEY}"}
    assert mask(config) == {"auth": masked, "urls": ["s3://me:<hidden>@host"], "token": None}
