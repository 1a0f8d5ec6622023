"""Faults of an object store, on a real S3 server behind a proxy that fails: no fault changes what is trained on, and
what waiting cannot fix is reported at once.

`COCA_STORE_FAULTS=1000` draws that many faults in the test of random ones.
"""

import errno
import http.client
import os
import random
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import fsspec
import pytest
from fsspec.exceptions import FSTimeoutError
from lightning.pytorch import Trainer
from test_datamodules import TOKENIZER, Recorder
from test_shards import contents, write_shards

from coca_lit.callbacks import Checkpoints
from coca_lit.cli.data import data as coca_data
from coca_lit.data.shards import store as object_store
from coca_lit.data.shards.cache import PARTIAL, ShardCache
from coca_lit.data.shards.datamodule import LAIONDataModule
from coca_lit.data.shards.listing import find_shards
from coca_lit.data.shards.store import StoreError, fault_of
from coca_lit.errors import DataError, DataNotFoundError

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

from faulty_store import FaultyStore, faulty_store  # noqa: E402  it needs moto

FAULTS = ("reset", "cut", "slow", "slow down", "internal", "away")
DRAWN = int(os.environ.get("COCA_STORE_FAULTS", 4))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "set"
    folder.mkdir()
    write_shards(folder, 4, 6)
    coca_data(["check", str(folder), "--workers", "1"])
    return folder


@pytest.fixture(scope="module")
def server(local: Path) -> Iterator[FaultyStore]:
    with faulty_store(local, "bucket") as store:
        yield store


