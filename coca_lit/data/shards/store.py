"""Object stores (s3, gs, hf, https) through fsspec: one place that reads them, waits for them and says what is wrong.

A store that does not answer is no damage to the data: a request is repeated with growing waits, and after the patience
is over the run stops. It never continues with other data. What waiting cannot fix (a bucket that does not exist,
credentials) is reported at once.

Only these schemes are accepted, and no chained protocols of fsspec: a URL may come from a stranger.
"""

import errno
import fnmatch
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from io import SEEK_CUR, BufferedIOBase
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import unquote

from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.reading import MAX_JSON, printable

log = logging.getLogger(__name__)
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback at each attempt; `ask` says it in a line

T = TypeVar("T")

SCHEMES = ("s3", "gs", "hf", "https", "memory")  # memory: for tests
VERSIONS = ("ETag", "etag", "blob_id", "Last-Modified", "created")  # what tells two versions of a file apart
BLOCK = 2**19  # bytes that a store sends in about the time in which it answers a request
PATIENCE = 600.0  # seconds
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two attempts
_used: dict[int, Any] = {}  # for good: a forked worker would close the connections of its parent, with a traceback
_jitter = random.SystemRandom()  # thousands of workers must not all come back in the same second

Fault = Literal["away", "throttled", "missing", "denied", "local", "unknown"]

# The libraries of the stores, and those under them, have no common class of errors and need not be installed: they are
# told apart by the module that defines the error, by HTTP status, and by the codes of S3.
_NETWORK = {"aiohttp", "aiobotocore", "botocore", "urllib3", "requests", "httpx", "httpx2", "httpcore", "httpcore2"}
_NETWORK |= {"h11", "http", "ssl", "socket", "asyncio", "anyio", "fsspec", "s3fs", "gcsfs", "google", "huggingface_hub"}
_DENIED = ("Credential", "Token", "Login", "Auth", "Gated", "Certificate")
_MISTAKEN = ("Validation", "Region", "Profile", "Config", "InvalidURL", "InvalidUrl", "HttpUrl", "Schem", "Offline")
_THROTTLING = ("SlowDown", "Throttl", "RequestLimitExceeded", "TooManyRequests", "ServiceUnavailable")
_ON_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?(/.*)?", re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class StoreError(DataError):
    """An object store that does not answer, or refuses."""


class DeniedError(StoreError):
    """A file that may not be read."""


class Stored(NamedTuple):
    """A remote file as its store lists it."""

    bytes: int
    version: str  # changes with the content; "" if the store does not tell


class RemoteFolder(NamedTuple):
    """The listing of a folder on an object store. A web server has none: it is asked for each file."""

    url: str
    files: Mapping[str, Stored]  # by name
    patience: float

    def file(self, name: str) -> Stored | None:
        if not _is_web(self.url):
            return self.files.get(name)
        url = f"{self.url}/{name}"
        try:
            return ask(url, self.patience, lambda store: stored(store, url))
        except (FileNotFoundError, DeniedError):  # as S3 answers those who may not list
            return None

    def matches(self, pattern: str) -> list[str]:
        if _is_web(self.url):
            raise DataError(f"{self.url} cannot be listed: name the files, as in {self.url}/{{00000..00099}}.tar")
        return sorted(name for name in self.files if fnmatch.fnmatchcase(name, pattern))

    def read(self, name: str, size: int) -> bytes:
        """A small file of that size."""
        url = f"{self.url}/{name}"
        if size > MAX_JSON:
            raise DataError(f"{url} has {size:,} bytes, more than {MAX_JSON:,}")
        return ask(url, self.patience, lambda store: read_range(store, url, 0, size))


class RangeFile(BufferedIOBase):
    """A remote file of which at least `BLOCK` bytes are read at a time, and what is skipped is not fetched."""

    def __init__(self, url: str, size: int, patience: float = PATIENCE) -> None:
        self._url, self._size, self._patience = url, size, patience
        self._position = self._start = self.fetched = 0
        self._block = b""

    def read(self, size: int | None = -1) -> bytes:
        """Raises as `ask`."""
        left = max(0, self._size - self._position)
        size = left if size is None or size < 0 else min(size, left)
        if not self._start <= self._position <= self._position + size <= self._start + len(self._block):
            start, end = self._position, self._position + max(size, min(BLOCK, left))
            self._block = ask(self._url, self._patience, lambda store: read_range(store, self._url, start, end))
            self._start, self.fetched = start, self.fetched + len(self._block)
        first = self._position - self._start
        self._position += size
        return self._block[first : first + size]

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (self._position if whence == SEEK_CUR else 0)
        return self._position

    def tell(self) -> int:
        return self._position


def is_remote(name: str) -> bool:
    return name.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)) and "::" not in name


