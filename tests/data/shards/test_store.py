"""Faults of an object store, on a real S3 server behind a proxy that fails: no fault changes what is trained on, and
what waiting cannot fix is reported at once.

`COCA_STORE_FAULTS=1000` draws that many faults in the test of random ones.
"""

import asyncio
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
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.exceptions import FSTimeoutError
from lightning.pytorch import Trainer
from test_datamodules import TOKENIZER, Recorder
from test_shards import contents, write_shards

from coca_lit.callbacks import Checkpoints
from coca_lit.cli.data import data as coca_data
from coca_lit.data.shards import store as object_store
from coca_lit.data.shards import windows as windowed
from coca_lit.data.shards.cache import PARTIAL, ShardCache
from coca_lit.data.shards.datamodule import LAIONDataModule
from coca_lit.data.shards.indexed import make_index
from coca_lit.data.shards.listing import Shard, find_shards
from coca_lit.data.shards.store import RangeFile, StoreError, fault_of
from coca_lit.errors import DataError, DataNotFoundError

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

from faulty_store import FaultyGoogleStore, FaultyHub, FaultyStore, faulty_store  # noqa: E402  it needs moto

pytestmark = pytest.mark.slow  # real servers whose faults are waited for

FAULTS = ("reset", "cut", "slow", "slow down", "internal", "away")
DRAWN = int(os.environ.get("COCA_STORE_FAULTS", 4))
OTHERS = [pytest.param(store, marks=pytest.mark.slow) for store in (FaultyGoogleStore, FaultyHub)]
ON_ALL = pytest.mark.parametrize("server", [FaultyStore, *OTHERS], indirect=True)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "set"
    folder.mkdir()
    write_shards(folder, 4, 6)
    coca_data(["check", str(folder), "--workers", "1"])
    return folder


@pytest.fixture(scope="module")
def server(local: Path, request: pytest.FixtureRequest) -> Iterator[FaultyStore]:
    """S3, if a test does not ask for another one."""
    kind = getattr(request, "param", FaultyStore)
    if kind is FaultyGoogleStore:
        pytest.importorskip("gcsfs")
        pytest.importorskip("gcp_storage_emulator")
    with faulty_store(local, "bucket", kind) as store:
        yield store