@pytest.fixture
def store(server: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """s3://bucket/set with four shards and their manifest. Waits are short."""
    server.faults.clear()
    server.always = ""
    options = {
        "endpoint_url": server.url,
        "key": "k",
        "secret": "s",
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {"retries": {"total_max_attempts": 1}},
    }
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(object_store, "FIRST_WAIT", 0.02)
    yield server
    if server.is_away:
        server.start()
    s3fs.S3FileSystem.clear_instance_cache()


def laion(tmp_path: Path, **more) -> LAIONDataModule:
    more = {"shuffle_buffer": 5, "cache_dir": str(tmp_path / "cache")} | more
    return LAIONDataModule("s3://bucket/set", 48, tokenizer=TOKENIZER, batch_size=4, image_size=16, **more)


def batches(data: LAIONDataModule, start: int = 0, stop: int = 12) -> list[tuple]:
    return [contents(batch) for batch in islice(data.train_dataloader().open_at(0, start), stop - start)]


@pytest.fixture(scope="module")
def expected(server: FaultyStore, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """Twelve batches, two passes, of an undisturbed run on local files of the same names."""
    options = {"endpoint_url": server.url, "key": "k", "secret": "s"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "s3", options)
        return batches(laion(tmp_path_factory.mktemp("expected")))


# What may pass


def test_faults_that_pass_change_nothing(store, tmp_path, expected, caplog):
    for fault in FAULTS[:-1]:
        data = laion(tmp_path, cache_dir=str(tmp_path / fault))
        store.faults.extend([fault] * 3)
        data.prepare_data()  # the listing
        store.faults.extend([fault] * 3)
        assert batches(data) == expected
        assert not [*(tmp_path / fault).glob("*.partial")]
    for said in ("throttles requests", "does not answer"):
        assert f"the store {said}" in caplog.text
    assert "the store answers again after" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_is_away_and_comes_back_changes_nothing(store, tmp_path, expected, workers):
    data = laion(tmp_path, num_workers=workers)
    data.prepare_data()
    undisturbed = expected if not workers else batches(laion(tmp_path / "other", num_workers=workers))
    store.stop()
    timer = threading.Timer(1.0, store.start)
    timer.start()
    assert batches(data) == undisturbed
    timer.join()


def test_random_faults_and_resumes_change_nothing(store, tmp_path, expected):
    rng = random.Random(0)
    drawn = 0
    while drawn < DRAWN:
        found: list[tuple] = []
        cache = str(tmp_path / f"cache{drawn}")
        while len(found) < len(expected):  # started again after every few batches, now and then with an empty cache
            if rng.random() < 0.3:
                cache = str(tmp_path / f"cache{drawn}-{len(found)}")
            for _ in range(rng.randint(0, 3)):
                fault = rng.choice(FAULTS)
                drawn += 1
                if fault == "away" and not store.is_away:
                    store.stop()
                    threading.Timer(rng.uniform(0.05, 0.5), store.start).start()
                elif fault != "away":
                    store.faults.extend([""] * rng.randint(0, 2) + [fault] * rng.randint(1, 3))
            found += batches(laion(tmp_path, cache_dir=cache), len(found), min(len(found) + rng.randint(1, 5), 12))
        assert found == expected
        while store.is_away:
            time.sleep(0.05)


def test_a_download_that_is_killed_is_begun_again(store, tmp_path, local):
    cache = ShardCache(tmp_path / "cache", 10**6)
    store.always = "slow"
    process = get_context("fork").Process(target=_open, args=(cache,))
    process.start()
    while not [*tmp_path.glob(f"cache/*{PARTIAL}")]:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    store.always = ""
    with cache.open("s3://bucket/set/00001.tar") as path:
        assert path.read_bytes() == (local / "00001.tar").read_bytes()
    assert not [*tmp_path.glob(f"cache/*{PARTIAL}")]


def _open(cache: ShardCache) -> None:
    with cache.open("s3://bucket/set/00001.tar"):
        pass


# What does not


@pytest.mark.parametrize(
    ("fault", "said"),
    [("reset", "for 0 s the store does not answer"), ("slow down", "for 0 s the store throttles requests: use fewer")],
)
def test_patience_ends_and_the_run_stops_saved(store, tmp_path, fault, said):
    """A first shard is there, then the store is gone: the run stops with a checkpoint, and resumes from it."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)

    def fit(module: Recorder, resume: Path | None = None, **more) -> None:
        data = laion(tmp_path, shuffle_buffer=1, **more)
        saving = Checkpoints(tmp_path / "checkpoints")
        Trainer(accelerator="cpu", max_epochs=1, callbacks=[saving], **quiet).fit(module, data, ckpt_path=resume)

    stopped, resumed, alone = Recorder(), Recorder(), Recorder()
    store.faults.extend([""] * 5)  # the listing, the manifest, a few shards
    store.always = fault
    with pytest.raises(StoreError, match=rf"{said}.*data\.store_patience=SECONDS"):
        fit(stopped, store_patience=0)
    assert 0 < len(stopped.seen) < 12
    store.always = ""
    fit(resumed, tmp_path / "checkpoints" / "last.ckpt")
    fit(alone)
    assert stopped.seen + resumed.seen == alone.seen


def test_the_end_of_patience_is_said_by_a_worker(store, tmp_path):
    data = laion(tmp_path, num_workers=1, store_patience=0.1)
    data.prepare_data()
    store.stop()
    stream = iter(data.train_dataloader().open_at(0, 0))
    with pytest.raises(StoreError, match="for 0 s the store does not answer") as error:
        next(stream)
    traceback.clear_frames(error.tb)
    del stream  # see test_shards.py


def test_what_no_waiting_mends_is_said_at_once(store, tmp_path):
    with pytest.raises(DataNotFoundError, match="there is no bucket s3://nowhere"):
        find_shards("s3://nowhere/set/*.tar")
    with pytest.raises(DataNotFoundError, match="shards not found"):
        find_shards("s3://bucket/other/*.tar")
    store.always = "forbidden"
    with pytest.raises(StoreError, match="s3://bucket/set cannot be read: check the address and the credentials"):
        laion(tmp_path).prepare_data()


def test_a_lost_shard_is_counted_and_a_lost_bucket_stops_the_run(store, tmp_path, local):
    store.put("brief", {f"set/{path.name}": path.read_bytes() for path in local.glob("*.tar")})
    shards = "s3://brief/set"
    options = {"tokenizer": TOKENIZER, "batch_size": 4, "image_size": 16, "cache_dir": str(tmp_path / "cache")}
    data = LAIONDataModule(shards, 24, max_bad_fraction=0.5, shuffle_buffer=1, **options)
    data.prepare_data()
    store.delete("brief/set/00002.tar")
    found = list(islice(data.train_dataloader().open_at(0, 0), 6))
    assert {bad.shard for batch in found for bad in batch.bad} == {f"{shards}/00002.tar"}
    for i in (0, 1, 3):
        store.delete(f"brief/set/{i:05d}.tar")
    store.delete("brief")
    other = LAIONDataModule(shards, 24, max_bad_fraction=1.0, **options | {"cache_dir": str(tmp_path / "empty")})
    other.shards = data.shards and {
        "": [shard._replace(cache=other.cache) for shard in data.shards[""]]
    }  # found before the bucket went
    with pytest.raises(DataNotFoundError, match="there is no bucket s3://brief"):
        batches(other)


def test_a_full_disk_is_not_the_store(store, tmp_path, monkeypatch):
    def full(self, *arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device", "x.partial")

    monkeypatch.setattr(s3fs.S3FileSystem, "get_file", full)
    with pytest.raises(DataError, match=r"no local copy of s3://.* can be written: No space left on device"):
        batches(laion(tmp_path))


# Errors of the libraries


def of_library(module: str, name: str, base: type[Exception] = Exception, **fields: object) -> Exception:
    """An error as a library defines it that is not installed here."""
    error = type(name, (base,), {"__module__": module})("said")
    for field, value in fields.items():
        setattr(error, field, value)
    return error


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def library_errors() -> list[tuple[Exception, str]]:
    import aiohttp
    import httpx
    import requests
    from botocore import exceptions as boto
    from huggingface_hub.errors import HfHubHTTPError
    from s3fs.errors import translate_boto_error

    def s3(code: str, status: int) -> Exception:
        response = {"Error": {"Code": code, "Message": "said"}, "ResponseMetadata": {"HTTPStatusCode": status}}
        return translate_boto_error(boto.ClientError(response, "GetObject"))

    def hf(status: int) -> Exception:
        request = httpx.Request("GET", "https://huggingface.co/x")
        return HfHubHTTPError("said", response=httpx.Response(status, request=request))

    def answered(status: int) -> requests.HTTPError:
        response = requests.Response()
        response.status_code = status
        return requests.HTTPError(response=response)

    return [
        (aiohttp.ClientPayloadError("said"), "away"),
        (aiohttp.ServerDisconnectedError(), "away"),
        (aiohttp.ClientResponseError(None, (), status=502), "away"),
        (aiohttp.ClientResponseError(None, (), status=429), "throttled"),
        (aiohttp.ClientResponseError(None, (), status=401), "denied"),
        (boto.EndpointConnectionError(endpoint_url="x"), "away"),
        (boto.ReadTimeoutError(endpoint_url="x"), "away"),
        (boto.NoCredentialsError(), "denied"),
        (boto.ParamValidationError(report="bucket"), "denied"),
        *((s3(code, 503), "throttled") for code in ("SlowDown", "ServiceUnavailable", "503")),
        *((s3(code, 500), "away") for code in ("InternalError", "500")),
        (s3("RequestTimeout", 400), "away"),
        (s3("NoSuchBucket", 404), "missing"),
        (s3("NoSuchKey", 404), "missing"),
        *((s3(code, 403), "denied") for code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")),
        (s3("ExpiredToken", 400), "denied"),
        (hf(503), "throttled"),
        (hf(429), "throttled"),
        (hf(500), "away"),
        (hf(403), "denied"),
        (httpx.ConnectError("said"), "away"),
        (httpx.ReadTimeout("said"), "away"),
        (requests.ConnectionError("said"), "away"),
        (requests.exceptions.ChunkedEncodingError("said"), "away"),
        (answered(504), "away"),
        (answered(404), "missing"),
        (of_library("gcsfs.retry", "HttpError", code=503), "throttled"),
        (of_library("gcsfs.retry", "HttpError", code=500), "away"),
        (of_library("gcsfs.retry", "HttpError", code=401), "denied"),
        (of_library("gcsfs.retry", "ChecksumError"), "away"),
        (of_library("google.auth.exceptions", "TransportError"), "away"),
        (of_library("google.auth.exceptions", "DefaultCredentialsError"), "denied"),
        (http.client.IncompleteRead(b"x"), "away"),
        (http.client.RemoteDisconnected("said"), "away"),
        (socket.gaierror(-3, "Temporary failure in name resolution"), "away"),
        (ConnectionResetError(104, "reset by peer"), "away"),
        (TimeoutError(), "away"),
        (FSTimeoutError(), "away"),
        (caused(OSError("said"), aiohttp.ClientResponseError(None, (), status=503)), "throttled"),
        (FileNotFoundError("bucket/x.tar"), "missing"),
        (PermissionError("said"), "denied"),
        (OSError(errno.ENOSPC, "full"), "local"),
        (PermissionError(errno.EACCES, "said", "/cache/x.partial"), "local"),
        (KeyError("a bug"), "unknown"),
        (MemoryError(), "unknown"),
    ]


def test_errors_of_the_libraries():
    wrong = [(error, fault_of(error), fault) for error, fault in library_errors() if fault_of(error) != fault]
    assert wrong == []