def list_folder(url: str, patience: float = PATIENCE) -> RemoteFolder:
    """A folder that does not exist is empty; raises as `ask`."""
    try:
        rows = [] if _is_web(url) else ask(url, patience, lambda store: store.ls(url, detail=True))
    except FileNotFoundError:
        rows = []
    files = {row["name"].rpartition("/")[2]: _stored(row) for row in rows if row["type"] == "file"}
    return RemoteFolder(url, files, patience)


def stored(store: Any, url: str) -> Stored:
    """The present state of a file, not the one that fsspec has cached."""
    store.invalidate_cache()
    found = store.info(url)
    if found["size"] is None:
        raise StoreError(
            f"{url}: the server does not report its size, without which it cannot be read: copy it to a local disk"
        )
    return _stored(found)


def read_range(store: Any, url: str, start: int, end: int) -> bytes:
    """The bytes from `start` to `end`, at most as many as a server may send."""
    more = {"cache_type": "none"} if url.startswith("hf://") else {}  # it would read 5 MB ahead
    content: bytes = store.cat_file(url, start=start, end=end, **more) if end > start else b""
    if len(content) > end - start:
        raise StoreError(f"{url}: the server ignores range requests: copy the file to a local disk")
    if len(content) < end - start:
        raise ConnectionError(f"{url} came with {len(content)} of {end - start} bytes")
    return content


def fetch(store: Any, url: str, path: Path, size: int) -> None:
    """Copies a file of that size. A web server that begins to send more is not listened to: it may have no end."""
    if not _is_web(url):
        return store.get_file(url, str(path))
    from fsspec.callbacks import Callback

    def check(announced: int | None, received: int) -> None:
        if max(announced or 0, received) > size:
            raise ConnectionError(f"{url} comes with more than {size} bytes")

    store.get_file(url, str(path), callback=Callback(hooks={"size": check}))


def at_commit(url: str, commits: dict[str, str], patience: float = PATIENCE) -> str:
    """A URL of a data set on the Hub with the hash of a commit as its revision: a branch may move while a training
    lasts. Other URLs stay as they are.

    Args:
        commits: the hash by data set and revision, "ORG/NAME@main". One that is not there yet is asked for and added.
    """
    if not (found := _ON_HUB.fullmatch(url)):
        return url
    name, revision, path = found[1], found[2] or "main", found[3] or ""
    if not _COMMIT.fullmatch(revision) and (key := f"{name}@{revision}") not in commits:

        def newest(store: Any) -> str:
            from huggingface_hub import HfApi
            from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

            try:
                api = HfApi(endpoint=store.endpoint, token=store.token)
                return str(api.dataset_info(name, revision=unquote(revision)).sha)
            except GatedRepoError:
                raise
            except (RepositoryNotFoundError, RevisionNotFoundError):
                raise FileNotFoundError(url) from None

        try:
            commits[key] = ask(url, patience, newest)
        except FileNotFoundError:
            return url  # its listing tells
    return f"hf://datasets/{name}@{commits.get(f'{name}@{revision}', revision)}{path}"


def ask(url: str, patience: float, request: Callable[[Any], T]) -> T:
    """`request(fsspec file system)`, repeated with growing waits while the store does not answer.

    Raises:
        StoreError: for `patience` seconds there was no answer, or the store refuses.
        DataNotFoundError: there is no such bucket.
        FileNotFoundError: there is no such file.
    """
    began, wait = None, FIRST_WAIT
    while True:
        try:
            answer = request(_filesystem(url))
        except DataError:
            raise
        except ImportError as error:
            raise StoreError(f"{url} needs an optional package: pip install 'coca_lit[remote]' ({error})") from error
        except Exception as error:
            fault = fault_of(error)
            if fault == "unknown":
                raise
            if fault not in ("away", "throttled"):
                raise _final(url, fault, error, patience) from error
            now = time.monotonic()
            began = now if began is None else began
            left = patience - (now - began)
            if left <= 0:
                raise _given_up(url, fault, error, patience) from error
            pause = min(wait * _jitter.uniform(0.5, 1), left)
            what = "throttles requests" if fault == "throttled" else "does not answer"
            log.warning(
                "%s: the store %s (%s); next try in %.0f s, for %.0f s more", url, what, _reason(error), pause, left
            )
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT)
            _forget(url)
        else:
            if began is not None:
                log.warning("%s: the store answers again after %.0f s", url, time.monotonic() - began)
            return answer


