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
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.exceptions import FSTimeoutError
from lightning.pytorch import Trainer

from coca_lit.callbacks import Checkpoints
from coca_lit.data.shards import listing
from coca_lit.data.shards.index import load_index, make_index
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.shards.listing import find_shards
from coca_lit.data.shards.remote import shards as remote_shards
from coca_lit.data.shards.remote import store as object_store
from coca_lit.data.shards.remote.cache import PARTIAL, ShardCache
from coca_lit.data.shards.remote.shards import RemoteShard
from coca_lit.data.shards.remote.store import RangeFile, Stored, StoreError
from coca_lit.data.shards.shard import ManifestEntry, Shard
from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.tools.prepare.command import data as coca_data
from helpers.datamodules import TOKENIZER, Recorder
from helpers.shards import contents, write_shards

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

from helpers.faulty_store import FaultyGoogleStore, FaultyHub, FaultyStore, faulty_store

pytestmark = pytest.mark.slow  # real servers whose faults are waited for

FAULTS = ("reset", "cut", "slow", "slow down", "internal", "away")
DRAWN = int(os.environ.get("COCA_STORE_FAULTS", 4))
ON_ALL = pytest.mark.parametrize("server", [FaultyStore, FaultyGoogleStore, FaultyHub], indirect=True)


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
    monkeypatch.setattr(listing, "SCHEMES", (*listing.SCHEMES, "http"))
    monkeypatch.setattr(remote_shards, "PAUSE", 0.05)
    fsspec.get_filesystem_class(server.scheme).clear_instance_cache()  # and its listings
    yield server
    if server.is_away:
        server.start()
    fsspec.get_filesystem_class(server.scheme).clear_instance_cache()


def laion(tmp_path: Path, root: str = "s3://", **more) -> LAIONDataModule:
    more = {"window": 12, "readers": 2, "cache_dir": str(tmp_path / "cache")} | more
    return LAIONDataModule(f"{root}bucket/set", 48, tokenizer=TOKENIZER, batch_size=4, image_size=16, **more)


def batches(data: LAIONDataModule, start: int = 0, stop: int = 12) -> list[tuple]:
    return [contents(batch) for batch in islice(data.train_dataloader().batches_from(0, start), stop - start)]