@pytest.fixture
def store(server: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """bucket/set with four shards and their manifest. Waits are short."""
    server.faults.clear()
    server.always = ""
    monkeypatch.setitem(fsspec.config.conf, server.scheme, server.options())
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    if server.scheme == "gs":  # whose number of attempts is fixed
        monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0.01)))
    if server.scheme == "hf":
        for module in ("utils._http", "file_download"):
            monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(object_store, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(object_store, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(object_store, "SCHEMES", (*object_store.SCHEMES, "http"))
    monkeypatch.setattr(windowed, "PAUSE", 0.05)
    fsspec.get_filesystem_class(server.scheme).clear_instance_cache()  # and its listings
    yield server
    if server.is_away:
        server.start()
    fsspec.get_filesystem_class(server.scheme).clear_instance_cache()


def laion(tmp_path: Path, root: str = "s3://", **more) -> LAIONDataModule:
    more = {"indexed": False, "shuffle_buffer": 5, "cache_dir": str(tmp_path / "cache")} | more
    return LAIONDataModule(f"{root}bucket/set", 48, tokenizer=TOKENIZER, batch_size=4, image_size=16, **more)


def batches(data: LAIONDataModule, start: int = 0, stop: int = 12) -> list[tuple]:
    return [contents(batch) for batch in islice(data.train_dataloader().open_at(0, start), stop - start)]


@pytest.fixture(scope="module")
def expected(server: FaultyStore, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """Twelve batches, two passes, of an undisturbed run on local files of the same names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, server.scheme, server.options())
        return batches(laion(tmp_path_factory.mktemp("expected"), server.root))


# What may pass


@ON_ALL
def test_faults_that_pass_change_nothing(store, tmp_path, expected, caplog):
    for fault in FAULTS[:-1]:
        data = laion(tmp_path, store.root, cache_dir=str(tmp_path / fault))
        times = 3 if fault == "slow" else store.attempts + 2
        store.faults.extend([fault] * times)
        data.prepare_data()  # the listing
        store.faults.extend([fault] * times)
        assert batches(data) == expected
        store.faults.clear()
        assert not [*(tmp_path / fault).glob("*.partial")]
    for said in ("throttles requests", "does not answer"):
        assert f"the store {said}" in caplog.text
    assert "the store answers again after" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("server", "workers"),
    [
        *((FaultyStore, count) for count in (0, 2)),
        *(pytest.param(other, 2, marks=pytest.mark.slow) for other in (FaultyGoogleStore, FaultyHub)),
    ],
    indirect=["server"],
)
def test_a_store_that_is_away_and_comes_back_changes_nothing(store, tmp_path, expected, workers):
    data = laion(tmp_path, store.root, num_workers=workers)
    data.prepare_data()
    undisturbed = expected if not workers else batches(laion(tmp_path / "other", store.root, num_workers=workers))
    store.stop()
    timer = threading.Timer(1.0, store.start)
    timer.start()
    assert batches(data) == undisturbed
    timer.join()


def have_a_fault(store: FaultyStore, rng: random.Random) -> None:
    """One at random, soon."""
    fault = rng.choice(FAULTS)
    if fault == "away" and not store.is_away:
        store.stop()
        threading.Timer(rng.uniform(0.05, 0.5), store.start).start()
    elif fault != "away":
        store.faults.extend([""] * rng.randint(0, 2) + [fault] * rng.randint(1, 3))


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
                drawn += 1
                have_a_fault(store, rng)
            found += batches(laion(tmp_path, cache_dir=cache), len(found), min(len(found) + rng.randint(1, 5), 12))
        assert found == expected
        while store.is_away:
            time.sleep(0.05)


@ON_ALL
def test_windows_are_those_of_the_local_set_whatever_fails(store, tmp_path, windows):
    """The index is fetched, and the shards, with any fault in between. It is the same over plain HTTP."""
    roots = {store.root: FAULTS[:-1] if store.scheme == "s3" else ("reset", "cut")}
    if store.scheme == "s3":
        roots |= {f"{store.url}/": ("reset", "cut", "internal")}
    for root, faults in roots.items():
        for fault in faults:
            data = in_windows(tmp_path / fault / root[:4], root)
            times = 3 if fault == "slow" else store.attempts + 2
            store.faults.extend([fault] * times)
            data.prepare_data()
            store.faults.extend([fault] * times)
            assert batches(data) == named(windows, data.shards[""][0].name.rpartition("/")[0])
            store.faults.clear()


@ON_ALL
def test_an_index_is_made_of_headers_whatever_fails(store, tmp_path, local, monkeypatch):
    monkeypatch.setattr(object_store, "BLOCK", 512)
    expected = make_index(Shard(str(local / "00001.tar")), tmp_path)
    (shard,) = find_shards(f"{store.root}bucket/set/00001.tar", ShardCache(tmp_path / "cache", 10**6))
    headers = RangeFile(shard.name, shard.stored.bytes)
    store.faults.extend(["", "", "reset", "", "cut", "internal"])
    assert make_index(shard, tmp_path, headers).places.tolist() == expected.places.tolist()
    assert headers.fetched < 0.7 * shard.stored.bytes


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_windows_are_equal_on_other_ranks_and_workers_after_random_faults(store, tmp_path, windows):
    """Started again after every few batches, on one to four ranks and with workers or none, often on a new machine."""
    rng = random.Random(1)
    drawn = 0
    while drawn < DRAWN:
        found: list[tuple] = []
        while len(found) < len(windows):
            cache, stop = tmp_path / f"cache{rng.randrange(3)}", min(len(found) + rng.randint(2, 6), 12)
            for _ in range(rng.randint(0, 2)):
                drawn += 1
                have_a_fault(store, rng)
            parts = []
            world, workers = rng.choice((1, 2, 4)), rng.choice((0, 0, 2))
            for rank in range(world):
                data = in_windows(cache, num_workers=workers)
                data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
                parts.append(batches(data, len(found), stop))
            for ranks in zip(*parts, strict=True):
                found.append(tuple(list(chain(*fields)) for fields in zip(*ranks, strict=True)))
        assert found == named(windows, "s3://bucket/set")
        while store.is_away:
            time.sleep(0.05)


def in_windows(tmp_path: Path, root: str = "s3://", **more) -> LAIONDataModule:
    """Six samples at a time of each of two readers."""
    more = {"indexed": "auto", "window": 12, "readers": 2} | more
    if not root.startswith("http"):
        return laion(tmp_path, root, **more)
    data = laion(tmp_path, **more)
    data.patterns = {"": f"{root}bucket/set/{{00000..00003}}.tar"}
    return data


def named(found: list[tuple], folder: str) -> list[tuple]:
    """With the keys that the samples have there."""
    return [([f"{folder}/{key.partition('set/')[2]}" for key in keys], *rest) for keys, *rest in found]


@pytest.fixture(scope="module")
def windows(local: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """Twelve batches of the local set, two passes, read in windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coca_lit.data.shards.datamodule.AUTO_BYTES", 0)
        data = in_windows(tmp_path_factory.mktemp("windows"))
        data.patterns = {"": str(local)}
        return batches(data)


def test_a_web_server_that_sends_without_end_is_left(store, tmp_path, local):
    """The cache has room for what it announced; the next attempt gets that."""
    cache, url = ShardCache(tmp_path / "cache", 10**6), f"{store.url}/bucket/set/00001.tar"
    store.faults.extend(["", "endless"])
    with cache.open(url) as path:
        assert path.read_bytes() == (local / "00001.tar").read_bytes()
    assert 0 < store.sent < 2**25


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
def test_patience_ends_and_the_run_stops_saved(store, tmp_path, fault, said, monkeypatch):
    """A first shard is there, then the store is gone: the run stops with a checkpoint, and resumes from it."""
    monkeypatch.setattr("coca_lit.data.shards.datamodule.OPEN_SHARDS", 2)  # one of a store
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)

    def fit(module: Recorder, resume: Path | None = None, **more) -> None:
        data = laion(tmp_path, shuffle_buffer=1, **more)
        saving = Checkpoints(tmp_path)
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


@ON_ALL
def test_what_no_waiting_mends_is_said_at_once(store, tmp_path):
    nowhere = "shards not found" if store.scheme == "hf" else f"there is no bucket {store.root}nowhere"
    with pytest.raises(DataNotFoundError, match=nowhere):
        find_shards(f"{store.root}nowhere/set/*.tar")
    with pytest.raises(DataNotFoundError, match="shards not found"):
        find_shards(f"{store.root}bucket/other/*.tar")
    store.always = "forbidden"
    with pytest.raises(StoreError, match="bucket/set cannot be read: check the address and the credentials"):
        laion(tmp_path, store.root).prepare_data()


def test_a_lost_shard_is_counted_and_a_lost_bucket_stops_the_run(store, tmp_path, local):
    store.put("brief", {f"set/{path.name}": path.read_bytes() for path in local.glob("*.tar")})
    shards = "s3://brief/set"
    options = {"tokenizer": TOKENIZER, "batch_size": 4, "image_size": 16, "cache_dir": str(tmp_path / "cache")}
    options["indexed"] = False
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


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def library_errors() -> list[tuple[Exception, str]]:
    import aiohttp
    import requests
    from botocore import exceptions as boto
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from s3fs.errors import translate_boto_error

    def s3(code: str, status: int) -> Exception:
        response = {"Error": {"Code": code, "Message": "said"}, "ResponseMetadata": {"HTTPStatusCode": status}}
        return translate_boto_error(boto.ClientError(response, "GetObject"))

    clients = [import_module(name) for name in ("httpx", "httpx2") if find_spec(name)]  # of which the Hub's is one
    httpx = clients[-1]

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
        (aiohttp.ServerTimeoutError(), "away"),
        (aiohttp.ClientConnectionResetError("said"), "away"),
        (aiohttp.InvalidURL("s3:/x"), "denied"),
        (boto.EndpointConnectionError(endpoint_url="x"), "away"),
        (boto.ReadTimeoutError(endpoint_url="x"), "away"),
        (boto.NoCredentialsError(), "denied"),
        (boto.ParamValidationError(report="bucket"), "denied"),
        (boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), "away"),
        (boto.ProfileNotFound(profile="x"), "denied"),
        (boto.NoRegionError(), "denied"),
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
        (HFValidationError("said"), "denied"),
        (OfflineModeIsEnabled("said"), "denied"),
        *((client.ConnectError("said"), "away") for client in clients),
        *((client.ReadTimeout("said"), "away") for client in clients),
        (requests.ConnectionError("said"), "away"),
        (requests.exceptions.ChunkedEncodingError("said"), "away"),
        (answered(504), "away"),
        (answered(404), "missing"),
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


def wrong(errors: list[tuple[Exception, str]]) -> list[tuple[Exception, str, str]]:
    return [(error, found, fault) for error, fault in errors if (found := fault_of(error)) != fault]


@pytest.mark.filterwarnings("error")
def test_errors_of_the_libraries():
    assert wrong(library_errors()) == []


@pytest.mark.filterwarnings("error::DeprecationWarning:coca_lit")
def test_errors_of_gcsfs():
    """As it makes them of answers; some are plain ones of Python, or of `requests`."""
    retry = pytest.importorskip("gcsfs.retry")
    from google.api_core import exceptions as api
    from google.auth import exceptions as auth

    faults = {400: "denied", 401: "denied", 403: "denied", 404: "missing", 408: "away", 429: "throttled"}
    faults |= {500: "away", 502: "away", 503: "throttled", 504: "away"}
    errors: list[tuple[Exception, str]] = []
    for status, fault in faults.items():
        for body in (b"", b"<html>", b'{"error": {"message": "said"}}'):
            with pytest.raises(Exception) as raised:  # noqa: PT011  whatever it is
                retry.validate_response(status, body, "bucket/x.tar")
            errors.append((raised.value, fault))
    with pytest.raises(ValueError, match="Bad Request") as raised:
        retry.validate_response(400, b'{"error": {"message": "invalid bucket name"}}', "bucket/x.tar")
    errors += [(raised.value, "denied"), (retry.ChecksumError("said"), "away")]
    errors += [(auth.TransportError("said"), "away"), (auth.DefaultCredentialsError("said"), "denied")]
    errors += [(api.ServiceUnavailable("said"), "throttled"), (api.Forbidden("said"), "denied")]
    assert wrong(errors) == []