def fault_of(error: BaseException) -> Fault:
    """What is wrong, by an error of any library below fsspec: "away" and "throttled" may pass, the others do not."""
    chain = [*_causes(error)]
    codes = {code for cause in chain for code in _codes(cause)}
    names = [type(cause).__name__ for cause in chain]
    if any(isinstance(c, OSError) and (c.errno in _FULL or isinstance(c.filename, str)) for c in chain[:1]):
        return "local"  # the cache folder, not the store
    if "NoSuchBucket" in codes or 404 in codes or (isinstance(error, FileNotFoundError) and not _hides(error)):
        return "missing"
    if any(word in str(code) for code in codes for word in _THROTTLING) or codes & {429, 503}:
        return "throttled"
    if isinstance(error, BlockingIOError) or getattr(error, "errno", None) == errno.EBUSY:  # so s3fs says SlowDown
        return "throttled"
    statuses = {code for code in codes if isinstance(code, int)}
    if any(code >= 500 or code in (408, 409) for code in statuses) or isinstance(error, TimeoutError):
        return "away"
    if (statuses and min(statuses) >= 400) or isinstance(error, PermissionError):
        return "denied"
    if any(word in name for name in names for word in _DENIED + _MISTAKEN):
        return "denied"
    if type(error) in (OSError, ValueError) and str(error).startswith(("Forbidden: ", "Bad Request: ")):
        return "denied"  # gcsfs says 403 and 400 like this
    return "away" if _is_of_network(chain[-1]) or isinstance(error, OSError | EOFError) else "unknown"


def _is_web(url: str) -> bool:
    return url.startswith("http")


def _stored(row: Mapping[str, Any]) -> Stored:
    version = next((row[name] for name in VERSIONS if row.get(name)), "")
    return Stored(row["size"], str(version.timestamp() if isinstance(version, datetime) else version))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, down to the first that a library of the network raised: what lies below may carry other
    codes. aiohttp calls a body that breaks off a bad request.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        if _is_of_network(error):
            return
        error = error.__cause__ or error.__context__


def _hides(error: FileNotFoundError) -> bool:
    """Whether it stands for another one: fsspec takes any failure of a web server for a missing file."""
    cause = error.__cause__
    return isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")


def _is_of_network(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _NETWORK


def _codes(error: BaseException) -> Iterator[int | str]:
    """HTTP statuses, and the names that S3 gives to its errors."""
    response = getattr(error, "response", None)
    found = [  # the first name that is there: aiohttp warns of `code`, its old name of `status`
        next((getattr(place, name) for name in ("status", "status_code", "code") if hasattr(place, name)), None)
        for place in (error, response)
    ]
    if isinstance(response, Mapping):  # botocore
        found += [
            (response.get("Error") or {}).get("Code"),
            (response.get("ResponseMetadata") or {}).get("HTTPStatusCode"),
        ]
    for code in found:
        if isinstance(code, str) and code.isdigit():
            code = int(code)
        if (isinstance(code, int) and 400 <= code < 600) or isinstance(code, str):
            yield code


def _final(url: str, fault: Fault, error: Exception, patience: float) -> Exception:
    """The error to raise for a fault that does not pass."""
    if fault == "missing":
        return _missing(url, patience)
    if fault == "local" and isinstance(error, OSError):
        return DataError(f"no local copy of {url} can be written: {error.strerror} ({error.filename})")
    return DeniedError(f"{url} cannot be read: check the address and the credentials ({_reason(error)})")


def _missing(url: str, patience: float) -> Exception:
    """Whether it is the file or the whole bucket that is gone: a bucket is not one of many shards."""
    bucket = "/".join(url.split("/")[:3])
    _forget(url)
    if not (url.startswith("hf://") or _is_web(url)) and not ask(
        bucket, patience, lambda store: _exists(store, bucket)
    ):
        return DataNotFoundError(f"{url}: there is no bucket {bucket}, or it cannot be seen with these credentials")
    return FileNotFoundError(f"{url} does not exist")


def _exists(store: Any, bucket: str) -> bool:
    try:
        store.ls(bucket, detail=True)  # `exists` would take any error for a no
        return True
    except FileNotFoundError:
        return False
    except PermissionError:
        return True


def _given_up(url: str, fault: Fault, error: Exception, patience: float) -> StoreError:
    asked = "throttles requests: use fewer workers, or" if fault == "throttled" else "does not answer:"
    return StoreError(
        f"{url}: for {patience:.0f} s the store {asked} start the same command later, which resumes from the last "
        f"checkpoint, or wait longer with data.store_patience=SECONDS ({_reason(error)})"
    )


def _reason(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {error}".splitlines()[0])[:200]


def _forget(url: str) -> None:
    """Listings and sizes that fsspec remembers may be of before."""
    try:
        _filesystem(url).invalidate_cache()
    except Exception:  # the next attempt reports what is wrong
        return


def _filesystem(url: str) -> Any:
    import fsspec

    store = fsspec.filesystem(url.partition("://")[0])
    _used[id(store)] = store
    return store
