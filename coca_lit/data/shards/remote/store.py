"""Object stores (s3, gs, hf through fsspec) and web servers (https): one place that reads them, waits for them and says
what is wrong.

A store that does not answer is no damage to the data: a request is repeated with growing waits, and after the patience
is over the run stops. It never continues with other data. A file that is missing and a refusal are reported at once.

Only these schemes are accepted, and no chained protocols of fsspec: a URL may come from a stranger.
"""

import errno
import logging
import random
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from http.client import HTTPMessage, HTTPResponse
from io import SEEK_CUR, BufferedIOBase
from ipaddress import ip_address
from typing import IO, Any, NamedTuple, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from coca_lit.data.shards.shard import ChangedError
from coca_lit.errors import DataError
from coca_lit.reading import printable

log = logging.getLogger(__name__)
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback at each attempt; `ask` says it in a line

T = TypeVar("T")

VERSIONS = ("ETag", "etag", "blob_id", "Last-Modified", "created")  # what tells two versions of a file apart
BLOCK = 2**19  # bytes that a store sends in about the time in which it answers a request
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two attempts
SILENCE = 10.0  # seconds without a byte until the first attempt is given up; twice as long at each further one
PASSING = (408, 409, 425, 429)  # HTTP statuses below 500 after which a request may be repeated
WITHOUT_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")  # classes of botocore, which s3fs brings
_used: dict[int, Any] = {}  # kept: a forked worker that collects them would close the connections of its parent
_jitter = random.SystemRandom()  # thousands of workers must not all come back in the same second
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


class RangeFile(BufferedIOBase):
    """A remote file of which at least `BLOCK` bytes are read at a time, and what is skipped is not fetched."""

    def __init__(self, url: str, size: int, patience: float) -> None:
        self._url = url
        self._size = size
        self._patience = patience
        self._position = self._start = self.fetched = 0
        self._block = b""

    def read(self, size: int | None = -1) -> bytes:
        """Raises as `ask`."""
        left = max(0, self._size - self._position)
        size = left if size is None or size < 0 else min(size, left)
        if not self._start <= self._position <= self._position + size <= self._start + len(self._block):
            start = self._position
            end = self._position + max(size, min(BLOCK, left))
            self._block = ask(self._url, self._patience, lambda store: read_range(store, self._url, start, end))
            self._start = start
            self.fetched += len(self._block)
        first = self._position - self._start
        self._position += size
        return self._block[first : first + size]

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (self._position if whence == SEEK_CUR else 0)
        return self._position

    def tell(self) -> int:
        return self._position


def list_folder(url: str, patience: float) -> dict[str, Stored] | None:
    """Files by name; none in a folder that does not exist, None from a web server. Raises as `ask`."""
    if _is_web(url):
        return None
    try:
        rows = ask(url, patience, lambda store: store.ls(url, detail=True))
    except FileNotFoundError:
        rows = []
    return {row["name"].rpartition("/")[2]: _stored(row) for row in rows if row["type"] == "file"}


def look_up(url: str, patience: float) -> Stored | None:
    """A file of a web server; None if there is none."""
    try:
        return ask(url, patience, lambda store: stored(store, url))
    except (FileNotFoundError, DeniedError):  # as S3 answers those who may not list
        return None


def stored(store: Any, url: str) -> Stored:
    """The present state of a file, not the one that fsspec has cached."""
    store.invalidate_cache()
    found = store.info(url)
    if found["size"] is None:
        raise StoreError(f"{url}: the server does not report its size: copy the file to a local disk")
    return _stored(found)


def read_file(url: str, size: int, patience: float) -> bytes:
    """A small file of that size; raises as `ask`."""
    return ask(url, patience, lambda store: read_range(store, url, 0, size))