@pytest.fixture(scope="module")
def expected(server: FaultyStore, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """Twelve batches, two passes, of an undisturbed run on local files of the same names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, server.scheme, server.options())
        return batches(laion(tmp_path_factory.mktemp("expected"), server.root))


# What may pass


@pytest.mark.parametrize(
    ("server", "workers"),
    [(FaultyStore, 0), *((store, 2) for store in (FaultyStore, FaultyGoogleStore, FaultyHub))],
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


@ON_ALL
def test_windows_are_those_of_the_local_set_whatever_fails(store, tmp_path, windows, caplog):
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
    assert "the store does not answer" in caplog.text
    assert "the store answers again after" in caplog.text
    assert "Traceback" not in caplog.text


@ON_ALL
def test_an_index_is_made_of_headers_whatever_fails(store, tmp_path, local, monkeypatch):
    monkeypatch.setattr(object_store, "BLOCK", 512)
    expected = make_index(Shard(str(local / "00001.tar")), tmp_path)
    (shard,) = find_shards(f"{store.root}bucket/set/00001.tar", ShardCache(tmp_path / "cache", 10**6))
    headers = RangeFile(shard.name, shard.stored.bytes, patience=600)
    store.faults.extend(["", "", "reset", "", "cut", "internal"])
    assert make_index(shard, tmp_path, headers).places.tolist() == expected.places.tolist()
    assert headers.fetched < 0.7 * shard.stored.bytes


def test_an_index_of_headers_is_of_its_version_also_beside_a_manifest(tmp_path, local):
    """Nobody has compared the digest: the object may have been a wrong one."""
    stored, entry = Stored(os.path.getsize(local / "00001.tar"), "1"), ManifestEntry(6, 0, "digest")
    shard = RemoteShard("s3://bucket/00001.tar", entry, stored=stored, cache=ShardCache(tmp_path / "cache", 10**6))
    with (local / "00001.tar").open("rb") as file:
        make_index(shard, tmp_path, file)
    assert load_index(shard, tmp_path) is not None
    assert load_index(replace(shard, stored=stored._replace(version="2")), tmp_path) is None


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
        patch.setattr("coca_lit.data.shards.laion.AUTO_BYTES", 0)
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


def index_without_copies(tmp_path: Path, but: Collection[str] = ()) -> None:
    """Leaves the indexes in the cache, and no other shards."""
    laion(tmp_path).prepare_data()
    for path in (tmp_path / "cache").glob("*.tar"):
        if path.name.partition("-")[2] not in but:
            path.unlink()


def test_patience_ends_and_the_run_stops_saved(store, tmp_path):
    """A first shard is there, then the store is gone: the run stops with a checkpoint, and resumes from it."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)

    def fit(module: Recorder, resume: Path | None = None, **more) -> None:
        data = laion(tmp_path, **more)
        saving = Checkpoints(tmp_path)
        Trainer(accelerator="cpu", max_epochs=1, callbacks=[saving], **quiet).fit(module, data, ckpt_path=resume)

    stopped, resumed, alone = Recorder(), Recorder(), Recorder()
    ((keys, *_),) = batches(laion(tmp_path), 0, 1)
    asked = -1
    while asked != store.requests:  # shards that were read ahead are still on their way
        asked = store.requests
        time.sleep(1)
    index_without_copies(tmp_path, but={key.split("/")[-2] for key in keys})
    store.faults.extend([""] * 2)  # the listing and the manifest
    store.always = "slow down"
    with pytest.raises(StoreError, match=r"for 0 s .*data\.store_patience"):
        fit(stopped, store_patience=0)
    assert 0 < len(stopped.seen) < 12
    store.always = ""
    fit(resumed, tmp_path / "checkpoints" / "last.ckpt")
    fit(alone)
    assert stopped.seen + resumed.seen == alone.seen


@pytest.mark.usefixtures("forked_workers")
def test_the_end_of_patience_is_said_by_a_worker(store, tmp_path):
    index_without_copies(tmp_path)
    data = laion(tmp_path, num_workers=1, store_patience=0.1)
    data.prepare_data()
    store.stop()
    stream = iter(data.train_dataloader().batches_from(0, 0))
    with pytest.raises(StoreError, match="for 0 s") as error:
        next(stream)
    traceback.clear_frames(error.tb)
    del stream  # see test_shards.py


@ON_ALL
def test_what_no_waiting_mends_is_said_at_once(store, tmp_path):
    for place in ("nowhere/set", "bucket/other"):
        with pytest.raises(DataNotFoundError, match=f"shards not found .*{place}"):
            find_shards(f"{store.root}{place}/*.tar")
    store.always = "forbidden"
    patience = 0 if store.scheme == "gs" else 600  # gcsfs has no class of its own for a refusal
    with pytest.raises(StoreError, match=r"bucket/set.*(credentials|Forbidden)"):
        laion(tmp_path, store.root, store_patience=patience).prepare_data()


def test_a_lost_shard_is_counted_and_a_lost_bucket_stops_the_run(store, tmp_path, local):
    store.put("brief", {f"set/{path.name}": path.read_bytes() for path in local.iterdir()})
    shards = "s3://brief/set"
    options = {"tokenizer": TOKENIZER, "batch_size": 4, "image_size": 16, "cache_dir": str(tmp_path / "cache")}
    data = LAIONDataModule(shards, 24, max_bad_fraction=0.5, **options)
    data.prepare_data()
    store.delete("brief/set/00002.tar")
    found = list(islice(data.train_dataloader().batches_from(0, 0), 6))
    assert {bad.shard for batch in found for bad in batch.bad} == {f"{shards}/00002.tar"}
    for path in local.iterdir():
        store.delete(f"brief/set/{path.name}")
    store.delete("brief")
    other = LAIONDataModule(shards, 24, max_bad_fraction=1.0, **options | {"cache_dir": str(tmp_path / "empty")})
    other.shards = data.shards and {
        "": [replace(shard, cache=ShardCache(*other.cache)) for shard in data.shards[""]]
    }  # found before the bucket went
    with pytest.raises(DataError, match="the shards hold no usable sample"):
        batches(other)


def test_a_full_disk_is_not_the_store(store, tmp_path, monkeypatch):
    def full(self, *arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device", "x.partial")

    monkeypatch.setattr(s3fs.S3FileSystem, "get_file", full)
    with pytest.raises(DataError, match=r"s3://.*No space left on device"):
        batches(laion(tmp_path))


# Errors of the libraries


def s3_error(code: str, status: int) -> Exception:
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    response = {"Error": {"Code": code, "Message": "said"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(response, "GetObject"))


def asked(error: Exception, patience: float = 0) -> Exception:
    """What `ask` makes of an error."""

    def fail(store: object) -> None:
        raise error

    with pytest.raises(Exception) as raised:  # noqa: PT011  whatever it is
        object_store.ask("memory://set/x.tar", patience, fail)
    return raised.value


def test_errors_that_pass_are_waited_for():
    import aiohttp
    from botocore import exceptions as boto

    for error in (
        *(aiohttp.ClientPayloadError("said"), aiohttp.ServerDisconnectedError(), aiohttp.ServerTimeoutError()),
        *(aiohttp.ClientResponseError(SimpleNamespace(real_url="x"), (), status=status) for status in (408, 429, 502)),
        *(boto.EndpointConnectionError(endpoint_url="x"), boto.ReadTimeoutError(endpoint_url="x")),
        *(s3_error(code, status) for code, status in (("SlowDown", 503), ("InternalError", 500))),
        *(http.client.IncompleteRead(b"x"), http.client.RemoteDisconnected("said"), FSTimeoutError(), TimeoutError()),
        *(socket.gaierror(-3, "Temporary failure in name resolution"), ConnectionResetError(104, "reset by peer")),
    ):
        found = asked(error)
        assert type(found) is StoreError
        assert "store_patience" in str(found)


def test_other_errors_are_raised_at_once():
    import aiohttp
    from botocore import exceptions as boto

    for error in (
        *(s3_error(code, 403) for code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")),
        *(
            aiohttp.ClientResponseError(SimpleNamespace(real_url="x"), (), status=401),
            PermissionError("said"),
            ValueError("bucket name"),
        ),
        *(boto.NoCredentialsError(), boto.PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY")),
    ):
        assert isinstance(asked(error, 600), object_store.DeniedError)
    assert isinstance(asked(FileNotFoundError("x.tar"), 600), FileNotFoundError)
    assert isinstance(asked(s3_error("NoSuchKey", 404), 600), FileNotFoundError)
    assert "No space left" in str(asked(OSError(errno.ENOSPC, "No space left", "/cache/x"), 600))
    assert isinstance(asked(KeyError("a bug"), 600), KeyError)
