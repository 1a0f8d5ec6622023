"""An S3 server (moto), one of the API of Google (gcp-storage-emulator) or a small Hub, behind a proxy that fails as
networks and stores do; all on this machine.
"""

import json
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from moto.server import ThreadedMotoServer

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # else gcsfs asks by gRPC, for a minute, what a bucket can do

CODES = {"slow down": (503, "SlowDown"), "internal": (500, "InternalError"), "forbidden": (403, "AccessDenied")}
AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=k/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class FaultyStore:
    """Answers with the next of `faults`, then with `always`, if that is one, and else as the server behind it.

    Faults: "reset" (of the connection), "cut" (in the middle of the body), "slow" (a body in pieces), "endless" (the
    body of a GET goes on for 64 MB), and `CODES`.

    Attributes:
        root: of the URLs of buckets.
        attempts: at most, that the client makes before it raises an error.
        sent: bytes of the last endless body.
    """

    root, attempts = "s3://", 1

    def __init__(self) -> None:
        self.backend, self._exit = self._serve()
        self.faults: deque[str] = deque()
        self.always = ""
        self.requests = self.sent = 0
        self._proxy: ThreadingHTTPServer | None = None
        self._port = socket.socket()  # which keeps the port while the store is away; it refuses connections
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._port.bind(("127.0.0.1", 0))
        self.port = self._port.getsockname()[1]
        self.start()

    def _serve(self) -> tuple[tuple[str, int], Callable[[], object]]:
        """Address of the server behind the proxy, and how to stop it."""
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        backend = HTTPConnection(*server.get_host_and_port())
        backend.request("POST", "/moto-api/reset")  # moto keeps its buckets in the process, for the next server too
        assert backend.getresponse().status == 200
        backend.close()
        return server.get_host_and_port(), server.stop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """The store comes back."""
        handler = type("Handler", (_Handler,), {"store": self})
        self._proxy = _Server(("127.0.0.1", self.port), handler)
        threading.Thread(target=self._proxy.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Connections are refused."""
        if self._proxy is not None:
            self._proxy.shutdown()
            self._proxy.server_close()
        self._proxy = None

    @property
    def is_away(self) -> bool:
        return self._proxy is None

    def close(self) -> None:
        self.stop()
        self._port.close()
        self._exit()

    @property
    def scheme(self) -> str:
        return self.root.partition("://")[0]

    def options(self) -> dict[str, Any]:
        """Of fsspec's file system."""
        region, once = {"region_name": "us-east-1"}, {"retries": {"total_max_attempts": 1}}
        return {"endpoint_url": self.url, "key": "k", "secret": "s", "client_kwargs": region, "config_kwargs": once}

    def put(self, bucket: str, files: dict[str, bytes]) -> None:
        self._make(bucket)
        for name, content in files.items():
            self._request("PUT", f"{bucket}/{name}", content)

    def _make(self, bucket: str) -> None:
        self._request("PUT", bucket)

    def delete(self, path: str) -> None:
        self._request("DELETE", path)

    def _request(self, method: str, path: str, content: bytes = b"") -> None:
        backend = HTTPConnection(*self.backend)
        kind = "application/json" if method == "POST" else "application/octet-stream"
        headers = {"Authorization": AUTHORIZATION, "Content-Type": kind, "x-amz-acl": "public-read"}
        backend.request(method, f"/{path}", content, headers)
        answer = backend.getresponse()
        assert answer.status < 300, answer.read()
        backend.close()

    def draw(self) -> str:
        self.requests += 1
        return self.faults.popleft() if self.faults else self.always


class FaultyGoogleStore(FaultyStore):
    root, attempts = "gs://", 12  # six, and aiohttp repeats those whose connection is reset

    def _serve(self) -> tuple[tuple[str, int], Callable[[], object]]:
        from gcp_storage_emulator.server import create_server

        server = create_server("127.0.0.1", 0, in_memory=True)
        server.start()
        return server._api._httpd.server_address, server.stop

    def options(self) -> dict[str, Any]:
        return {"endpoint_url": self.url, "token": "anon"}

    def _make(self, bucket: str) -> None:
        self._request("POST", "storage/v1/b", json.dumps({"name": bucket}).encode())


class FaultyHub(FaultyStore):
    """Of which BUCKET/set is a data set."""

    root, attempts = "hf://datasets/", 12

    def _serve(self) -> tuple[tuple[str, int], Callable[[], object]]:
        from helpers.hub_server import Hub

        self._hub = Hub()
        self._hub.__enter__()
        return self._hub.server_address, self._hub.__exit__

    def options(self) -> dict[str, Any]:
        return {"endpoint": self.url, "token": False}

    def put(self, bucket: str, files: dict[str, bytes]) -> None:
        from helpers.hub_server import Repository

        by_name = {name.removeprefix("set/"): content for name, content in files.items()}
        self._hub.repositories[f"{bucket}/set"] = Repository(by_name)


class _Server(ThreadingHTTPServer):
    daemon_threads = allow_reuse_port = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is none."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: ClassVar[FaultyStore]

    def do_GET(self) -> None:
        fault = "reset" if self.store.is_away else self.store.draw()
        if fault == "reset":
            return self._hang_up()
        if fault in CODES:
            status, code = CODES[fault]
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{fault}</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
        else:
            backend = HTTPConnection(*self.store.backend)
            backend.request(self.command, self.path, headers=dict(self.headers))
            answer = backend.getresponse()
            body = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "connection", "date", "server", "transfer-encoding"):
                    port = f":{self.store.backend[1]}/"  # redirects lead back to the proxy
                    self.send_header(name, value.replace(port, f":{self.store.port}/"))
            if self.command == "HEAD":
                self.send_header("Content-Length", answer.getheader("Content-Length") or "0")
            backend.close()
        if self.command != "HEAD" and fault != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault == "endless":
            return self._go_on()
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            return self._hang_up()
        for part in range(4) if fault == "slow" else ():
            self.wfile.write(body[part * len(body) // 4 : (part + 1) * len(body) // 4])
            self.wfile.flush()
            time.sleep(0.1)
        if fault != "slow":
            self.wfile.write(body)
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def _go_on(self) -> None:
        self.store.sent, self.close_connection = 0, True
        with suppress(OSError):
            while self.store.sent < 2**26:
                self.store.sent += self.wfile.write(bytes(2**16))

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Not to the terminal."""


@contextmanager
def faulty_store(folder: Path, bucket: str, kind: type[FaultyStore] = FaultyStore) -> Iterator[FaultyStore]:
    """A store with the files of a folder as BUCKET/set/NAME."""
    store = kind()
    try:
        store.put(
            bucket, {f"set/{path.name}": path.read_bytes() for path in folder.iterdir() if path.suffix != ".index"}
        )
        yield store
    finally:
        store.close()