def read_range(store: Any, url: str, start: int, end: int) -> bytes:
    """The bytes from `start` to `end`."""
    more = {"cache_type": "none"} if url.startswith("hf://") else {}  # it would read 5 MB ahead
    content: bytes = store.cat_file(url, start=start, end=end, **more) if end > start else b""
    if len(content) > end - start:
        raise StoreError(f"{url}: the server ignores range requests: copy the file to a local disk")
    if len(content) < end - start:
        raise ConnectionError(f"{url} came with {len(content)} of {end - start} bytes")
    return content


def at_commit(url: str, commits: dict[str, str], patience: float) -> str:
    """A URL of a data set on the Hub with the hash of a commit as its revision: a branch may move while a training
    lasts. Other URLs stay as they are.

    Args:
        commits: the hash by data set and revision, "ORG/NAME@main". One that is not there yet is asked for and added.
    """
    found = _ON_HUB.fullmatch(url)
    if not found:
        return url
    name = found[1]
    revision = found[2] or "main"
    path = found[3] or ""
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
    """`request(file system)`, repeated with growing waits while the store does not answer; not if `patience` is 0.

    Raises:
        StoreError: for `patience` seconds there was no answer, or the store refuses.
        FileNotFoundError: there is no such file.
    """
    failing_since = None
    wait = FIRST_WAIT
    silence = SILENCE
    while True:
        began = time.monotonic()
        silence = min(silence, max(patience, 1) if patience else SILENCE)
        try:
            answer = request(_filesystem(url, silence))
        except (DataError, ChangedError):
            raise
        except ImportError as error:
            raise StoreError(f"{url} needs an optional package: pip install 'coca_lit[remote]' ({error})") from error
        except Exception as error:
            final = _final(url, error)
            if final is not None:
                raise final from error
            now = time.monotonic()
            if failing_since is None:
                failing_since = max(began, now - silence)  # before that, bytes arrived
            left = patience - (now - failing_since)
            if left <= 0:
                raise StoreError(
                    f"{url}: for {patience:.0f} s the store does not answer ({_reason(error)}): run the same command"
                    " later, which resumes, or raise data.store_patience"
                ) from error
            pause = min(wait * _jitter.uniform(0.5, 1), left)
            log.warning(
                "%s: the store does not answer (%s); next try in %.0f s, for %.0f s more",
                *(url, _reason(error), pause, left),
            )
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT)
            silence = 2 * silence
            _forget(url)
        else:
            if failing_since is not None:
                log.warning("%s: the store answers again after %.0f s", url, time.monotonic() - failing_since)
            return answer


def _final(url: str, error: Exception) -> Exception | None:
    """What to raise for an error that does not pass; None for one that may. The libraries of stores share no class of
    errors: those of Python other than `OSError` are mistakes of a program, all others may pass.
    """
    if isinstance(error, OSError) and (error.errno in _FULL or isinstance(error.filename, str)):
        return DataError(f"no local copy of {url} can be written: {error.strerror} ({error.filename})")
    places = (error, getattr(error, "response", None))
    codes = (getattr(place, name, None) for place in places for name in ("status", "status_code", "code"))
    status = next((code for code in codes if isinstance(code, int)), 0)  # of HTTP
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(f"{url} does not exist")
    refused = 400 <= status < 500 and status not in PASSING
    without_credentials = type(error).__name__ in WITHOUT_CREDENTIALS
    if refused or without_credentials or isinstance(error, PermissionError | ValueError):
        return DeniedError(f"{url} cannot be read: check the address and the credentials ({_reason(error)})")
    passes = isinstance(error, OSError | EOFError) or type(error).__module__ != "builtins"
    return None if passes else error


def _is_web(url: str) -> bool:
    return url.startswith("http")


def _stored(row: Mapping[str, Any]) -> Stored:
    version = next((row[name] for name in VERSIONS if row.get(name)), "")
    return Stored(row["size"], str(version.timestamp() if isinstance(version, datetime) else version))


def _reason(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {error}".splitlines()[0])[:200]


def _forget(url: str) -> None:
    """Listings and sizes that fsspec remembers may be of before."""
    try:
        _filesystem(url, SILENCE).invalidate_cache()
    except Exception:  # the next attempt reports what is wrong
        return


def _filesystem(url: str, silence: float) -> Any:
    """That of fsspec, or `WebStore`; where it can be set, a read fails after so many seconds without a byte."""
    if _is_web(url):
        return WebStore(silence)
    import fsspec

    scheme = url.partition("://")[0]
    more = {}
    if scheme == "gs":  # whose requests would be cut after 300 s
        from aiohttp import ClientTimeout

        more["requests_timeout"] = ClientTimeout(total=None, sock_connect=LONGEST_WAIT, sock_read=LONGEST_WAIT)
    store = fsspec.filesystem(scheme, **more)
    _used[id(store)] = store
    return store


# Web servers: the few methods of an fsspec file system that training calls

CHUNK = 2**20  # bytes


class WebStore:
    """Reads at most what was asked for, and follows redirects as `SafeRedirects` allows.

    Args:
        timeout: seconds without a byte after which a request fails. One that goes on may take any time.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout

    def info(self, url: str) -> dict[str, Any]:
        """{"size": bytes or None, "ETag", "Last-Modified"}; raises as the other methods, see `_open`."""
        with self._open(url, "bytes=0-0") as answer:
            whole = answer.headers.get("Content-Length") if answer.status == 200 else None
            found = re.fullmatch(r"bytes .*/(\d+)", answer.headers.get("Content-Range", ""))
            size = found[1] if found else whole
            about = {name: answer.headers.get(name) for name in ("ETag", "Last-Modified")}
            return {"size": int(size) if size and size.isdigit() else None, **about}

    def cat_file(self, url: str, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, and one more if the server sends more."""
        content = b""
        with self._open(url, f"bytes={start}-{end - 1}") as answer:
            if answer.status != 206 and start:
                raise PermissionError("the server ignores range requests")
            while part := answer.read(end - start + 1 - len(content)):
                content += part
        return content

    def get_file(self, url: str, path: str, size: int) -> None:
        """Copies a file; a server that sends more than `size` bytes is not listened to, as it may have no end."""
        left = size
        with self._open(url) as answer, open(path, "wb") as file:
            while part := answer.read(min(CHUNK, left + 1)):
                left -= len(part)
                if left < 0:
                    raise ConnectionError(f"{url} comes with more than {size} bytes")
                file.write(part)

    def invalidate_cache(self) -> None:
        """Nothing is remembered."""

    @contextmanager
    def _open(self, url: str, byte_range: str = "") -> Iterator[HTTPResponse]:
        """Raises `FileNotFoundError`, `PermissionError` for a refusal, else an `OSError` that may pass."""
        request = Request(url, headers={"Range": byte_range} if byte_range else {})
        try:
            answer = build_opener(SafeRedirects).open(request, timeout=self.timeout)
        except HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise FileNotFoundError(url) from error
            passes = error.code >= 500 or error.code in PASSING
            raise (ConnectionError if passes else PermissionError)(f"HTTP status {error.code}") from error
        except URLError as error:
            refused = isinstance(error.reason, ssl.SSLCertVerificationError)
            raise (PermissionError if refused else ConnectionError)(str(error.reason)) from error
        with answer:
            yield answer


class SafeRedirects(HTTPRedirectHandler):
    """None from https to http, and none from a public host into the network of this machine, whose services trust it.

    Names are looked up here; one that only a proxy can resolve counts as public.
    """

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise PermissionError(f"{req.full_url} leads from https to {newurl.partition(':')[0]}")
        host = urlsplit(newurl).hostname
        if _is_private(host) and not _is_private(req.origin_req_host):
            raise PermissionError(f"{req.full_url} leads to {host}, which is on a private network")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_private(host: str | None) -> bool:
    """Whether a host name has an address that is not of the public internet: loopback, private, link-local."""
    try:
        found = {str(address[0]) for *_, address in socket.getaddrinfo(host and host.strip("[]"), 0)}
    except socket.gaierror:
        return False
    addresses = map(ip_address, found)
    return not all((getattr(address, "ipv4_mapped", None) or address).is_global for address in addresses)
